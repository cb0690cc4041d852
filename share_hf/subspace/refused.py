"""Updates that every merge refuses, found before the merge so that the others can be merged without them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from tqdm.auto import tqdm

from .factors import LowRankUpdate
from .layer import LayerSubspace
from .merge import merge_into_layer
from .settings import BasisKind, SubspaceSettings
from .threads import for_each_module, tasks_by_module


# The product of factors within these sizes has a norm in range, or is zero relative to the factors.
_USUAL_FACTOR = 1e12
# Where ‖ΔW‖ is smaller than this part of ‖B‖ ‖A‖, the rounding of stored factors may matter.
_NOTABLE_CANCELLATION = 1e-3


def refused_updates(
    updates: Mapping[str, Mapping[str, LowRankUpdate]], basis: BasisKind, *, progress: bool = False
) -> dict[str, ValueError]:
    """Return the error with which a merge refuses an update of each task that has such an update.

    An update is refused because it is not finite, its norm is out of range, or float32 cannot hold its factors. A
    merge that fails only because the scales of several tasks do not fit together is not attributed to any of them.

    Args:
        updates: Updates by task and module. They are read one module at a time.
        basis: Kind of basis, which determines whether factors are stored as they are.
        progress: Whether to show a progress bar.
    """
    by_module = tasks_by_module(updates)

    def messages_of(module: str) -> dict[str, str]:
        return dict(_messages({task: updates[task][module] for task in by_module[module]}, basis))

    refused: dict[str, ValueError] = {}
    with tqdm(total=len(by_module), desc="Checking", unit="layer", leave=False, disable=not progress) as bar:
        for module, messages in zip(by_module, for_each_module(messages_of, by_module), strict=True):
            for task, message in messages.items():
                refused.setdefault(task, ValueError(f"{module!r}: {message}"))
            bar.update()
    return refused


def _messages(updates: Mapping[str, LowRankUpdate], basis: BasisKind) -> Iterator[tuple[str, str]]:
    for task, update in updates.items():
        if _is_usual(update, basis):
            continue
        rank = max(1, update.out_factor.shape[1])
        settings = SubspaceSettings(num_components=rank, pseudo_rank=rank, basis=basis)
        layer = LayerSubspace.empty(*update.shape, rank, device=update.out_factor.device)
        try:
            merge_into_layer(layer, {task: update}, settings)
        except ValueError as error:
            yield task, str(error)


def _is_usual(update: LowRankUpdate, basis: BasisKind) -> bool:
    """Return whether a merge certainly accepts an update, judging by the sizes of its factors alone."""
    factors = update.out_factor, update.in_factor
    sizes = [float(torch.linalg.vector_norm(factor, dtype=torch.float64)) for factor in factors]
    if not all(1 / _USUAL_FACTOR < size < _USUAL_FACTOR for size in sizes):  # also False if one is not finite
        return False
    if basis == "joint":
        return True
    grams = [factor.double().T @ factor.double() for factor in factors]
    return float((grams[0] * grams[1]).sum()) > (_NOTABLE_CANCELLATION * math.prod(sizes)) ** 2
