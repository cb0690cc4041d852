"""The stack of all updates of a layer in the coordinates of one merge.

All old updates lie in the span of the basis and the new ones in that of their factors, so one QR of ``[β N]`` (and one
of ``[α M]``) gives at most k + m coordinates in which everything a merge does is exact. Nothing in here has a size of
n or d. The tasks appear only in products over their stacked coefficients, taken a chunk at a time so that what a chunk
needs stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


TASKS_PER_CHUNK = 256


@dataclass(frozen=True)
class UpdateStack:
    """Old and new updates of one layer, in orthonormal coordinates (q_out of them outside, q_in inside).

    An old update is ``rotation_out ε_out,i (rotation_in ε_in,i)^T``; a new one is ``X_j Y_j^T`` with X_j, Y_j the
    columns of `new_out`, `new_in` that `new_owner` gives to it. Everything is float64 but the old coefficients, which
    stay as stored.

    Args:
        rotation_out: (q_out, k_out), the old basis in these coordinates. Likewise `rotation_in` (q_in, k_in).
        old_out: (tasks, p, k_out), coefficients of the old tasks, transposed.
        old_in: (tasks, p, k_in).
        new_out: (q_out, m), columns of all new updates. Likewise `new_in` (q_in, m).
        new_owner: (m,) int64, which new update a column belongs to.
        old_weights: (tasks,), w_i of the old tasks.
        new_weights: (new tasks,).
    """

    rotation_out: Tensor
    rotation_in: Tensor
    old_out: Tensor
    old_in: Tensor
    new_out: Tensor
    new_in: Tensor
    new_owner: Tensor
    old_weights: Tensor
    new_weights: Tensor

    @property
    def mirrored(self) -> UpdateStack:
        """The stack of the transposed updates, for the computations of the input side."""
        return UpdateStack(
            rotation_out=self.rotation_in,
            rotation_in=self.rotation_out,
            old_out=self.old_in,
            old_in=self.old_out,
            new_out=self.new_in,
            new_in=self.new_out,
            new_owner=self.new_owner,
            old_weights=self.old_weights,
            new_weights=self.new_weights,
        )

    def new_update(self, j: int) -> tuple[Tensor, Tensor]:
        """Factors X_j (q_out, r) and Y_j (q_in, r) of the j-th new update."""
        columns = self.new_owner == j
        return self.new_out[:, columns], self.new_in[:, columns]

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Positions and coefficients (chunk, p, k) of the old tasks, a cacheful at a time."""
        for start in range(0, len(self.old_out), TASKS_PER_CHUNK):
            span = slice(start, start + TASKS_PER_CHUNK)
            yield span, self.old_out[span], self.old_in[span]

    def factor_columns(self) -> Tensor:
        """The paper's stack ``[β ε_1 … β ε_T, N]`` (q_out, columns): factors as they are, unweighted (Sec. 3.2.1)."""
        return torch.cat([self.rotation_out @ self.old_out.double().flatten(0, 1).T, self.new_out], dim=1)

    def second_moment_along(self, directions: Tensor) -> Tensor:
        """``V^T (Σ w_i² ΔW_i ΔW_i^T) V`` (j, j) along directions V (q_out, j), from the factors there.

        Its small eigenvalues are exact where those of `second_moment` are rounding error of the largest.
        """
        reduction = self.rotation_out.T @ directions
        moment = directions.new_zeros(directions.shape[1], directions.shape[1])
        for span, chunk_out, chunk_in in self.chunks():
            old_out, old_in = chunk_out.double() @ reduction, chunk_in.double()
            gram = (old_in @ old_in.mT) * self.old_weights[span, None, None].square()
            moment += old_out.flatten(0, 1).T @ (gram @ old_out).flatten(0, 1)
        return moment + self._weighted(directions.T @ self.new_out, self.new_in)

    def second_moment(self) -> Tensor:
        """``Σ w_i² ΔW_i ΔW_i^T`` (q_out, q_out)."""
        moment = self.rotation_out.new_zeros(self.rotation_out.shape[1], self.rotation_out.shape[1])
        for span, chunk_out, chunk_in in self.chunks():
            old_out, old_in = chunk_out.double(), chunk_in.double()
            gram = (old_in @ old_in.mT) * self.old_weights[span, None, None].square()
            moment += old_out.flatten(0, 1).T @ (gram @ old_out).flatten(0, 1)
        return self.rotation_out @ moment @ self.rotation_out.T + self._new_moment(self.new_in)

    def second_moment_within(self, moment: Tensor, kept: Tensor, discarded: Tensor) -> Tensor:
        """``Σ w_i² ΔW_i Π ΔW_i^T`` (q_out, q_out), with Π the projection on some directions of the inputs.

        The old tasks are summed over the kept directions or taken off `moment` over the discarded ones, whichever are
        fewer: a merge discards no more than it adds.

        Args:
            moment: `second_moment()`.
            kept: (q_in, j), orthonormal.
            discarded: (q_in, q_in - j), the rest of the space.
        """
        of_new = self._new_moment(kept.T @ self.new_in)
        if kept.shape[1] <= discarded.shape[1]:
            return self._old_moment_through(kept) + of_new
        return moment - self._new_moment(self.new_in) - self._old_moment_through(discarded) + of_new

    def _old_moment_through(self, directions_in: Tensor) -> Tensor:
        """``Σ w_i² ΔW_i D D^T ΔW_i^T`` of the old tasks, with products in the dtype the coefficients are stored in."""
        dtype = self.old_out.dtype
        reduction = (self.rotation_in.T @ directions_in).to(dtype)
        # The weight of a very quiet task is no float32 number, unlike its root.
        roots = self.old_weights.sqrt().to(dtype)[:, None, None]
        moment = self.rotation_out.new_zeros(self.rotation_out.shape[1], self.rotation_out.shape[1])
        for span, old_out, old_in in self.chunks():
            seen = (old_in @ reduction) * roots[span] * roots[span]
            images = (seen.mT @ old_out).flatten(0, 1)
            moment += images.T @ images
        return self.rotation_out @ moment @ self.rotation_out.T

    def _new_moment(self, seen_in: Tensor) -> Tensor:
        return self._weighted(self.new_out, seen_in)

    def _weighted(self, seen_out: Tensor, seen_in: Tensor) -> Tensor:
        """``Σ w_j² X_j Y_j^T Y_j X_j^T`` of the new updates, with X and Y (any, m) in some coordinates."""
        same_update = self.new_owner[:, None] == self.new_owner[None, :]
        weights = self.new_weights.square()[self.new_owner]
        return seen_out @ ((seen_in.T @ seen_in) * same_update * weights[:, None]) @ seen_out.T
