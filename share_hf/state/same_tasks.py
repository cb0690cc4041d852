"""Search for new tasks that already exist under another name, by the norms of their updates and then by stored values.

The norms as learned, layer by layer, are a fingerprint that truncation and merges do not change. If two tasks came
from the same adapter, their stored updates are no further apart than the certificates of both allow.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from hashlib import sha256

import torch
from torch import Tensor

from ..subspace import LayerSubspace
from ..subspace.factors import product_norm
from ..subspace.likeness import SAME
from .state import SubspaceState


_MOST_COMPARED = 8  # copies of one adapter have the same key, so the nearest tasks are enough


def earlier_names(state: SubspaceState, new: Sequence[str]) -> dict[str, str]:
    """Return the earlier task that has the same updates up to rounding, and the same head, for each new task with one.

    Every new task is compared with only a few tasks whose norms are the nearest, however many tasks there are.

    Args:
        state: State that holds all tasks.
        new: Names of the tasks that were added last.
    """
    earlier = [task for task in state.tasks if task not in set(new)]
    if not earlier:
        return {}
    keys = _keys(state.layers)
    earlier = sorted((task for task in earlier if keys.get(task)), key=keys.__getitem__)
    sizes = [keys[task] for task in earlier]
    found = {}
    for task in new:
        if not (key := keys.get(task, 0.0)):
            continue  # zeros identify no task
        near = earlier[bisect_left(sizes, key * (1 - SAME)) : bisect_right(sizes, key * (1 + SAME))]
        near = sorted(near, key=lambda other: abs(keys[other] - key))[:_MOST_COMPARED]
        if (same := next((other for other in near if _same(state, task, other)), None)) is not None:
            found[task] = same
    return found


def _keys(layers: Mapping[str, LayerSubspace]) -> dict[str, float]:
    """Return a number for each task: the sum of its norms with a different weight for each layer.

    The weights give different numbers to tasks that were scaled to the same size.
    """
    sums: dict[tuple[str, ...], Tensor] = {}  # most layers have the same tasks
    for module, layer in layers.items():
        weight = 0.5 + int.from_bytes(sha256(module.encode()).digest()[:4], "big") / 2**32
        sums[layer.tasks] = sums.get(layer.tasks, 0.0) + weight * layer.records.norms
    keys: dict[str, float] = {}
    for tasks, norms in sums.items():
        for task, norm in zip(tasks, norms.tolist(), strict=True):
            keys[task] = keys.get(task, 0.0) + norm
    return keys


def _same(state: SubspaceState, task: str, other: str) -> bool:
    layers = [layer for layer in state.layers.values() if layer.has(task) or layer.has(other)]
    if not all(layer.has(task) and layer.has(other) and _same_norm(layer, task, other) for layer in layers):
        return False
    if not _same_head(state.tasks[task].head, state.tasks[other].head):
        return False
    return all(_distance(layer, task, other) <= _allowed(layer, task, other) for layer in layers)


def _same_norm(layer: LayerSubspace, task: str, other: str) -> bool:
    ours, theirs = (float(layer.records.norms[layer.index(name)]) for name in (task, other))
    return abs(ours - theirs) <= SAME * max(ours, theirs)


def _distance(layer: LayerSubspace, task: str, other: str) -> float:
    """Return ``‖ΔW_1 - ΔW_2‖`` of two stored tasks."""
    (out, in_), (other_out, other_in) = layer.coefficients_of(task), layer.coefficients_of(other)
    return float(product_norm(torch.cat([out, other_out], 1), torch.cat([in_, -other_in], 1)))


def _allowed(layer: LayerSubspace, task: str, other: str) -> float:
    """Return the largest possible distance between two stored tasks that were learned from the same update."""
    records, (i, j) = layer.records, (layer.index(task), layer.index(other))
    relative = records.drift_bounds[i] + records.drift_bounds[j] + 2 * SAME
    return float(relative * torch.maximum(records.norms[i], records.norms[j]))


def _same_head(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    if ours.keys() != theirs.keys() or any(ours[name].shape != theirs[name].shape for name in ours):
        return False
    return all(
        float((weight.double() - theirs[name].double()).norm()) <= SAME * float(weight.double().norm())
        for name, weight in ours.items()
    )
