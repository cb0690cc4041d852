"""Orthonormal coordinates in which a merge computes: all that old and new updates span, or the leading part of it.

All old updates lie in the span of the basis. Beside a few new ones, one QR of ``[β N]`` a side holds everything, and a
merge is exact. Many new ones, as of a build from a folder of adapters, span more than can be decomposed; a merge of
them takes the leading directions, `OVERSAMPLING` more than it may keep, and knows exactly what of each update lies
outside of them. So its certificate is as rigorous, and its basis explains nearly what the best one does: in the tests,
the error of the updates is within 1 % of it.

Finding directions needs no more than float32, and neither does what is seen along them, as the bound on its rounding
is part of the certificate. An update for which that bound would matter, as nearly all of it lies in the coordinates,
is seen along them in float64. Norms and coordinates are computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import TASKS_PER_CHUNK, LargeBatch, UpdateBatch
from .factors import without_autocast
from .layer import LayerSubspace
from .leading import ROUGH_STEPS, Side
from .products import product_rounding, rounding_is_known
from .stack import UpdateStack


# Up to so many columns of new factors, the coordinates hold everything. Beyond, that costs more than finding them.
EXACT_COLUMNS = 256

OVERSAMPLING = 16
# A difference of squares that is so many times its own rounding error is known well enough for a bound.
_KNOWN_DIGITS = 1e3
# What the rounding of float32 may add to the bound of an update, relative to what lies outside the coordinates.
_MOST_ROUNDING = 0.02

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
) -> tuple[Coordinates, UpdateStack, Tensor]:
    """The basis and `room` leading directions a side of what the new updates have beside it.

    Args:
        layer: As it is.
        batch: The new updates.
        weights: (tasks + new tasks,), of all updates.
        room: How many directions to find.
        joint: Whether they are to be the best for the updates, or for the columns of the factors.

    Returns:
        The coordinates, all updates in them, and a bound (new tasks,) on what rounding changed of each new one there.
    """
    find = _joint_sides if joint else _factor_sides
    with without_autocast(layer.basis_out.device):
        sides = find(layer, batch, weights[len(layer.tasks) :], room)
        seen, outside, rounding = _seen_and_outside(batch, sides)
    known = [(side.coordinates, side.rotation) for side in sides]
    return *_stack(layer, batch, weights, known, list(seen), outside), rounding


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


def _joint_sides(layer: LayerSubspace, batch: LargeBatch, weights: Tensor, room: int) -> tuple[Side, Side]:
    """Both sides along leading directions of weighted updates, alternating between them."""
    (rows_out, scales_out), (rows_in, scales_in) = (_in_single(rows) for rows in (batch.out, batch.in_))
    out, in_ = Side(rows_out, layer.basis_out, room), Side(rows_in, layer.basis_in, room)
    # What each update's Gram matrices are to be multiplied with, for updates of norm 1.
    energies = (weights / scales_out / scales_in).square()[:, None, None]
    out.start(energies * batch.grams[1] * scales_in.square()[:, None, None])
    in_.start(energies * out.gram)
    for _ in range(ROUGH_STEPS):
        out.turn(energies * in_.gram)
        in_.turn(energies * out.gram)
    out.settle(energies * in_.gram)
    in_.settle(energies * out.gram)
    return out, in_


def _factor_sides(layer: LayerSubspace, batch: LargeBatch, weights: Tensor, room: int) -> tuple[Side, Side]:
    """Each side alone along leading directions of the columns of the factors, as they are."""
    found = []
    for rows, basis in ((batch.out, layer.basis_out), (batch.in_, layer.basis_in)):
        if rows.dtype == torch.float64:
            largest = rows.abs().amax()
            rows = (rows / torch.where(largest > 0, largest, 1.0)).float()
        side = Side(rows, basis, room)
        as_they_are = torch.eye(rows.shape[1], dtype=torch.float64, device=rows.device).expand(len(rows), -1, -1)
        side.start(as_they_are)
        for _ in range(1 + ROUGH_STEPS):
            side.turn(as_they_are)
        side.settle(as_they_are)
        found.append(side)
    return found[0], found[1]


def _in_single(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (updates, r, n) in float32, and what each was multiplied with (updates,) to be of a usual size there."""
    if rows.dtype == torch.float32:
        return rows, rows.new_ones(len(rows), dtype=torch.float64)
    sizes = torch.linalg.vector_norm(rows, dim=(1, 2))
    scales = torch.where(sizes > 0, 1 / sizes, 1.0)
    return (rows * scales[:, None, None]).float(), scales


