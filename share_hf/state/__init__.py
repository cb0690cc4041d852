"""The immutable value that a shared subspace is: its state, its lineage, and the scores of its stream."""

from .component import component_of
from .layout import Layout
from .lineage import Lineage, shared_steps, step_tags, tasks_touched
from .phase import Phase
from .reconcile import extends, reconcile
from .report import SubspaceReport, TaskReport, report_of
from .scores import ContinualMetrics, TaskScore, combined_metrics, measured
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
    "ContinualMetrics",
    "Layout",
    "Lineage",
    "Phase",
    "SubspaceReport",
    "SubspaceState",
    "TaskInfo",
    "TaskReport",
    "TaskScore",
    "combined_metrics",
    "component_of",
    "extends",
    "initialization_of",
    "initializations_of",
    "measured",
    "merge_tasks",
    "reconcile",
    "report_of",
    "rounded",
    "shared_steps",
    "sketch_of",
    "step_tags",
    "tasks_touched",
    "with_learned_coefficients",
    "without_task",
]
