"""The stack of all updates of a layer in the coordinates of one merge.

All old updates lie in the span of the basis and the new ones in that of their factors, so the orthonormal coordinates
of `coordinates` hold everything that a merge of a few updates does, and the leading part of a merge of many. Nothing
in here has a size of n or d. The tasks appear only in products over their stacked factors, taken a chunk at a time so
that what a chunk needs stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


TASKS_PER_CHUNK = 256


@dataclass(frozen=True)
class UpdateStack:
    """Old and new updates of one layer, in orthonormal coordinates (q_out of them outside, q_in inside).

    An old update is ``rotation_out ε_out,i (rotation_in ε_in,i)^T``; a new one is ``X_j Y_j^T`` and what of it lies
    outside the coordinates. Everything is float64 but the old coefficients, which stay as stored.

    Args:
        rotation_out: (q_out, k_out), the old basis in these coordinates. Likewise `rotation_in` (q_in, k_in).
        old_out: (tasks, p, k_out), coefficients of the old tasks, transposed.
        old_in: (tasks, p, k_in).
        new_out: (new tasks, r, q_out), factors X of the new updates, transposed; zeros fill up smaller ranks.
        new_in: (new tasks, r, q_in), factors Y.
        new_ranks: (new tasks,) int64, how many rows of its factors a new update has.
        old_weights: (tasks,), w_i of the old tasks.
        new_weights: (new tasks,).
        outside: (new tasks,), norm of the part of each new update that the coordinates do not hold.
    """

    rotation_out: Tensor
    rotation_in: Tensor
    old_out: Tensor
    old_in: Tensor
    new_out: Tensor
    new_in: Tensor
    new_ranks: Tensor
    old_weights: Tensor
    new_weights: Tensor
    outside: Tensor

    @cached_property
    def mirrored(self) -> UpdateStack:
        """The stack of the transposed updates, for the computations of the input side."""
        return UpdateStack(
            rotation_out=self.rotation_in,
            rotation_in=self.rotation_out,
            old_out=self.old_in,
            old_in=self.old_out,
            new_out=self.new_in,
            new_in=self.new_out,
            new_ranks=self.new_ranks,
            old_weights=self.old_weights,
            new_weights=self.new_weights,
            outside=self.outside,
        )

    @cached_property
    def energy_outside(self) -> float:
        """``Σ w_j² ‖·‖²`` of what the coordinates do not hold."""
        return float((self.outside * self.new_weights).square().sum())

    def old_chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Positions and coefficients (chunk, p, k) of the old tasks, a cacheful at a time."""
        return _chunks(self.old_out, self.old_in)

    def new_chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Positions and factors (chunk, r, q) of the new tasks, a cacheful at a time."""
        return _chunks(self.new_out, self.new_in)

    def factor_columns(self) -> Tensor:
        """The paper's stack ``[β ε_1 … β ε_T, N]`` (q_out, columns): factors as they are, unweighted (Sec. 3.2.1)."""
        places = torch.arange(self.new_out.shape[1], device=self.new_ranks.device)
        given = places < self.new_ranks.unsqueeze(1)
        old = self.rotation_out @ self.old_out.double().flatten(0, 1).T
        return torch.cat([old, self.new_out[given].T], dim=1)

    def second_moment_along(self, directions: Tensor) -> Tensor:
        """``V^T (Σ w_i² ΔW_i ΔW_i^T) V`` (j, j) along directions V (q_out, j), from the factors there.

        Its small eigenvalues are exact where those of `second_moment` are rounding error of the largest.
        """
        reduction = self.rotation_out.T @ directions
        old = ((span, old_out.double() @ reduction, old_in) for span, old_out, old_in in self.old_chunks())
        new = ((span, new_out @ directions, new_in) for span, new_out, new_in in self.new_chunks())
        size = directions.shape[1]
        return _moment(size, old, self.old_weights) + _moment(size, new, self.new_weights)

    def second_moment(self) -> Tensor:
        """``Σ w_i² ΔW_i ΔW_i^T`` (q_out, q_out)."""
        moment = _moment(self.rotation_out.shape[1], self.old_chunks(), self.old_weights)
        return self.rotation_out @ moment @ self.rotation_out.T + self._new_moment

    def second_moment_within(self, moment: Tensor, kept: Tensor, discarded: Tensor) -> Tensor:
        """``Σ w_i² ΔW_i Π ΔW_i^T`` (q_out, q_out), with Π the projection on some directions of the inputs.

        The old tasks are summed over the kept directions or taken off `moment` over the discarded ones, whichever are
        fewer: a merge discards no more than it adds.

        Args:
            moment: `second_moment()`.
            kept: (q_in, j), orthonormal.
            discarded: (q_in, q_in - j), the rest of the space.
        """
        seen = ((span, new_out, new_in @ kept) for span, new_out, new_in in self.new_chunks())
        of_new = _moment(self.new_out.shape[2], seen, self.new_weights)
        if kept.shape[1] <= discarded.shape[1]:
            return self._old_moment_through(kept) + of_new
        return moment - self._new_moment - self._old_moment_through(discarded) + of_new

    def _old_moment_through(self, directions_in: Tensor) -> Tensor:
        """``Σ w_i² ΔW_i D D^T ΔW_i^T`` of the old tasks, with products in the dtype the coefficients are stored in."""
        dtype = self.old_out.dtype
        reduction = (self.rotation_in.T @ directions_in).to(dtype)
        # The weight of a very quiet task is no float32 number, unlike its root.
        roots = self.old_weights.sqrt().to(dtype)[:, None, None]
        moment = self.rotation_out.new_zeros(self.rotation_out.shape[1], self.rotation_out.shape[1])
        for span, old_out, old_in in self.old_chunks():
            seen = (old_in @ reduction) * roots[span] * roots[span]
            images = (seen.mT @ old_out).flatten(0, 1)
            moment += images.T @ images
        return self.rotation_out @ moment @ self.rotation_out.T

    @cached_property
    def _new_moment(self) -> Tensor:
        return _moment(self.new_out.shape[2], self.new_chunks(), self.new_weights)


def _chunks(factors_out: Tensor, factors_in: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    for start in range(0, len(factors_out), TASKS_PER_CHUNK):
        span = slice(start, start + TASKS_PER_CHUNK)
        yield span, factors_out[span], factors_in[span]


def _moment(size: int, chunks: Iterable[tuple[slice, Tensor, Tensor]], weights: Tensor) -> Tensor:
    """``Σ w_i² X_i Y_i^T Y_i X_i^T`` (size, size) float64, of chunks of X^T (chunk, r, size) and Y^T (chunk, r, j)."""
    moment = weights.new_zeros(size, size)
    for span, factors_out, factors_in in chunks:
        out, in_ = factors_out.double(), factors_in.double()
        gram = (in_ @ in_.mT) * weights[span, None, None].square()
        moment += out.flatten(0, 1).T @ (gram @ out).flatten(0, 1)
    return moment
