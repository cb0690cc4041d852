"""Which tasks get a branch, what this costs, and how tasks without a branch are found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import PreTrainedModel

from share_hf import SharedSubspace
from share_hf.hub.branches import MAX_BRANCHES_UNASKED
from tests.hub_server.fixtures import Hub
from tests.trees import assert_close, assert_same_state, distance, logits


REPO = "org/share-subspace"


def branches(hub: Hub) -> set[str]:
    return set(hub.repository(REPO).branches) - {"main"}


@pytest.mark.parametrize(
    ("choice", "first", "second"),
    [
        (None, {"mrpc", "sst2"}, {"mrpc", "sst2", "rte"}),
        ("all", {"mrpc", "sst2"}, {"mrpc", "sst2", "rte"}),
        ("new", {"mrpc", "sst2"}, {"mrpc", "sst2", "rte"}),
        ("none", set(), set()),
        (["mrpc"], {"mrpc"}, {"mrpc"}),
    ],
)
def test_a_push_makes_the_branches_that_are_asked_for(
    choice: str | list[str] | None,
    first: set[str],
    second: set[str],
    hub: Hub,
    subspace: SharedSubspace,
    loras: dict[str, Path],
) -> None:
    subspace.push_to_hub(REPO, branches=choice)
    assert branches(hub) == first
    subspace.add_adapters({"rte": loras["rte"]}, progress=False)
    oid = subspace.push_to_hub(REPO, branches=choice).oid
    assert branches(hub) == second
    for task in second:
        assert distance(SharedSubspace.from_pretrained(REPO, revision=task), subspace, task) <= 0.05
    hub.server.forget_requests()
    assert subspace.push_to_hub(REPO, branches=choice).oid == oid
    assert not [request for request in hub.server.requests if request.method != "GET" and "/commit/" in request.path]


def test_new_means_what_the_repository_does_not_have(
    hub: Hub, subspace: SharedSubspace, loras: dict[str, Path]
) -> None:
    subspace.push_to_hub(REPO, branches="none")
    subspace.add_adapters({"rte": loras["rte"]}, progress=False)
    subspace.push_to_hub(REPO, branches="new")
    assert branches(hub) == {"rte"}


def test_a_branch_that_is_there_is_kept_up_to_date_whatever_is_asked_for(
    hub: Hub, subspace: SharedSubspace, loras: dict[str, Path]
) -> None:
    subspace.push_to_hub(REPO, branches=["sst2"])
    subspace.remove_task("sst2")
    subspace.add_adapters({"sst2": loras["rte"]}, progress=False)  # in one push, so that it never left the repository
    subspace.push_to_hub(REPO, branches="none")
    assert branches(hub) == {"sst2"}
    assert distance(SharedSubspace.from_pretrained(REPO, revision="sst2"), subspace, "sst2") < 1e-6


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("some", "branches is 'some', expected 'all', 'new', 'none' or a list of tasks"),
        (["mrpc", "cola"], r"branches has \['cola'\], expected tasks of the subspace, which has \['mrpc', 'sst2'\]"),
    ],
)
def test_what_names_no_tasks_is_refused(
    choice: str | list[str], message: str, hub: Hub, subspace: SharedSubspace
) -> None:
    with pytest.raises(ValueError, match=message):
        subspace.push_to_hub(REPO, branches=choice)
    assert not hub.server.repositories


def test_roots_that_repeat_what_main_has_are_right_on_every_branch(hub: Hub, save_lora: Callable[..., Path]) -> None:
    """A branch's tree is made from the previous one, which may differ from main where the new one does not."""
    targets = {"mrpc": ["q_proj", "v_proj"], "sst2": ["q_proj"], "rte": ["q_proj", "v_proj"], "cola": ["v_proj"]}
    adapters = {
        name: save_lora(name, seed=i, target_modules=modules) for i, (name, modules) in enumerate(targets.items())
    }
    adapters |= {"twin": adapters["mrpc"], "last": adapters["mrpc"]}
    subspace = SharedSubspace.from_adapters(adapters, num_components=24, pseudo_rank=4, progress=False)
    subspace.push_to_hub(REPO)
    repository = hub.repository(REPO)
    for task in adapters:
        subspace.export_lora(task, hub.home / task)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert repository.branches[task].files[name].content == (hub.home / task / name).read_bytes(), (task, name)


