"""Sequences of merges, compared step by step with a dense float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given

from share_hf.subspace import LayerSubspace, SubspaceSettings, merge_into_layer
from share_hf.subspace.stack import TASKS_PER_CHUNK

from .reference import ReferenceLayer, joint_basis, reference_merge, reference_weights
from .streams import KINDS, Stream, dense_learned, dense_of, examples, random_update, streams


# A mean of equal columns leaves only rounding errors, and a combination of float32 columns is not exact.
KINDS_TO_CENTER = tuple(kind for kind in KINDS if kind != "duplicate columns")
KINDS_IN_FLOAT32 = tuple(kind for kind in KINDS if kind != "combination")


def assert_agrees(layer: LayerSubspace, reference: ReferenceLayer, tolerance: float) -> None:
    """Assert that spans and updates are the same, and factors up to a rotation of their columns."""
    assert layer.tasks == tuple(reference.tasks)
    for basis, expected in ((layer.basis_out, reference.basis_out), (layer.basis_in, reference.basis_in)):
        assert basis.shape == expected.shape
        outside = basis.double() - expected @ (expected.T @ basis.double())
        assert float(outside.norm()) <= tolerance
    for i, (task, expected) in enumerate(reference.tasks.items()):
        norm = float(expected.learned.norm())
        assert float((dense_of(layer, task) - expected.dense).norm()) <= tolerance * norm
        for basis, coefficients, factor in (
            (layer.basis_out, layer.coefficients_out[i], expected.out_factor),
            (layer.basis_in, layer.coefficients_in[i], expected.in_factor),
        ):
            stored = basis.double() @ coefficients.double()
            difference = stored @ stored.T - factor @ factor.T
            assert float(difference.norm()) <= 20 * tolerance * float(factor.norm()) ** 2


def assert_follows_reference(stream: Stream, dtype: torch.dtype, *, least_gap: float, tolerance: float) -> None:
    layer, reference = stream.empty(dtype), ReferenceLayer.empty(*stream.shape)
    for updates in stream.merges():
        layer, report = merge_into_layer(layer, updates, stream.settings)
        reference, drift = reference_merge(reference, updates, stream.settings)
        assume(reference.gap > least_gap)
        assert_agrees(layer, reference, tolerance)
        assert report.drift == pytest.approx(drift, rel=0, abs=tolerance)


@examples(250)
@given(streams("joint"))
def test_joint_merges_follow_the_reference(stream: Stream) -> None:
    assert_follows_reference(stream, torch.float64, least_gap=1e-2, tolerance=1e-8)


@examples(150)
@given(streams("factor"))
def test_factor_merges_follow_the_reference(stream: Stream) -> None:
    assert_follows_reference(stream, torch.float64, least_gap=1e-2, tolerance=1e-8)


@examples(80)
@given(streams("factor", center=True, kinds=KINDS_TO_CENTER, wider_than_pseudo_rank=False))
def test_centered_merges_follow_the_reference(stream: Stream) -> None:
    # A mean with columns of very different sizes costs the small ones some of their digits.
    assert_follows_reference(stream, torch.float64, least_gap=1e-2, tolerance=1e-7)


@examples(80)
@given(streams("joint"))
def test_joint_merges_in_float32_follow_the_reference_to_single_precision(stream: Stream) -> None:
    assert_follows_reference(stream, torch.float32, least_gap=3e-2, tolerance=2e-5)


@examples(60)
@given(streams("factor", kinds=KINDS_IN_FLOAT32))
def test_factor_merges_in_float32_follow_the_reference_to_single_precision(stream: Stream) -> None:
    assert_follows_reference(stream, torch.float32, least_gap=3e-2, tolerance=2e-5)


@pytest.mark.parametrize("basis", ["joint", "factor"])
@pytest.mark.parametrize("tasks", [TASKS_PER_CHUNK, TASKS_PER_CHUNK + 1, 2 * TASKS_PER_CHUNK + 5])
def test_a_merge_beside_many_tasks_follows_the_reference(tasks: int, basis: str) -> None:
    generator = torch.Generator().manual_seed(tasks)
    settings = SubspaceSettings(num_components=5, pseudo_rank=2, basis=basis)
    layer, _ = merge_into_layer(
        LayerSubspace.empty(12, 10, 2, dtype=torch.float64), {"base": random_update(generator, (12, 10), 6)}, settings
    )
    for i in range(tasks):
        out, in_ = (torch.randn(5, 2, generator=generator, dtype=torch.float64) for _ in range(2))
        layer = layer.with_task(f"learned_{i}", out / torch.arange(1, 6)[:, None], in_ / torch.arange(1, 6)[:, None])
    layer = layer.without_task("base")
    updates = {f"new_{i}": random_update(generator, (12, 10), 2) for i in range(30)}

    merged, report = merge_into_layer(layer, updates, settings)

    reference, drift = reference_merge(ReferenceLayer.of(layer), updates, settings)
    assert reference.gap > 1e-3
    assert report.basis_changed
    assert_agrees(merged, reference, 1e-8)
    assert report.drift == pytest.approx(drift, rel=0, abs=1e-8)
    assert max(report.drift.values()) > 0.1


@examples(40)
@given(streams("joint", most_merges=1, kinds=("random", "related")))
def test_the_spectrum_is_that_of_the_weighted_stack_when_nothing_is_cut(stream: Stream) -> None:
    (updates,) = stream.merges()
    settings = SubspaceSettings(num_components=min(stream.shape), pseudo_rank=1)
    assume(sum(plan.rank for plan in stream.plan[0]) <= min(stream.shape))

    layer, _ = merge_into_layer(LayerSubspace.empty(*stream.shape, 1, dtype=torch.float64), updates, settings)

    dense = {task: dense_learned(update) for task, update in updates.items()}
    stack = [weight * dense[task] for task, weight in reference_weights(dense).items()]
    for spectrum, matrix in (
        (layer.spectrum_out, torch.cat(stack, dim=1)),
        (layer.spectrum_in, torch.cat(stack, dim=0)),
    ):
        values = torch.linalg.svdvals(matrix)
        torch.testing.assert_close(spectrum, values[: len(spectrum)], rtol=0, atol=1e-7)
        assert float(values[len(spectrum) :].sum()) <= 1e-6


def test_the_reference_basis_holds_what_can_be_held() -> None:
    generator = torch.Generator().manual_seed(0)
    stack = [random_update(generator, (9, 7), 2).dense() for _ in range(2)]

    basis_out, basis_in, gap = joint_basis(stack, 4)

    assert gap == 1.0
    for update in stack:
        torch.testing.assert_close(basis_out @ basis_out.T @ update @ basis_in @ basis_in.T, update)
