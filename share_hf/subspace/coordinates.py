"""Orthonormal coordinates in which a merge computes: all that old and new updates span, or the leading part of it.

All old updates lie in the span of the basis. Beside a few new ones, one QR of ``[β N]`` a side holds everything, and a
merge is exact. Many new ones, as of a build from a folder of adapters, span more than can be decomposed; a merge of
them takes the leading directions, `OVERSAMPLING` more than it may keep, and knows exactly what of each update lies
outside of them. So its certificate is as rigorous, and its basis explains nearly what the best one does: in the tests,
the error of the updates is within 1 % of it. They are found by block power iteration (Halko, Martinsson & Tropp 2011,
Sec. 4.5) through the thin factors, never from a matrix as large as the layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import UpdateBatch
from .layer import LayerSubspace
from .stack import UpdateStack


# Up to so many columns of new factors, the coordinates hold everything. Beyond, that costs more than finding them.
EXACT_COLUMNS = 256

OVERSAMPLING = 16
_ROUNDS = 2
_TASKS_PER_CHUNK = 32

# A layer's coordinates, (n, q_out) and (d, q_in).
Coordinates = tuple[Tensor, Tensor]


def exact_coordinates(layer: LayerSubspace, batch: UpdateBatch, weights: Tensor) -> tuple[Coordinates, UpdateStack]:
    """Coordinates of all updates: one QR a side, of the basis beside the new factors.

    No orthogonality is assumed, so a rank-deficient block, or more columns than rows, needs no special case.

    Args:
        layer: As it is.
        batch: The new updates.
        weights: (tasks + new tasks,), of all updates.
    """
    sides, factors = [], []
    for basis, rows in ((layer.basis_out, batch.out), (layer.basis_in, batch.in_)):
        coordinates, triangle = torch.linalg.qr(torch.cat([basis.double(), rows[batch.given].T], dim=1))
        placed = rows.new_zeros(*rows.shape[:2], len(triangle))
        placed[batch.given] = triangle[:, basis.shape[1] :].T
        sides.append((coordinates, triangle[:, : basis.shape[1]]))
        factors.append(placed)
    return _stack(layer, batch, weights, sides, factors, torch.zeros_like(batch.norms))


def found_coordinates(
    layer: LayerSubspace, batch: UpdateBatch, weights: Tensor, room: int, *, joint: bool
) -> tuple[Coordinates, UpdateStack]:
    """The basis and `room` leading directions a side of what the new updates have beside it.

    Args:
        layer: As it is.
        batch: The new updates.
        weights: (tasks + new tasks,), of all updates.
        room: How many directions to find.
        joint: Whether they are to be the best for the updates, or for the columns of the factors.
    """
    find = _joint_directions if joint else _factor_directions
    sides = [
        _orthonormal(basis, directions)
        for basis, directions in zip(
            (layer.basis_out, layer.basis_in), find(layer, batch, weights[len(layer.tasks) :], room), strict=True
        )
    ]
    seen = [rows @ coordinates for rows, (coordinates, _) in zip((batch.out, batch.in_), sides, strict=True)]
    outside = _outside(batch, sides[0][0], sides[1][0], *seen)
    return _stack(layer, batch, weights, sides, seen, outside)


def _stack(
    layer: LayerSubspace,
    batch: UpdateBatch,
    weights: Tensor,
    sides: list[tuple[Tensor, Tensor]],
    factors: list[Tensor],
    outside: Tensor,
) -> tuple[Coordinates, UpdateStack]:
    (coordinates_out, rotation_out), (coordinates_in, rotation_in) = sides
    stack = UpdateStack(
        rotation_out=rotation_out,
        rotation_in=rotation_in,
        # Transposed in memory too, as the products over all tasks run along the rows.
        old_out=layer.coefficients_out.mT.contiguous(),
        old_in=layer.coefficients_in.mT.contiguous(),
        new_out=factors[0],
        new_in=factors[1],
        new_ranks=batch.ranks,
        old_weights=weights[: len(layer.tasks)],
        new_weights=weights[len(layer.tasks) :],
        outside=outside,
    )
    return (coordinates_out, coordinates_in), stack


def _orthonormal(basis: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Float64 coordinates (n, q) whose first ones span the basis (n, k), and the basis in them (q, k)."""
    coordinates, triangle = torch.linalg.qr(torch.cat([basis, directions], dim=1).double())
    return coordinates, triangle[:, : basis.shape[1]]


