"""What a merge does, besides agreeing with the reference and certifying drift."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from share_hf.subspace import (
    BasisKind,
    LayerSubspace,
    LowRankUpdate,
    SubspaceSettings,
    merge_into_layer,
    residual_outside,
)

from .reference import ReferenceLayer, explained_fraction, joint_basis, reference_merge
from .streams import Stream, dense_learned, dense_of, examples, random_update, streams


DTYPES = [torch.float64, torch.float32]
BASES: list[BasisKind] = ["joint", "factor"]
SHAPE = (14, 11)


def generated(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_updates(shape: tuple[int, int], ranks: Mapping[str, int], seed: int = 0) -> dict[str, LowRankUpdate]:
    generator = generated(seed)
    return {task: random_update(generator, shape, rank) for task, rank in ranks.items()}


def initialized(
    updates: Mapping[str, LowRankUpdate], settings: SubspaceSettings, dtype: torch.dtype = torch.float64
) -> LayerSubspace:
    shape = next(iter(updates.values())).shape
    return merge_into_layer(LayerSubspace.empty(*shape, settings.pseudo_rank, dtype=dtype), updates, settings)[0]


def orthonormality_error(basis: Tensor) -> float:
    basis = basis.double()
    return float(torch.linalg.matrix_norm(basis.T @ basis - torch.eye(basis.shape[1], dtype=torch.float64), ord=2))


def projection(basis: Tensor) -> Tensor:
    return basis.double() @ basis.double().T


def orthogonal_projection(basis: Tensor) -> Tensor:
    """Project onto the span of a basis that is orthonormal only to the precision in which it is stored."""
    return projection(torch.linalg.qr(basis.double()).Q)


def weighted_stack(updates: Mapping[str, LowRankUpdate]) -> list[Tensor]:
    dense = [dense_learned(update) for update in updates.values()]
    return [update / update.norm() for update in dense]


@examples(40)
@given(streams("joint", most_merges=3, largest_exponent=1.0, kinds=("random", "related")), st.floats(-3, 3, width=16))
def test_a_joint_merge_does_not_depend_on_how_adapters_are_factored(stream: Stream, exponent: float) -> None:
    generator = generated(stream.seed)
    layer, other, reference = stream.empty(), stream.empty(), ReferenceLayer.empty(*stream.shape)
    for updates in stream.merges():
        refactored = {}
        for task, update in updates.items():
            rank = update.out_factor.shape[1]
            turn = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64)).Q
            gauge = turn * torch.logspace(0, exponent, rank, dtype=torch.float64)
            refactored[task] = LowRankUpdate(update.out_factor @ gauge, update.in_factor @ torch.linalg.inv(gauge).T)
        reference, _ = reference_merge(reference, updates, stream.settings)
        assume(reference.gap > 1e-2)

        layer, report = merge_into_layer(layer, updates, stream.settings)
        other, other_report = merge_into_layer(other, refactored, stream.settings)

        assert other.num_components == layer.num_components
        assert other_report.drift == pytest.approx(report.drift, rel=0, abs=1e-8)
        for task in layer.tasks:
            torch.testing.assert_close(dense_of(other, task), dense_of(layer, task), rtol=0, atol=1e-7)


@pytest.mark.parametrize("loudness", [1e-6, 1e6])
def test_a_loud_adapter_does_not_buy_the_joint_basis(loudness: float) -> None:
    updates = random_updates(SHAPE, {"a": 3, "b": 3, "c": 3})
    scaled = {**updates, "a": LowRankUpdate(loudness * updates["a"].out_factor, updates["a"].in_factor)}
    settings = SubspaceSettings(num_components=5, pseudo_rank=3)

    layer, other = initialized(updates, settings), initialized(scaled, settings)

    torch.testing.assert_close(projection(other.basis_out), projection(layer.basis_out), rtol=0, atol=1e-9)
    torch.testing.assert_close(projection(other.basis_in), projection(layer.basis_in), rtol=0, atol=1e-9)


@examples(40)
@given(streams("joint", most_merges=1, kinds=("random", "related"), largest_exponent=1.0))
def test_the_joint_basis_explains_no_less_than_its_one_sided_start(stream: Stream) -> None:
    (updates,) = stream.merges()
    settings = replace(stream.settings, pseudo_rank=1)
    stack, cap = weighted_stack(updates), settings.num_components

    layer = initialized(updates, settings)

    start_out = torch.linalg.svd(torch.cat(stack, dim=1)).U[:, :cap]
    start_in = torch.linalg.svd(torch.cat(stack, dim=0).T).U[:, :cap]
    explained = explained_fraction(stack, layer.basis_out, layer.basis_in)
    assert explained >= explained_fraction(stack, start_out, start_in) - 1e-9


def test_the_joint_basis_explains_more_of_unlike_adapters_than_the_factor_basis() -> None:
    generator = generated()
    updates = {f"task_{i}": random_update(generator, (40, 30), 4, scale=3.0**i) for i in range(6)}
    settings = SubspaceSettings(num_components=12, pseudo_rank=4)

    joint, factor = initialized(updates, settings), initialized(updates, replace(settings, basis="factor"))

    assert joint.explained_variance() > factor.explained_variance() + 0.05


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_inside_the_basis_leaves_basis_and_old_coefficients_to_the_bit(
    dtype: torch.dtype, basis: BasisKind
) -> None:
    settings = SubspaceSettings(num_components=4, pseudo_rank=2, basis=basis)
    layer = initialized(random_updates(SHAPE, {"a": 2, "b": 2, "c": 2}), settings, dtype)
    generator = generated(1)
    mixes = [torch.randn(4, 2, generator=generator, dtype=torch.float64) for _ in range(2)]
    inside = LowRankUpdate(layer.basis_out.double() @ mixes[0], layer.basis_in.double() @ mixes[1])

    merged, report = merge_into_layer(layer, {"inside": inside}, settings)

    assert not report.basis_changed
    assert merged.basis_out is layer.basis_out
    assert merged.basis_in is layer.basis_in
    assert torch.equal(merged.coefficients_out[:3], layer.coefficients_out)
    assert torch.equal(merged.coefficients_in[:3], layer.coefficients_in)
    assert torch.equal(merged.records.drift_bounds[:3], layer.records.drift_bounds)
    assert torch.equal(merged.records.drift_estimates[:3], layer.records.drift_estimates)
    assert [report.drift[task] for task in layer.tasks] == [0, 0, 0]
    error = (dense_of(merged, "inside") - dense_learned(inside)).norm() / dense_learned(inside).norm()
    assert float(error) <= (1e-13 if dtype == torch.float64 else 3e-7)
    assert float(error) <= report.drift_bound["inside"] + 1e-15


def test_an_update_inside_the_basis_counts_in_the_explained_variance() -> None:
    settings = SubspaceSettings(num_components=3, pseudo_rank=2)
    layer = initialized(random_updates(SHAPE, {"a": 2, "b": 2}), settings)
    before = layer.explained_variance()
    assert before < 0.99

    merged, report = merge_into_layer(layer, {"again": layer.update_of("a")}, settings)

    assert not report.basis_changed
    assert merged.explained_variance() == pytest.approx((2 * before + 1) / 3, rel=1e-9)


def test_an_update_just_outside_the_basis_changes_it() -> None:
    settings = SubspaceSettings(num_components=4, pseudo_rank=2)
    layer = initialized(random_updates(SHAPE, {"a": 2}), settings)
    inside, outside = layer.update_of("a"), random_updates(SHAPE, {"b": 2}, seed=1)["b"]
    part = 1e-5 * inside.dense().norm() / outside.dense().norm()
    update = LowRankUpdate(
        torch.cat([inside.out_factor, part * outside.out_factor], dim=1),
        torch.cat([inside.in_factor, outside.in_factor], dim=1),
    )

    merged, report = merge_into_layer(layer, {"b": update}, settings)

    assert report.basis_changed
    assert merged.num_components == (4, 4)


@pytest.mark.parametrize("basis", BASES)
def test_zero_adapters_take_no_room_and_never_drift(basis: BasisKind) -> None:
    settings = SubspaceSettings(num_components=3, pseudo_rank=2, basis=basis)
    zero = LowRankUpdate(torch.zeros(SHAPE[0], 4), torch.randn(SHAPE[1], 4, generator=generated()))
    layer, report = merge_into_layer(LayerSubspace.empty(*SHAPE, 2), {"zero": zero}, settings)
    assert report.num_components == (0, 0)
    assert not report.basis_changed
    others = random_updates(SHAPE, {"a": 2, "b": 2})

    layer, report = merge_into_layer(layer, {**others, "other zero": zero}, settings)

    assert layer.tasks == ("zero", "a", "b", "other zero")
    assert report.drift["zero"] == report.drift["other zero"] == 0
    assert report.drift_bound["zero"] == report.drift_bound["other zero"] == 0
    assert layer.records.norms[0] == layer.records.norms[3] == 0
    assert not dense_of(layer, "zero").any()
    assert not dense_of(layer, "other zero").any()
    alone = initialized(others, settings, torch.float32)
    assert alone.num_components == layer.num_components == (3, 3)
    for task in others:
        torch.testing.assert_close(dense_of(layer, task), dense_of(alone, task), rtol=0, atol=1e-5)


def test_a_layer_of_zero_adapters_is_as_good_as_empty() -> None:
    settings = SubspaceSettings(num_components=3, pseudo_rank=2, drift_tolerance=0.1)
    zero = LowRankUpdate(torch.zeros(SHAPE[0], 2), torch.ones(SHAPE[1], 2))

    layer, report = merge_into_layer(LayerSubspace.empty(*SHAPE, 2), {"a": zero, "b": zero}, settings)

    assert report.drift == {"a": 0, "b": 0}
    assert layer.explained_variance() == 1
    assert layer.coefficients_out.shape == (2, 0, 2)
    assert layer.update_of("a").dense().shape == SHAPE


@pytest.mark.parametrize("together", [True, False])
def test_an_update_below_the_largest_but_not_far_keeps_its_directions(together: bool) -> None:
    settings = SubspaceSettings(num_components=4, pseudo_rank=2)
    updates = random_updates(SHAPE, {"loud": 2, "quiet": 2})
    quiet = {"quiet": LowRankUpdate(1e-6 * updates["quiet"].out_factor, updates["quiet"].in_factor)}
    layer = LayerSubspace.empty(*SHAPE, 2, dtype=torch.float64)

    for step in [{"loud": updates["loud"], **quiet}] if together else [{"loud": updates["loud"]}, quiet]:
        layer, _ = merge_into_layer(layer, step, settings)

    dense = dense_learned(quiet["quiet"])
    torch.testing.assert_close(dense_of(layer, "quiet"), dense, rtol=0, atol=1e-10 * float(dense.norm()))


@pytest.mark.parametrize("basis", BASES)
def test_a_direction_of_a_millionth_of_the_largest_is_kept_while_there_is_room(basis: BasisKind) -> None:
    update = random_updates(SHAPE, {"a": 2})["a"]
    left, right = torch.linalg.qr(update.out_factor).Q, torch.linalg.qr(update.in_factor).Q
    uneven = LowRankUpdate(left * torch.tensor([1.0, 1e-6], dtype=torch.float64), right)

    layer = initialized({"a": uneven}, SubspaceSettings(num_components=2, pseudo_rank=2, basis=basis))

    assert layer.num_components == (2, 2)
    torch.testing.assert_close(dense_of(layer, "a"), dense_learned(uneven), rtol=0, atol=1e-9)


@pytest.mark.parametrize("basis", BASES)
@examples(25)
@given(
    threshold=st.floats(0.05, 1.0),
    seed=st.integers(0, 2**31),
    out_features=st.integers(6, 30),
    in_features=st.integers(6, 30),
)
def test_no_fewer_components_reach_the_explained_variance(
    basis: BasisKind, threshold: float, seed: int, out_features: int, in_features: int
) -> None:
    shape = (out_features, in_features)
    updates = random_updates(shape, {"a": 2, "b": 1, "c": 3}, seed)
    settings = SubspaceSettings(num_components=6, pseudo_rank=3, basis=basis, explained_variance=threshold)

    layer = initialized(updates, settings)

    if basis == "joint":
        stack, k = weighted_stack(updates), max(layer.num_components)
        assert explained_fraction(stack, layer.basis_out, layer.basis_in) >= threshold - 1e-12
        assert layer.explained_variance() >= threshold - 1e-12
        if k > 1:
            basis_out, basis_in, gap = joint_basis(stack, k - 1)
            assume(gap > 1e-3)
            assert explained_fraction(stack, basis_out, basis_in) < threshold
        return
    for chosen, factors in zip(layer.num_components, ("out_factor", "in_factor"), strict=True):
        columns = torch.cat([getattr(update, factors) for update in updates.values()], dim=1)
        share = torch.linalg.svdvals(columns).square().cumsum(0) / columns.square().sum()
        assert share[chosen - 1] >= threshold - 1e-12
        assert chosen == 1 or share[chosen - 2] < threshold


@pytest.mark.parametrize("basis", BASES)
def test_the_explained_variance_never_takes_more_than_the_cap(basis: BasisKind) -> None:
    settings = SubspaceSettings(num_components=4, pseudo_rank=2, basis=basis, explained_variance=0.99)

    layer = initialized(random_updates(SHAPE, {"a": 2, "b": 2, "c": 2}), settings)

    assert layer.num_components == (4, 4)
    assert layer.explained_variance() < 0.99


@pytest.mark.parametrize("basis", BASES)
def test_a_layer_does_not_shrink_because_fewer_components_would_explain_enough(basis: BasisKind) -> None:
    wide = SubspaceSettings(num_components=6, pseudo_rank=2, basis=basis)
    layer = initialized(random_updates(SHAPE, {"a": 2, "b": 2, "c": 2}), wide)
    assert layer.num_components == (6, 6)

    merged, report = merge_into_layer(
        layer, random_updates(SHAPE, {"d": 2}, seed=1), replace(wide, explained_variance=0.2)
    )

    assert report.basis_changed
    assert merged.num_components == (6, 6)


@pytest.mark.parametrize("basis", BASES)
@examples(30)
@given(
    seed=st.integers(0, 2**31),
    rank=st.integers(3, 8),
    pseudo_rank=st.integers(1, 2),
    out_features=st.integers(6, 30),
    in_features=st.integers(6, 30),
)
def test_an_adapter_wider_than_the_pseudo_rank_gets_its_best_rank_in_the_basis(
    basis: BasisKind, seed: int, rank: int, pseudo_rank: int, out_features: int, in_features: int
) -> None:
    updates = random_updates((out_features, in_features), {"wide": rank, "other": 2}, seed)
    settings = SubspaceSettings(num_components=5, pseudo_rank=pseudo_rank, basis=basis)

    layer = initialized(updates, settings)

    inside = projection(layer.basis_out) @ dense_learned(updates["wide"]) @ projection(layer.basis_in)
    best_error = torch.linalg.svdvals(inside)[pseudo_rank:].norm()
    error = (inside - dense_of(layer, "wide")).norm()
    assert float(error) == pytest.approx(float(best_error), rel=1e-8, abs=1e-10)
    norm = dense_learned(updates["wide"]).norm()
    assert float(layer.records.rank_errors[0]) == pytest.approx(float(best_error / norm), rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("basis", BASES)
def test_the_factors_of_an_adapter_that_fits_are_kept_unsplit_only_in_factor_mode(basis: BasisKind) -> None:
    update = random_updates(SHAPE, {"a": 2})["a"]
    skewed = LowRankUpdate(1e3 * update.out_factor, update.in_factor)
    settings = SubspaceSettings(num_components=4, pseudo_rank=3, basis=basis)

    stored = initialized({"a": skewed}, settings).update_of("a")

    if basis == "factor":
        torch.testing.assert_close(stored.out_factor[:, :2], skewed.out_factor, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(stored.in_factor[:, :2], skewed.in_factor, rtol=1e-10, atol=1e-10)
    else:
        assert float(stored.out_factor.norm()) == pytest.approx(float(stored.in_factor.norm()), rel=1e-10)
    assert not stored.out_factor[:, 2:].any()
    assert not stored.in_factor[:, 2:].any()


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 5e-7)])
def test_the_basis_is_as_orthonormal_after_fifty_merges_as_after_one(
    dtype: torch.dtype, tolerance: float, basis: BasisKind
) -> None:
    generator, shape = generated(), (64, 48)
    settings = SubspaceSettings(num_components=8, pseudo_rank=4, basis=basis)
    layer = LayerSubspace.empty(*shape, 4, dtype=dtype)
    for step in range(50):
        update = random_update(generator, shape, 4, scale=10.0 ** (step % 5 - 2))
        layer, report = merge_into_layer(layer, {f"task_{step}": update}, settings)
        assert report.basis_changed

        assert orthonormality_error(layer.basis_out) < tolerance
        assert orthonormality_error(layer.basis_in) < tolerance
    assert layer.num_components == (8, 8)
    assert layer.basis_out.dtype == layer.basis_in.dtype == dtype


@pytest.mark.parametrize("basis", BASES)
def test_the_order_of_merges_does_not_matter_while_nothing_is_lost(basis: BasisKind) -> None:
    updates = random_updates((20, 16), {"a": 2, "b": 1, "c": 2, "d": 2})
    settings = SubspaceSettings(num_components=8, pseudo_rank=2, basis=basis)
    together = initialized(updates, settings)
    layer = LayerSubspace.empty(20, 16, 2, dtype=torch.float64)
    for task in ("d", "b", "a", "c"):
        layer, _ = merge_into_layer(layer, {task: updates[task]}, settings)

    torch.testing.assert_close(projection(layer.basis_out), projection(together.basis_out), rtol=0, atol=1e-9)
    for task, update in updates.items():
        torch.testing.assert_close(dense_of(layer, task), dense_learned(update), rtol=0, atol=1e-10)


@pytest.mark.parametrize("basis", BASES)
def test_the_order_of_adapters_in_one_merge_does_not_matter(basis: BasisKind) -> None:
    updates = random_updates((20, 16), {"a": 2, "b": 1, "c": 2, "d": 2})
    settings = SubspaceSettings(num_components=3, pseudo_rank=2, basis=basis)

    layer = initialized(updates, settings)
    other = initialized(dict(reversed(updates.items())), settings)

    assert other.tasks == ("d", "c", "b", "a")
    for task in updates:
        torch.testing.assert_close(dense_of(other, task), dense_of(layer, task), rtol=0, atol=1e-9)


@pytest.mark.parametrize("basis", BASES)
def test_a_removed_task_no_longer_counts_in_the_next_merge(basis: BasisKind) -> None:
    updates = random_updates((20, 16), {"a": 2, "b": 2, "c": 2})
    settings = SubspaceSettings(num_components=4, pseudo_rank=2, basis=basis)
    layer = initialized({task: updates[task] for task in ("a", "b")}, settings)

    merged, _ = merge_into_layer(layer.without_task("a"), {"c": updates["c"]}, settings)

    assert merged.tasks == ("b", "c")
    never_there = initialized({task: updates[task] for task in ("b", "c")}, settings)
    torch.testing.assert_close(projection(merged.basis_out), projection(never_there.basis_out), rtol=0, atol=1e-9)
    torch.testing.assert_close(dense_of(merged, "b"), dense_learned(updates["b"]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("basis", BASES)
def test_a_task_fine_tuned_in_the_basis_counts_as_it_is_now(basis: BasisKind) -> None:
    updates = random_updates((20, 16), {"a": 2, "b": 2, "c": 2})
    settings = SubspaceSettings(num_components=4, pseudo_rank=2, basis=basis)
    layer = initialized({task: updates[task] for task in ("a", "b")}, settings)
    generator = generated(1)
    tuned = layer.with_task("a", *(torch.randn(4, 2, generator=generator, dtype=torch.float64) for _ in range(2)))

    merged, report = merge_into_layer(tuned, {"c": updates["c"]}, settings)

    learned = dense_of(tuned, "a")
    drift = float((dense_of(merged, "a") - learned).norm() / learned.norm())
    assert drift > 0.1
    assert report.drift["a"] == pytest.approx(drift, rel=1e-9)
    assert report.drift_bound["a"] == pytest.approx(drift, rel=1e-9)


def test_merging_nothing_changes_nothing() -> None:
    settings = SubspaceSettings(num_components=3, pseudo_rank=2)
    layer = initialized(random_updates(SHAPE, {"a": 2, "b": 2}), settings)

    merged, report = merge_into_layer(layer, {}, settings)

    assert report.new_tasks == ()
    assert report.drift == {"a": 0, "b": 0}
    assert merged.tasks == layer.tasks
    assert merged.basis_out is layer.basis_out
    assert torch.equal(merged.coefficients_out, layer.coefficients_out)


def test_more_columns_than_the_layer_has_rows_are_merged_like_any() -> None:
    updates = random_updates((5, 4), {"a": 9, "b": 7, "c": 9})
    settings = SubspaceSettings(num_components=4, pseudo_rank=4)
    layer = LayerSubspace.empty(5, 4, 4, dtype=torch.float64)
    for task, update in updates.items():
        layer, _ = merge_into_layer(layer, {task: update}, settings)

    assert layer.num_components == (4, 4)
    learned = dense_learned(updates["c"])
    inside = projection(layer.basis_out) @ learned @ projection(layer.basis_in)
    torch.testing.assert_close(dense_of(layer, "c"), inside, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_adapters_of_low_precision_are_merged_in_float64(dtype: torch.dtype) -> None:
    update = random_update(generated(), SHAPE, 2, dtype=dtype)
    settings = SubspaceSettings(num_components=2, pseudo_rank=2)

    layer = initialized({"a": update}, settings)

    assert layer.coefficients_out.dtype == torch.float64
    torch.testing.assert_close(dense_of(layer, "a"), dense_learned(update), rtol=0, atol=1e-12)


def test_a_float32_layer_stays_float32_with_records_in_float64() -> None:
    settings = SubspaceSettings(num_components=3, pseudo_rank=2)

    layer = initialized(random_updates(SHAPE, {"a": 2, "b": 2}), settings, torch.float32)

    assert {layer.basis_out.dtype, layer.basis_in.dtype} == {torch.float32}
    assert {layer.coefficients_out.dtype, layer.coefficients_in.dtype} == {torch.float32}
    assert {layer.records.norms.dtype, layer.records.drift_bounds.dtype, layer.spectrum_out.dtype} == {torch.float64}


@pytest.mark.parametrize("dtype", DTYPES)
@examples(40)
@given(
    seed=st.integers(0, 2**31),
    out_features=st.integers(4, 40),
    in_features=st.integers(4, 40),
    rank=st.integers(1, 6),
    exponent=st.floats(-9, 0),
)
def test_the_residual_outside_a_basis_is_that_of_the_dense_update(
    dtype: torch.dtype, seed: int, out_features: int, in_features: int, rank: int, exponent: float
) -> None:
    shape = (out_features, in_features)
    settings = SubspaceSettings(num_components=3, pseudo_rank=2)
    layer = initialized(random_updates(shape, {"a": 2, "b": 2}, seed), settings, dtype)
    outside = random_update(generated(seed + 1), shape, rank, scale=10.0**exponent)
    update = LowRankUpdate(
        torch.cat([layer.basis_out.double(), outside.out_factor], dim=1),
        torch.cat([layer.basis_in.double(), outside.in_factor], dim=1),
    )

    residual = residual_outside(layer, update)

    dense, basis_out, basis_in = dense_learned(update), layer.basis_out.double(), layer.basis_in.double()
    inside = orthogonal_projection(basis_out) @ dense @ orthogonal_projection(basis_in)
    expected = float((dense - inside).norm() / dense.norm())
    assert residual == pytest.approx(expected, rel=1e-5, abs=1e-14)


def test_an_update_inside_the_basis_has_no_residual_and_one_beside_it_nothing_else() -> None:
    settings = SubspaceSettings(num_components=2, pseudo_rank=2)
    layer = initialized(random_updates(SHAPE, {"a": 2}), settings)
    zero = LowRankUpdate(torch.zeros(SHAPE[0], 1), torch.ones(SHAPE[1], 1))
    beside_out = torch.linalg.svd(layer.basis_out).U[:, 2:4]

    assert residual_outside(layer, layer.update_of("a")) < 1e-14
    assert residual_outside(layer, zero) == 0
    assert residual_outside(layer, LowRankUpdate(beside_out, layer.basis_in)) == pytest.approx(1, rel=1e-12)
    assert residual_outside(LayerSubspace.empty(*SHAPE, 2), layer.update_of("a")) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_residual_of_an_update_that_is_not_finite_is_refused(value: float) -> None:
    layer = initialized(random_updates(SHAPE, {"a": 2}), SubspaceSettings(num_components=2, pseudo_rank=2))
    update = LowRankUpdate(torch.full((SHAPE[0], 1), value), torch.ones(SHAPE[1], 1))

    with pytest.raises(ValueError, match="out_factor has NaN or infinite entries, expected finite numbers"):
        residual_outside(layer, update)


@pytest.mark.parametrize(
    ("update_shape", "task", "settings", "message"),
    [
        ((10, 8), "a", SubspaceSettings(4, 2), "task 'a' is already in the layer"),
        ((8, 10), "b", SubspaceSettings(4, 2), "the update of task 'b' is (8, 10), the layer is (10, 8)"),
        ((10, 8), "b", SubspaceSettings(20, 20), "pseudo_rank is 8, the layer's tasks have 2"),
        ((10, 8), "b", SubspaceSettings(4, 3), "pseudo_rank is 3, the layer's tasks have 2"),
    ],
)
def test_an_update_that_does_not_fit_the_layer_is_refused_with_what_was_found_and_expected(
    update_shape: tuple[int, int], task: str, settings: SubspaceSettings, message: str
) -> None:
    layer = initialized(random_updates((10, 8), {"a": 2}), SubspaceSettings(num_components=4, pseudo_rank=2))

    with pytest.raises(ValueError) as error:
        merge_into_layer(layer, {task: random_update(generated(), update_shape, 2)}, settings)

    assert str(error.value) == message


@pytest.mark.parametrize("side", ["out_factor", "in_factor"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_an_adapter_that_is_not_finite_is_refused(side: str, value: float) -> None:
    factors = {"out_factor": torch.ones(10, 2), "in_factor": torch.ones(8, 2)}
    factors[side][3, 0] = value

    with pytest.raises(ValueError, match=f"{side} has NaN or infinite entries, expected finite numbers"):
        merge_into_layer(LayerSubspace.empty(10, 8, 2), {"a": LowRankUpdate(**factors)}, SubspaceSettings(4, 2))


def test_a_rank_deficient_wide_adapter_leaves_no_directions_in_the_factor_basis_that_it_does_not_use() -> None:
    generator = generated()
    settings = SubspaceSettings(num_components=6, pseudo_rank=3, basis="factor")
    update = random_update(generator, (20, 16), 4)
    update.out_factor[:, 2:] = 0
    update.in_factor[:, 1] = 0
    layer = initialized({"a": update}, settings)

    merged, _ = merge_into_layer(layer, random_updates((20, 16), {"b": 1}, seed=1), settings)

    # Of the columns of "a", only the first is in both factors: rank 1.
    assert merged.num_components == (2, 2)