def _seen_and_outside(batch: LargeBatch, sides: tuple[Side, Side]) -> tuple[Coordinates, Tensor, Tensor]:
    """Factors (updates, r, q) float64 in the coordinates, what lies outside, and a bound on their rounding (updates,).

    An update along the coordinates is the product of the factors there, so what rounding changed of these is a change
    inside of the coordinates, and counts on its own.
    """
    seen = sides[0].seen.double(), sides[1].seen.double()
    if batch.out.dtype == torch.float32 and rounding_is_known(batch.out.device):
        outside = _outside(batch, slice(None), seen)[0].sqrt()
        rounding = _rounding_of_single(batch, seen, outside)
        doubtful = (rounding > _MOST_ROUNDING * outside).nonzero().flatten()
    else:
        outside, rounding = torch.zeros_like(batch.norms), torch.zeros_like(batch.norms)
        doubtful = torch.arange(len(outside), device=outside.device)
    coordinates = sides[0].coordinates, sides[1].coordinates
    for some in doubtful.split(TASKS_PER_CHUNK):
        for rows, of, along in zip((batch.out, batch.in_), seen, coordinates, strict=True):
            of[some] = rows[some].double() @ along
        outside[some], rounding[some] = _outside_exactly(batch, some, coordinates, seen), 0.0
    return seen, outside, rounding


def _rounding_of_single(batch: LargeBatch, seen: Coordinates, outside: Tensor) -> Tensor:
    """Bound (updates,) on what float32 products with the coordinates changed, and hid of what lies outside of them.

    ``‖X̂^T Ŷ - X^T Y‖ <= ‖X̂ - X‖_F ‖Ŷ‖_2 + ‖X‖_2 ‖Ŷ - Y‖_F`` of both sides' factors there. The largest singular value
    of one is at most the root of the norm of its Gram matrix.
    """
    sizes = [gram.diagonal(dim1=1, dim2=2).sum(1).sqrt() for gram in batch.grams]
    errors = [
        product_rounding(rows.shape[2]) * of.shape[2] ** 0.5 * size
        for rows, of, size in zip((batch.out, batch.in_), seen, sizes, strict=True)
    ]
    grams = [of @ of.mT for of in seen]
    largest = [torch.linalg.matrix_norm(gram).sqrt() for gram in grams]
    changed = errors[0] * largest[1] + (largest[0] + errors[0]) * errors[1]
    inside = _inner(*grams).clamp_min(0).sqrt()
    # What lies outside has the energy that is not inside, of which as much may have been a change.
    return changed + (outside.square() + 2 * changed * inside).sqrt() - outside


def _outside(batch: LargeBatch, some: Tensor | slice, seen: Coordinates) -> tuple[Tensor, Tensor]:
    """``‖ΔW_j‖² - ‖X_j^T Y_j‖²`` of factors in the coordinates, rounded up, and its rounding error, of some."""
    gram_out, gram_in = (gram[some] for gram in batch.grams)
    seen_out, seen_in = (of[some] for of in seen)
    gram_seen = seen_out @ seen_out.mT
    squared = _inner(gram_out - gram_seen, gram_in) + _inner(gram_seen, gram_in - seen_in @ seen_in.mT)
    # Each sum over the features rounds, and so do the q products with the coordinates.
    rounding = 8 * max(seen_out.shape[2], seen_in.shape[2]) ** 0.5 * _rounding(batch, gram_out, gram_in)
    return squared.clamp_min(0) + rounding, rounding


def _outside_exactly(batch: LargeBatch, some: Tensor, coordinates: Coordinates, seen: Coordinates) -> Tensor:
    """``‖ΔW_j - QQ^T ΔW_j Q'Q'^T‖``, rounded up, of some updates (some,) that were seen in float64."""
    squared, rounding = _outside(batch, some, seen)
    # Where little lies outside, a difference has lost the digits that the residuals of the factors have.
    for i in (squared < _KNOWN_DIGITS * rounding).nonzero().flatten().tolist():
        squared[i] = _outside_of_one(batch, int(some[i]), coordinates, seen)
    return squared.sqrt()


def _outside_of_one(batch: LargeBatch, j: int, coordinates: Coordinates, seen: Coordinates) -> Tensor:
    """The square of `_outside_exactly` of one update, from the residuals of its factors."""
    rows_out, rows_in = batch.out[j].double(), batch.in_[j].double()
    left_out, left_in = (
        rows - of[j] @ side.T for rows, of, side in zip((rows_out, rows_in), seen, coordinates, strict=True)
    )
    squared = torch.zeros_like(batch.norms[j])
    for first, second in ((left_out, rows_in), (seen[0][j], left_in)):
        grams = first @ first.T, second @ second.T
        squared += _inner(*grams).clamp_min(0) + _rounding(batch, *grams)
    return squared


def _inner(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum((-2, -1))


def _rounding(batch: LargeBatch, gram_out: Tensor, gram_in: Tensor) -> Tensor:
    """Bound on the rounding error of the inner product of Gram matrices."""
    features = max(batch.out.shape[2], batch.in_.shape[2])
    traces = [gram.diagonal(dim1=-2, dim2=-1).sum(-1) for gram in (gram_out, gram_in)]
    return features * torch.finfo(torch.float64).eps * traces[0] * traces[1]