def test_the_first_push_of_many_tasks_costs_few_requests(hub: Hub, save_lora: Callable[..., Path]) -> None:
    adapters = {f"task{i:02}": save_lora(f"task{i:02}", seed=i, target_modules=["q_proj"]) for i in range(20)}
    subspace = SharedSubspace.from_adapters(adapters, num_components=8, pseudo_rank=2, progress=False)
    hub.server.forget_requests()
    subspace.push_to_hub(REPO)
    sent = Counter(request.method if request.method == "PUT" else request.path for request in hub.server.requests)
    uploads = sent["PUT"] + sent[f"/{REPO}.git/info/lfs/objects/verify"]
    # A branch takes two requests, and the client has its card checked as well. Everything else is for the push as a
    # whole.
    assert sum(sent.values()) - uploads <= 3 * 19 + 20
    assert sent["PUT"] == 20 + 1 + 20  # coefficients, the basis, and root adapters
    hub.api.delete_repo(REPO)
    hub.server.forget_requests()
    subspace.push_to_hub(REPO, branches="none")
    sent = Counter(request.method if request.method == "PUT" else request.path for request in hub.server.requests)
    assert sum(sent.values()) - 2 * sent["PUT"] <= 12


@pytest.mark.slow
def test_of_many_tasks_none_gets_a_branch_unasked(hub: Hub, save_lora: Callable[..., Path]) -> None:
    lora = save_lora("lora", target_modules=["q_proj"])
    names = [f"task{i:03}" for i in range(MAX_BRANCHES_UNASKED + 1)]
    subspace = SharedSubspace.from_adapters(
        dict.fromkeys(names, lora), num_components=4, pseudo_rank=2, progress=False
    )
    subspace.push_to_hub(REPO)
    assert not branches(hub)
    subspace.push_to_hub(REPO, branches=["task007"])
    subspace.add_adapters({"another": save_lora("another", seed=1, target_modules=["q_proj"])}, progress=False)
    subspace.push_to_hub(REPO)
    assert branches(hub) == {"task007"}
    assert distance(SharedSubspace.from_pretrained(REPO, revision="task007"), subspace, "task007") <= 0.05


# ---- Tasks without a branch -----------------------------------------------------------------------------------------


def test_a_task_without_a_branch_is_found_on_main(hub: Hub, subspace: SharedSubspace) -> None:
    subspace.push_to_hub(REPO, branches="none")
    hub.move_to_another_machine()
    hub.server.forget_requests()
    found = SharedSubspace.from_pretrained(REPO, revision="mrpc")
    assert not hub.server.downloaded(REPO, "tasks/sst2/adapter_model.safetensors")
    assert found.state.root_task == "mrpc" and distance(found, subspace, "mrpc") == 0
    with hub.offline():
        assert distance(SharedSubspace.from_pretrained(REPO, revision="mrpc"), subspace, "mrpc") == 0
    with pytest.raises(
        ValueError, match=r"no revision 'mrcp', did you mean 'mrpc'|no revision 'mrcp', expected one of"
    ):
        SharedSubspace.from_pretrained(REPO, revision="mrcp")
    assert_same_state(SharedSubspace.from_pretrained(REPO).state, subspace.state)


def test_the_card_names_revisions_that_exist(hub: Hub, subspace: SharedSubspace) -> None:
    subspace.push_to_hub(REPO, branches="none")
    card = hub.repository(REPO).branches["main"].files["README.md"].content.decode()
    peft, _, share = card.partition("To load one task from its coefficients")
    assert "revision=" not in peft and 'revision="mrpc"' in share
    subspace.push_to_hub(REPO, branches=["sst2"])
    card = hub.repository(REPO).branches["main"].files["README.md"].content.decode()
    assert 'revision="sst2"' in card.partition("To load one task from its coefficients")[0]
    assert "at the revision of a task that has a branch, it is the LoRA of that task" in card


def test_peft_is_told_where_a_task_without_a_branch_is(
    hub: Hub, subspace: SharedSubspace, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    subspace.push_to_hub(REPO, branches="none")
    message = r"has no revision 'mrpc'.*: the task 'mrpc' has no branch of its own, it is at subfolder='tasks/mrpc'"
    with pytest.raises(ValueError, match=message):
        AutoPeftModelForCausalLM.from_pretrained(REPO, revision="mrpc")
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny_model("llama"), REPO, revision="mrpc")
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json'"):
        PeftModel.from_pretrained(tiny_model("llama"), REPO, revision="cola")
    loaded = PeftModel.from_pretrained(tiny_model("llama"), REPO, subfolder="tasks/mrpc", adapter_name="mrpc")
    assert_close(logits(loaded), logits(subspace.apply(tiny_model("llama"), ["mrpc"])))
