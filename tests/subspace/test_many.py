"""Merges of many updates at once, which find the leading directions instead of decomposing everything."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

import pytest
import torch

from share_hf.subspace import (
    LayerSubspace,
    LowRankUpdate,
    SubspaceSettings,
    merge,
    merge_into_layer,
    merge_into_layers,
)
from share_hf.subspace.coordinates import EXACT_COLUMNS

from .streams import dense_learned, dense_of


SHAPE = (120, 150)
MANY = 60  # updates of rank 8: far above what is decomposed
SETTINGS = SubspaceSettings(num_components=12, pseudo_rank=8)


def related_updates(
    count: int, *, seed: int = 0, shape: tuple[int, int] = SHAPE, rank: int = 8
) -> dict[str, LowRankUpdate]:
    """Return updates with a common part of decaying strength, as adapters of one model have, and a separate part."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    strengths = torch.arange(1, 41) ** -0.7
    common = [torch.linalg.qr(normal(max(features, 40), 40)).Q[:features] * strengths for features in shape]
    updates = {}
    for i in range(count):
        factors = [side @ normal(40, rank) + 0.02 * normal(len(side), rank) for side in common]
        updates[f"task{i}"] = LowRankUpdate(factors[0] * torch.arange(1, rank + 1) ** -0.5, factors[1])
    return updates


def relative_errors(layer: LayerSubspace, updates: Mapping[str, LowRankUpdate]) -> dict[str, float]:
    """Return ``‖stored - ΔW‖ / ‖ΔW‖`` by task."""
    learned = {task: dense_learned(update) for task, update in updates.items()}
    return {task: float((dense_of(layer, task) - dense).norm() / dense.norm()) for task, dense in learned.items()}


