"""Edits of the tasks of a subspace that need no computation: renaming a task, and removing the scores of tasks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..subspace import LayerSubspace
from .scores import ContinualMetrics
from .state import SubspaceState


def renamed_task(state: SubspaceState, old: str, new: str, *, origins: Sequence[str] | None = None) -> SubspaceState:
    """Return a state in which one task has another name, and everything else is unchanged to the bit.

    The step in the lineage records that `old` was removed and `new` learned, which every version of this library
    understands, and also that both are the same task.

    Args:
        state: State that holds the task; not changed.
        old: Present name of the task.
        new: New name, which no other task has.
        origins: Ids of the steps that the task had in another lineage, if the step comes from there.
    """
    layers = {module: _renamed(layer, old, new) if layer.has(old) else layer for module, layer in state.layers.items()}
    renamed = replace(
        state,
        layers=layers,
        tasks={new if task == old else task: info for task, info in state.tasks.items()},
        default_task=new if state.default_task == old else state.default_task,
        metrics=_metrics_renamed(state.metrics, old, new),
    )
    facts: dict[str, Any] = {"learned": new, "removed": old, "renamed": [old, new]}
    if origins:
        facts["origins"] = {new: list(origins)}
    return renamed.with_step(changed=[new], **facts)


def without_scores(metrics: Mapping[str, Any], tasks: Collection[str]) -> Mapping[str, Any]:
    """Return the metrics of a stream without the scores and drifts of some tasks."""
    if not metrics.get("matrix") or not set(metrics.get("tasks", ())) & set(tasks):
        return metrics
    found = ContinualMetrics.from_dict(metrics)
    rest = found.joined_by(found, [task for task in found.tasks if task not in tasks])
    drift = {task: value for task, value in rest.drift.items() if task not in tasks}
    kept = {name: value for name, value in metrics.items() if name not in ("row_sizes", "score_names")}
    return {**kept, **replace(rest, drift=drift).as_dict()}


def _renamed(layer: LayerSubspace, old: str, new: str) -> LayerSubspace:
    return replace(layer, tasks=tuple(new if task == old else task for task in layer.tasks))


def _metrics_renamed(metrics: Mapping[str, Any], old: str, new: str) -> Mapping[str, Any]:
    """Return the metrics of a stream under the new name, without leftover scores of an earlier task of that name."""
    metrics = without_scores(metrics, [new])
    renamed = dict(metrics)
    if isinstance(tasks := metrics.get("tasks"), list):
        renamed["tasks"] = [new if task == old else task for task in tasks]
    for name in ("drift", "score_names"):
        if isinstance(by_task := metrics.get(name), Mapping):
            renamed[name] = {new if task == old else task: value for task, value in by_task.items()}
    return renamed
