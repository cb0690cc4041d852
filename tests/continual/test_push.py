"""A trainer that publishes its subspace."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from share_hf import SharedSubspace, ShareTrainer
from tests.hub_server import Answer, DropUpload, LoseAnswer, Request, WebPage, is_commit
from tests.hub_server.faults import Fault
from tests.hub_server.fixtures import Hub
from tests.trees import distance

from .cases import arguments, assert_same_tasks, classification_task, classification_tasks, classifier_trainer, logits


REPO = "org/stream"
TinyModel = Callable[[str], PreTrainedModel]


def commits(hub: Hub) -> list[str]:
    return [commit.title for commit in reversed(hub.api.list_repo_commits(REPO))]


def publishing(model: PreTrainedModel, folder: Path, **overrides: object) -> ShareTrainer:
    tasks = classification_tasks("colors", "shapes")
    return classifier_trainer(model, folder, tasks, push_to_hub=True, hub_model_id=REPO, **overrides)


def test_every_save_is_a_push_after_every_task(hub: Hub, tiny_model: TinyModel, tmp_path: Path) -> None:
    trainer = publishing(tiny_model("bert"), tmp_path, hub_strategy="every_save", save_strategy="steps", save_steps=1)
    trainer.train()
    assert commits(hub) == ["initial commit", "Add task colors", "Add task shapes"]
    repository = hub.repository(REPO)
    assert sorted(repository.branches) == ["colors", "main", "shapes"]
    assert sorted(repository.tags) == ["step-0001-colors", "step-0002-shapes"]
    assert_same_tasks(SharedSubspace.from_pretrained(REPO), trainer.subspace)
    assert SharedSubspace.from_pretrained(REPO, revision="step-0001-colors").tasks == ("colors",)


def test_end_is_one_push_when_all_tasks_are_learned(hub: Hub, tiny_model: TinyModel, tmp_path: Path) -> None:
    trainer = publishing(tiny_model("bert"), tmp_path, hub_strategy="end", hub_private_repo=True)
    trainer.train()
    assert commits(hub) == ["initial commit", "Add 2 tasks"]
    assert hub.repository(REPO).private
    assert_same_tasks(SharedSubspace.from_pretrained(REPO), trainer.subspace)


def test_a_trainer_pushes_when_it_is_told_to(hub: Hub, tiny_model: TinyModel, tmp_path: Path) -> None:
    trainer = classifier_trainer(
        tiny_model("bert"), tmp_path, classification_tasks("colors"), hub_model_id=REPO,
        trainer={"dataset_ids": {"colors": "org/colors"}},
    )  # fmt: skip
    trainer.train()
    commit = trainer.push_to_hub("First task", private=True)
    assert commit.oid == hub.api.repo_info(REPO).sha and commits(hub)[-1] == "First task"
    card = ModelCard.load(REPO)
    assert card.data.datasets == ["org/colors"]
    result = card.data.eval_results[0]
    assert (result.dataset_name, result.metric_type) == ("colors", "accuracy")
    assert result.metric_value == trainer.metrics["matrix"][0][0]
    with pytest.raises(ValueError, match="revision 'colors', expected True and None"):
        trainer.push_to_hub(revision="colors")


def test_tasks_that_others_pushed_meanwhile_are_adapters_of_the_model_from_then_on(
    hub: Hub, tiny_model: TinyModel, tmp_path: Path
) -> None:
    trainer = publishing(tiny_model("bert"), tmp_path / "ours", hub_strategy="every_save")
    other = classifier_trainer(
        tiny_model("bert"), tmp_path / "theirs", {"sounds": classification_task(3, 3)}, hub_model_id=REPO
    )
    other.train()
    hub.server.faults.before_commit(other.push_to_hub)
    trainer.train()
    assert set(trainer.subspace.tasks) == set(SharedSubspace.from_pretrained(REPO).tasks) == {
        "colors", "shapes", "sounds",
    }  # fmt: skip
    assert set(trainer.model.peft_config) == {"colors", "shapes", "sounds"}
    assert_same_tasks(SharedSubspace.from_pretrained(tmp_path / "ours" / "subspace"), trainer.subspace)
    data = classification_task(3, 3)["test"]
    trainer.model.set_adapter("sounds")
    expected = SharedSubspace.from_pretrained(REPO).apply(tiny_model("bert"), ["sounds"])
    assert logits(trainer.model, data).allclose(logits(expected, data), atol=1e-5)
    assert trainer.metrics["tasks"] == ["colors", "shapes"]
    assert set(trainer.subspace.state.metrics["tasks"]) == {"colors", "shapes", "sounds"}


def test_a_hub_that_is_down_does_not_stop_a_stream(
    hub: Hub, tiny_model: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = publishing(tiny_model("bert"), tmp_path, hub_strategy="every_save")
    hub.server.faults.add(is_commit, Answer(403))
    trainer.train()
    assert commits(hub) == ["initial commit", "Add 2 tasks"]


TROUBLES = {
    "web page": WebPage(),
    "answer lost": LoseAnswer(),
    "forbidden": Answer(403),
    "deleted": Answer(404),
    "unavailable": WebPage(503),
    "dropped": DropUpload(),
    "refused": Answer(400, "Invalid metadata"),
}


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, id=name, marks=[pytest.mark.slow] * (name not in ("web page", "answer lost")))
        for name, fault in TROUBLES.items()
    ],
)
@pytest.mark.parametrize("request_part", ["/refs", "/tree/", "/commit/", "/branch/", "/tag/", "/preupload/"])
def test_no_trouble_with_the_hub_ends_a_stream_and_the_next_push_catches_up(
    fault: Fault, request_part: str, hub: Hub, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    trainer = publishing(tiny_model("bert"), tmp_path, hub_strategy="every_save")
    done = 0

    def is_of_first_push(request: Request) -> bool:
        nonlocal done
        done = len(trainer.metrics["matrix"])
        return done == 1 and request_part in request.path

    hub.server.faults.add(is_of_first_push, fault, times=math.inf)
    trainer.train()
    assert done == 2, "the second push did not ask for it"
    repository = hub.repository(REPO)
    assert set(repository.branches) == {"main", "colors", "shapes"} and "step-0002-shapes" in repository.tags
    assert_same_tasks(SharedSubspace.from_pretrained(REPO), trainer.subspace)
    for task in ("colors", "shapes"):
        assert distance(SharedSubspace.from_pretrained(REPO, revision=task), trainer.subspace, task) <= 0.05


def test_a_task_of_somebody_else_under_the_name_of_one_to_come_is_not_taken_for_it(
    hub: Hub, tiny_model: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = publishing(tiny_model("bert"), tmp_path / "ours", hub_strategy="every_save")
    other = classifier_trainer(
        tiny_model("bert"), tmp_path / "theirs", {"shapes": classification_task(3, 3)}, hub_model_id=REPO
    )
    other.train()
    theirs = other.push_to_hub().oid
    with pytest.raises(ValueError, match="task 'shapes' was learned by both sides"):
        trainer.train()
    assert (
        f"{REPO}: already has ['shapes'], which somebody else pushed and which are still to be learned" in caplog.text
    )
    assert trainer.metrics["tasks"] == ["colors", "shapes"] and len(trainer.metrics["matrix"]) == 2
    assert hub.api.repo_info(REPO).sha == theirs
    # They remove theirs again, as the message says, and the stream continues.
    moved = SharedSubspace.from_pretrained(REPO)
    moved.export_lora("shapes", tmp_path / "shapes-of-theirs")
    moved.add_adapters({"forms": tmp_path / "shapes-of-theirs"}, progress=False)
    moved.remove_task("shapes")
    moved.push_to_hub(REPO)
    resumed = publishing(tiny_model("bert"), tmp_path / "ours", hub_strategy="every_save")
    resumed.train(resume_from_checkpoint=True)
    assert set(SharedSubspace.from_pretrained(REPO).tasks) == {"colors", "shapes", "forms"}
    assert distance(SharedSubspace.from_pretrained(REPO), trainer.subspace, "shapes") < 0.3


def test_a_stream_says_which_of_its_tasks_get_a_branch(hub: Hub, tiny_model: TinyModel, tmp_path: Path) -> None:
    trainer = publishing(tiny_model("bert"), tmp_path, hub_strategy="every_save", hub_branches=["shapes"])
    trainer.train()
    assert set(hub.repository(REPO).branches) == {"main", "shapes"}
    assert arguments(tmp_path, hub_branches=["none"]).hub_branches == "none"
    with pytest.raises(ValueError, match="branches is 'some', expected 'all', 'new', 'none' or a list of tasks"):
        arguments(tmp_path, hub_branches="some")


def test_a_hub_that_stays_down_leaves_the_subspace_on_disk(hub: Hub, tiny_model: TinyModel, tmp_path: Path) -> None:
    trainer = publishing(tiny_model("bert"), tmp_path, hub_strategy="end")
    hub.server.faults.add(is_commit, Answer(403), times=math.inf)
    with pytest.raises(Exception, match="403"):
        trainer.train()
    assert_same_tasks(SharedSubspace.from_pretrained(tmp_path / "subspace"), trainer.subspace)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hub_strategy": "checkpoint"}, "hub_strategy is 'checkpoint', expected 'every_save'"),
        ({"hub_strategy": "all_checkpoints"}, "hub_strategy is 'all_checkpoints', expected"),
        ({"hub_revision": "colors"}, "hub_revision is 'colors', expected none"),
    ],
)
def test_what_a_subspace_has_no_use_for_is_refused(values: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, push_to_hub=True, **values)
