"""The stack of all updates of a layer in the coordinates of one merge.

Old updates lie in the span of the basis and new ones in the span of their factors. The orthonormal coordinates from
`coordinates` therefore hold everything in a merge of a few updates, and the leading part in a merge of many. No
dimension here is n or d. The tasks appear only in products over their stacked factors, which are computed in chunks so
that the data of a chunk stays in the processor's cache.
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
    """Old and new updates of one layer in orthonormal coordinates (q_out for the outputs, q_in for the inputs).

    An old update is ``rotation_out ε_out,i (rotation_in ε_in,i)^T``; a new one is ``X_j Y_j^T`` plus its part outside
    the coordinates. Everything is float64 except the old coefficients, which stay as stored.

    Args:
        rotation_out: (q_out, k_out), old output basis in these coordinates.
        rotation_in: (q_in, k_in), old input basis in these coordinates.
        old_out: (tasks, p, k_out), output coefficients of the old tasks, transposed.
        old_in: (tasks, p, k_in), input coefficients of the old tasks, transposed.
        new_out: (new tasks, r, q_out), factors X of the new updates, transposed, and padded with zeros where the rank
            is smaller.
        new_in: (new tasks, r, q_in), factors Y, in the same layout.
        new_ranks: (new tasks,) int64, number of rows of the factors of each new update that are not padding.
        old_weights: (tasks,), weights w_i of the old tasks.
        new_weights: (new tasks,), weights w_j of the new tasks.
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
        """Stack of the transposed updates, for the computations of the input side."""
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
        """Weighted energy ``Σ w_j² ‖·‖²`` that the coordinates do not hold."""
        return float((self.outside * self.new_weights).square().sum())

    def old_chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Iterate over positions and coefficients (chunk, p, k) of the old tasks, in chunks that fit the cache."""
        return _chunks(self.old_out, self.old_in)

    def new_chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Iterate over positions and factors (chunk, r, q) of the new tasks, in chunks that fit the cache."""
        return _chunks(self.new_out, self.new_in)

    def factor_columns(self) -> Tensor:
        """Return the paper's stack ``[β ε_1 … β ε_T, N]`` (q_out, columns) of unweighted factors (Sec. 3.2.1)."""
        places = torch.arange(self.new_out.shape[1], device=self.new_ranks.device)
        given = places < self.new_ranks.unsqueeze(1)
        old = self.rotation_out @ self.old_out.double().flatten(0, 1).T
        return torch.cat([old, self.new_out[given].T], dim=1)

    def second_moment_along(self, directions: Tensor) -> Tensor:
        """Return ``V^T (Σ w_i² ΔW_i ΔW_i^T) V`` (j, j) along directions V (q_out, j), from the factors along them.

        Its small eigenvalues are accurate, while in `second_moment` they drown in the rounding error of the largest.
        """
        reduction = self.rotation_out.T @ directions
        old = ((span, old_out.double() @ reduction, old_in) for span, old_out, old_in in self.old_chunks())
        new = ((span, new_out @ directions, new_in) for span, new_out, new_in in self.new_chunks())
        size = directions.shape[1]
        return _moment(size, old, self.old_weights) + _moment(size, new, self.new_weights)

    def second_moment(self) -> Tensor:
        """Return ``Σ w_i² ΔW_i ΔW_i^T`` (q_out, q_out)."""
        moment = _moment(self.rotation_out.shape[1], self.old_chunks(), self.old_weights)
        return self.rotation_out @ moment @ self.rotation_out.T + self._new_moment

    def second_moment_within(self, moment: Tensor, kept: Tensor, discarded: Tensor) -> Tensor:
        """Return ``Σ w_i² ΔW_i Π ΔW_i^T`` (q_out, q_out), with Π the projection on some directions of the inputs.

        The old tasks are either summed over the kept directions, or subtracted from `moment` over the discarded ones,
        whichever are fewer: a merge discards no more directions than it adds.

        Args:
            moment: Result of `second_moment()`.
            kept: (q_in, j), orthonormal directions to project on.
            discarded: (q_in, q_in - j), orthonormal directions of the rest of the space.
        """
        seen = ((span, new_out, new_in @ kept) for span, new_out, new_in in self.new_chunks())
        of_new = _moment(self.new_out.shape[2], seen, self.new_weights)
        if kept.shape[1] <= discarded.shape[1]:
            return self._old_moment_through(kept) + of_new
        return moment - self._new_moment - self._old_moment_through(discarded) + of_new

    def _old_moment_through(self, directions_in: Tensor) -> Tensor:
        """Return ``Σ w_i² ΔW_i D D^T ΔW_i^T`` over the old tasks, with products in the dtype of their coefficients."""
        dtype = self.old_out.dtype
        reduction = (self.rotation_in.T @ directions_in).to(dtype)
        # float32 cannot hold the weight of a task with a very small update, but it can hold the root of the weight.
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
    """Sum ``w_i² X_i Y_i^T Y_i X_i^T`` (size, size), float64, for chunks X^T (chunk, r, size), Y^T (chunk, r, j)."""
    moment = weights.new_zeros(size, size)
    for span, factors_out, factors_in in chunks:
        out, in_ = factors_out.double(), factors_in.double()
        gram = (in_ @ in_.mT) * weights[span, None, None].square()
        moment += out.flatten(0, 1).T @ (gram @ out).flatten(0, 1)
    return moment
