"""Merging new updates into a layer (Sec. 3.2.3 of the paper), at a cost that does not depend on the number of tasks.

The work on matrices with n or d rows is one QR of the basis beside the new factors and one product, whatever the
number of tasks; what grows with it is O(tasks p k²) in coordinates of at most k + m. Every merge certifies what it did
to each task, from the parts it discards rather than from differences of norms, which would lose half the digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .basis import Directions, choose_directions
from .factors import (
    CompactUpdate,
    LowRankUpdate,
    significant_weights,
    thin_svd_of_update,
    truncated_balanced_factors,
)
from .layer import LayerSubspace, TaskRecords
from .settings import SubspaceSettings
from .stack import UpdateStack


# A new update with less than this relative part outside the basis needs no merge: it is float32 rounding error.
NEGLIGIBLE_RESIDUAL = 1e-6


class DriftToleranceError(ValueError):
    """No basis of the allowed size keeps the drift of every task of a layer under the tolerance."""


@dataclass(frozen=True)
class LayerMergeReport:
    """What one merge did to one layer.

    Args:
        new_tasks: Tasks that were added.
        drift: Relative change ``‖ΔW_i' - ΔW_i‖ / ‖ΔW_i‖`` of every task by this merge, (task -> value); for a new
            task, its own compression error. Exact up to the rounding of what is stored, which only the bound includes.
        drift_bound: Sum of the drifts since each task was learned.
        num_components: (k_out, k_in) of the result.
        basis_changed: False if the basis already explained the new updates.
    """

    new_tasks: tuple[str, ...]
    drift: dict[str, float]
    drift_bound: dict[str, float]
    num_components: tuple[int, int]
    basis_changed: bool


@dataclass(frozen=True)
class _Candidate:
    """Directions of a possible result, and the relative part (new tasks,) of the new updates outside them."""

    out: Directions
    in_: Directions
    span_error: Tensor


def merge_into_layer(
    layer: LayerSubspace, updates: Mapping[str, LowRankUpdate], settings: SubspaceSettings
) -> tuple[LayerSubspace, LayerMergeReport]:
    """Add updates to a layer: new basis, analytic coefficients of every task, and a certificate of their drift.

    Merging into `LayerSubspace.empty` is the initialization of the subspace from adapters.

    Args:
        layer: The layer as it is; not changed.
        updates: New tasks by name, each an update of the layer's shape.
        settings: k, p, the kind of basis, and the drift that is tolerated.

    Returns:
        The new layer, in the dtype of the old one's basis, and the report.

    Raises:
        ValueError: If a name is taken, a shape is not the layer's, a factor is not finite, or `num_components` is
            larger than the layer.
        DriftToleranceError: If no number of components up to `max_components` meets `drift_tolerance`.
    """
    _check_updates(layer, updates, settings)
    compact = {task: thin_svd_of_update(update) for task, update in updates.items()}
    new_norms = torch.stack([update.norm for update in compact.values()]) if compact else layer.records.norms[:0]
    norms = torch.cat([layer.records.norms, new_norms])
    weights = significant_weights(norms)
    new_factors = [_stacked_factors(updates[task], compact[task], settings) for task in updates]
    coordinates, stack = _coordinates(layer, new_factors, weights)

    unchanged = _candidate(stack, (_old_basis(stack), _old_basis(stack.mirrored)), new_norms)
    if (unchanged.span_error > NEGLIGIBLE_RESIDUAL).any():
        candidate = _search_candidate(layer, stack, settings, norms)
        merged, drift = _with_new_basis(layer, tuple(updates), stack, norms, candidate, coordinates)
    else:
        merged, drift = _with_old_basis(layer, tuple(updates), stack, norms, unchanged)
    report = LayerMergeReport(
        new_tasks=tuple(updates),
        drift=dict(zip(merged.tasks, drift.tolist(), strict=True)),
        drift_bound=dict(zip(merged.tasks, merged.records.drift_bounds.tolist(), strict=True)),
        num_components=merged.num_components,
        basis_changed=merged.basis_out is not layer.basis_out,
    )
    return merged, report


def residual_outside(layer: LayerSubspace, update: LowRankUpdate) -> float:
    """Relative part of an update that the layer's basis does not explain, ``‖ΔW - ββ^T ΔW αα^T‖ / ‖ΔW‖``.

    Measured on the factors themselves, not as a difference of squared norms.
    """
    compact = thin_svd_of_update(update)
    weights = torch.ones(len(layer.tasks) + 1, dtype=torch.float64, device=layer.basis_out.device)
    _, stack = _coordinates(layer, [compact.balanced_factors()], weights)
    basis = _old_basis(stack), _old_basis(stack.mirrored)
    return float(_candidate(stack, basis, compact.norm.unsqueeze(0)).span_error) if compact.norm > 0 else 0.0


def _check_updates(layer: LayerSubspace, updates: Mapping[str, LowRankUpdate], settings: SubspaceSettings) -> None:
    for task, update in updates.items():
        if layer.has(task):
            raise ValueError(f"task {task!r} is already in the layer")
        if update.shape != layer.shape:
            raise ValueError(f"the update of task {task!r} is {update.shape}, the layer is {layer.shape}")
    if settings.num_components > min(layer.shape):
        raise ValueError(f"num_components is {settings.num_components}, the layer is only {layer.shape}")
    if settings.pseudo_rank != layer.pseudo_rank:
        raise ValueError(f"pseudo_rank is {settings.pseudo_rank}, the layer's tasks have {layer.pseudo_rank}")


def _stacked_factors(update: LowRankUpdate, compact: CompactUpdate, settings: SubspaceSettings) -> LowRankUpdate:
    """The factors of a new update as they enter the stack: balanced ones, or in `factor` mode the adapter's own."""
    if settings.basis == "joint" or compact.norm == 0:
        return compact.balanced_factors()
    return LowRankUpdate(update.out_factor.double(), update.in_factor.double())


