"""What a merge reports about drift, and what it does to stay under a tolerance."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from share_hf.subspace import (
    BasisKind,
    DriftToleranceError,
    LayerMergeReport,
    LayerSubspace,
    LowRankUpdate,
    SubspaceSettings,
    merge_into_layer,
)

from .streams import Stream, dense_learned, dense_of, examples, random_update, streams


SINGLE_PRECISION = 5e-7


def relative_change(before: Tensor, after: Tensor, learned: Tensor) -> float:
    return float((after - before).norm() / learned.norm())


def state_bytes(layer: LayerSubspace) -> bytes:
    """Return every number of a layer, as bytes."""
    tensors = [value for field in fields(layer) if isinstance(value := getattr(layer, field.name), Tensor)]
    tensors += [getattr(layer.records, field.name) for field in fields(layer.records)]
    return b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)


def merged_drift(layer: LayerSubspace, report: LayerMergeReport) -> Tensor:
    """Return what the tolerance applies to, per task: the bound without what a rank over p lost."""
    assert report.drift_bound == dict(zip(layer.tasks, layer.records.drift_bounds.tolist(), strict=True))
    return layer.records.drift_bounds - layer.records.rank_errors


def assert_certificate_holds(stream: Stream, dtype: torch.dtype, *, drift_tolerance: float) -> None:
    """Compare reported drifts with dense ones, after every merge and for every task that still counts."""
    layer, learned, counted = stream.empty(dtype), {}, set()
    for updates in stream.merges():
        before = {task: dense_of(layer, task) for task in layer.tasks}
        layer, report = merge_into_layer(layer, updates, stream.settings)
        for task, update in updates.items():
            learned[task] = dense_learned(update)
            if layer.records.norms[layer.index(task)] > 0:
                counted.add(task)
        for task in counted:
            after = dense_of(layer, task)
            drift = relative_change(before.get(task, learned[task]), after, learned[task])
            assert report.drift[task] == pytest.approx(drift, rel=0, abs=drift_tolerance)
            since_learning = relative_change(learned[task], after, learned[task])
            assert since_learning <= report.drift_bound[task] + 1e-12


@examples(80)
@given(streams("joint"))
def test_joint_drift_is_exact_and_the_bound_a_bound(stream: Stream) -> None:
    assert_certificate_holds(stream, torch.float64, drift_tolerance=1e-11)


@examples(60)
@given(streams("factor"))
def test_factor_drift_is_exact_and_the_bound_a_bound(stream: Stream) -> None:
    assert_certificate_holds(stream, torch.float64, drift_tolerance=1e-11)


@examples(80)
@given(streams("joint"))
def test_the_bound_of_a_joint_layer_includes_the_rounding_to_float32(stream: Stream) -> None:
    assert_certificate_holds(stream, torch.float32, drift_tolerance=SINGLE_PRECISION)


@examples(60)
@given(streams("factor"))
def test_the_bound_of_a_factor_layer_includes_the_rounding_to_float32(stream: Stream) -> None:
    assert_certificate_holds(stream, torch.float32, drift_tolerance=SINGLE_PRECISION)


@examples(40)
@given(streams("joint", most_merges=1, kinds=("random", "related")), st.sampled_from(["joint", "factor"]))
def test_the_estimate_of_a_new_task_is_its_exact_compression_error(stream: Stream, basis: BasisKind) -> None:
    (updates,) = stream.merges()

    layer, _ = merge_into_layer(stream.empty(), updates, replace(stream.settings, basis=basis))

    for i, (task, update) in enumerate(updates.items()):
        learned = dense_learned(update)
        error = relative_change(learned, dense_of(layer, task), learned)
        assert float(layer.records.drift_estimates[i]) == pytest.approx(error, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("basis", ["joint", "factor"])
def test_the_estimate_of_a_task_stored_exactly_is_its_exact_drift_after_one_merge(basis: BasisKind) -> None:
    generator = torch.Generator().manual_seed(0)
    settings = SubspaceSettings(num_components=6, pseudo_rank=3, basis=basis)
    first = {task: random_update(generator, (20, 15), 3) for task in ("a", "b")}
    second = {task: random_update(generator, (20, 15), 3) for task in ("c", "d")}
    layer, report = merge_into_layer(LayerSubspace.empty(20, 15, 3, dtype=torch.float64), first, settings)
    assert max(report.drift.values()) < 1e-12

    layer, _ = merge_into_layer(layer, second, settings)

    for i, task in enumerate(first):
        drift = relative_change(dense_learned(first[task]), dense_of(layer, task), dense_learned(first[task]))
        assert drift > 0.1
        assert float(layer.records.drift_estimates[i]) == pytest.approx(drift, rel=1e-9)
        assert float(layer.records.drift_bounds[i]) == pytest.approx(drift, rel=1e-9)


@pytest.mark.parametrize("basis", ["joint", "factor"])
def test_over_many_merges_the_estimate_stays_close_and_the_bound_above(basis: BasisKind) -> None:
    generator = torch.Generator().manual_seed(0)
    settings = SubspaceSettings(num_components=8, pseudo_rank=2, basis=basis)
    common = random_update(generator, (30, 20), 6)
    layer, learned = LayerSubspace.empty(30, 20, 2), {}
    for step in range(20):
        mix, noise = torch.randn(6, 2, generator=generator, dtype=torch.float64), random_update(generator, (30, 20), 2)
        update = LowRankUpdate(
            common.out_factor @ mix + 0.3 * noise.out_factor, common.in_factor @ mix + 0.3 * noise.in_factor
        )
        learned[f"task_{step}"] = dense_learned(update)
        layer, report = merge_into_layer(layer, {f"task_{step}": update}, settings)

    for i, task in enumerate(layer.tasks):
        drift = relative_change(learned[task], dense_of(layer, task), learned[task])
        assert drift <= report.drift_bound[task]
        assert float(layer.records.drift_estimates[i]) == pytest.approx(drift, rel=0.2)
    assert layer.records.drift_bounds.max() > 0.2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, SINGLE_PRECISION)])
@pytest.mark.parametrize("basis", ["joint", "factor"])
@examples(30)
@given(seed=st.integers(0, 2**31), out_features=st.integers(12, 40), in_features=st.integers(12, 40))
def test_nothing_drifts_while_every_direction_has_room(
    basis: BasisKind, dtype: torch.dtype, tolerance: float, seed: int, out_features: int, in_features: int
) -> None:
    generator, shape = torch.Generator().manual_seed(seed), (out_features, in_features)
    settings = SubspaceSettings(num_components=12, pseudo_rank=2, basis=basis)
    layer, learned = LayerSubspace.empty(*shape, 2, dtype=dtype), {}
    for step in range(6):
        update = random_update(generator, shape, 2, scale=10.0 ** (step % 3))
        learned[f"task_{step}"] = dense_learned(update)
        layer, report = merge_into_layer(layer, {f"task_{step}": update}, settings)

        assert report.num_components == (2 * step + 2, 2 * step + 2)
        assert max(report.drift.values()) < tolerance
    for task, update in learned.items():
        assert relative_change(update, dense_of(layer, task), update) < 6 * tolerance


def test_what_the_rank_costs_a_new_task_is_kept_apart_from_its_drift() -> None:
    update = random_update(torch.Generator().manual_seed(0), (20, 15), 6)
    settings = SubspaceSettings(num_components=8, pseudo_rank=2)

    layer, report = merge_into_layer(LayerSubspace.empty(20, 15, 2, dtype=torch.float64), {"wide": update}, settings)

    values = torch.linalg.svdvals(dense_learned(update))
    expected = float(values[2:].norm() / values.norm())
    assert float(layer.records.rank_errors[0]) == pytest.approx(expected, rel=1e-9)
    assert report.drift["wide"] == pytest.approx(expected, rel=1e-9)
    assert float(merged_drift(layer, report)[0]) == pytest.approx(0, abs=1e-12)


@examples(60)
@given(streams("joint", largest_exponent=1.0), st.floats(0.02, 0.9), st.sampled_from(["joint", "factor"]))
def test_a_layer_grows_just_enough_to_meet_the_tolerance(stream: Stream, tolerance: float, basis: BasisKind) -> None:
    settings = replace(stream.settings, basis=basis, drift_tolerance=tolerance)
    layer = stream.empty()
    for updates in stream.merges():
        merged, report = merge_into_layer(layer, updates, settings)

        assert float(merged_drift(merged, report).max()) <= tolerance + 1e-12
        grown = min(max(report.num_components), min(stream.shape) + 1) if report.basis_changed else 0
        for smaller in range(settings.num_components, grown):
            cut, cut_report = merge_into_layer(
                layer, updates, replace(settings, num_components=smaller, drift_tolerance=None)
            )
            assert float(merged_drift(cut, cut_report).max()) > tolerance
        layer = merged


def test_a_layer_that_meets_the_tolerance_anyway_does_not_grow() -> None:
    generator = torch.Generator().manual_seed(0)
    updates = {task: random_update(generator, (20, 15), 2) for task in ("a", "b", "c")}
    settings = SubspaceSettings(num_components=4, pseudo_rank=2)
    empty = LayerSubspace.empty(20, 15, 2)
    free, report = merge_into_layer(empty, updates, settings)
    assert 0.1 < max(report.drift.values()) < 0.95

    held, _ = merge_into_layer(empty, updates, replace(settings, drift_tolerance=0.95))

    assert state_bytes(held) == state_bytes(free)


@pytest.mark.parametrize("basis", ["joint", "factor"])
def test_a_layer_grows_past_its_explained_variance_to_meet_the_tolerance(basis: BasisKind) -> None:
    generator = torch.Generator().manual_seed(0)
    updates = {task: random_update(generator, (20, 15), 2) for task in ("a", "b", "c")}
    settings = SubspaceSettings(num_components=3, pseudo_rank=2, basis=basis, explained_variance=0.3)
    empty = LayerSubspace.empty(20, 15, 2)
    free, _ = merge_into_layer(empty, updates, settings)
    assert max(free.num_components) < 3

    held, report = merge_into_layer(empty, updates, replace(settings, drift_tolerance=0.2))

    assert min(held.num_components) > 3
    assert float(merged_drift(held, report).max()) <= 0.2 + SINGLE_PRECISION


@pytest.mark.parametrize("basis", ["joint", "factor"])
def test_a_merge_that_cannot_meet_the_tolerance_leaves_the_layer_as_it_was(basis: BasisKind) -> None:
    generator = torch.Generator().manual_seed(0)
    settings = SubspaceSettings(num_components=4, pseudo_rank=2, basis=basis, drift_tolerance=0.05, max_components=5)
    first = {task: random_update(generator, (20, 15), 2) for task in ("a", "b")}
    layer, _ = merge_into_layer(LayerSubspace.empty(20, 15, 2), first, settings)
    before = state_bytes(layer)

    with pytest.raises(DriftToleranceError) as error:
        merge_into_layer(layer, {"c": random_update(generator, (20, 15), 2)}, settings)

    assert state_bytes(layer) == before
    assert layer.tasks == ("a", "b")
    message = str(error.value)
    assert message.startswith("drift_tolerance is 0.05, but with 5 components")
    assert "max_components = 5" in message
    drift = float(message.split("a task would have drifted ")[1].split()[0])
    assert 0.05 < drift < 1


def test_the_tolerance_does_not_apply_to_what_the_rank_costs() -> None:
    update = random_update(torch.Generator().manual_seed(0), (20, 15), 6)
    settings = SubspaceSettings(num_components=4, pseudo_rank=2, drift_tolerance=1e-3)

    layer, report = merge_into_layer(LayerSubspace.empty(20, 15, 2), {"wide": update}, settings)

    assert report.drift["wide"] > 0.1
    assert layer.num_components == (6, 6)


@examples(30)
@given(streams("joint", kinds=("random", "related"), most_merges=3, largest_exponent=1.0))
def test_a_merge_does_not_change_its_input(stream: Stream) -> None:
    layer = stream.empty(torch.float32)
    for updates in stream.merges():
        factors = [(u.out_factor.clone(), u.in_factor.clone()) for u in updates.values()]
        before = state_bytes(layer)

        merged, _ = merge_into_layer(layer, updates, stream.settings)

        assert state_bytes(layer) == before
        for update, (out_factor, in_factor) in zip(updates.values(), factors, strict=True):
            assert torch.equal(update.out_factor, out_factor)
            assert torch.equal(update.in_factor, in_factor)
        layer = merged


def test_the_tolerance_holds_for_the_bound_that_is_reported() -> None:
    generator = torch.Generator().manual_seed(0)
    updates = {f"task_{i}": random_update(generator, (20, 16), 2) for i in range(4)}
    settings = SubspaceSettings(num_components=4, pseudo_rank=2)
    empty = LayerSubspace.empty(20, 16, 2)
    _, free = merge_into_layer(empty, updates, settings)
    tolerance = max(free.drift.values()) * (1 + 1e-12)

    layer, report = merge_into_layer(empty, updates, replace(settings, drift_tolerance=tolerance))

    assert float(merged_drift(layer, report).max()) <= tolerance
    merge_into_layer(
        layer, {"next": random_update(generator, (20, 16), 2)}, replace(settings, drift_tolerance=tolerance)
    )


def test_a_small_new_direction_is_kept_beside_many_tasks_while_there_is_room() -> None:
    generator = torch.Generator().manual_seed(0)
    settings = SubspaceSettings(num_components=8, pseudo_rank=2, drift_tolerance=1e-6)
    common, other = random_update(generator, (40, 40), 1), random_update(generator, (40, 40), 1)
    layer, _ = merge_into_layer(LayerSubspace.empty(40, 40, 2, dtype=torch.float64), {"task_0": common}, settings)
    for i in range(1, 1000):
        layer = layer.with_task(f"task_{i}", layer.coefficients_out[0], layer.coefficients_in[0])
    part = 2e-6 * float(dense_learned(common).norm() / dense_learned(other).norm())
    update = LowRankUpdate(
        torch.cat([common.out_factor, part * other.out_factor], dim=1),
        torch.cat([common.in_factor, other.in_factor], dim=1),
    )

    layer, report = merge_into_layer(layer, {"new": update}, settings)

    assert layer.num_components == (2, 2)
    assert report.drift["new"] <= 1e-6
