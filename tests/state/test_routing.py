"""Routers of two writers: what both have counts once, and what each has learned counts too."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from share_hf import SharedSubspace
from share_hf.state import SubspaceState, reconcile
from share_hf.state.routing import MOST_PARTS, joined_router
from tests.routes import PROBE, features, routed, scatter_of
from tests.tree_fixtures import SaveLora


@pytest.fixture
def writers(subspace: SharedSubspace, save_lora: SaveLora) -> tuple[SubspaceState, SubspaceState]:
    """Two writers who both had the route of mrpc, and have each learned a task and its route since."""
    begun = routed(subspace.state, "mrpc", 0)
    found = []
    for seed, task in ((1, "rte"), (2, "cola")):
        writer = SharedSubspace(begun)
        writer.add_adapters({task: save_lora(task, seed=seed)}, progress=False)
        found.append(routed(writer.state, task, seed))
    return found[0], found[1]


def expected_scatter(*seeds: int) -> torch.Tensor:
    total = torch.zeros(6, 6, dtype=torch.float64)
    for seed in seeds:
        rows = features(seed).double()
        total += (rows - rows.mean(0)).T @ (rows - rows.mean(0))
    return total


def test_the_merge_of_two_writers_has_each_task_once(writers: tuple[SubspaceState, SubspaceState]) -> None:
    one, other = reconcile(*writers), reconcile(*reversed(writers))
    for merged in (one, other):
        assert {task for task, info in merged.tasks.items() if info.route is not None} == {"mrpc", "rte", "cola"}
        torch.testing.assert_close(scatter_of(merged), expected_scatter(0, 1, 2), rtol=1e-5, atol=1e-4)
        assert merged.router.scatter.degrees == 3 * 39
    assert torch.equal(scatter_of(one), scatter_of(other))
    assert torch.equal(scatter_of(reconcile(one, writers[1])), scatter_of(one))


def test_the_order_of_tasks_makes_no_difference(subspace: SharedSubspace) -> None:
    state = subspace.state
    first = routed(routed(state, "mrpc", 0), "sst2", 1)
    second = routed(routed(state, "sst2", 1), "mrpc", 0)
    assert torch.equal(scatter_of(first), scatter_of(second))
    assert torch.equal(first.tasks["mrpc"].route.mean, second.tasks["mrpc"].route.mean)


def test_what_one_side_has_taken_into_its_sum_counts_once(subspace: SharedSubspace) -> None:
    ours = routed(subspace.state, "mrpc", 0)
    theirs = ours
    for seed in range(1, MOST_PARTS + 2):
        theirs = routed(theirs, "sst2", seed)
    assert theirs.router.settled is not None
    ours = routed(ours, "mrpc", 50)
    for joined in (joined_router(ours.router, theirs.router), joined_router(theirs.router, ours.router)):
        torch.testing.assert_close(
            joined.scatter.products, expected_scatter(*range(MOST_PARTS + 2), 50), rtol=1e-5, atol=1e-3
        )
        assert len(joined.parts) == MOST_PARTS


def test_what_can_no_longer_be_told_apart_is_left_out_and_logged(
    subspace: SharedSubspace, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("share_hf"), "propagate", True)
    begun = routed(subspace.state, "mrpc", 0)
    ours, theirs = begun, begun
    for seed in range(1, MOST_PARTS + 2):
        ours, theirs = routed(ours, "mrpc", seed), routed(theirs, "mrpc", 100 + seed)
    joined = joined_router(ours.router, theirs.router)
    # Of our five tasks, one is only in the sum of ours.
    assert joined.scatter.degrees == 39 * (1 + 2 * (MOST_PARTS + 1) - 1)
    assert "1 tasks that only one side has" in caplog.text


def test_a_route_that_only_we_have_learned_is_kept(subspace: SharedSubspace, save_lora: SaveLora) -> None:
    ours = routed(subspace.state, "sst2", 3)
    theirs = SharedSubspace(subspace.state)
    theirs.add_adapters({"rte": save_lora("rte", seed=5)}, progress=False)
    merged = reconcile(ours, theirs.state)
    assert merged.tasks["sst2"].route is ours.tasks["sst2"].route
    assert torch.equal(scatter_of(merged), scatter_of(ours))


def test_the_same_data_learned_twice_counts_once(subspace: SharedSubspace) -> None:
    once = routed(subspace.state, "mrpc", 0)
    assert torch.equal(scatter_of(routed(once, "mrpc", 0)), scatter_of(once))


def test_edits_carry_routes(subspace: SharedSubspace, save_lora: SaveLora, tmp_path: Path) -> None:
    held = SharedSubspace(routed(routed(subspace.state, "mrpc", 0), "sst2", 1))
    route = held.state.tasks["mrpc"].route
    held.rename_task("mrpc", "paraphrases")
    held.add_adapters({"rte": save_lora("rte", seed=5)}, progress=False)
    assert held.routed_tasks == ("paraphrases", "sst2")
    assert held.state.tasks["paraphrases"].route is route
    held.refit({"rte": tmp_path / "adapters" / "rte"}, progress=False)
    assert held.routed_tasks == ("paraphrases", "sst2") and held.state.router is not None
    held.replace_task("sst2", save_lora("sst2", seed=9), progress=False)
    assert held.routed_tasks == ("paraphrases",)
    held.remove_task("paraphrases")
    assert held.routed_tasks == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": (1, 3)}, r"has 6 features of layers \[1, 2\], expected 6 of \[1, 3\] as the router has"),
        ({"probe": -PROBE}, "of cosine -1.00 with the router's for the same tokens, expected at least 0.8"),
    ],
)
def test_routers_of_two_base_models_are_not_joined(
    writers: tuple[SubspaceState, SubspaceState], change: dict[str, object], message: str
) -> None:
    ours, theirs = writers
    with pytest.raises(ValueError, match=message):
        reconcile(ours, replace(theirs, router=replace(theirs.router, **change)))
    with pytest.raises(ValueError, match=message):
        routed(replace(ours, router=replace(ours.router, **change)), "mrpc", 9)
