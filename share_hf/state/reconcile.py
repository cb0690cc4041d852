"""Joining what two writers of one subspace have learned into one subspace.

Both writers start from a shared state and change it. Their lineages show what each knows of the tasks of the other.
The result is the other's state plus those of our steps that it lacks: our new tasks are merged into it as if they had
arrived as adapters (the asynchronous setting of Sec. 3.2.3), tasks that we removed are removed, and tasks that we
renamed get their new names. If the other has trained a renamed task further meanwhile, both are kept. A task keeps the
ids of the steps that it had with its writer, who can thus recognize it after an interrupted push.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace

import torch

from ..subspace import LayerSubspace, LowRankUpdate, TaskRecords
from ..subspace.factors import product_norm
from .edits import renamed_task
from .layout import named
from .lineage import Lineage, hub_originals, renamings, shared_steps, steps_of_tasks
from .routing import with_routes_of
from .scores import combined_metrics
from .state import SubspaceState, merge_tasks, without_task


# Relative distance below which two updates are the same task that reached both writers. float32 rounding is far below.
_SAME_UPDATE = 1e-4


def extends(ours: SubspaceState, lineage: Lineage) -> bool:
    """Return whether a state has every step of another lineage."""
    return shared_steps(ours.lineage, lineage) == len(lineage)


def reconcile(ours: SubspaceState, theirs: SubspaceState) -> SubspaceState:
    """Return a subspace with the tasks of both states.

    Args:
        ours: State whose new tasks are merged into the other; not changed.
        theirs: State whose lineage the result continues; not changed.

    Raises:
        ValueError: If the states belong to different base models or have different settings, or both have a new task
            of the same name with different results.
        DriftToleranceError: If the tolerated drift cannot be met.
    """
    if extends(ours, theirs.lineage):
        return ours
    if extends(theirs, ours.lineage):
        return _named(theirs, ours)
    _check_mergeable(ours, theirs)
    added, superseded = _differences(ours, theirs)
    merged = theirs
    for new, old in renamings(ours.lineage[shared_steps(ours.lineage, theirs.lineage) :]).items():
        # The other still has the same task under the old name, so it need not be merged once more.
        if old in superseded and new in added and new not in merged.tasks:
            merged = renamed_task(merged, old, new, origins=added.pop(new))
            superseded.remove(old)
    for task in superseded:
        merged = without_task(merged, task)
    if added:
        # Use float64, because no bound would include the rounding of the factors.
        updates = {task: ours.updates_of(task, torch.float64) for task in added}
        known = hub_originals(ours.lineage)
        merged, _ = merge_tasks(
            merged,
            updates,
            {task: ours.tasks[task] for task in added},
            layouts=dict.fromkeys(added, ours.layouts),
            origins=added,
            originals={task: known[task] for task in added if task in known},
            uncut=added,  # a second tolerated error would add to the first
        )
        merged = replace(
            merged,
            layers={
                module: with_history(layer, ours.layers.get(module), added) for module, layer in merged.layers.items()
            },
        )
    merged = with_routes_of(merged, ours)
    return replace(_named(merged, ours), metrics=combined_metrics(merged.metrics, ours.metrics, merged.tasks))


def _named(state: SubspaceState, ours: SubspaceState) -> SubspaceState:
    """Return a state with our base model if it has none: publishing leaves out a path on our machine."""
    base = state.base_model_name_or_path or ours.base_model_name_or_path
    return replace(state, base_model_name_or_path=base)


def _differences(ours: SubspaceState, theirs: SubspaceState) -> tuple[dict[str, list[str]], list[str]]:
    """Return the changes to make to the other's state.

    A side that knows the last step of the other's task has seen the task, so its present state reflects what it did
    since: it kept the task, trained it further, removed it, or learned another task under the same name.

    Returns:
        The tasks to add, each with the ids of its steps, and the tasks to remove first.

    Raises:
        ValueError: If neither side knows the other's task of the same name, and the two differ.
    """
    steps, their_steps = steps_of_tasks(ours.lineage), steps_of_tasks(theirs.lineage)
    added, superseded = {}, []
    for task in theirs.tasks:
        if _knows(their_steps, steps, task) and task in ours.tasks:
            continue
        if _knows(steps, their_steps, task):
            superseded.append(task)
        elif task in ours.tasks and not _same_update(ours, theirs, task):
            raise ValueError(
                f"task {task!r} was learned by both sides, with different results: expected one of them under another "
                "name"
            )
    for task in ours.tasks:
        if task in superseded or not (task in theirs.tasks or _knows(their_steps, steps, task)):
            added[task] = steps.get(task, [])
    return added, superseded


def _knows(steps: Mapping[str, list[str]], others: Mapping[str, list[str]], task: str) -> bool:
    """Return whether the last step of a task in `others` is among its steps in `steps`."""
    return task in others and others[task][-1] in steps.get(task, ())


def _check_mergeable(ours: SubspaceState, theirs: SubspaceState) -> None:
    bases = (ours.base_model_name_or_path, theirs.base_model_name_or_path)
    if None not in bases and bases[0] != bases[1]:
        raise ValueError(f"the other subspace belongs to base model {bases[1]!r}, expected {bases[0]!r}")
    settings, others = asdict(ours.settings), asdict(theirs.settings)
    for name, value in settings.items():
        if others[name] != value:
            raise ValueError(f"the other subspace has {name} = {others[name]!r}, expected {value!r}")
    for module, layer in ours.layers.items():
        if module in theirs.layers and theirs.layers[module].shape != layer.shape:
            raise ValueError(
                f"the other subspace has {module!r} of shape {theirs.layers[module].shape}, expected {layer.shape}"
            )
        if module in theirs.layers and theirs.layouts.get(module) != ours.layouts.get(module):
            raise ValueError(
                f"the other subspace has {module!r} of kind {named(theirs.layouts.get(module))}, expected "
                f"{named(ours.layouts.get(module))}"
            )


def _same_update(ours: SubspaceState, theirs: SubspaceState, task: str) -> bool:
    updates, others = ours.updates_of(task), theirs.updates_of(task)
    return updates.keys() == others.keys() and all(
        _distance(update, others[module]) <= _SAME_UPDATE for module, update in updates.items()
    )


def _distance(first: LowRankUpdate, second: LowRankUpdate) -> float:
    """Return ``‖ΔW_1 - ΔW_2‖ / ‖ΔW_1‖`` without forming either matrix."""
    out = torch.cat([first.out_factor, second.out_factor], dim=1)
    in_ = torch.cat([first.in_factor, -second.in_factor], dim=1)
    difference, norm = product_norm(out, in_), product_norm(first.out_factor, first.in_factor)
    return float(difference / norm if norm else difference)


def with_history(layer: LayerSubspace, origin: LayerSubspace | None, tasks: Iterable[str]) -> LayerSubspace:
    """Return a layer whose records include what newly merged tasks had lost in the subspace that they come from."""
    columns = [column.clone() for column in vars(layer.records).values()]
    norms, rank_errors, bounds, estimates = columns
    for task in tasks:
        if origin is None or not layer.has(task) or not origin.has(task):
            continue
        i, j, past = layer.index(task), origin.index(task), origin.records
        if not past.norms[j]:
            continue
        shrunk = norms[i] / past.norms[j]
        bounds[i] = past.drift_bounds[j] + shrunk * bounds[i]
        estimates[i] = (past.drift_estimates[j] ** 2 + (shrunk * estimates[i]) ** 2).sqrt()
        rank_errors[i] = past.rank_errors[j]
        norms[i] = past.norms[j]
    return replace(layer, records=TaskRecords(*columns))
