"""Orthonormal coordinates in which a merge computes: all that old and new updates span, or the leading part of it.

All old updates lie in the span of the basis. Beside a few new ones, one QR of ``[β N]`` a side holds everything, and a
merge is exact. Many new ones, as of a build from a folder of adapters, span more than can be decomposed; a merge of
them takes the leading directions, `OVERSAMPLING` more than it may keep, and knows exactly what of each update lies
outside of them. So its certificate is as rigorous, and its basis explains nearly what the best one does: in the tests,
the error of the updates is within 1 % of it. They are the best of a small block Krylov space (Halko, Martinsson &
Tropp 2011, Sec. 4.5; Musco & Musco 2015): random combinations of the columns, and what a power step finds beside
them, through the thin factors, never from a matrix as large as the layer.

Finding directions needs no more than float32. What is certified, norms, coordinates and what lies outside of them, is
computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import LargeBatch, UpdateBatch, in_chunks
from .layer import LayerSubspace
from .stack import UpdateStack


# Up to so many columns of new factors, the coordinates hold everything. Beyond, that costs more than finding them.
EXACT_COLUMNS = 256

OVERSAMPLING = 16
# Power steps of each side. A second one takes a fifth more time and the error from 0.6 % above the best to 0.03 %.
_ROUNDS = 1
# Mixed columns for each direction that is looked for: a few times as many are as good as all of them.
_MIXED_COLUMNS = 3
# A difference of squares that is so many times its own rounding error is known well enough for a bound.
_KNOWN_DIGITS = 1e3

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
    layer: LayerSubspace, batch: LargeBatch, weights: Tensor, room: int, *, joint: bool
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
    seen = [_seen_along(rows, side) for rows, (side, _) in zip((batch.out, batch.in_), sides, strict=True)]
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


def _joint_directions(layer: LayerSubspace, batch: LargeBatch, weights: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Leading directions (n, room), (d, room) float32 of weighted updates, alternating between both sides."""
    (rows_out, scales_out), (rows_in, scales_in) = (_in_single(rows) for rows in (batch.out, batch.in_))
    side_out, side_in = _Side(rows_out, layer.basis_out, room), _Side(rows_in, layer.basis_in, room)
    # What each update's Gram matrices are to be multiplied with, for updates of norm 1.
    energies = (weights / scales_out / scales_in).square()[:, None, None]
    gram_in = batch.grams[1] * scales_in.square()[:, None, None]
    side_out.start(energies * gram_in)
    side_in.start(energies * side_out.gram)
    for _ in range(_ROUNDS):
        side_out.turn(energies * side_in.gram)
        side_in.turn(energies * side_out.gram)
    return side_out.directions, side_in.directions


