"""Two writers of one repository: the tasks of both end up on `main`, and nothing is overwritten."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from share_hf import SharedSubspace
from share_hf.hub.push import PushConflictError
from share_hf.state import reconcile
from tests.hub_server import DropDownload, is_commit
from tests.hub_server.fixtures import Hub
from tests.trees import assert_same_state, distance


REPO = "org/share-subspace"


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("share_hf.hub.push._SECONDS_BETWEEN_ATTEMPTS", 0.0)


@pytest.fixture
def writers(
    hub: Hub, subspace: SharedSubspace, save_lora: Callable[..., Path]
) -> tuple[SharedSubspace, SharedSubspace]:
    """Two people who start from the same revision and have each learned a task since."""
    subspace.push_to_hub(REPO)
    first, second = (SharedSubspace.from_pretrained(REPO) for _ in range(2))
    first.add_adapters({"rte": save_lora("rte", seed=11)}, progress=False)
    second.add_adapters({"cola": save_lora("cola", seed=12)}, progress=False)
    return first, second


def test_both_tasks_end_up_on_main(hub: Hub, writers: tuple[SharedSubspace, SharedSubspace]) -> None:
    first, second = writers
    first.push_to_hub(REPO)
    before = second.state
    second.push_to_hub(REPO)
    assert second.tasks == ("mrpc", "sst2", "rte", "cola")
    on_main = SharedSubspace.from_pretrained(REPO)
    assert_same_state(on_main.state, second.state)
    assert on_main.state.lineage[: len(first.state.lineage)] == first.state.lineage
    for task, learned in (("rte", first), ("cola", SharedSubspace(before))):
        assert distance(on_main, learned, task) <= on_main.state.drifts()[task] + 1e-6
    refs = hub.repository(REPO)
    assert sorted(refs.branches) == ["cola", "main", "mrpc", "rte", "sst2"]
    assert sorted(refs.tags) == ["step-0002-sst2", "step-0003-rte", "step-0004-cola"]
    assert [commit.title for commit in hub.api.list_repo_commits(REPO)][:2] == ["Add task cola", "Add task rte"]


def test_what_a_task_lost_before_it_was_merged_stays_known(writers: tuple[SharedSubspace, SharedSubspace]) -> None:
    first, second = (writer.state for writer in writers)
    merged = reconcile(second, first)
    for module, layer in merged.layers_of("cola").items():
        origin = second.layers[module]
        i, j = layer.index("cola"), origin.index("cola")
        assert layer.records.norms[i] == origin.records.norms[j]
        assert layer.records.rank_errors[i] == origin.records.rank_errors[j]
        assert layer.records.drift_bounds[i] >= origin.records.drift_bounds[j]


def test_the_one_who_loses_a_race_merges_and_pushes_again(
    hub: Hub, writers: tuple[SharedSubspace, SharedSubspace]
) -> None:
    first, second = writers
    hub.server.faults.before_commit(lambda: first.push_to_hub(REPO))
    second.push_to_hub(REPO)
    assert set(SharedSubspace.from_pretrained(REPO).tasks) == {"mrpc", "sst2", "rte", "cola"}


@pytest.mark.parametrize("count", [4, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_many_at_once_all_arrive_once(count: int, hub: Hub, save_lora: Callable[..., Path]) -> None:
    names = [f"task{i}" for i in range(count)]
    adapters = {
        name: save_lora(name, seed=20 + i, target_modules=["q_proj"]) for i, name in enumerate(["first", *names])
    }
    SharedSubspace.from_adapters(
        {"first": adapters["first"]}, num_components=24, pseudo_rank=4, progress=False
    ).push_to_hub(REPO)
    writers = {name: SharedSubspace.from_pretrained(REPO) for name in names}
    errors = []

    def learn_and_push(name: str) -> None:
        try:
            writers[name].add_adapters({name: adapters[name]}, progress=False)
            writers[name].push_to_hub(REPO)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=learn_and_push, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    main, tasks = SharedSubspace.from_pretrained(REPO), {"first", *names}
    assert set(main.tasks) == tasks and len(main.tasks) == len(tasks)
    titles = [commit.title for commit in hub.api.list_repo_commits(REPO)]
    assert all(titles.count(f"Add task {name}") == 1 for name in names)
    assert set(hub.repository(REPO).branches) == {"main", *tasks}
    for task in tasks:
        # Drift is relative to what was learned, of which less is left by now.
        left = (1 - main.state.drifts()[task] ** 2) ** 0.5
        assert distance(SharedSubspace.from_pretrained(REPO, revision=task), main, task) <= 0.05 / left + 1e-3
    SharedSubspace.from_pretrained(REPO).push_to_hub(REPO)
    assert [commit.title for commit in hub.api.list_repo_commits(REPO)] == titles


def test_attempts_run_out_with_a_clear_message_and_nothing_lost(
    hub: Hub, writers: tuple[SharedSubspace, SharedSubspace]
) -> None:
    _, second = writers
    before, repository, count = second.state, hub.repository(REPO), 0

    def somebody_else_commits() -> None:
        nonlocal count
        count += 1
        repository.write({"notes.md": str(count).encode()})

    hub.server.faults.before_commit(somebody_else_commits, times=float("inf"))
    with pytest.raises(PushConflictError, match=f"{REPO}: others pushed during each of 3 attempts.*push it again"):
        second.push_to_hub(REPO, max_attempts=3)
    assert count == 3 and second.state is before
    assert SharedSubspace.from_pretrained(REPO).tasks == ("mrpc", "sst2")
    hub.server.faults.clear()
    second.push_to_hub(REPO)
    assert SharedSubspace.from_pretrained(REPO).tasks == ("mrpc", "sst2", "cola")


def test_a_push_whose_answer_was_lost_is_not_done_twice(
    hub: Hub, writers: tuple[SharedSubspace, SharedSubspace]
) -> None:
    first, _ = writers
    hub.server.faults.add(is_commit, DropDownload(0))
    with pytest.raises(Exception, match=""):
        first.push_to_hub(REPO)
    first.push_to_hub(REPO)
    assert [commit.title for commit in hub.api.list_repo_commits(REPO)].count("Add task rte") == 1
    assert sorted(hub.repository(REPO).tags) == ["step-0002-sst2", "step-0003-rte"]


def test_two_tasks_of_one_name_are_not_mixed(
    hub: Hub, writers: tuple[SharedSubspace, SharedSubspace], save_lora: Callable[..., Path]
) -> None:
    first, second = writers
    first.add_adapters({"cola": save_lora("other-cola", seed=13)}, progress=False)
    head = first.push_to_hub(REPO).oid
    before = second.state
    with pytest.raises(ValueError, match="task 'cola' was learned by both sides, with different results"):
        second.push_to_hub(REPO)
    assert hub.api.repo_info(REPO).sha == head and second.state is before


def test_one_task_that_reached_both_by_different_ways_is_one_task(
    writers: tuple[SharedSubspace, SharedSubspace],
) -> None:
    state = writers[0].state
    otherwise = replace(state, lineage=(*state.lineage[:2], {"id": "another way", "merged": ["rte"]}))
    assert reconcile(otherwise, state).tasks == state.tasks


def test_a_task_that_one_side_removed_is_removed(writers: tuple[SharedSubspace, SharedSubspace]) -> None:
    first, second = writers
    second.remove_task("mrpc")
    first.push_to_hub(REPO)
    second.push_to_hub(REPO)
    assert SharedSubspace.from_pretrained(REPO).tasks == ("sst2", "rte", "cola")
    first.push_to_hub(REPO)
    assert first.tasks == ("sst2", "rte", "cola")


def test_who_is_behind_gets_what_is_there_and_pushes_nothing(
    hub: Hub, writers: tuple[SharedSubspace, SharedSubspace]
) -> None:
    first, _ = writers
    behind = SharedSubspace.from_pretrained(REPO)
    head = first.push_to_hub(REPO).oid
    behind.push_to_hub(REPO)
    assert hub.api.repo_info(REPO).sha == head
    assert_same_state(behind.state, first.state)


def test_subspaces_with_nothing_in_common_are_merged(hub: Hub, save_lora: Callable[..., Path]) -> None:
    for i, name in enumerate(("left", "right")):
        SharedSubspace.from_adapters(
            {name: save_lora(name, seed=30 + i)}, num_components=6, pseudo_rank=4, progress=False
        ).push_to_hub(REPO)
    assert SharedSubspace.from_pretrained(REPO).tasks == ("left", "right")


def test_the_scores_of_both_streams_are_kept(writers: tuple[SharedSubspace, SharedSubspace]) -> None:
    def with_scores(subspace: SharedSubspace, task: str, score: float) -> SharedSubspace:
        metrics = {"score": "accuracy", "tasks": ["mrpc", "sst2", task]}
        matrix = [[0.9, None, None], [0.8, 0.7, None], [0.8, 0.6, score]]
        return SharedSubspace(replace(subspace.state, metrics={**metrics, "matrix": matrix}))

    first, second = with_scores(writers[0], "rte", 0.5), with_scores(writers[1], "cola", 0.4)
    first.push_to_hub(REPO)
    second.push_to_hub(REPO)
    metrics = SharedSubspace.from_pretrained(REPO).state.metrics
    assert metrics["tasks"] == ["mrpc", "sst2", "rte", "cola"]
    assert metrics["matrix"] == [
        [0.9, None, None, None], [0.8, 0.7, None, None], [0.8, 0.6, 0.5, None], [0.8, 0.6, None, 0.4],
    ]  # fmt: skip


def test_merging_is_the_same_whoever_comes_second(writers: tuple[SharedSubspace, SharedSubspace]) -> None:
    first, second = (writer.state for writer in writers)
    one, other = reconcile(second, first), reconcile(first, second)
    assert set(one.tasks) == set(other.tasks)
    for module, layer in one.layers.items():
        for task in layer.tasks:
            a, b = layer.update_of(task).dense(), other.layers[module].update_of(task).dense()
            drift = 2 * max(one.drifts()[task], other.drifts()[task], 1e-6)
            assert torch.linalg.matrix_norm(a - b) <= 2 * drift * torch.linalg.matrix_norm(a) + 1e-6


def renamed(writer: SharedSubspace, base: str) -> SharedSubspace:
    return SharedSubspace(replace(writer.state, base_model_name_or_path=base))


def test_a_four_bit_twin_of_the_base_model_is_the_same_model(
    hub: Hub, writers: tuple[SharedSubspace, SharedSubspace]
) -> None:
    first, second = writers
    first.push_to_hub(REPO)
    twin = renamed(second, "org/tiny-bnb-4bit")
    twin.push_to_hub(REPO)
    assert SharedSubspace.from_pretrained(REPO).base_model_name_or_path == "org/tiny"
    assert set(SharedSubspace.from_pretrained(REPO).tasks) == {"mrpc", "sst2", "rte", "cola"}


def test_who_knows_that_two_names_are_one_model_says_so(
    hub: Hub, writers: tuple[SharedSubspace, SharedSubspace]
) -> None:
    first, second = writers
    first.push_to_hub(REPO)
    other = renamed(second, "org/renamed")
    before = other.state
    for meet in (lambda: other.push_to_hub(REPO), lambda: other.update_from(first)):
        with pytest.raises(ValueError, match=r"base model 'org/tiny', expected 'org/renamed'.*base_model="):
            meet()
    assert other.state is before and SharedSubspace.from_pretrained(REPO).tasks == first.tasks

    SharedSubspace(before).update_from(first, base_model="org/renamed")
    other.push_to_hub(REPO, base_model="org/renamed")

    published = SharedSubspace.from_pretrained(REPO)
    assert published.base_model_name_or_path == other.base_model_name_or_path == "org/renamed"
    assert set(published.tasks) == {"mrpc", "sst2", "rte", "cola"}
    with pytest.raises(ValueError, match=r"base_model is './tiny', expected a Hub id"):
        other.push_to_hub(REPO, base_model="./tiny")
