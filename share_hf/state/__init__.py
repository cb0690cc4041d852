"""A shared subspace as an immutable value: its state, its lineage, and the scores of its stream."""

from .component import component_of
from .edits import renamed_task, without_scores
from .layout import Layout, of_experts
from .lineage import Lineage, hub_originals, renamings, shared_steps, step_tags, steps_of_tasks, tasks_touched
from .phase import Phase
from .reconcile import extends, reconcile
from .refit import check_original, refitted
from .report import SubspaceReport, TaskReport, report_of
from .routing import Router, with_route
from .same_tasks import earlier_names
from .scores import (
    MIXED_SCORE,
    ContinualMetrics,
    TaskScore,
    combined_metrics,
    decimals,
    mean_score,
    measured,
    row_names,
)
from .state import (
    SubspaceState,
    TaskInfo,
    initialization_of,
    initializations_of,
    merge_tasks,
    rounded,
    sketch_of,
    with_learned_coefficients,
    without_task,
)


__all__ = [
    "MIXED_SCORE",
    "ContinualMetrics",
    "Layout",
    "Lineage",
    "Phase",
    "Router",
    "SubspaceReport",
    "SubspaceState",
    "TaskInfo",
    "TaskReport",
    "TaskScore",
    "check_original",
    "combined_metrics",
    "component_of",
    "decimals",
    "earlier_names",
    "extends",
    "hub_originals",
    "initialization_of",
    "initializations_of",
    "mean_score",
    "measured",
    "merge_tasks",
    "of_experts",
    "reconcile",
    "refitted",
    "renamed_task",
    "renamings",
    "report_of",
    "rounded",
    "row_names",
    "shared_steps",
    "sketch_of",
    "step_tags",
    "steps_of_tasks",
    "tasks_touched",
    "with_learned_coefficients",
    "with_route",
    "without_scores",
    "without_task",
]
