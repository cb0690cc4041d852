"""The certificate at any scale: tasks from 1e-20 to 1e20 side by side, over any stream of operations."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from share_hf.subspace import (
    BasisKind,
    DriftToleranceError,
    LayerSubspace,
    LowRankUpdate,
    SubspaceSettings,
    TaskRecords,
    merge_into_layer,
)

from .streams import dense_learned, dense_of, examples, random_update


SHAPE = (14, 11)
SETTINGS = SubspaceSettings(num_components=6, pseudo_rank=2)

OPERATIONS = st.one_of(
    st.tuples(
        st.just("merge"),
        st.lists(st.tuples(st.integers(1, 3), st.integers(-20, 20), st.integers(-20, 20)), min_size=1, max_size=2),
    ),
    st.tuples(st.just("remove"), st.integers(0, 9)),
    st.tuples(st.just("finetune"), st.integers(0, 9), st.integers(-10, 10)),
    st.tuples(st.just("learn"), st.integers(-10, 10)),
    st.tuples(st.just("save")),
)


def as_loaded(layer: LayerSubspace) -> LayerSubspace:
    """Return the layer as a tree gives it back: float32 tensors, and certificates as JSON has them."""
    rows = torch.tensor(layer.records.rows, dtype=torch.float64).reshape(-1, 4)
    spectra = layer.spectrum_out.float().double(), layer.spectrum_in.float().double()
    assert all(torch.isfinite(tensor).all() for tensor in (rows, *spectra))
    return replace(layer, records=TaskRecords(*rows.unbind(1)), spectrum_out=spectra[0], spectrum_in=spectra[1])


def assert_bounds_hold(layer: LayerSubspace, originals: dict[str, Tensor]) -> None:
    assert set(layer.tasks) == originals.keys()
    for i, task in enumerate(layer.tasks):
        size = originals[task].abs().max()  # of 1e-40 as well as of 1e40
        original, stored = originals[task] / size, dense_of(layer, task) / size
        error = float((stored - original).norm() / original.norm())
        assert error <= float(layer.records.drift_bounds[i]) * (1 + 1e-9) + 1e-13, task


@pytest.mark.parametrize("basis", ["joint", "factor"])
@examples(120)
@given(st.lists(OPERATIONS, min_size=2, max_size=12), st.integers(0, 2**31), st.sampled_from([None, 0.05, 0.5]))
def test_the_bound_holds_for_any_stream_of_operations_at_any_scale(
    basis: BasisKind, operations: list[tuple], seed: int, tolerance: float | None
) -> None:
    generator, originals = torch.Generator().manual_seed(seed), {}
    settings = replace(SETTINGS, basis=basis, drift_tolerance=tolerance, max_components=10)
    layer = LayerSubspace.empty(*SHAPE, settings.pseudo_rank)
    for step, (kind, *arguments) in enumerate(operations):
        if kind == "merge":
            updates = {}
            for j, (rank, exponent_out, exponent_in) in enumerate(arguments[0]):
                update = random_update(generator, SHAPE, rank, scale=10.0**exponent_out)
                updates[f"task_{step}_{j}"] = LowRankUpdate(update.out_factor, update.in_factor * 10.0**exponent_in)
            try:
                layer, _ = merge_into_layer(layer, updates, settings)
            except ValueError:  # refused: nothing has changed
                continue
            originals |= {task: dense_learned(update) for task, update in updates.items()}
        elif kind == "remove" and layer.tasks:
            task = layer.tasks[arguments[0] % len(layer.tasks)]
            layer = layer.without_task(task)
            del originals[task]
        elif kind in ("finetune", "learn"):
            task = layer.tasks[arguments[0] % len(layer.tasks)] if kind == "finetune" and layer.tasks else f"l_{step}"
            k_out, k_in = layer.num_components
            if not k_out:
                continue
            sides = [
                torch.randn(k, layer.pseudo_rank, generator=generator) * 10.0 ** arguments[-1] for k in (k_out, k_in)
            ]
            layer = layer.with_task(task, *sides)
            originals[task] = dense_of(layer, task)
        elif kind == "save":
            layer = as_loaded(layer)
        assert_bounds_hold(layer, originals)
        if tolerance is not None:
            assert not (layer.records.drift_bounds - layer.records.rank_errors > tolerance).any()


@pytest.mark.parametrize("basis", ["joint", "factor"])
def test_the_bound_holds_over_200_merges_in_a_row(basis: BasisKind) -> None:
    generator, originals = torch.Generator().manual_seed(0), {}
    layer = LayerSubspace.empty(*SHAPE, SETTINGS.pseudo_rank)
    for step in range(200):
        exponent = 40 * float(torch.rand((), generator=generator)) - 20 if basis == "joint" else 0.0
        update = random_update(generator, SHAPE, 2, scale=10.0**exponent)
        originals[f"task_{step}"] = dense_learned(update)
        layer, _ = merge_into_layer(layer, {f"task_{step}": update}, replace(SETTINGS, basis=basis))
    assert_bounds_hold(layer, originals)


@pytest.mark.parametrize("scale", [1e-20, 1e-9, 1e8, 1e20])
def test_a_task_of_another_scale_costs_the_others_nothing_while_there_is_room(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    first = {task: random_update(generator, SHAPE, 2) for task in ("a", "b")}
    other = random_update(generator, SHAPE, 2, scale=scale)
    layer, _ = merge_into_layer(LayerSubspace.empty(*SHAPE, 2), first, SETTINGS)

    layer, report = merge_into_layer(layer, {"other": other}, SETTINGS)

    assert layer.num_components == (6, 6)
    assert max(report.drift.values()) < 1e-6
    assert_bounds_hold(layer, {task: dense_learned(update) for task, update in {**first, "other": other}.items()})


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_what_a_task_of_another_scale_costs_does_not_depend_on_the_scale(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    updates = {task: random_update(generator, SHAPE, 2) for task in ("a", "b", "c")}
    scaled = {**updates, "c": LowRankUpdate(updates["c"].out_factor * scale, updates["c"].in_factor)}
    settings, empty = replace(SETTINGS, num_components=4), LayerSubspace.empty(*SHAPE, 2)

    _, report = merge_into_layer(empty, updates, settings)
    _, of_scaled = merge_into_layer(empty, scaled, settings)

    assert min(report.drift.values()) > 0.1
    assert of_scaled.drift == pytest.approx(report.drift, rel=1e-5)


def test_a_loud_task_takes_the_factor_basis_and_the_report_says_so() -> None:
    generator = torch.Generator().manual_seed(0)
    updates = {"quiet": random_update(generator, SHAPE, 2), "loud": random_update(generator, SHAPE, 2, scale=1e8)}
    settings = SubspaceSettings(num_components=2, pseudo_rank=2, basis="factor")
    empty = LayerSubspace.empty(*SHAPE, 2)

    layer, report = merge_into_layer(empty, updates, settings)

    assert report.drift["quiet"] > 0.5
    assert_bounds_hold(layer, {task: dense_learned(update) for task, update in updates.items()})
    with pytest.raises(DriftToleranceError):
        merge_into_layer(empty, updates, replace(settings, drift_tolerance=0.1, max_components=2))


@pytest.mark.parametrize("scale", [1e-200, 1e-40, 1e20, 1e160, 1e300])
def test_an_update_out_of_range_is_refused_by_name_rather_than_taken_for_zero(scale: float) -> None:
    update = random_update(torch.Generator().manual_seed(0), SHAPE, 2, scale=scale)
    update = LowRankUpdate(update.out_factor, update.in_factor * scale)

    with pytest.raises(ValueError, match=r"^task 'odd': its update has norm .*, expected 1e-70 to 1e\+30"):
        merge_into_layer(LayerSubspace.empty(*SHAPE, 2), {"odd": update}, SETTINGS)


@pytest.mark.parametrize(("out_scale", "in_scale"), [(1e-60, 1e60), (1e60, 1e-60), (1e-60, 1e20)])
def test_factors_that_float32_cannot_hold_are_refused_by_name(out_scale: float, in_scale: float) -> None:
    update = random_update(torch.Generator().manual_seed(0), SHAPE, 2)
    update = LowRankUpdate(update.out_factor * out_scale, update.in_factor * in_scale)
    empty = LayerSubspace.empty(*SHAPE, 2)

    with pytest.raises(ValueError, match=r"^task 'odd': its update of norm .* cannot be stored in float32"):
        merge_into_layer(empty, {"odd": update}, replace(SETTINGS, basis="factor"))

    layer, report = merge_into_layer(empty, {"odd": update}, SETTINGS)  # if balanced, it can be stored
    assert report.drift["odd"] < 1e-12
    assert_bounds_hold(layer, {"odd": dense_learned(update)})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_task_that_is_not_finite_is_refused_by_name(value: float) -> None:
    layer, _ = merge_into_layer(
        LayerSubspace.empty(*SHAPE, 2), {"a": random_update(torch.Generator().manual_seed(0), SHAPE, 2)}, SETTINGS
    )
    broken = random_update(torch.Generator().manual_seed(1), SHAPE, 2)
    broken.in_factor[0, 0] = value

    with pytest.raises(ValueError, match=r"^task 'b': in_factor has NaN or infinite entries"):
        merge_into_layer(layer, {"b": broken}, SETTINGS)
    with pytest.raises(ValueError, match=r"^task 'b': its coefficients have NaN or infinite entries"):
        layer.with_task("b", torch.full((2, 2), value), torch.ones(2, 2))


def test_the_norm_of_coefficients_that_cancel_each_other_is_exact() -> None:
    update = random_update(torch.Generator().manual_seed(0), SHAPE, 2)
    layer, _ = merge_into_layer(LayerSubspace.empty(*SHAPE, 2), {"a": update}, SETTINGS)
    column = torch.ones(2, 1)

    learned = layer.with_task("b", torch.cat([column, -column], 1), torch.cat([column, column * (1 + 1e-6)], 1))

    assert float(learned.records.norms[1]) == pytest.approx(float(dense_of(learned, "b").norm()), rel=1e-8)
