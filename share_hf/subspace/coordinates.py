"""Orthonormal coordinates in which a merge computes: the whole span of old and new updates, or the leading part of it.

All old updates lie in the span of the basis. With a few new updates, one QR of ``[β N]`` per side holds everything,
and the merge is exact. Many new updates, as in a build from a folder of adapters, span more than can be decomposed.
Their merge takes the leading directions, `OVERSAMPLING` more than it may keep, and computes exactly how much of each
update lies outside of them. Its certificate is therefore just as rigorous, and its basis explains nearly as much as
the best one: in the tests, the error of the updates is within 1 % of the best.

float32 is enough to find directions. It is also enough to project the updates on them, because the certificate
includes the bound on the rounding. Where that bound would matter, because nearly all of an update lies in the
coordinates, the update is projected in float64. Norms and coordinates are computed in float64.
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


# Up to this many columns of new factors, the coordinates hold everything. Beyond, a QR of all columns costs more than
# finding the leading directions.
EXACT_COLUMNS = 256

OVERSAMPLING = 16
# A difference of squares is accurate enough for a bound if it is this many times its own rounding error.
_KNOWN_DIGITS = 1e3
# Largest amount that float32 rounding may add to the bound of an update, relative to the part outside the coordinates.
_MOST_ROUNDING = 0.02

# Coordinates of a layer, (n, q_out) and (d, q_in).
Coordinates = tuple[Tensor, Tensor]


def exact_coordinates(layer: LayerSubspace, batch: UpdateBatch, weights: Tensor) -> tuple[Coordinates, UpdateStack]:
    """Compute coordinates of all updates by one QR per side, of the basis next to the new factors.

    This assumes no orthogonality, so a rank-deficient block, or more columns than rows, needs no special case.

    Args:
        layer: Layer before the merge.
        batch: New updates.
        weights: (tasks + new tasks,), weights of all updates.
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
    """Compute coordinates from the basis and, on each side, `room` leading directions of the new updates outside it.

    Args:
        layer: Layer before the merge.
        batch: New updates.
        weights: (tasks + new tasks,), weights of all updates.
        room: Number of directions to find on each side.
        joint: Whether to find the best directions for the updates, instead of for the columns of their factors.

    Returns:
        The coordinates, the stack of all updates in them, and a bound (new tasks,) on how much rounding changed each
        new update there.
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
        # Transposed in memory as well, because the products over all tasks run along the rows.
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
    """Return both sides along the leading directions of the weighted updates, by alternating between the sides."""
    (rows_out, scales_out), (rows_in, scales_in) = (_in_single(rows) for rows in (batch.out, batch.in_))
    out, in_ = Side(rows_out, layer.basis_out, room), Side(rows_in, layer.basis_in, room)
    # Factors that the Gram matrices are multiplied by, so that each update has norm 1.
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
    """Return each side on its own along the leading directions of the columns of the factors, unweighted."""
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
    """Return factors (updates, r, n) in float32, and the scales (updates,) that bring each of them to a usual size."""
    if rows.dtype == torch.float32:
        return rows, rows.new_ones(len(rows), dtype=torch.float64)
    sizes = torch.linalg.vector_norm(rows, dim=(1, 2))
    scales = torch.where(sizes > 0, 1 / sizes, 1.0)
    return (rows * scales[:, None, None]).float(), scales


def _seen_and_outside(batch: LargeBatch, sides: tuple[Side, Side]) -> tuple[Coordinates, Tensor, Tensor]:
    """Return factors (updates, r, q) float64 in the coordinates, the norms outside, and a bound on their rounding.

    In the coordinates an update is the product of its factors there. A rounding error of these factors is therefore a
    change inside the coordinates, and counts on its own.
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
    """Bound how much float32 products with the coordinates changed, and hid of the part outside of them (updates,).

    The bound is ``‖X̂^T Ŷ - X^T Y‖ <= ‖X̂ - X‖_F ‖Ŷ‖_2 + ‖X‖_2 ‖Ŷ - Y‖_F`` for the factors of both sides in the
    coordinates. The largest singular value of a factor is at most the root of the norm of its Gram matrix.
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
    # The energy outside is whatever is not inside, and up to `changed` of the norm inside may be rounding error.
    return changed + (outside.square() + 2 * changed * inside).sqrt() - outside


def _outside(batch: LargeBatch, some: Tensor | slice, seen: Coordinates) -> tuple[Tensor, Tensor]:
    """Return ``‖ΔW_j‖² - ‖X_j^T Y_j‖²`` of some updates for factors in the coordinates, rounded up, and its error."""
    gram_out, gram_in = (gram[some] for gram in batch.grams)
    seen_out, seen_in = (of[some] for of in seen)
    gram_seen = seen_out @ seen_out.mT
    squared = _inner(gram_out - gram_seen, gram_in) + _inner(gram_seen, gram_in - seen_in @ seen_in.mT)
    # Each sum over the features adds rounding error, and so do the q products with the coordinates.
    rounding = 8 * max(seen_out.shape[2], seen_in.shape[2]) ** 0.5 * _rounding(batch, gram_out, gram_in)
    return squared.clamp_min(0) + rounding, rounding


def _outside_exactly(batch: LargeBatch, some: Tensor, coordinates: Coordinates, seen: Coordinates) -> Tensor:
    """Return ``‖ΔW_j - QQ^T ΔW_j Q'Q'^T‖``, rounded up, of some updates (some,) that were projected in float64."""
    squared, rounding = _outside(batch, some, seen)
    # Where little lies outside, the difference has lost digits that the residuals of the factors still have.
    for i in (squared < _KNOWN_DIGITS * rounding).nonzero().flatten().tolist():
        squared[i] = _outside_of_one(batch, int(some[i]), coordinates, seen)
    return squared.sqrt()


def _outside_of_one(batch: LargeBatch, j: int, coordinates: Coordinates, seen: Coordinates) -> Tensor:
    """Return the square of `_outside_exactly` for one update, from the residuals of its factors."""
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
    """Bound the rounding error of the inner product of two Gram matrices."""
    features = max(batch.out.shape[2], batch.in_.shape[2])
    traces = [gram.diagonal(dim1=-2, dim2=-1).sum(-1) for gram in (gram_out, gram_in)]
    return features * torch.finfo(torch.float64).eps * traces[0] * traces[1]
