"""The updates of one layer as one stack of factors with their norms, which a merge of many updates starts from."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .factors import LowRankUpdate, check_norm, thin_svd_of_update
from .layer import LayerSubspace


# Beyond these sizes float64 cannot represent the square of a square.
_LARGEST_USUAL_FACTOR = 1e60
# Within these sizes float32 can represent the products of factors with weights and with each other.
_LARGEST_SINGLE_FACTOR = 1e12
# Where ‖ΔW‖ is smaller than this part of ‖B‖ ‖A‖, columns cancel each other, and a product of Gram matrices would have
# fewer than half of its digits right.
_NOTABLE_CANCELLATION = 1e-3

TASKS_PER_CHUNK = 16  # at rank 16 and 1024 features, this many in float64 fit the cache of a processor


@dataclass(frozen=True)
class UpdateBatch:
    """Updates ``ΔW_j = X_j Y_j^T`` of one layer, exactly as they are.

    Args:
        out: (updates, r, n), factors X, transposed, and padded with zeros where the rank is smaller. They are float64,
            or float32 where that represents each of them exactly and does not overflow in their products.
        in_: (updates, r, d), factors Y, in the same layout and dtype.
        ranks: (updates,) int64, ranks before padding.
        norms: (updates,) float64, ``‖ΔW_j‖``; 0 for an update that is zero relative to its own factors.
        noise: (updates,) float64, bound on how much rounding and the cut to numerical rank changed each update.
    """

    out: Tensor
    in_: Tensor
    ranks: Tensor
    norms: Tensor
    noise: Tensor

    @property
    def given(self) -> Tensor:
        """Mask (updates, r) bool of the rows of the factors that are not padding."""
        places = torch.arange(self.out.shape[1], device=self.ranks.device)
        return places < self.ranks.unsqueeze(1)


@dataclass(frozen=True)
class LargeBatch(UpdateBatch):
    """Updates of one layer that are too many to be decomposed one by one.

    Args:
        grams: ``X_j^T X_j`` and ``Y_j^T Y_j``, (updates, r, r) float64 each.
    """

    grams: tuple[Tensor, Tensor]


def batch_of_few(layer: LayerSubspace, updates: Mapping[str, LowRankUpdate], *, as_they_are: bool) -> UpdateBatch:
    """Stack updates that are cut to their numerical rank, each through its compact SVD.

    Args:
        layer: Layer that the updates belong to.
        updates: Updates by task.
        as_they_are: Whether to keep the factors that the updates came with, instead of balanced ones.

    Raises:
        ValueError: If an update is not finite or its norm is out of range. The error names the task.
    """
    factors, norms, noise = [], [], []
    for task, update in updates.items():
        balanced, norm, error = _balanced(task, update)
        factors.append(update if as_they_are and norm > 0 else balanced)
        norms.append(norm)
        noise.append(error)
    numbers = [torch.stack(values) if values else layer.records.norms[:0] for values in (norms, noise)]
    return UpdateBatch(*_stacked(layer, factors, torch.float64, Scratch()), *numbers)


class Scratch(threading.local):
    """Memory for the stacks of one layer after another, separate for each thread.

    A stack takes tens of megabytes, and the system needs longer to hand out its pages than a merge needs to fill it.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def empty(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a tensor of undefined content, which the next tensor of the same name overwrites."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.dtype != dtype or held.device != device or len(held) < size:
            self._held[name] = held = torch.empty(size, dtype=dtype, device=device)
        return held[:size].view(*shape)


def batch_of_many(
    layer: LayerSubspace, updates: Mapping[str, LowRankUpdate], scratch: Scratch, *, as_they_are: bool
) -> LargeBatch:
    """Stack updates with the factors that they came with and norms from Gram matrices, without decomposing each.

    An update whose columns cancel each other, or that is zero or not finite, is treated as in `batch_of_few`.

    Args:
        layer: Layer that the updates belong to.
        updates: Updates by task.
        scratch: Memory that holds the stacks.
        as_they_are: Same as in `batch_of_few`.

    Raises:
        ValueError: See `batch_of_few`.
    """
    given = {factor.dtype for update in updates.values() for factor in (update.out_factor, update.in_factor)}
    dtype = torch.float64 if torch.float64 in given else torch.float32
    out, in_, ranks = _stacked(layer, list(updates.values()), dtype, scratch)
    grams = _grams(out), _grams(in_)
    squared = (grams[0] * grams[1]).sum((1, 2))
    sizes = torch.stack([gram.diagonal(dim1=1, dim2=2).sum(1).sqrt() for gram in grams])
    bounds = sizes[0] * sizes[1]
    norms = squared.clamp_min(0).sqrt()
    usual = _all_within(sizes, _LARGEST_USUAL_FACTOR) & (norms > _NOTABLE_CANCELLATION * bounds)
    noise = max(out.shape[2], in_.shape[2]) * torch.finfo(torch.float64).eps * bounds * ranks.sqrt()
    balanced = {}
    for j, (task, update) in enumerate(updates.items()):
        if usual[j]:
            check_norm(norms[j], task)
        else:
            balanced[j], norms[j], noise[j] = _balanced(task, update)
    single = _all_within(sizes, _LARGEST_SINGLE_FACTOR) | (norms == 0)
    if not single.all() or (norms[list(balanced)] > 0).any():
        out, in_ = out.double(), in_.double()
    for j, update in balanced.items():
        if not (as_they_are and norms[j] > 0):
            _fill(out[j], in_[j], update)
            ranks[j] = update.out_factor.shape[1]
            for gram, rows in zip(grams, (out, in_), strict=True):
                gram[j] = _grams(rows[j : j + 1])[0]
    return LargeBatch(out, in_, ranks, norms, noise, grams)


def _all_within(sizes: Tensor, largest: float) -> Tensor:
    """Return which updates have factors whose sizes (2, updates), and the inverses of these, are below a limit."""
    return ((sizes > 1 / largest) & (sizes < largest)).all(0)


def _balanced(task: str, update: LowRankUpdate) -> tuple[LowRankUpdate, Tensor, Tensor]:
    """Return balanced factors of numerical rank, ``‖ΔW‖``, and a bound on what was lost (0-d each)."""
    try:
        compact = thin_svd_of_update(update)
    except ValueError as error:
        raise ValueError(f"task {task!r}: {error}") from error
    if len(compact.singular_values):
        check_norm(compact.norm, task)
    return compact.balanced_factors(), compact.norm, compact.noise


def _stacked(
    layer: LayerSubspace, updates: Sequence[LowRankUpdate], dtype: torch.dtype, scratch: Scratch
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factors (updates, r, n) and (updates, r, d), transposed, and the ranks (updates,)."""
    ranks = [update.out_factor.shape[1] for update in updates]
    sides = (
        (layer.basis_out, [update.out_factor for update in updates]),
        (
            layer.basis_in,
            [update.in_factor for update in updates],
        ),
    )
    stacks = []
    for name, (basis, factors) in zip(("out", "in"), sides, strict=True):
        stack = scratch.empty(name, (len(updates), max(ranks, default=0), len(basis)), dtype, basis.device)
        if factors:
            torch.stack([_row_of(factor, stack) for factor in factors], out=stack)
        stacks.append(stack)
    return *stacks, torch.tensor(ranks, dtype=torch.long, device=layer.basis_out.device)


def _row_of(factor: Tensor, stack: Tensor) -> Tensor:
    """Return a factor as an entry of a stack (updates, r, n), padded with zeros."""
    missing = stack.shape[1] - factor.shape[1]
    row = factor.T.to(stack)
    return torch.nn.functional.pad(row, (0, 0, 0, missing)) if missing else row


def _fill(out: Tensor, in_: Tensor, update: LowRankUpdate) -> None:
    """Write the factors of an update into their rows, (r, n) and (r, d), and pad them with zeros."""
    for rows, factor in ((out, update.out_factor), (in_, update.in_factor)):
        rows[: factor.shape[1]] = factor.T
        if factor.shape[1] < len(rows):
            rows[factor.shape[1] :] = 0


def in_chunks(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield positions and factors (chunk, r, n) float64 of a few updates at a time, in memory that is reused."""
    buffer = rows.new_empty(min(TASKS_PER_CHUNK, len(rows)), *rows.shape[1:], dtype=torch.float64)
    for start in range(0, len(rows), TASKS_PER_CHUNK):
        part = rows[start : start + TASKS_PER_CHUNK]
        yield slice(start, start + len(part)), buffer[: len(part)].copy_(part)


def _grams(rows: Tensor) -> Tensor:
    """Return ``X^T X`` (updates, r, r) float64 for factors (updates, r, n)."""
    grams = rows.new_empty(len(rows), rows.shape[1], rows.shape[1], dtype=torch.float64)
    for span, part in in_chunks(rows):
        torch.matmul(part, part.mT, out=grams[span])
    return grams