def _coordinates(
    layer: LayerSubspace, new_factors: list[LowRankUpdate], weights: Tensor
) -> tuple[tuple[Tensor, Tensor], UpdateStack]:
    """Orthonormal coordinates for all updates: one QR a side, of the basis beside the new factors.

    No orthogonality is assumed, so a rank-deficient block, or more columns than rows, needs no special case.
    """
    old_count, (k_out, k_in) = len(layer.tasks), layer.num_components
    columns_out = [layer.basis_out.double(), *(factors.out_factor for factors in new_factors)]
    columns_in = [layer.basis_in.double(), *(factors.in_factor for factors in new_factors)]
    coordinates_out, triangle_out = torch.linalg.qr(torch.cat(columns_out, dim=1))
    coordinates_in, triangle_in = torch.linalg.qr(torch.cat(columns_in, dim=1))
    widths = torch.tensor([factors.out_factor.shape[1] for factors in new_factors], dtype=torch.long)
    owner = torch.repeat_interleave(torch.arange(len(new_factors)), widths)
    stack = UpdateStack(
        rotation_out=triangle_out[:, :k_out],
        rotation_in=triangle_in[:, :k_in],
        # Transposed in memory too, as the products over all tasks run along the rows.
        old_out=layer.coefficients_out.mT.contiguous(),
        old_in=layer.coefficients_in.mT.contiguous(),
        new_out=triangle_out[:, k_out:],
        new_in=triangle_in[:, k_in:],
        new_owner=owner.to(coordinates_out.device),
        old_weights=weights[:old_count],
        new_weights=weights[old_count:],
    )
    return (coordinates_out, coordinates_in), stack


def _old_basis(stack: UpdateStack) -> Directions:
    """The old basis as directions: the first coordinates of the QR span it."""
    kept = stack.rotation_out.shape[1]
    identity = torch.eye(stack.rotation_out.shape[0], dtype=torch.float64, device=stack.rotation_out.device)
    return Directions(identity, identity.new_zeros(len(identity)), kept)


def _candidate(stack: UpdateStack, directions: tuple[Directions, Directions], new_norms: Tensor) -> _Candidate:
    errors = [_span_error(stack, *directions, j) for j in range(len(new_norms))]
    lost = torch.stack(errors) if errors else torch.zeros_like(new_norms)
    return _Candidate(*directions, _relative(lost, new_norms, stack.new_weights))


