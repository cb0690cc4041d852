"""Moving the tasks of a layer to other directions: their coefficients there, and the loss, computed exactly.

All computations are in the coordinates of an `UpdateStack`. The loss is computed from the discarded parts rather than
from differences of norms, which would lose half the digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .basis import Directions
from .factors import truncated_balanced_factors
from .rounding import CoefficientDtype, Rounding, store
from .stack import UpdateStack


@dataclass(frozen=True)
class Candidate:
    """Directions of a possible result, and the relative part (new tasks,) of the new updates outside them."""

    out: Directions
    in_: Directions
    span_error: Tensor


def old_basis_of(stack: UpdateStack) -> Directions:
    """Return the old basis as directions; the first coordinates of the QR span it."""
    kept = stack.rotation_out.shape[1]
    identity = torch.eye(stack.rotation_out.shape[0], dtype=torch.float64, device=stack.rotation_out.device)
    return Directions(identity, identity.new_zeros(len(identity)), kept)


def candidate_of(stack: UpdateStack, directions: tuple[Directions, Directions]) -> Candidate:
    """Return the directions with the part of each new update that they leave out."""
    return Candidate(*directions, _span_errors(stack, *directions) * stack.new_weights)


def _span_errors(stack: UpdateStack, out: Directions, in_: Directions) -> Tensor:
    """Return ``‖ΔW - PP^T ΔW P'P'^T‖`` (new tasks,).

    The parts outside the coordinates, in discarded outputs, and in kept outputs but discarded inputs are orthogonal to
    each other.
    """
    squared = stack.outside.square()
    for span, new_out, new_in in stack.new_chunks():
        triangles = torch.linalg.qr(new_in.mT, mode="r").R
        in_discarded_outputs = triangles @ (new_out @ out.discarded)
        in_discarded_inputs = (new_out @ out.basis).mT @ (new_in @ in_.discarded)
        squared[span] += sum(part.square().sum((-2, -1)) for part in (in_discarded_outputs, in_discarded_inputs))
    return squared.sqrt()


@dataclass(frozen=True)
class MovedTasks:
    """Old tasks in a new basis, as stored, with the loss of each of them.

    Args:
        coefficients_out: (tasks + new tasks, k_out', p), with room at the end for the new tasks.
        coefficients_in: (tasks + new tasks, k_in', p), with room at the end for the new tasks.
        lost: (tasks,), loss ``‖ΔW_i' - ΔW_i‖`` before rounding.
        rounding: Changes made by storing the coefficients.
    """

    coefficients_out: Tensor
    coefficients_in: Tensor
    lost: Tensor
    rounding: Rounding


def move_old_tasks(stack: UpdateStack, candidate: Candidate, dtype: CoefficientDtype = "float32") -> MovedTasks:
    """Compute ``ε' = P^T R ε`` for all old tasks (Sec. 3.2.3), and how much of each update the new basis loses.

    The squared loss is ``‖D_out^T ΔW‖² + ‖ΔW D_in‖² - ‖D_out^T ΔW D_in‖²`` with D the discarded directions. The last
    term is no larger than either of the others, so no digits cancel.
    """
    turn_out = stack.rotation_out.T @ candidate.out.vectors
    turn_in = stack.rotation_in.T @ candidate.in_.vectors
    kept_out, kept_in = candidate.out.kept, candidate.in_.kept
    tasks, pseudo_rank = stack.old_out.shape[:2]
    with_room = tasks + len(stack.new_weights)
    moved_out = stack.old_out.new_empty(with_room, pseudo_rank, kept_out)
    moved_in = stack.old_in.new_empty(with_room, pseudo_rank, kept_in)
    squared = stack.old_weights.new_empty(tasks)
    sizes, roundings = stack.old_weights.new_empty(tasks, 2), stack.old_weights.new_empty(tasks, 2)
    changes = stack.old_weights.new_empty(tasks)
    for span, stored_out, stored_in in stack.old_chunks():
        old_out, old_in = stored_out.double(), stored_in.double()
        turned_out, turned_in = old_out @ turn_out, old_in @ turn_in
        lost_out, lost_in = turned_out[..., kept_out:], turned_in[..., kept_in:]
        squared[span] = (
            _product_norm_squared(lost_out, old_in @ old_in.mT)
            + _product_norm_squared(lost_in, old_out @ old_out.mT)
            - (lost_out.mT @ lost_in).square().sum((-2, -1))
        )
        exact_out, exact_in = turned_out[..., :kept_out], turned_in[..., :kept_in]
        stored = moved_out[:tasks][span], moved_in[:tasks][span]
        rounding = store((exact_out, exact_in), stored, dtype, dim=-1)
        sizes[span], roundings[span], changes[span] = rounding.sizes, rounding.roundings, rounding.changes
    rounding = Rounding(sizes, roundings, changes)
    return MovedTasks(moved_out.mT, moved_in.mT, squared.clamp_min(0).sqrt(), rounding)


def _product_norm_squared(factor: Tensor, gram: Tensor) -> Tensor:
    """Return ``‖X Y^T‖²`` (tasks,) from X^T (tasks, p, j) and the Gram matrix Y^T Y (tasks, p, p)."""
    return ((gram @ factor) * factor).sum((-2, -1)).clamp_min(0)


def new_coefficients(
    stack: UpdateStack,
    candidate: Candidate,
    pseudo_rank: int,
    *,
    balance: bool,
    tolerance: float | None = None,
    uncut: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the coefficients of the new tasks: their projected factors, or the best rank p if these are wider.

    Args:
        stack: Stack that holds the new tasks.
        candidate: Directions of the result.
        pseudo_rank: Rank p.
        balance: Whether to balance the two factors of each task, instead of keeping them as they came.
        tolerance: Relative error up to which a task takes a smaller rank, padded with zeros. It implies balancing.
            None means that no rank is cut.
        uncut: (new tasks,) bool, whether a new task keeps its rank in spite of the tolerance; none if not given.

    Returns:
        Coefficients (new tasks, k_out', p) and (new tasks, k_in', p), and the norm (new tasks,) of what the cut of the
        rank lost.
    """
    count = len(stack.new_weights)
    all_out = stack.new_out.new_zeros(count, candidate.out.kept, pseudo_rank)
    all_in = stack.new_in.new_zeros(count, candidate.in_.kept, pseudo_rank)
    rank_errors = stack.new_weights.new_zeros(count)
    for span, factors_out, factors_in in stack.new_chunks():
        new_out, new_in = (factors_out @ candidate.out.basis).mT, (factors_in @ candidate.in_.basis).mT
        rank = min(pseudo_rank, new_out.shape[2])
        all_out[span, :, :rank], all_in[span, :, :rank] = new_out[..., :rank], new_in[..., :rank]
        remade = stack.new_ranks[span] > (0 if balance or tolerance is not None else pseudo_rank)
        if remade.any():
            all_out[span][remade], all_in[span][remade], rank_errors[span][remade] = truncated_balanced_factors(
                new_out[remade], new_in[remade], pseudo_rank
            )
    # For an update of a smaller rank, a decomposition leaves rounding errors in columns that should be zero.
    empty = torch.arange(pseudo_rank, device=all_out.device) >= stack.new_ranks.unsqueeze(1)
    all_out.masked_fill_(empty.unsqueeze(1), 0.0)
    all_in.masked_fill_(empty.unsqueeze(1), 0.0)
    if tolerance is not None:
        tolerated = _tolerated(stack, candidate, tolerance)
        if uncut is not None:
            tolerated[uncut] = -1.0  # less than the loss of a zero column, so nothing is cut
        _cut_to_tolerance(all_out, all_in, rank_errors, tolerated)
    return all_out, all_in, rank_errors


def _tolerated(stack: UpdateStack, candidate: Candidate, tolerance: float) -> Tensor:
    """Return the squared norms (new tasks,) that a smaller rank may lose in addition to the loss of the directions."""
    relative = (tolerance**2 - candidate.span_error.square()).clamp_min(0)
    weights = stack.new_weights
    return torch.where(weights > 0, relative / torch.where(weights > 0, weights, 1.0).square(), 0.0)


def _cut_to_tolerance(out: Tensor, in_: Tensor, rank_errors: Tensor, tolerated: Tensor) -> None:
    """Zero as many of the last columns of balanced coefficients as is tolerated, and count them as lost, in place.

    Args:
        out: (tasks, k_out, p), ``U √S``.
        in_: (tasks, k_in, p), ``V √S``.
        rank_errors: (tasks,), norms of what a rank above p lost.
        tolerated: (tasks,), tolerated squared norms.
    """
    energies = out.square().sum(1) * in_.square().sum(1)  # S², as the columns of both sides have squared norms S
    # The loss at each column is the energy of that column and all columns after it.
    lost = energies.flip(1).cumsum(1).flip(1) + rank_errors.square().unsqueeze(1)
    cut = lost <= tolerated.unsqueeze(1)
    out.masked_fill_(cut.unsqueeze(1), 0.0)
    in_.masked_fill_(cut.unsqueeze(1), 0.0)
    rank_errors.copy_(torch.where(cut, lost, 0.0).amax(1).sqrt().maximum(rank_errors))


def rounded_basis(exact: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Return the basis as stored, and the spectral norm of its rounding error."""
    rounded = exact.to(dtype)
    change = rounded.double() - exact
    if not change.numel():
        return rounded, 0.0
    return rounded, float(torch.linalg.eigvalsh(change.T @ change).max().clamp_min(0).sqrt())


def rounding_bound(rounding: Rounding, slack: Tensor) -> Tensor:
    """Bound the change (tasks,) of each update by rounding the bases and the coefficients.

    The bound includes only small rounding errors of coefficients, not the `changes` of coefficients in fewer bits.

    Args:
        rounding: Rounding of the coefficients.
        slack: (2,), spectral norms of the rounding errors of the bases.
    """
    sizes, roundings = rounding.sizes, rounding.roundings
    changes = slack * (sizes + roundings) + roundings
    return changes[:, 0] * sizes[:, 1] + (sizes[:, 0] + changes[:, 0]) * changes[:, 1]