def exactly(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> LayerSubspace:
    """Return the merge with everything decomposed."""
    with monkeypatch.context() as patch:
        patch.setattr(merge, "EXACT_COLUMNS", 10**9)
        return merge_into_layer(*arguments)[0]


def assert_certified(layer: LayerSubspace, updates: Mapping[str, LowRankUpdate]) -> dict[str, float]:
    """Assert that no task is further from its update than its bound, nor nearer than a hundredth; return errors."""
    errors = relative_errors(layer, updates)
    for task, error in errors.items():
        bound = float(layer.records.drift_bounds[layer.index(task)])
        assert error <= bound + 1e-12, task
        assert error >= 0.3 * bound - 1e-6, task
    return errors


@pytest.mark.parametrize("basis", ["joint", "factor"])
@pytest.mark.parametrize("rank", [6, 8, 12])
def test_the_error_is_nearly_that_of_the_exact_basis(basis: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = related_updates(MANY, rank=rank)
    settings = SubspaceSettings(num_components=12, pseudo_rank=8, basis=basis)
    layer = LayerSubspace.empty(*SHAPE, 8)

    found = assert_certified(merge_into_layer(layer, updates, settings)[0], updates)
    exact = assert_certified(exactly(monkeypatch, layer, updates, settings), updates)

    assert sum(found.values()) <= 1.01 * sum(exact.values())
    assert found != exact  # they were computed in different ways


def test_the_leading_directions_are_those_of_the_exact_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = related_updates(MANY)
    layer = LayerSubspace.empty(*SHAPE, 8)
    found, exact = merge_into_layer(layer, updates, SETTINGS)[0], exactly(monkeypatch, layer, updates, SETTINGS)
    for mine, best in ((found.basis_out, exact.basis_out), (found.basis_in, exact.basis_in)):
        cosines = torch.linalg.svdvals(mine.T @ best)  # of the principal angles
        assert cosines[:8].min() > 0.99


def test_a_basis_that_explains_everything_is_found_to_rounding() -> None:
    generator = torch.Generator().manual_seed(3)
    common = [torch.randn(features, 10, generator=generator) for features in SHAPE]
    updates = {
        f"task{i}": LowRankUpdate(*(side @ torch.randn(10, 8, generator=generator) for side in common))
        for i in range(MANY)
    }
    layer, report = merge_into_layer(LayerSubspace.empty(*SHAPE, 8), updates, SETTINGS)
    assert max(relative_errors(layer, updates).values()) < 1e-5
    assert max(report.drift_bound.values()) < 1e-4


def test_many_more_leave_the_old_tasks_within_their_bounds() -> None:
    updates = related_updates(2 * MANY)
    first = dict(list(updates.items())[:5])
    layer, _ = merge_into_layer(LayerSubspace.empty(*SHAPE, 8), first, SETTINGS)
    layer, _ = merge_into_layer(layer, {task: updates[task] for task in updates if task not in first}, SETTINGS)
    errors = relative_errors(layer, updates)
    for task, error in errors.items():
        assert error <= float(layer.records.drift_bounds[layer.index(task)]) + 1e-12, task


def test_a_tolerated_drift_is_met_by_finding_more_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = related_updates(MANY)
    settings = SubspaceSettings(num_components=12, pseudo_rank=8, drift_tolerance=0.35)
    layer, _ = merge_into_layer(LayerSubspace.empty(*SHAPE, 8), updates, settings)
    exact = exactly(monkeypatch, LayerSubspace.empty(*SHAPE, 8), updates, settings)
    assert max(assert_certified(layer, updates).values()) <= 0.35
    assert min(layer.num_components) > 12
    assert max(layer.num_components) <= max(exact.num_components) + 2


def test_the_fewest_directions_that_explain_enough_are_nearly_those_of_the_exact_basis(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    updates = related_updates(MANY)
    settings = SubspaceSettings(num_components=30, pseudo_rank=8, explained_variance=0.7)
    layer, _ = merge_into_layer(LayerSubspace.empty(*SHAPE, 8), updates, settings)
    exact = exactly(monkeypatch, LayerSubspace.empty(*SHAPE, 8), updates, settings)
    assert layer.explained_by_basis == pytest.approx(0.7, abs=0.03)
    assert abs(max(layer.num_components) - max(exact.num_components)) <= 1


@pytest.mark.parametrize("basis", ["joint", "factor"])
def test_updates_of_all_sizes_ranks_and_kinds_are_certified(basis: str) -> None:
    updates = related_updates(MANY)
    some = list(updates)
    if basis == "joint":  # the paper's stack is not weighted, and its factors are not balanced
        first, second, near = (updates[some[i]] for i in (0, 1, 4))
        updates[some[0]] = LowRankUpdate(first.out_factor * 1e-20, first.in_factor)
        updates[some[1]] = LowRankUpdate(second.out_factor * 1e15, second.in_factor)
        # Two columns that cancel each other except for a millionth.
        out, in_, other = near.out_factor[:, :1].double(), near.in_factor[:, :1].double(), near.in_factor[:, 1:2]
        updates[some[4]] = LowRankUpdate(torch.cat([out, -out], dim=1), torch.cat([in_, in_ + 1e-6 * other], dim=1))
    fresh = updates[some[2]]
    updates[some[2]] = LowRankUpdate(torch.zeros_like(fresh.out_factor), fresh.in_factor)
    thin = updates[some[3]]
    updates[some[3]] = LowRankUpdate(thin.out_factor[:, :1], thin.in_factor[:, :1])
    settings = SubspaceSettings(num_components=12, pseudo_rank=8, basis=basis)

    layer, _ = merge_into_layer(LayerSubspace.empty(*SHAPE, 8), updates, settings)

    del updates[some[2]]
    for task, error in relative_errors(layer, updates).items():
        assert error <= float(layer.records.drift_bounds[layer.index(task)]) + 1e-12, task
    assert not layer.update_of(some[2]).dense().any()


def test_a_broken_one_among_many_is_named() -> None:
    updates = related_updates(MANY)
    updates["task7"].in_factor[3, 2] = torch.nan
    with pytest.raises(ValueError, match="task 'task7': in_factor has NaN or infinite entries"):
        merge_into_layer(LayerSubspace.empty(*SHAPE, 8), updates, SETTINGS)


def test_layers_with_few_outputs_take_all_of_them() -> None:
    updates = related_updates(MANY, shape=(5, 150), rank=5)
    settings = SubspaceSettings(num_components=12, pseudo_rank=8)
    layer, _ = merge_into_layer(LayerSubspace.empty(5, 150, 8), updates, settings)
    assert layer.num_components == (5, 12)
    assert_certified(layer, updates)


def test_few_columns_are_decomposed() -> None:
    count = EXACT_COLUMNS // 8
    updates = related_updates(count)
    layer, _ = merge_into_layer(LayerSubspace.empty(*SHAPE, 8), updates, SETTINGS)
    assert len(layer.tasks) == count


# ---- Layers ---------------------------------------------------------------------------------------------------------


class _Read(Mapping[str, LowRankUpdate]):
    """The updates of one adapter, each made when it is requested. Records the layers of which some are held."""

    held: dict[str, int]

    def __init__(self, seed: int, held: set[str], lock: threading.Lock) -> None:
        self.seed, self.asked, self.lock = seed, held, lock

    def __getitem__(self, module: str) -> LowRankUpdate:
        with self.lock:
            self.asked.add(module)
        return related_updates(1, seed=1000 * self.seed + int(module[1:]), shape=(40, 50))["task0"]

    def __iter__(self) -> Iterator[str]:
        return (f"m{i}" for i in range(6))

    def __len__(self) -> int:
        return 6


def test_the_number_of_threads_changes_no_bit() -> None:
    held: set[str] = set()
    updates = {f"task{seed}": _Read(seed, held, threading.Lock()) for seed in range(40)}
    settings = SubspaceSettings(num_components=6, pseudo_rank=4)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(merge_into_layers({}, updates, settings)[0])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert list(other) == list(results[0])
        for module, layer in other.items():
            for name in ("basis_out", "basis_in", "coefficients_out", "coefficients_in"):
                assert torch.equal(getattr(layer, name), getattr(results[0][module], name))
    assert dense_of(results[0]["m0"], "task0").any()


def test_an_error_stops_the_layers_that_have_not_begun() -> None:
    held: set[str] = set()
    updates: dict[str, Mapping[str, LowRankUpdate]] = {
        f"task{seed}": _Read(seed, held, threading.Lock()) for seed in range(40)
    }
    bad = {f"m{i}": updates["task0"][f"m{i}"] for i in range(6)}
    bad["m0"].out_factor[0, 0] = torch.inf
    held.clear()
    with pytest.raises(ValueError, match="'m0': task 'bad': out_factor has NaN or infinite entries"):
        merge_into_layers({}, {**updates, "bad": bad}, SubspaceSettings(num_components=6, pseudo_rank=4))
    assert len(held) <= 3