def _factor_directions(layer: LayerSubspace, batch: LargeBatch, weights: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Leading directions of the columns of the factors, as they are, on each side alone."""
    found = []
    for rows, basis in ((batch.out, layer.basis_out), (batch.in_, layer.basis_in)):
        if rows.dtype == torch.float64:
            largest = rows.abs().amax()
            rows = (rows / torch.where(largest > 0, largest, 1.0)).float()
        side = _Side(rows, basis, room)
        as_they_are = torch.eye(rows.shape[1], dtype=torch.float64, device=rows.device).expand(len(rows), -1, -1)
        side.start(as_they_are)
        for _ in range(1 + _ROUNDS):
            side.turn(as_they_are)
        found.append(side.directions)
    return found[0], found[1]


def _in_single(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (updates, r, n) in float32, and what each was multiplied with (updates,) to be of a usual size there."""
    if rows.dtype == torch.float32:
        return rows, rows.new_ones(len(rows), dtype=torch.float64)
    sizes = torch.linalg.vector_norm(rows, dim=(1, 2))
    scales = torch.where(sizes > 0, 1 / sizes, 1.0)
    return (rows * scales[:, None, None]).float(), scales


class _Side:
    """Directions of one side that turn towards the leading ones of ``Σ X_i G_i X_i^T``, beside the basis.

    Args:
        rows: (updates, r, n) float32, the factors X, transposed.
        basis: (n, k), which the directions are orthogonal to.
        room: How many directions; all there are if the layer has no more.

    Attributes:
        directions: (n, room) float32.
    """

    def __init__(self, rows: Tensor, basis: Tensor, room: int) -> None:
        self._rows, self._basis, self._room = rows, basis.float(), room
        features = rows.shape[2]
        self._is_whole = basis.shape[1] + room >= features
        if self._is_whole:
            self.directions = torch.eye(features, dtype=torch.float32, device=rows.device)
            self._seen, self._gram_of_basis = rows, rows.new_zeros(1)
            return
        seen_by_basis = rows @ self._basis
        self._gram_of_basis = seen_by_basis @ seen_by_basis.mT

    @property
    def gram(self) -> Tensor:
        """``X_i^T P P^T X_i`` (updates, r, r) float64, with P the basis and the directions."""
        return (self._gram_of_basis + self._seen @ self._seen.mT).double()

    def start(self, weights: Tensor) -> None:
        """Directions of random combinations of the columns, those of each update as large as G (updates, r, r)."""
        if self._is_whole:
            return
        generator = torch.Generator().manual_seed(0)  # the same numbers on every device
        updates, rank, features = self._rows.shape
        # Updates are mixed first, as that is one product with few rows, and the columns of the mixtures after.
        mixtures = -(-_MIXED_COLUMNS * self._room // rank)
        mixing = torch.randn(mixtures, updates, generator=generator).to(self._rows.device)
        sizes = weights.diagonal(dim1=1, dim2=2).sum(1).sqrt().float()
        mixed = (mixing * sizes) @ self._rows.flatten(1)
        combining = torch.randn(mixtures * rank, self._room, generator=generator).to(self._rows.device)
        self.directions = self._beside([self._basis], mixed.view(-1, features).T @ combining)
        self._seen = self._rows @ self.directions

    def turn(self, weights: Tensor) -> None:
        """One step of the power iteration with G (updates, r, r): the best of what it finds and what there was."""
        if self._is_whole:
            return
        single = weights.float()
        block = self._rows.flatten(0, 1).T @ (single @ self._seen).flatten(0, 1)
        found = self._beside([self._basis, self.directions], block)
        seen = torch.cat([self._seen, self._rows @ found], dim=2)
        moment = seen.flatten(0, 1).T @ (single @ seen).flatten(0, 1)
        best = torch.linalg.eigh(moment.double()).eigenvectors[:, -self._room :].float()
        self.directions, self._seen = torch.cat([self.directions, found], dim=1) @ best, seen @ best

    @staticmethod
    def _beside(known: list[Tensor], block: Tensor) -> Tensor:
        """Orthonormal directions that a block has beside those that are known already."""
        columns = sum(side.shape[1] for side in known)
        return torch.linalg.qr(torch.cat([*known, block], dim=1)).Q[:, columns:]


def _seen_along(rows: Tensor, coordinates: Tensor) -> Tensor:
    """``X_j^T Q`` (updates, r, q) float64 of factors (updates, r, n) in coordinates (n, q)."""
    seen = coordinates.new_empty(*rows.shape[:2], coordinates.shape[1])
    for span, part in in_chunks(rows):
        torch.matmul(part, coordinates, out=seen[span])
    return seen


def _outside(batch: LargeBatch, out: Tensor, in_: Tensor, seen_out: Tensor, seen_in: Tensor) -> Tensor:
    """``‖ΔW_j - QQ^T ΔW_j Q'Q'^T‖`` (updates,), rounded up, of coordinates Q (n, q) and Q' (d, q')."""
    gram_out, gram_in = batch.grams
    gram_seen = seen_out @ seen_out.mT
    squared = _inner(gram_out - gram_seen, gram_in) + _inner(gram_seen, gram_in - seen_in @ seen_in.mT)
    # Each sum over the features rounds, and so do the q products with the coordinates.
    rounding = 8 * max(seen_out.shape[2], seen_in.shape[2]) ** 0.5 * _rounding(batch, gram_out, gram_in)
    # Where little lies outside, a difference has lost the digits that the residuals of the factors have.
    for j in (squared < _KNOWN_DIGITS * rounding).nonzero().flatten().tolist():
        squared[j], rounding[j] = _outside_of_one(batch, j, (out, in_), (seen_out[j], seen_in[j]))
    return (squared.clamp_min(0) + rounding).sqrt()


def _outside_of_one(
    batch: LargeBatch, j: int, coordinates: Coordinates, seen: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The square of `_outside` of one update, from the residuals of its factors, and the square of its rounding."""
    rows_out, rows_in = batch.out[j].double(), batch.in_[j].double()
    left_out, left_in = (
        rows - part @ side.T for rows, part, side in zip((rows_out, rows_in), seen, coordinates, strict=True)
    )
    squared, rounding = torch.zeros_like(batch.norms[j]), torch.zeros_like(batch.norms[j])
    for first, second in ((left_out, rows_in), (seen[0], left_in)):
        grams = first @ first.T, second @ second.T
        squared += _inner(*grams).clamp_min(0)
        rounding += _rounding(batch, *grams)
    return squared, rounding


def _inner(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum((-2, -1))


def _rounding(batch: LargeBatch, gram_out: Tensor, gram_in: Tensor) -> Tensor:
    """Bound on the rounding error of the inner product of Gram matrices."""
    features = max(batch.out.shape[2], batch.in_.shape[2])
    traces = [gram.diagonal(dim1=-2, dim2=-1).sum(-1) for gram in (gram_out, gram_in)]
    return features * torch.finfo(torch.float64).eps * traces[0] * traces[1]