def _span_error(stack: UpdateStack, out: Directions, in_: Directions, j: int) -> Tensor:
    """``‖ΔW - PP^T ΔW P'P'^T‖`` of the j-th new update: its part in discarded outputs, or only in discarded inputs."""
    new_out, new_in = stack.new_update(j)
    in_discarded_outputs = ((out.discarded.T @ new_out) @ new_in.T).square().sum()
    in_discarded_inputs = ((out.basis.T @ new_out) @ (in_.discarded.T @ new_in).T).square().sum()
    return (in_discarded_outputs + in_discarded_inputs).sqrt()


def _relative(errors: Tensor, norms: Tensor, weights: Tensor) -> Tensor:
    return torch.where(weights > 0, errors / norms, torch.zeros_like(errors))


def _search_candidate(
    layer: LayerSubspace, stack: UpdateStack, settings: SubspaceSettings, norms: Tensor
) -> _Candidate:
    """The smallest result that meets the drift tolerance; without one, the result at `num_components`.

    Drift is not monotone in k, so k is scanned upward, one by one.
    """
    new_norms = norms[len(layer.tasks) :]
    candidate = _candidate(stack, choose_directions(stack, settings, settings.num_components), new_norms)
    if settings.drift_tolerance is None:
        return candidate
    limit = max(stack.new_out.shape[0], stack.new_in.shape[0])
    if settings.max_components is not None:
        limit = min(limit, settings.max_components)
    widest = replace(settings, explained_variance=None)
    for cap in range(max(candidate.out.kept, candidate.in_.kept) + 1, limit + 1):
        if _worst_drift(layer, stack, norms, candidate) <= settings.drift_tolerance:
            return candidate
        candidate = _candidate(stack, choose_directions(stack, widest, cap), new_norms)
    if (worst := _worst_drift(layer, stack, norms, candidate)) > settings.drift_tolerance:
        raise DriftToleranceError(
            f"drift_tolerance is {settings.drift_tolerance:g}, but with {limit} components, the most that "
            f"max_components = {settings.max_components} allows here, a task would have drifted {worst:.3g} in all"
        )
    return candidate


def _worst_drift(layer: LayerSubspace, stack: UpdateStack, norms: Tensor, candidate: _Candidate) -> float:
    """Largest drift the tolerance applies to: merges of old tasks and the basis' error on new ones, not p < r."""
    moved = _move_old_tasks(stack, candidate)
    records = layer.records
    drift = _relative(moved.lost, records.norms, stack.old_weights)
    old = records.drift_bounds - records.rank_errors + drift
    return float(torch.cat([old, candidate.span_error]).max())


@dataclass(frozen=True)
class _MovedTasks:
    """Old tasks in a new basis, as stored, with what the change did to each of them.

    Args:
        coefficients_out: (tasks + new tasks, k_out', p), with room at the end for the new tasks. Likewise
            `coefficients_in`.
        lost: (tasks,), ``‖ΔW_i' - ΔW_i‖`` before rounding.
        sizes: (tasks, 2), norms of the exact coefficients; the product bounds ``‖ΔW_i'‖``.
        roundings: (tasks, 2), norms of their rounding errors.
    """

    coefficients_out: Tensor
    coefficients_in: Tensor
    lost: Tensor
    sizes: Tensor
    roundings: Tensor


def _move_old_tasks(stack: UpdateStack, candidate: _Candidate) -> _MovedTasks:
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
    for span, stored_out, stored_in in stack.chunks():
        old_out, old_in = stored_out.double(), stored_in.double()
        turned_out, turned_in = old_out @ turn_out, old_in @ turn_in
        lost_out, lost_in = turned_out[..., kept_out:], turned_in[..., kept_in:]
        squared[span] = (
            _product_norm_squared(lost_out, old_in @ old_in.mT)
            + _product_norm_squared(lost_in, old_out @ old_out.mT)
            - (lost_out.mT @ lost_in).square().sum((-2, -1))
        )
        exact_out, exact_in = turned_out[..., :kept_out], turned_in[..., :kept_in]
        rounded_out, rounded_in = moved_out[:tasks][span], moved_in[:tasks][span]
        rounded_out.copy_(exact_out)
        rounded_in.copy_(exact_in)
        sizes[span] = _sizes(exact_out, exact_in)
        roundings[span] = _sizes(rounded_out - exact_out, rounded_in - exact_in)
    return _MovedTasks(moved_out.mT, moved_in.mT, squared.clamp_min(0).sqrt(), sizes, roundings)


