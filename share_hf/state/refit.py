"""Rebuilding a subspace from what its tasks were learned from.

Truncation then does not accumulate, and nothing of removed tasks remains in the bases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from ..subspace import LowRankUpdate, MergeReport
from ..subspace.factors import product_norm
from .reconcile import with_history
from .state import SubspaceState, merge_tasks, rounded


# Relative difference from the norm as learned above which an adapter is a different one. Rounding is far below.
_ANOTHER_NORM = 1e-3


def check_original(state: SubspaceState, task: str, updates: Mapping[str, LowRankUpdate]) -> None:
    """Check that an adapter can be the one that a task was learned from.

    Args:
        state: State that holds the task.
        task: Name of the task.
        updates: Updates of the adapter by module.

    Raises:
        ValueError: If the adapter adapts other modules, or an update has a different shape or norm.
    """
    layers = state.layers_of(task)
    if odd := sorted(layers.keys() ^ updates.keys()):
        raise ValueError(f"task {task!r}: only one of the task and the adapter that it came from adapts {odd[0]!r}")
    for module, layer in layers.items():
        update, expected = updates[module], float(layer.records.norms[layer.index(task)])
        if update.shape != layer.shape:
            raise ValueError(f"task {task!r}: {module!r} is {update.shape} in its adapter, expected {layer.shape}")
        found = float(product_norm(update.out_factor, update.in_factor))
        if abs(found - expected) > _ANOTHER_NORM * max(found, expected):
            raise ValueError(
                f"task {task!r}: the update of {module!r} has norm {found:.6g} in its adapter, expected "
                f"{expected:.6g} as learned: it is another adapter, or the task was trained further"
            )


def refitted(
    state: SubspaceState, originals: Mapping[str, Mapping[str, LowRankUpdate]], *, progress: bool = False
) -> tuple[SubspaceState, MergeReport]:
    """Return a state with the same tasks on newly fitted bases, and the report of the merge.

    Args:
        state: State to rebuild; not changed.
        originals: Updates that tasks were learned from, by task and module. The other tasks are taken as they are
            stored, and keep their drift.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: See `merge_tasks`.
        DriftToleranceError: If the tolerated drift cannot be met.
    """
    kept = [task for task in state.tasks if task not in originals]
    updates = {
        task: originals[task] if task in originals else state.updates_of(task, torch.float64) for task in state.tasks
    }
    empty = replace(state, layers={}, tasks={}, layouts={}, lineage=())
    layouts = dict.fromkeys(state.tasks, state.layouts)
    # Tasks that are taken as stored have already lost what is tolerated.
    built, report = merge_tasks(empty, updates, state.tasks, layouts=layouts, uncut=kept, progress=progress)
    layers = {module: with_history(layer, state.layers.get(module), kept) for module, layer in built.layers.items()}
    steps = {
        "refit": list(state.tasks),
        "from_originals": len(originals),
        "max_drift": rounded(report.max_drift_bound),
    }
    return replace(built, layers=layers, lineage=state.lineage).with_step(changed=state.tasks, **steps), report