def _joint_directions(layer: LayerSubspace, batch: UpdateBatch, weights: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Leading directions (n, room), (d, room) float32 of weighted updates, alternating between both sides."""
    # Each side of a size that float32 squares and sums well: the inner one of norm 1, the outer one has the rest.
    sizes = torch.linalg.vector_norm(batch.in_, dim=(1, 2))
    out = (batch.out * (weights * sizes)[:, None, None]).float()
    in_ = (batch.in_ / torch.where(sizes > 0, sizes, 1.0)[:, None, None]).float()
    side_out, side_in = _Side(out, layer.basis_out, room), _Side(in_, layer.basis_in, room)
    side_out.turn(in_ @ in_.mT)
    side_in.turn(side_out.gram)
    for _ in range(_ROUNDS):
        side_out.turn(side_in.gram)
        side_in.turn(side_out.gram)
    return side_out.directions, side_in.directions


def _factor_directions(layer: LayerSubspace, batch: UpdateBatch, weights: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Leading directions of the columns of the factors, as they are, on each side alone."""
    found = []
    for rows, basis in ((batch.out, layer.basis_out), (batch.in_, layer.basis_in)):
        largest = rows.abs().amax()
        side = _Side((rows / torch.where(largest > 0, largest, 1.0)).float(), basis, room)
        as_they_are = torch.eye(rows.shape[1], dtype=torch.float32, device=rows.device)
        for _ in range(1 + _ROUNDS):
            side.turn(as_they_are)
        found.append(side.directions)
    return found[0], found[1]


class _Side:
    """Directions of one side that turn towards the leading ones of ``Σ X_i G_i X_i^T``, beside the basis.

    Args:
        rows: (updates, r, n) float32, the factors X, transposed.
        basis: (n, k), which the directions are orthogonal to.
        room: How many directions; all there are if the layer has no more.
    """

    def __init__(self, rows: Tensor, basis: Tensor, room: int) -> None:
        self._rows, self._basis = rows, basis.float()
        features = rows.shape[2]
        self._is_whole = basis.shape[1] + room >= features
        if self._is_whole:
            self.directions = torch.eye(features, dtype=torch.float32, device=rows.device)
            self._seen, self.gram = rows, rows @ rows.mT
            return
        # The same numbers on every device.
        self.directions = torch.randn(features, room, generator=torch.Generator().manual_seed(0)).to(rows.device)
        self._seen = rows @ self.directions
        seen_by_basis = rows @ self._basis
        self._gram_of_basis = seen_by_basis @ seen_by_basis.mT
        self.gram = self._gram_of_basis

    def turn(self, weights: Tensor) -> None:
        """One step of the power iteration with G (updates, r, r).

        Then `gram` (updates, r, r) is ``X_i^T P P^T X_i`` with P the basis and the directions.
        """
        if self._is_whole:
            return
        block = self._rows.flatten(0, 1).T @ (weights @ self._seen).flatten(0, 1)
        columns = self._basis.shape[1]
        self.directions = torch.linalg.qr(torch.cat([self._basis, block], dim=1)).Q[:, columns:]
        self._seen = self._rows @ self.directions
        self.gram = self._gram_of_basis + self._seen @ self._seen.mT


def _outside(batch: UpdateBatch, out: Tensor, in_: Tensor, seen_out: Tensor, seen_in: Tensor) -> Tensor:
    """``‖ΔW_j - QQ^T ΔW_j Q'Q'^T‖`` (updates,), rounded up, of coordinates Q (n, q) and Q' (d, q').

    From the residuals of the factors themselves, which lose no digits where little lies outside.
    """
    squared, rounding = torch.zeros_like(batch.norms), torch.zeros_like(batch.norms)
    features = max(batch.out.shape[2], batch.in_.shape[2])
    for start in range(0, len(squared), _TASKS_PER_CHUNK):
        span = slice(start, start + _TASKS_PER_CHUNK)
        rows_in = batch.in_[span]
        left_out = batch.out[span] - seen_out[span] @ out.T
        left_in = rows_in - seen_in[span] @ in_.T
        for first, second in ((left_out, rows_in), (seen_out[span], left_in)):
            energies = first @ first.mT, second @ second.mT
            squared[span] += (energies[0] * energies[1]).sum((1, 2)).clamp_min(0)
            traces = [energy.diagonal(dim1=1, dim2=2).sum(1) for energy in energies]
            rounding[span] += features * torch.finfo(torch.float64).eps * traces[0] * traces[1]
    return (squared + rounding).sqrt()
