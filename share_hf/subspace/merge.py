"""Merging new updates into a layer (Sec. 3.2.3 of the paper), at a cost that does not depend on the number of tasks.

The work on matrices with n or d rows is one QR of the basis beside the new factors and one product, whatever the
number of tasks; what grows with it is O(tasks p k²) in coordinates of at most k + m. Every merge certifies what it did
to each task, at whatever scale the task is, and what the bound says holds for what is stored, rounding included.
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
            task, its own compression error. Exact up to the rounding of what is stored in float32, which only the
            bound includes.
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
class _Merge:
    """What goes into one merge of one layer.

    Args:
        layer: As it was.
        new_tasks: Names of the new tasks.
        norms: (tasks + new tasks,), of all updates as learned.
        noise: (new tasks,), relative size of what rounding may have changed of a new update, or hidden of its drift.
        coordinates: (n, q_out) and (d, q_in), orthonormal.
        stack: All updates in these coordinates.
        unbalanced: Whether the factors of the new updates are still to get equal shares of them.
        coefficient_dtype: What coefficients are stored in.
        tolerance: Relative error up to which a new task takes a smaller rank.
        uncut: Which of the new tasks (new tasks,) bool keep their rank whatever it says.
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
        """(tasks + new tasks,), ``1 / ‖ΔW_i‖``, or 0 for an update that is zero."""
        return torch.cat([self.stack.old_weights, self.stack.new_weights])

    @property
    def nothing_lost(self) -> Tensor:
        """Zeros (tasks,), the change of old tasks that are not moved."""
        return torch.zeros_like(self.layer.records.norms)


# A layer after a merge, and the relative drift (tasks,) by it.
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
    """Add updates to a layer: new basis, analytic coefficients of every task, and a certificate of their drift.

    Merging into `LayerSubspace.empty` is the initialization of the subspace from adapters.

    Args:
        layer: The layer as it is; not changed.
        updates: New tasks by name, each an update of the layer's shape.
        settings: k, p, the kind of basis, and the drift that is tolerated.
        scratch: Memory that the merges of several layers share.
        tolerance: Relative part of an update that may be outside the basis for the basis to stay as it is; rounding
            errors if not given. What p < r costs an update does not count: no basis removes it. Another thing than
            the tolerance of `settings`, which is about ranks.
        uncut: New tasks that keep the rank they come with, up to p, whatever the tolerance of `settings`: it was
            applied to them before.

    Returns:
        The new layer, in the dtype of the old one's basis, and the report.

    Raises:
        ValueError: If a name is taken, a shape is not the layer's, a factor is not finite, or a task cannot be stored
            in the layer's dtype within a bound; naming the task.
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
        return _search(merge, settings)  # nothing explains an update yet
    unchanged = candidate_of(merge.stack, (old_basis_of(merge.stack), old_basis_of(merge.stack.mirrored)))
    if (unchanged.span_error <= explained).all():
        kept, drift = _with_old_basis(merge, unchanged)
        added = _tolerated_part(kept.records)[len(merge.layer.tasks) :]
        if settings.drift_tolerance is None or (added <= settings.drift_tolerance).all():
            return kept, drift
    return _search(merge, settings)


def residual_outside(layer: LayerSubspace, update: LowRankUpdate) -> float:
    """Relative part of an update that the layer's basis does not explain, ``‖ΔW - ββ^T ΔW αα^T‖ / ‖ΔW‖``.

    Measured on the factors themselves, not as a difference of squared norms.
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
    """How many directions to find for a merge, more and more while a tolerated drift is not met; 0 for all."""
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
    """The smallest result that meets the drift tolerance; without one, the result at `num_components`.

    Drift is not monotone in k, so k is scanned upward, one by one. What rounding adds is only known of a whole result,
    which is not computed where the directions alone lose too much.

    Raises:
        DriftToleranceError: If none meets it.
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
    """Largest drift the tolerance applies to, before rounding: of old tasks by merges, of new ones by the basis."""
    drift = move_old_tasks(merge.stack, candidate).lost * merge.stack.old_weights
    return float(torch.cat([_tolerated_part(merge.layer.records) + drift, candidate.span_error]).max())


def _tolerated_part(records: TaskRecords) -> Tensor:
    """What the tolerance applies to (tasks,): the bounds without what p < r cost a task, which no basis changes."""
    return records.drift_bounds - records.rank_errors


def _with_new_basis(merge: _Merge, candidate: Candidate) -> _Merged:
    """The layer in the candidate's basis, rounded to its dtype, and the drift (tasks,) of this merge.

    What is certified is what is written: the bounds include the rounding of basis and coefficients.
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
    """The layer with the new tasks projected on the basis it has; the old tasks keep their coefficients to the bit."""
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
    """Refuse a result that its dtype cannot hold: overflow and underflow are the rounding of single tasks.

    Raises:
        ValueError: Naming the task that it changes most.
    """
    relative = rounding * merge.weights
    overflows = any(not torch.isfinite(spectrum.float()).all() for spectrum in spectra)
    if not overflows and (relative <= MOST_ROUNDING[merge.coefficient_dtype]).all():
        return
    kept_in = str(dtype).removeprefix("torch.") if merge.coefficient_dtype == "float32" else merge.coefficient_dtype
    worst = int(relative.nan_to_num(torch.inf).argmax())
    task = (*merge.layer.tasks, *merge.new_tasks)[worst]
    raise ValueError(
        f"task {task!r}: its update of norm {float(merge.norms[worst]):.3g} cannot be stored in "
        f"{kept_in} beside the others with any precision; expected updates whose factors "
        "are of more usual sizes (basis='joint' balances them)"
    )


def _records(
    merge: _Merge, lost: Tensor, span_error: Tensor, rank_errors: Tensor, rounding: Tensor, changes: Tensor
) -> tuple[TaskRecords, Tensor]:
    """Records of all tasks after a merge, and its drift (tasks,).

    Args:
        merge: What went into it.
        lost: (tasks,), ``‖ΔW_i' - ΔW_i‖`` of the old tasks.
        span_error: (new tasks,), relative.
        rank_errors: (new tasks,), absolute.
        rounding: (tasks + new tasks,), absolute.
        changes: (tasks + new tasks,), absolute, by storing coefficients in fewer bits.
    """
    old, stack = merge.layer.records, merge.stack
    old_changes, new_changes = (changes * merge.weights).split([len(lost), len(span_error)])
    # What storing changes lies inside the basis, and what is lost outside of it.
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
    """Coefficients in the first coordinates of a merge, written in the old basis that spans them."""
    k = rotation.shape[1]
    return torch.linalg.solve_triangular(rotation[:k], coefficients, upper=True)
