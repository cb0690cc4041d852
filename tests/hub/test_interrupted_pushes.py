"""Pushes that end at any point, and the push after them: nothing is lost or stale, and nobody is locked out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub.errors import HfHubHTTPError

from share_hf import SharedSubspace
from share_hf.hub.answers import HubAnswerError
from tests.hub_server import Answer, DropUpload, LoseAnswer, Request, Run, WebPage, is_commit
from tests.hub_server.faults import Fault
from tests.hub_server.fixtures import Hub
from tests.trees import assert_same_state, distance


REPO = "org/share-subspace"
FAULTS = {
    "refused": Answer(400),
    "dropped": DropUpload(),
    "answer lost": LoseAnswer(),
    "web page": WebPage(),
    "limited for an hour": Answer(429, headers={"Retry-After": "3600"}),
}


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


class Interrupt:
    """Let everything fail from the n-th request of a push that may change something. Requests that read succeed."""

    def __init__(self, hub: Hub, at: int, fault: Fault) -> None:
        self.seen = 0
        hub.server.faults.add(self._is_due, fault, times=float("inf"))
        self._at = at

    def _is_due(self, request: Request) -> bool:
        self.seen += request.method not in ("GET", "HEAD")
        return self.seen > self._at


def assert_whole(hub: Hub, tasks: set[str], *, tolerance: float = 0.05) -> None:
    """Assert that everything in the repository fits together: branches, tags, and no remains of a push."""
    main = SharedSubspace.from_pretrained(REPO)
    assert set(main.tasks) == tasks and len(main.tasks) == len(tasks)
    repository = hub.repository(REPO)
    assert set(repository.branches) == {"main", *tasks}
    for task in tasks:
        of_branch = SharedSubspace.from_pretrained(REPO, revision=task)
        assert of_branch.state.root_task == task
        assert distance(of_branch, main, task) <= tolerance
        of_branch.export_lora(task, hub.home / f"{task}-of-branch")
        root = repository.branches[task].files["adapter_model.safetensors"].content
        assert root == (hub.home / f"{task}-of-branch" / "adapter_model.safetensors").read_bytes()
    newest = [tag for tag in repository.tags if tag.endswith(f"-{main.tasks[-1]}")]
    assert json.loads(repository.tags[newest[0]].files["share_config.json"].content)["tasks"] == list(main.tasks)


def changed(pushed: SharedSubspace, save_lora: Callable[..., Path]) -> SharedSubspace:
    """The subspace with a task that was learned again under its old name, two new ones, and one that drifted."""
    pushed.remove_task("sst2")
    pushed.add_adapters({"sst2": save_lora("sst2", seed=41)}, progress=False)
    pushed.add_adapters({name: save_lora(name, seed=42 + i) for i, name in enumerate(("rte", "cola"))}, progress=False)
    assert pushed.state.drifts()["mrpc"] > 0.05
    return pushed


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, id=name) for name, fault in FAULTS.items()],
)
@pytest.mark.parametrize("third", range(3))
def test_a_push_interrupted_anywhere_leaves_a_repository_that_loads_and_the_next_completes_it(
    third: int, fault: Fault, hub: Hub, subspace: SharedSubspace, save_lora: Callable[..., Path]
) -> None:
    subspace.push_to_hub(REPO)
    state = changed(SharedSubspace.from_pretrained(REPO), save_lora).state
    others = SharedSubspace.from_pretrained(REPO)
    others.add_adapters({"others": save_lora("others", seed=44)}, progress=False)
    others.push_to_hub(REPO)
    repository = hub.repository(REPO)
    refs = dict(repository.branches), dict(repository.tags)
    for at in range(third, 200, 3):
        repository.branches, repository.tags = dict(refs[0]), dict(refs[1])
        pushed = SharedSubspace(state)
        interrupt = Interrupt(hub, at, fault)
        try:
            pushed.push_to_hub(REPO)
        except Exception:
            hub.server.faults.clear()
            assert pushed.state is state
        else:
            assert interrupt.seen <= at, "the push did not notice"
            hub.server.faults.clear()
            break
        for branch in set(repository.branches) - {"main"}:
            if not branch.startswith("share_hf-"):
                assert SharedSubspace.from_pretrained(REPO, revision=branch).state.root_task == branch
        pushed.push_to_hub(REPO)
        assert_whole(hub, {"mrpc", "sst2", "rte", "cola", "others"})
        assert distance(pushed, SharedSubspace(state), "sst2") <= pushed.state.drifts()["sst2"] + 1e-5
        assert_same_state(SharedSubspace.from_pretrained(REPO).state, pushed.state)
    assert at > 20


def test_a_first_push_that_was_cut_off_is_completed_by_somebody_else(hub: Hub, subspace: SharedSubspace) -> None:
    hub.server.faults.add(lambda request: "/branch/" in request.path, Answer(500), times=99)
    with pytest.raises(HfHubHTTPError):
        subspace.push_to_hub(REPO)
    hub.server.faults.clear()
    hub.move_to_another_machine()
    SharedSubspace.from_pretrained(REPO).push_to_hub(REPO)
    assert_whole(hub, {"mrpc", "sst2"})


def test_branches_that_were_asked_for_are_completed_by_a_push_that_does_not_ask(
    hub: Hub, subspace: SharedSubspace
) -> None:
    hub.server.faults.add(lambda request: "/branch/" in request.path, Answer(500), times=99)
    with pytest.raises(HfHubHTTPError):
        subspace.push_to_hub(REPO, branches="new")
    hub.server.faults.clear()
    subspace.push_to_hub(REPO, branches="new")
    assert_whole(hub, {"mrpc", "sst2"})


@pytest.mark.parametrize("further", ["trained", "removed", "learned anew"])
def test_what_was_done_since_a_push_whose_answer_was_lost_is_pushed_too(
    further: str, hub: Hub, subspace: SharedSubspace, save_lora: Callable[..., Path]
) -> None:
    subspace.push_to_hub(REPO)
    ours, others = SharedSubspace.from_pretrained(REPO), SharedSubspace.from_pretrained(REPO)
    others.add_adapters({"others": save_lora("others", seed=51)}, progress=False)
    others.push_to_hub(REPO)
    ours.add_adapters({"rte": save_lora("rte", seed=52)}, progress=False)
    hub.server.faults.add(is_commit, LoseAnswer())
    with pytest.raises(Exception, match=r"disconnected|closed"):
        ours.push_to_hub(REPO)
    assert "rte" in SharedSubspace.from_pretrained(REPO).tasks and "others" not in ours.tasks
    if further == "trained":
        ours.add_adapters({"cola": save_lora("cola", seed=53)}, progress=False)
    else:
        ours.remove_task("rte")
    if further == "learned anew":
        ours.add_adapters({"rte": save_lora("another-rte", seed=54)}, progress=False)
    before = SharedSubspace(ours.state)
    ours.push_to_hub(REPO)
    tasks = {"mrpc", "sst2", "others", "rte", *(["cola"] if further == "trained" else [])}
    assert set(ours.tasks) == tasks - ({"rte"} if further == "removed" else set())
    if further == "learned anew":
        assert distance(ours, before, "rte") <= ours.state.drifts()["rte"] + 1e-5
        assert_whole(hub, set(ours.tasks))


def test_a_task_that_others_learned_again_is_not_removed_by_whoever_removed_the_old_one(
    hub: Hub, subspace: SharedSubspace, save_lora: Callable[..., Path]
) -> None:
    subspace.push_to_hub(REPO)
    ours, theirs = SharedSubspace.from_pretrained(REPO), SharedSubspace.from_pretrained(REPO)
    theirs.remove_task("mrpc")
    theirs.add_adapters({"mrpc": save_lora("mrpc", seed=61)}, progress=False)
    theirs.push_to_hub(REPO)
    ours.remove_task("mrpc")
    ours.push_to_hub(REPO)
    assert distance(SharedSubspace.from_pretrained(REPO), theirs, "mrpc") < 1e-5


def test_a_web_page_in_place_of_an_answer_is_reported(hub: Hub, subspace: SharedSubspace) -> None:
    hub.server.faults.add(lambda request: True, WebPage(), times=99)
    with pytest.raises(HubAnswerError, match=r"answer cannot be understood .*proxy or the sign-in page"):
        subspace.push_to_hub(REPO)


def test_a_rate_limit_at_any_request_is_waited_for(
    hub: Hub, subspace: SharedSubspace, save_lora: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waited.append)
    subspace.push_to_hub(REPO)
    hub.move_to_another_machine()
    pushed = changed(SharedSubspace.from_pretrained(REPO), save_lora)
    seen: set[tuple[str, str]] = set()

    def is_new(request: Request) -> bool:
        key = request.method, request.path
        return key not in seen and not seen.add(key)

    hub.server.faults.add(is_new, Answer(429, headers={"Retry-After": "7"}), times=float("inf"))
    hub.move_to_another_machine()
    pushed.push_to_hub(REPO)
    hub.server.faults.clear()
    # The client runs without two of its own requests: the names of agents, and what the cache has already.
    assert len(seen) > 25 and len([seconds for seconds in waited if seconds >= 7]) >= len(seen) - 2
    assert_whole(hub, {"mrpc", "sst2", "rte", "cola"})


def test_a_limit_of_an_hour_is_not_waited_for(hub: Hub, subspace: SharedSubspace) -> None:
    hub.server.faults.add(is_commit, Answer(429, headers={"RateLimit": '"commits";r=0;t=3600'}))
    with pytest.raises(HfHubHTTPError, match="429"):
        subspace.push_to_hub(REPO)
    subspace.push_to_hub(REPO)
    assert_whole(hub, {"mrpc", "sst2"})


def test_the_workshop_of_a_push_that_was_cut_off_is_deleted(
    hub: Hub, subspace: SharedSubspace, save_lora: Callable[..., Path]
) -> None:
    hub.server.faults.add(lambda request: is_commit(request) and "/commit/share_hf-" in request.path, Answer(400))
    with pytest.raises(HfHubHTTPError):
        subspace.push_to_hub(REPO)
    repository = hub.repository(REPO)
    assert [name for name in repository.branches if name.startswith("share_hf-")]
    repository.create_branch(f"share_hf-{'0' * 32}", "main")  # of an earlier version
    repository.create_branch("share_hf-notes", "main")  # of another person
    subspace.add_adapters({"rte": save_lora("rte", seed=71)}, progress=False)
    subspace.push_to_hub(REPO)
    assert set(repository.branches) == {"main", "mrpc", "sst2", "rte", "share_hf-notes"}


def test_a_push_whose_workshop_somebody_else_takes_leaves_the_branches_to_them(
    hub: Hub, subspace: SharedSubspace, save_lora: Callable[..., Path]
) -> None:
    subspace.push_to_hub(REPO)
    first, second = SharedSubspace.from_pretrained(REPO), SharedSubspace.from_pretrained(REPO)
    names = ("rte", "cola", "wnli")
    first.add_adapters({name: save_lora(name, seed=81 + i) for i, name in enumerate(names)}, progress=False)
    second.add_adapters({"stsb": save_lora("stsb", seed=84)}, progress=False)
    repository = hub.repository(REPO)

    def is_last_branch(request: Request) -> bool:
        return request.path.endswith("/branch/cola")

    hub.server.faults.add(is_last_branch, Run(lambda: second.push_to_hub(REPO)))
    first.push_to_hub(REPO)
    assert_whole(hub, {"mrpc", "sst2", "stsb", *names}, tolerance=0.06)
    assert not [name for name in repository.branches if name.startswith("share_hf-")]


def test_tags_of_a_subspace_that_was_removed_do_not_pass_for_those_of_its_successor(
    hub: Hub, subspace: SharedSubspace, save_lora: Callable[..., Path]
) -> None:
    subspace.push_to_hub(REPO)
    repository = hub.repository(REPO)
    files = repository.branches["main"].files
    repository.write({name: None for name in files if name != ".gitattributes"}, title="Start anew")
    hub.api.create_tag(REPO, tag="v1")
    adapters = {"mrpc": save_lora("mrpc", seed=91), "sst2": save_lora("sst2", seed=92)}
    anew = SharedSubspace.from_adapters(adapters, num_components=6, pseudo_rank=4, progress=False)
    anew.push_to_hub(REPO)
    assert_same_state(SharedSubspace.from_pretrained(REPO, revision="step-0002-sst2").state, anew.state)
    assert set(repository.tags) == {"step-0002-sst2", "v1"}
    assert_whole(hub, {"mrpc", "sst2"})
