"""The folder of a stream: which files belong to it, and which it never touches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from share_hf import SharedSubspace, ShareTrainer

from .cases import At, Interruption, assert_same_tasks, classification_tasks, classifier_trainer
from .test_interruptions import interrupt, stop_at


Start = Callable[..., ShareTrainer]


@pytest.fixture
def start(tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path) -> Start:
    def make(folder: str, **overrides: object) -> ShareTrainer:
        values = {"save_strategy": "steps", "save_steps": 1, **overrides}
        tasks = classification_tasks("colors", "shapes")
        return classifier_trainer(tiny_model("bert"), tmp_path / folder, tasks, **values)

    return make


def files_under(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_stream_in_a_folder_called_phases_leaves_its_siblings_alone(start: Start, tmp_path: Path) -> None:
    notes = tmp_path / "exp" / "phases" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    start("exp/phases/run1").train()
    sibling = files_under(tmp_path / "exp" / "phases" / "run1")
    start("exp/phases/run2").train()
    assert files_under(tmp_path / "exp" / "phases" / "run1") == sibling
    assert notes.read_text() == "mine"
    assert not (tmp_path / "exp" / "subspace").exists()
    assert not (tmp_path / "exp" / "stream_state.json").exists()
    for run in ("run1", "run2"):
        tree = SharedSubspace.from_pretrained(tmp_path / "exp" / "phases" / run / "subspace")
        assert tree.tasks == ("colors", "shapes")


def test_such_a_stream_can_be_resumed(start: Start, tmp_path: Path) -> None:
    whole = start("whole")
    whole.train()
    interrupt(start("exp/phases/run1"), stop_at("shapes-adapt", 2))
    resumed = start("exp/phases/run1")
    resumed.train(resume_from_checkpoint=True)
    assert_same_tasks(resumed.subspace, whole.subspace)


def test_what_others_put_beside_the_checkpoints_stays(start: Start, tmp_path: Path) -> None:
    start("out").train()
    phases = tmp_path / "out" / "phases"
    kept = [phases / "README", phases / "0001-colors-init" / "notes.txt", phases / "mine" / "weights.bin"]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    checkpoints = set(phases.glob("*/checkpoint-*"))
    assert checkpoints
    again = start("out", save_strategy="no")
    again.add_callback(stop_at("colors-init", 1))
    with pytest.raises(Interruption):
        again.train()
    assert not any(path.exists() for path in checkpoints)
    assert [path.read_text() for path in kept] == ["mine"] * 3


def test_checkpoints_that_no_stream_wrote_are_neither_removed_nor_used(start: Start, tmp_path: Path) -> None:
    foreign = tmp_path / "out" / "phases" / "0001-colors-init" / "checkpoint-1" / "optimizer.pt"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    with pytest.raises(ValueError, match=r"checkpoint-1: not a checkpoint of a stream.*expected another output_dir"):
        start("out").train()
    assert foreign.read_text() == "mine"
    assert not (tmp_path / "out" / "stream_state.json").exists()


def test_a_checkpoint_limit_spares_the_checkpoints_of_others(start: Start, tmp_path: Path) -> None:
    trainer = start("out", save_total_limit=1)
    foreign = tmp_path / "out" / "phases" / "mine" / "checkpoint-7" / "optimizer.pt"

    def put_there(*args: object, **kwargs: object) -> None:
        foreign.parent.mkdir(parents=True, exist_ok=True)
        foreign.write_text("mine")

    trainer.add_callback(At("on_train_begin", put_there))
    trainer.train()
    assert foreign.read_text() == "mine"
    assert len(list((tmp_path / "out" / "phases").glob("0*/checkpoint-*"))) == 1


def test_a_stream_of_an_earlier_version_that_left_no_marks_is_continued(start: Start, tmp_path: Path) -> None:
    whole = start("whole")
    whole.train()
    interrupt(start("out"), stop_at("shapes-adapt", 2))
    for marker in (tmp_path / "out" / "phases").glob("*/.share_hf_phase"):
        marker.unlink()
    position = tmp_path / "out" / "stream_state.json"
    content = json.loads(position.read_text())
    assert content.pop("marks_phases") is True
    position.write_text(json.dumps(content))
    steps: list[int] = []
    resumed = start("out")
    resumed.add_callback(At("on_step_end", lambda args, state, **kwargs: steps.append(state.global_step)))
    resumed.train(resume_from_checkpoint=True)
    assert_same_tasks(resumed.subspace, whole.subspace)
    assert steps[0] == 2  # it resumed from the checkpoint of the first step
