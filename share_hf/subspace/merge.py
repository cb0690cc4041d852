"""Merging new updates into a layer (Sec. 3.2.3 of the paper), at a cost that hardly depends on the number of tasks.

The work on matrices with n or d rows is one QR of the basis next to the new factors and one product, whatever the
number of tasks. Only the work of O(tasks p k²) in at most k + m coordinates grows with that number. Every merge
certifies how much it changed each task, relative to the size of the task, and the bound covers what is stored,
including rounding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .basis import choose_directions
from .batch import LargeBatch, Scratch, batch_of_few, batch_of_many
from .coordinates import EXACT_COLUMNS, OVERSAMPLING, exact_coordinates, found_coordinates
from .factors import LowRankUpdate, inverse_norms
from .layer import LayerSubspace, TaskRecords
from .move import (
    Candidate,
    candidate_of,
    move_old_tasks,
    new_coefficients,
    old_basis_of,
    rounded_basis,
    rounding_bound,
)
from .rounding import MOST_ROUNDING, CoefficientDtype, store
from .settings import SubspaceSettings, rank_in_layer
from .stack import UpdateStack


# A new update with less than this relative part outside the basis needs no new basis: it is float32 rounding
# error.
NEGLIGIBLE_RESIDUAL = 1e-6


class DriftToleranceError(ValueError):
    """No basis of the allowed size keeps the drift of every task of a layer under the tolerance."""


@dataclass(frozen=True)
class LayerMergeReport:
    """Report of one merge into one layer.

    Args:
        new_tasks: Names of the tasks that were added.
        drift: Relative change ``‖ΔW_i' - ΔW_i‖ / ‖ΔW_i‖`` of every task by this merge (task -> value). For a new task
            it is its own compression error. It is exact up to the rounding of what is stored in float32, which only
            the bound includes.
        drift_bound: Sum of the drifts since each task was learned, as a bound.
        num_components: (k_out, k_in) of the result.
        basis_changed: Whether the merge changed the basis. It does not if the basis already explained the new updates.
    """

    new_tasks: tuple[str, ...]
    drift: dict[str, float]
    drift_bound: dict[str, float]
    num_components: tuple[int, int]
    basis_changed: bool


@dataclass(frozen=True)
class _Merge:
    """Inputs of one merge of one layer.

    Args:
        layer: Layer before the merge.
        new_tasks: Names of the new tasks.
        norms: (tasks + new tasks,), norms of all updates as learned.
        noise: (new tasks,), relative bound on how much rounding changed a new update, or hid of its drift.
        coordinates: (n, q_out) and (d, q_in), orthonormal.
        stack: All updates in these coordinates.
        unbalanced: Whether the factors of the new updates have yet to be balanced.
        coefficient_dtype: Type that coefficients are stored in.
        tolerance: Relative error up to which a new task takes a smaller rank. None means that no rank is cut.
        uncut: (new tasks,) bool, whether a new task keeps its rank in spite of the tolerance.
    """

    layer: LayerSubspace
    new_tasks: tuple[str, ...]
    norms: Tensor
    noise: Tensor
    coordinates: tuple[Tensor, Tensor]
    stack: UpdateStack
    unbalanced: bool
    coefficient_dtype: CoefficientDtype
    tolerance: float | None
    uncut: Tensor

    @property
    def weights(self) -> Tensor:
        """Weights (tasks + new tasks,), ``1 / ‖ΔW_i‖`` or 0 for an update that is zero."""
        return torch.cat([self.stack.old_weights, self.stack.new_weights])

    @property
    def nothing_lost(self) -> Tensor:
        """Zeros (tasks,), the loss of old tasks that are not moved."""
        return torch.zeros_like(self.layer.records.norms)


# A layer after a merge, and the relative drift (tasks,) that the merge caused.
_Merged = tuple[LayerSubspace, Tensor]


def merge_into_layer(
    layer: LayerSubspace,
    updates: Mapping[str, LowRankUpdate],
    settings: SubspaceSettings,
    scratch: Scratch | None = None,
    *,
    tolerance: float | None = None,
    uncut: Collection[str] = (),
) -> tuple[LayerSubspace, LayerMergeReport]:
    """Add updates to a layer, with a new basis, analytic coefficients of every task, and a certificate of their drift.

    Merging into `LayerSubspace.empty` initializes the subspace from adapters.

    Args:
        layer: Layer before the merge; not changed.
        updates: Updates of the new tasks by name, each of the layer's shape.
        settings: Settings such as k, p, the kind of basis, and the tolerated drift.
        scratch: Memory that the merges of several layers share.
        tolerance: Relative part of an update that may lie outside the basis without a change of the basis. If not
            given, only rounding errors are tolerated. The error of an update due to p < r does not count, because no
            basis removes it. This is not the tolerance of `settings`, which is about ranks.
        uncut: Names of new tasks that keep the rank they come with, up to p, whatever the tolerance of `settings`,
            because it was applied to them before.

    Returns:
        The new layer, in the dtype of the old basis, and the report.

    Raises:
        ValueError: If a name is taken, a shape is not the layer's, a factor is not finite, or a task cannot be stored
            in the layer's dtype within a bound. The error names the task.
        DriftToleranceError: If no number of components up to `max_components` meets `drift_tolerance`.
    """
    _check_updates(layer, updates, settings)
    for room in _rooms(layer, updates, settings):
        merge = _prepared(layer, updates, settings, room, scratch or Scratch(), uncut)
        try:
            merged, drift = _merged(merge, settings, max(tolerance or 0.0, NEGLIGIBLE_RESIDUAL))
            break
        except DriftToleranceError:
            if not room:
                raise
    report = LayerMergeReport(
        new_tasks=merge.new_tasks,
        drift=dict(zip(merged.tasks, drift.tolist(), strict=True)),
        drift_bound=dict(zip(merged.tasks, merged.records.drift_bounds.tolist(), strict=True)),
        num_components=merged.num_components,
        basis_changed=merged.basis_out is not layer.basis_out,
    )
    return merged, report


def _merged(merge: _Merge, settings: SubspaceSettings, explained: float) -> _Merged:
    if min(merge.layer.num_components) == 0 and merge.stack.new_weights.any():
        return _search(merge, settings)  # there is no basis yet
    unchanged = candidate_of(merge.stack, (old_basis_of(merge.stack), old_basis_of(merge.stack.mirrored)))
    if (unchanged.span_error <= explained).all():
        kept, drift = _with_old_basis(merge, unchanged)
        added = _tolerated_part(kept.records)[len(merge.layer.tasks) :]
        if settings.drift_tolerance is None or (added <= settings.drift_tolerance).all():
            return kept, drift
    return _search(merge, settings)


def residual_outside(layer: LayerSubspace, update: LowRankUpdate) -> float:
    """Return the relative part of an update that the basis does not explain, ``‖ΔW - ββ^T ΔW αα^T‖ / ‖ΔW‖``.

    It is computed from the factors themselves, not as a difference of squared norms.
    """
    batch = batch_of_few(layer, {"": update}, as_they_are=False)
    weights = torch.ones(len(layer.tasks) + 1, dtype=torch.float64, device=layer.basis_out.device)
    weights[-1] = inverse_norms(batch.norms)
    _, stack = exact_coordinates(layer, batch, weights)
    return float(candidate_of(stack, (old_basis_of(stack), old_basis_of(stack.mirrored))).span_error)


def _check_updates(layer: LayerSubspace, updates: Mapping[str, LowRankUpdate], settings: SubspaceSettings) -> None:
    for task, update in updates.items():
        if layer.has(task):
            raise ValueError(f"task {task!r} is already in the layer")
        if update.shape != layer.shape:
            raise ValueError(f"the update of task {task!r} is {update.shape}, the layer is {layer.shape}")
    if (expected := rank_in_layer(settings.pseudo_rank, layer.shape)) != layer.pseudo_rank:
        raise ValueError(f"pseudo_rank is {expected}, the layer's tasks have {layer.pseudo_rank}")


def _rooms(layer: LayerSubspace, updates: Mapping[str, LowRankUpdate], settings: SubspaceSettings) -> Iterator[int]:
    """Yield numbers of directions to find, growing for as long as the tolerated drift is not met, and 0 for all."""
    columns = sum(update.out_factor.shape[1] for update in updates.values())
    room = max(settings.num_components, *layer.num_components) + OVERSAMPLING
    if columns > EXACT_COLUMNS:
        while 4 * room < columns:
            yield room
            room *= 2
    yield 0


def _prepared(
    layer: LayerSubspace,
    updates: Mapping[str, LowRankUpdate],
    settings: SubspaceSettings,
    room: int,
    scratch: Scratch,
    uncut: Collection[str],
) -> _Merge:
    joint = settings.basis == "joint"
    if room:
        batch = batch_of_many(layer, updates, scratch, as_they_are=not joint)
    else:
        batch = batch_of_few(layer, updates, as_they_are=not joint)
    norms = torch.cat([layer.records.norms, batch.norms])
    weights = inverse_norms(norms)
    if isinstance(batch, LargeBatch):
        coordinates, stack, rounding = found_coordinates(layer, batch, weights, room, joint=joint)
    else:
        coordinates, stack = exact_coordinates(layer, batch, weights)
        rounding = torch.zeros_like(batch.norms)
    noise = (batch.noise + rounding) * stack.new_weights
    return _Merge(
        layer,
        tuple(updates),
        norms,
        noise,
        coordinates,
        stack,
        unbalanced=joint and bool(room),
        coefficient_dtype=settings.coefficient_dtype,
        tolerance=settings.tolerance,
        uncut=torch.tensor([task in uncut for task in updates], dtype=torch.bool, device=norms.device),
    )


def _search(merge: _Merge, settings: SubspaceSettings) -> _Merged:
    """Return the smallest result that meets the drift tolerance, or, if there is none, the one at `num_components`.

    Drift is not monotone in k, so k is scanned upward, one by one. The effect of rounding is only known for a complete
    result, which is not computed where the directions alone lose too much.

    Raises:
        DriftToleranceError: If no result meets the tolerance.
    """
    stack, tolerance = merge.stack, settings.drift_tolerance
    candidate = candidate_of(stack, choose_directions(stack, settings, settings.num_components))
    if tolerance is None:
        return _with_new_basis(merge, candidate)
    limit = max(stack.rotation_out.shape[0], stack.rotation_in.shape[0])
    if settings.max_components is not None:
        limit = min(limit, settings.max_components)
    widest = replace(settings, explained_variance=None)
    cap = max(candidate.out.kept, candidate.in_.kept)
    while True:
        worst = _worst_drift(merge, candidate)
        if worst <= tolerance:
            result = _with_new_basis(merge, candidate)
            worst = float(_tolerated_part(result[0].records).max())
            if worst <= tolerance:
                return result
        cap += 1
        if cap > limit:
            break
        candidate = candidate_of(stack, choose_directions(stack, widest, cap))
    most = (
        "there is room for"
        if settings.max_components is None
        else f"max_components = {settings.max_components} allows"
    )
    exact = settings.coefficient_dtype == "float32"
    rounded = "" if exact else f"; coefficient_dtype = {settings.coefficient_dtype!r} rounds, and that counts"
    raise DriftToleranceError(
        f"drift_tolerance is {tolerance:g}, but with {limit} components, the most that {most} here, a task would "
        f"have drifted {worst:.3g} in all{rounded}"
    )


def _worst_drift(merge: _Merge, candidate: Candidate) -> float:
    """Return the largest drift before rounding: of old tasks by all merges, and of new tasks by the basis alone."""
    drift = move_old_tasks(merge.stack, candidate).lost * merge.stack.old_weights
    return float(torch.cat([_tolerated_part(merge.layer.records) + drift, candidate.span_error]).max())


def _tolerated_part(records: TaskRecords) -> Tensor:
    """Return the bounds (tasks,) without the cost of p < r, which no basis changes and the tolerance leaves out."""
    return records.drift_bounds - records.rank_errors


def _with_new_basis(merge: _Merge, candidate: Candidate) -> _Merged:
    """Return the layer in the candidate's basis, rounded to its dtype, and the drift (tasks,) of this merge.

    The certificate covers what is written: the bounds include the rounding of basis and coefficients.
    """
    layer, stack, coordinates = merge.layer, merge.stack, merge.coordinates
    dtype, old_count = layer.basis_out.dtype, len(layer.tasks)
    sides = (side.oriented(of) for side, of in zip((candidate.out, candidate.in_), coordinates, strict=True))
    candidate = Candidate(*sides, candidate.span_error)
    basis_out, slack_out = rounded_basis(coordinates[0] @ candidate.out.basis, dtype)
    basis_in, slack_in = rounded_basis(coordinates[1] @ candidate.in_.basis, dtype)
    moved = move_old_tasks(stack, candidate, merge.coefficient_dtype)
    new_out, new_in, rank_errors = _new_coefficients(merge, candidate)
    coefficients_out, coefficients_in = moved.coefficients_out, moved.coefficients_in
    stored = coefficients_out[old_count:], coefficients_in[old_count:]
    rounding = moved.rounding.append(store((new_out, new_in), stored, merge.coefficient_dtype, dim=-2))
    bound = rounding_bound(rounding, torch.tensor([slack_out, slack_in]).to(merge.norms))
    spectrum_out = candidate.out.spectrum[: candidate.out.kept]
    spectrum_in = candidate.in_.spectrum[: candidate.in_.kept]
    _check_storable(merge, bound + rounding.changes, dtype, (spectrum_out, spectrum_in))
    records, drift = _records(merge, moved.lost, candidate.span_error, rank_errors, bound, rounding.changes)
    merged = LayerSubspace(
        tasks=(*layer.tasks, *merge.new_tasks),
        basis_out=basis_out,
        basis_in=basis_in,
        coefficients_out=coefficients_out,
        coefficients_in=coefficients_in,
        records=records,
        spectrum_out=spectrum_out,
        spectrum_in=spectrum_in,
    )
    return replace(merged, explained_by_basis=merged.explained_variance()), drift


def _with_old_basis(merge: _Merge, candidate: Candidate) -> _Merged:
    """Return the layer with new tasks projected on its present basis; old tasks keep their coefficients to the bit."""
    layer, stack, dtype = merge.layer, merge.stack, merge.layer.basis_out.dtype
    new_out, new_in, rank_errors = _new_coefficients(merge, candidate)
    new_out, new_in = _in_old_basis(new_out, stack.rotation_out), _in_old_basis(new_in, stack.rotation_in)
    stored_out, stored_in = torch.empty_like(new_out, dtype=dtype), torch.empty_like(new_in, dtype=dtype)
    rounding = store((new_out, new_in), (stored_out, stored_in), merge.coefficient_dtype, dim=-2)
    new_bound = rounding_bound(rounding, torch.zeros(2).to(merge.norms))
    bound, changes = torch.cat([merge.nothing_lost, new_bound]), torch.cat([merge.nothing_lost, rounding.changes])
    _check_storable(merge, bound + changes, dtype)
    records, drift = _records(merge, merge.nothing_lost, candidate.span_error, rank_errors, bound, changes)
    merged = replace(
        layer,
        tasks=(*layer.tasks, *merge.new_tasks),
        coefficients_out=torch.cat([layer.coefficients_out, stored_out]),
        coefficients_in=torch.cat([layer.coefficients_in, stored_in]),
        records=records,
    )
    return merged, drift


def _new_coefficients(merge: _Merge, candidate: Candidate) -> tuple[Tensor, Tensor, Tensor]:
    return new_coefficients(
        merge.stack,
        candidate,
        merge.layer.pseudo_rank,
        balance=merge.unbalanced,
        tolerance=merge.tolerance,
        uncut=merge.uncut,
    )


def _check_storable(merge: _Merge, rounding: Tensor, dtype: torch.dtype, spectra: tuple[Tensor, ...] = ()) -> None:
    """Check that the dtype can hold a result; overflow and underflow show as the rounding of single tasks.

    Raises:
        ValueError: If it cannot. The error names the task that rounding changes most.
    """
    relative = rounding * merge.weights
    overflows = any(not torch.isfinite(spectrum.float()).all() for spectrum in spectra)
    if not overflows and (relative <= MOST_ROUNDING[merge.coefficient_dtype]).all():
        return
    kept_in = str(dtype).removeprefix("torch.") if merge.coefficient_dtype == "float32" else merge.coefficient_dtype
    worst = int(relative.nan_to_num(torch.inf).argmax())
    task = (*merge.layer.tasks, *merge.new_tasks)[worst]
    raise ValueError(
        f"task {task!r}: its update of norm {float(merge.norms[worst]):.3g} cannot be stored in {kept_in} beside the "
        "others with any precision; expected updates with factors of more usual sizes (basis='joint' balances them)"
    )


def _records(
    merge: _Merge, lost: Tensor, span_error: Tensor, rank_errors: Tensor, rounding: Tensor, changes: Tensor
) -> tuple[TaskRecords, Tensor]:
    """Return the records of all tasks after a merge, and the drift (tasks + new tasks,) that it caused.

    Args:
        merge: Inputs of the merge.
        lost: (tasks,), absolute loss ``‖ΔW_i' - ΔW_i‖`` of the old tasks.
        span_error: (new tasks,), relative part outside the directions.
        rank_errors: (new tasks,), absolute loss to a rank above p.
        rounding: (tasks + new tasks,), absolute bound on the rounding.
        changes: (tasks + new tasks,), absolute change by storing coefficients in fewer bits.
    """
    old, stack = merge.layer.records, merge.stack
    old_changes, new_changes = (changes * merge.weights).split([len(lost), len(span_error)])
    # The change by storing lies inside the basis, and the loss outside of it.
    old_drift = torch.hypot(lost * stack.old_weights, old_changes)
    rank_errors = rank_errors * stack.new_weights
    new_drift = (span_error.square() + rank_errors.square() + new_changes.square()).sqrt()
    bounds = torch.cat([old.drift_bounds + old_drift, span_error + rank_errors + new_changes + merge.noise])
    estimates = torch.cat([(old.drift_estimates.square() + old_drift.square()).sqrt(), new_drift])
    records = TaskRecords(
        norms=merge.norms,
        rank_errors=torch.cat([old.rank_errors, rank_errors]),
        drift_bounds=bounds + rounding * merge.weights,
        drift_estimates=estimates,
    )
    return records, torch.cat([old_drift, new_drift])


def _in_old_basis(coefficients: Tensor, rotation: Tensor) -> Tensor:
    """Convert coefficients in the first coordinates of a merge to the old basis, which spans these."""
    k = rotation.shape[1]
    return torch.linalg.solve_triangular(rotation[:k], coefficients, upper=True)
