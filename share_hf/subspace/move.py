"""What becomes of a layer's tasks in other directions: their coefficients there, and what is lost, computed exactly.

Everything is in the coordinates of an `UpdateStack`. What is lost comes from the parts that are discarded rather than
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
    """The old basis as directions: the first coordinates of the QR span it."""
    kept = stack.rotation_out.shape[1]
    identity = torch.eye(stack.rotation_out.shape[0], dtype=torch.float64, device=stack.rotation_out.device)
    return Directions(identity, identity.new_zeros(len(identity)), kept)


def candidate_of(stack: UpdateStack, directions: tuple[Directions, Directions]) -> Candidate:
    """Directions with what they leave out of each new update."""
    return Candidate(*directions, _span_errors(stack, *directions) * stack.new_weights)


def _span_errors(stack: UpdateStack, out: Directions, in_: Directions) -> Tensor:
    """``‖ΔW - PP^T ΔW P'P'^T‖`` (new tasks,).

    Parts outside the coordinates, in discarded outputs, and in kept outputs but discarded inputs, are orthogonal.
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
    """Old tasks in a new basis, as stored, with what the change did to each of them.

    Args:
        coefficients_out: (tasks + new tasks, k_out', p), with room at the end for the new tasks. Likewise
            `coefficients_in`.
        lost: (tasks,), ``‖ΔW_i' - ΔW_i‖`` before rounding.
        rounding: What storing them changed.
    """

    coefficients_out: Tensor
    coefficients_in: Tensor
    lost: Tensor
    rounding: Rounding


def move_old_tasks(stack: UpdateStack, candidate: Candidate, dtype: CoefficientDtype = "float32") -> MovedTasks:
    """``ε' = P^T R ε`` for all old tasks (Sec. 3.2.3), and how much of each update the new basis loses.

    The loss is ``‖D_out^T ΔW‖² + ‖ΔW D_in‖² - ‖D_out^T ΔW D_in‖²`` with D the discarded directions. The last term is
    no larger than either of the others, so nothing cancels.
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
    """``‖X Y^T‖²`` (tasks,) from X^T (tasks, p, j) and the Gram matrix Y^T Y (tasks, p, p)."""
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
    """Coefficients of the new tasks: their factors projected, or the best rank p of the product if they are wider.

    Args:
        stack: Has the new tasks.
        candidate: The directions.
        pseudo_rank: p.
        balance: Whether both factors of each task get the same share of its update, instead of what they came with.
        tolerance: Relative error up to which a task takes a smaller rank, filled up with zeros. Balances them too.
        uncut: Which of the new tasks (new tasks,) bool keep their rank all the same; none if not given.

    Returns:
        (new tasks, k_out', p), (new tasks, k_in', p), and the norm (new tasks,) of what a rank over p lost.
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
    # Of an update of a smaller rank, a decomposition leaves rounding errors where there is nothing.
    empty = torch.arange(pseudo_rank, device=all_out.device) >= stack.new_ranks.unsqueeze(1)
    all_out.masked_fill_(empty.unsqueeze(1), 0.0)
    all_in.masked_fill_(empty.unsqueeze(1), 0.0)
    if tolerance is not None:
        tolerated = _tolerated(stack, candidate, tolerance)
        if uncut is not None:
            tolerated[uncut] = -1.0  # less than a column of zeros loses
        _cut_to_tolerance(all_out, all_in, rank_errors, tolerated)
    return all_out, all_in, rank_errors


def _tolerated(stack: UpdateStack, candidate: Candidate, tolerance: float) -> Tensor:
    """Squared norms (new tasks,) of what a rank may lose of each, beside what the directions do."""
    relative = (tolerance**2 - candidate.span_error.square()).clamp_min(0)
    weights = stack.new_weights
    return torch.where(weights > 0, relative / torch.where(weights > 0, weights, 1.0).square(), 0.0)


def _cut_to_tolerance(out: Tensor, in_: Tensor, rank_errors: Tensor, tolerated: Tensor) -> None:
    """Zero the last columns of balanced coefficients, as many as are tolerated, and count them as lost; in place.

    Args:
        out: (tasks, k_out, p), ``U √S``.
        in_: (tasks, k_in, p), ``V √S``.
        rank_errors: (tasks,), what a rank over p lost.
        tolerated: (tasks,), squared norms.
    """
    energies = out.square().sum(1) * in_.square().sum(1)  # S², whose roots are the norms of both sides' columns
    # Behind each column, what is lost without it and those after it.
    lost = energies.flip(1).cumsum(1).flip(1) + rank_errors.square().unsqueeze(1)
    cut = lost <= tolerated.unsqueeze(1)
    out.masked_fill_(cut.unsqueeze(1), 0.0)
    in_.masked_fill_(cut.unsqueeze(1), 0.0)
    rank_errors.copy_(torch.where(cut, lost, 0.0).amax(1).sqrt().maximum(rank_errors))


def rounded_basis(exact: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The basis as stored, and the spectral norm of what rounding changed."""
    rounded = exact.to(dtype)
    change = rounded.double() - exact
    if not change.numel():
        return rounded, 0.0
    return rounded, float(torch.linalg.eigvalsh(change.T @ change).max().clamp_min(0).sqrt())


def rounding_bound(rounding: Rounding, slack: Tensor) -> Tensor:
    """Upper bound (tasks,) on the change of each update by rounding the bases, and its coefficients where that is
    little; not the `changes` of coefficients in fewer bits.

    Args:
        rounding: The rounding of the coefficients.
        slack: (2,), spectral norms of the rounding errors of the bases.
    """
    sizes, roundings = rounding.sizes, rounding.roundings
    changes = slack * (sizes + roundings) + roundings
    return changes[:, 0] * sizes[:, 1] + (sizes[:, 0] + changes[:, 0]) * changes[:, 1]
