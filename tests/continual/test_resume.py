"""A stream that is interrupted anywhere ends like one that is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from share_hf import ShareTrainer
from share_hf.continual import stream as stream_module
from share_hf.continual import task_trainer as task_trainer_module

from .conftest import MakeTrainer, assert_same_to_the_bit, coefficients


class Interrupted(RuntimeError):
    """Stands for anything that ends a run."""


class StopAt(TrainerCallback):
    """End the run at the n-th step of any phase."""

    def __init__(self, step: int) -> None:
        self.left = step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.left -= 1
        if self.left == 0:
            raise Interrupted


ARGUMENTS = {"save_strategy": "steps", "save_steps": 2, "finetune_num_train_epochs": 1}


_WHOLE: dict[str, torch.Tensor] = {}


@pytest.fixture
def uninterrupted(make_trainer: MakeTrainer) -> dict[str, torch.Tensor]:
    """What an uninterrupted run ends with. It is computed once."""
    if not _WHOLE:
        trainer = make_trainer(folder="whole", **ARGUMENTS)
        trainer.train()
        _WHOLE.update({name: tensor.clone() for name, tensor in coefficients(trainer).items()})
    return _WHOLE


def interrupt(run: Callable[[], object]) -> None:
    with pytest.raises(Interrupted):
        run()


def resume(make_trainer: MakeTrainer) -> ShareTrainer:
    trainer = make_trainer(**ARGUMENTS)
    trainer.train(resume_from_checkpoint=True)
    return trainer


# Steps of the stream: 6 of init, 3 of finetune, and for each later task 6 of adapt and 3 of finetune.
@pytest.mark.parametrize("step", [1, 5, 8, 12, 22])
def test_a_phase_that_is_cut_off_continues_to_the_bit(
    make_trainer: MakeTrainer, uninterrupted: dict[str, torch.Tensor], step: int
) -> None:
    interrupt(make_trainer(callbacks=[StopAt(step)], **ARGUMENTS).train)
    assert_same_to_the_bit(coefficients(resume(make_trainer)), uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["take_merged", "take_coefficients", "write_tree"])
@pytest.mark.parametrize("after", [False, True])
def test_a_run_cut_off_around_a_merge_or_a_save_continues_to_the_bit(
    make_trainer: MakeTrainer,
    uninterrupted: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    after: bool,
) -> None:
    module = stream_module if name == "write_tree" else task_trainer_module
    original, calls = getattr(module, name), [0]

    def cut_off(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2 and not after:
            raise Interrupted
        result = original(*args, **kwargs)
        if calls[0] == 2:
            raise Interrupted
        return result

    monkeypatch.setattr(module, name, cut_off)
    interrupt(make_trainer(**ARGUMENTS).train)
    monkeypatch.setattr(module, name, original)
    assert_same_to_the_bit(coefficients(resume(make_trainer)), uninterrupted)


def test_a_run_cut_off_in_an_evaluation_keeps_the_whole_matrix(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_trainer(folder="whole", evaluate_before=True, **ARGUMENTS)
    whole.train()
    original, calls = ShareTrainer.evaluate, [0]

    def cut_off(self: ShareTrainer, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            raise Interrupted
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ShareTrainer, "evaluate", cut_off)
    interrupt(make_trainer(evaluate_before=True, **ARGUMENTS).train)
    monkeypatch.setattr(ShareTrainer, "evaluate", original)
    resumed = make_trainer(evaluate_before=True, **ARGUMENTS)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.metrics == whole.metrics


def test_a_torn_checkpoint_is_passed_over(
    make_trainer: MakeTrainer, uninterrupted: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    interrupt(make_trainer(callbacks=[StopAt(5)], **ARGUMENTS).train)
    (torn,) = (tmp_path / "out" / "phases").glob("*-init/checkpoint-4/trainer_state.json")
    torn.write_text(torn.read_text()[:40])
    assert_same_to_the_bit(coefficients(resume(make_trainer)), uninterrupted)


def test_a_finished_stream_has_nothing_left_to_do(
    make_trainer: MakeTrainer, uninterrupted: dict[str, torch.Tensor]
) -> None:
    make_trainer(**ARGUMENTS).train()
    again = make_trainer(**ARGUMENTS)
    assert again.train(resume_from_checkpoint=True).global_step == 0
    assert_same_to_the_bit(coefficients(again), uninterrupted)


def test_resuming_where_nothing_was_begun_starts_the_stream(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.train(resume_from_checkpoint=True)
    assert trainer.subspace.tasks == ("a", "b", "c")


def test_a_stream_of_other_tasks_is_not_resumed(make_trainer: MakeTrainer, classification_tasks: Any) -> None:
    interrupt(make_trainer(callbacks=[StopAt(12)], **ARGUMENTS).train)
    others = {"x": classification_tasks["a"], "y": classification_tasks["b"]}
    with pytest.raises(ValueError, match=r"the stream was at task 'b', number 2, but tasks is \['x', 'y'\]"):
        make_trainer(tasks=others, **ARGUMENTS).train(resume_from_checkpoint=True)


def test_a_damaged_stream_state_is_named(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    interrupt(make_trainer(callbacks=[StopAt(12)], **ARGUMENTS).train)
    (tmp_path / "out" / "stream_state.json").write_text('{"position": 1')
    with pytest.raises(ValueError, match=r"stream_state\.json: not valid JSON"):
        make_trainer(**ARGUMENTS).train(resume_from_checkpoint=True)