def _product_norm_squared(factor: Tensor, gram: Tensor) -> Tensor:
    """``‖X Y^T‖²`` (tasks,) from X^T (tasks, p, j) and the Gram matrix Y^T Y (tasks, p, p)."""
    return ((gram @ factor) * factor).sum((-2, -1)).clamp_min(0)


def _sizes(coefficients_out: Tensor, coefficients_in: Tensor) -> Tensor:
    """Frobenius norms of both sides' coefficients, (tasks, 2)."""
    norm = torch.linalg.vector_norm
    return torch.stack([norm(coefficients_out, dim=(-2, -1)), norm(coefficients_in, dim=(-2, -1))], dim=-1)


def _with_new_basis(
    layer: LayerSubspace,
    new_tasks: tuple[str, ...],
    stack: UpdateStack,
    norms: Tensor,
    candidate: _Candidate,
    coordinates: tuple[Tensor, Tensor],
) -> tuple[LayerSubspace, Tensor]:
    """The layer in the candidate's basis, rounded to its dtype, and the drift (tasks,) of this merge.

    What is certified is what is written: the bounds include the rounding of basis and coefficients.
    """
    dtype = layer.basis_out.dtype
    sides = (side.oriented(of) for side, of in zip((candidate.out, candidate.in_), coordinates, strict=True))
    candidate = _Candidate(*sides, candidate.span_error)
    basis_out, slack_out = _rounded_basis(coordinates[0] @ candidate.out.basis, dtype)
    basis_in, slack_in = _rounded_basis(coordinates[1] @ candidate.in_.basis, dtype)
    moved = _move_old_tasks(stack, candidate)
    new_out, new_in, rank_errors = _new_coefficients(stack, candidate, layer.pseudo_rank)
    coefficients_out, coefficients_in = moved.coefficients_out, moved.coefficients_in
    coefficients_out[len(layer.tasks) :], coefficients_in[len(layer.tasks) :] = new_out, new_in
    stored_out, stored_in = coefficients_out[len(layer.tasks) :], coefficients_in[len(layer.tasks) :]

    slack = torch.tensor([slack_out, slack_in]).to(norms)
    sizes = torch.cat([moved.sizes, _sizes(new_out, new_in)])
    roundings = torch.cat([moved.roundings, _sizes(stored_out - new_out, stored_in - new_in)])
    rounding = _rounding_bound(sizes, roundings, slack)
    lost = torch.cat([moved.lost, torch.zeros_like(rank_errors)])
    records, drift = _records(layer, stack, norms, lost, candidate.span_error, rank_errors, rounding)
    merged = LayerSubspace(
        tasks=(*layer.tasks, *new_tasks),
        basis_out=basis_out,
        basis_in=basis_in,
        coefficients_out=coefficients_out,
        coefficients_in=coefficients_in,
        records=records,
        spectrum_out=candidate.out.spectrum[: candidate.out.kept],
        spectrum_in=candidate.in_.spectrum[: candidate.in_.kept],
    )
    return replace(merged, explained_by_basis=merged.explained_variance()), drift


def _with_old_basis(
    layer: LayerSubspace, new_tasks: tuple[str, ...], stack: UpdateStack, norms: Tensor, candidate: _Candidate
) -> tuple[LayerSubspace, Tensor]:
    """The layer with the new tasks projected on the basis it has; the old tasks keep their coefficients to the bit."""
    dtype = layer.basis_out.dtype
    new_out, new_in, rank_errors = _new_coefficients(stack, candidate, layer.pseudo_rank)
    new_out, new_in = _in_old_basis(new_out, stack.rotation_out), _in_old_basis(new_in, stack.rotation_in)
    stored_out, stored_in = new_out.to(dtype), new_in.to(dtype)
    unmoved = torch.zeros_like(layer.records.norms)
    new_rounding = _rounding_bound(
        _sizes(new_out, new_in), _sizes(stored_out - new_out, stored_in - new_in), torch.zeros(2).to(norms)
    )
    rounding = torch.cat([unmoved, new_rounding])
    lost = torch.cat([unmoved, torch.zeros_like(rank_errors)])
    records, drift = _records(layer, stack, norms, lost, candidate.span_error, rank_errors, rounding)
    merged = replace(
        layer,
        tasks=(*layer.tasks, *new_tasks),
        coefficients_out=torch.cat([layer.coefficients_out, stored_out]),
        coefficients_in=torch.cat([layer.coefficients_in, stored_in]),
        records=records,
    )
    return merged, drift


