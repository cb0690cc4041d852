"""`tolerance`: the smallest rank of each task in each layer, compared with full decompositions of dense updates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from share_hf.subspace import (
    LayerSubspace,
    LowRankUpdate,
    SubspaceSettings,
    WantedDimensions,
    merge_into_layer,
)

from .streams import Stream, dense_learned, dense_of, examples, random_update, streams
from .test_many import related_updates


KINDS = ("random", "related", "zero", "zero columns", "combination")


def smallest_rank(layer: LayerSubspace, update: LowRankUpdate, p: int, tolerance: float) -> tuple[int, list[float]]:
    """Return how few singular values of an update inside a basis keep its error, up to p, and the error by rank."""
    dense = dense_learned(update)
    out, in_ = (torch.linalg.qr(basis.double()).Q for basis in (layer.basis_out, layer.basis_in))
    left, values, right_t = torch.linalg.svd(out.T @ dense @ in_)
    errors = []
    for rank in range(1, p + 1):
        core = left[:, :rank] @ torch.diag(values[:rank]) @ right_t[: len(values)][:rank]
        errors.append(float((dense - out @ core @ in_.T).norm() / dense.norm()))
    return next((rank for rank, error in enumerate(errors, 1) if error <= tolerance), p), errors


@pytest.mark.parametrize("basis", ["joint", "factor"])
@examples(50)
@given(stream=streams("joint", kinds=KINDS, largest_exponent=1.0), tolerance=st.floats(0.01, 0.95))
def test_a_new_task_takes_the_smallest_rank_that_keeps_its_error(basis: str, stream: Stream, tolerance: float) -> None:
    settings = replace(stream.settings, basis=basis, tolerance=tolerance)
    layer = stream.empty()
    for updates in stream.merges():
        ranks = dict(zip(layer.tasks, layer.ranks.tolist(), strict=True))
        layer, report = merge_into_layer(layer, updates, settings)
        found = dict(zip(layer.tasks, layer.ranks.tolist(), strict=True))
        for task, rank in ranks.items():  # zeros stay zeros; a merge may leave nothing of a task
            assert found[task] <= rank
        for task, update in updates.items():
            norm = layer.records.norms[layer.index(task)]
            if not norm:
                assert found[task] == 1
                continue
            naive, errors = smallest_rank(layer, update, layer.pseudo_rank, tolerance)
            if min(abs(error - tolerance) for error in errors) < 1e-7:
                continue  # rounding decides
            error = float((dense_of(layer, task) - dense_learned(update)).norm() / norm)
            assert error <= max(tolerance, min(errors)) + 1e-9
            assert report.drift[task] == pytest.approx(error, abs=1e-7)
            assert error <= report.drift_bound[task] + 1e-12
            if errors[-1] <= tolerance:
                assert found[task] == naive
            else:
                assert found[task] <= naive


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "4bit"])
@examples(40)
@given(stream=streams("joint", kinds=("random", "related", "zero")), tolerance=st.floats(0.05, 0.9))
def test_merges_certify_tasks_of_all_ranks(dtype: str, stream: Stream, tolerance: float) -> None:
    settings = replace(stream.settings, coefficient_dtype=dtype, tolerance=tolerance)
    layer, learned = stream.empty(torch.float32), {}
    for updates in stream.merges():
        layer, report = merge_into_layer(layer, updates, settings)
        learned |= {task: dense_learned(update) for task, update in updates.items()}
        for task, norm in zip(layer.tasks, layer.records.norms.tolist(), strict=True):
            if norm:
                change = float((dense_of(layer, task) - learned[task]).norm()) / norm
                assert change <= report.drift_bound[task] + 1e-12


def test_of_many_each_takes_its_own_rank() -> None:
    updates = related_updates(60)
    settings = SubspaceSettings(num_components=24, pseudo_rank=8, tolerance=0.4)
    layer, report = merge_into_layer(LayerSubspace.empty(*updates["task0"].shape, 8), updates, settings)
    for task, update in updates.items():
        naive, errors = smallest_rank(layer, update, 8, 0.4)
        assert layer.ranks[layer.index(task)] == naive
        assert report.drift[task] == pytest.approx(errors[naive - 1], abs=1e-5)
    assert 1 < layer.ranks.double().mean() < 8


def test_what_the_tolerance_costs_counts_as_a_rank_and_not_as_drift() -> None:
    updates = {"a": random_update(torch.Generator().manual_seed(0), (30, 20), 6)}
    settings = SubspaceSettings(num_components=8, pseudo_rank=6, tolerance=0.5, drift_tolerance=1e-5)
    layer, report = merge_into_layer(LayerSubspace.empty(30, 20, 6), updates, settings)
    assert layer.ranks.tolist() < [6]
    assert 0.1 < layer.records.rank_errors[0] <= 0.5
    assert report.drift["a"] == pytest.approx(float(layer.records.rank_errors[0]))


def test_no_tolerance_keeps_every_column_and_a_tolerance_of_zero_every_number() -> None:
    updates = {"a": random_update(torch.Generator().manual_seed(0), (30, 20), 3)}
    layers = [
        merge_into_layer(
            LayerSubspace.empty(30, 20, 6),
            updates,
            SubspaceSettings(num_components=8, pseudo_rank=6, tolerance=tolerance),
        )[0]
        for tolerance in (None, 0.0)
    ]
    assert torch.allclose(layers[0].coefficients_out, layers[1].coefficients_out, atol=1e-6)
    assert layers[1].ranks.tolist() == [3]
    out, in_ = layers[1].coefficients_of("a", trimmed=True)
    assert out.shape == in_.shape == (3, 3)
    assert torch.equal(layers[1].update_of("a", trimmed=True).dense(), layers[1].update_of("a").dense())


@pytest.mark.parametrize("value", [1.0, -0.1, float("nan"), True, "0.1"])
def test_a_tolerance_that_is_not_an_error_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=f"tolerance is {value!r}, expected None or a number of at least 0"):
        SubspaceSettings(tolerance=value)


def test_auto_and_a_tolerance_are_two_answers() -> None:
    with pytest.raises(ValueError, match=r"pseudo_rank is 'auto' and tolerance is 0\.1, expected one of the two"):
        WantedDimensions(32, "auto", target_error=0.1).check_beside(SubspaceSettings(tolerance=0.1))