def _records(
    layer: LayerSubspace,
    stack: UpdateStack,
    norms: Tensor,
    lost: Tensor,
    span_error: Tensor,
    rank_errors: Tensor,
    rounding: Tensor,
) -> tuple[TaskRecords, Tensor]:
    """Records of all tasks after a merge, and its drift (tasks,); `lost`, `rank_errors`, `rounding` are absolute."""
    weights = torch.cat([stack.old_weights, stack.new_weights])
    old, old_count = layer.records, len(layer.tasks)
    old_drift = _relative(lost, norms, weights)[:old_count]
    rank_errors = _relative(rank_errors, norms[old_count:], stack.new_weights)
    new_drift = (span_error.square() + rank_errors.square()).sqrt()
    bounds = torch.cat([old.drift_bounds + old_drift, span_error + rank_errors]) + _relative(rounding, norms, weights)
    estimates = torch.cat([(old.drift_estimates.square() + old_drift.square()).sqrt(), new_drift])
    records = TaskRecords(norms, torch.cat([old.rank_errors, rank_errors]), bounds, estimates)
    return records, torch.cat([old_drift, new_drift])


def _new_coefficients(stack: UpdateStack, candidate: _Candidate, pseudo_rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of the new tasks: their factors projected, or the best rank p of the product if they are wider.

    Returns:
        (new tasks, k_out', p), (new tasks, k_in', p), and the norm (new tasks,) of what a rank over p lost.
    """
    count = len(stack.new_weights)
    all_out = stack.new_out.new_zeros(count, candidate.out.kept, pseudo_rank)
    all_in = stack.new_in.new_zeros(count, candidate.in_.kept, pseudo_rank)
    rank_errors = stack.new_weights.new_zeros(count)
    for j in range(count):
        new_out, new_in = stack.new_update(j)
        new_out, new_in = candidate.out.basis.T @ new_out, candidate.in_.basis.T @ new_in
        rank = new_out.shape[1]
        if rank > pseudo_rank:
            all_out[j], all_in[j], rank_errors[j] = truncated_balanced_factors(new_out, new_in, pseudo_rank)
        else:
            all_out[j, :, :rank], all_in[j, :, :rank] = new_out, new_in
    return all_out, all_in, rank_errors


def _in_old_basis(coefficients: Tensor, rotation: Tensor) -> Tensor:
    """Coefficients in the first coordinates of a merge, written in the old basis that spans them."""
    k = rotation.shape[1]
    return torch.linalg.solve_triangular(rotation[:k], coefficients, upper=True)


def _rounded_basis(exact: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The basis as stored, and the spectral norm of what rounding changed."""
    rounded = exact.to(dtype)
    change = rounded.double() - exact
    if not change.numel():
        return rounded, 0.0
    return rounded, float(torch.linalg.eigvalsh(change.T @ change).max().clamp_min(0).sqrt())


def _rounding_bound(sizes: Tensor, roundings: Tensor, slack: Tensor) -> Tensor:
    """Upper bound (tasks,) on the change of each update by rounding its coefficients and the bases.

    Args:
        sizes: (tasks, 2), norms of the exact coefficients, output and input side.
        roundings: (tasks, 2), norms of their rounding errors.
        slack: (2,), spectral norms of the rounding errors of the bases.
    """
    changes = slack * (sizes + roundings) + roundings
    return changes[:, 0] * sizes[:, 1] + (sizes[:, 0] + changes[:, 0]) * changes[:, 1]
