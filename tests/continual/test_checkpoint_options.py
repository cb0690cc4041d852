"""What the Trainer's options for checkpoints mean in a phase: when they are written, and which are kept and used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from transformers import EvalPrediction

from share_hf import ShareTrainer

from .cases import At, Interruption, assert_same_tasks, classification_tasks, classifier_trainer
from .test_interruptions import Start, assert_ends_as, interrupt, start, stop_at  # noqa: F401


# The phases of the stream with their numbers of steps.
PHASES = {
    "0001-colors-init": 4,
    "0001-colors-finetune": 2,
    "0002-shapes-adapt": 4,
    "0002-shapes-finetune": 2,
    "0003-sizes-adapt": 4,
    "0003-sizes-finetune": 2,
}


@pytest.fixture
def phases(tmp_path: Path) -> Path:
    return tmp_path / "stream" / "phases"


def checkpoints(folder: Path) -> list[int]:
    """Return the steps at which the checkpoints in the folder of a phase were written."""
    return sorted(int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*"))


def test_save_total_limit_is_how_many_checkpoints_a_phase_has(start: Start, phases: Path) -> None:  # noqa: F811
    seen: dict[str, list[list[int]]] = {}

    def note(args: Any, state: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir)
        seen.setdefault(folder.name, []).append(checkpoints(folder))

    trainer = start(save_total_limit=2)
    trainer.add_callback(At("on_save", note))
    trainer.train()
    for phase, steps in PHASES.items():
        assert seen[phase] == [list(range(max(1, step - 1), step + 1)) for step in range(1, steps + 1)]


def test_save_total_limit_is_how_many_checkpoints_the_whole_stream_has(start: Start, phases: Path) -> None:  # noqa: F811
    written: list[str] = []

    def note(args: Any, state: Any, **kwargs: Any) -> None:
        written.append(f"{Path(args.output_dir).name}/checkpoint-{state.global_step}")
        kept = {str(path.relative_to(phases)) for path in phases.glob("*/checkpoint-*")}
        assert kept == set(written[-3:])

    trainer = start(save_total_limit=3)
    trainer.add_callback(At("on_save", note))
    trainer.train()
    assert len(written) == sum(PHASES.values())


@pytest.mark.parametrize("phase", ["colors-init", "shapes-adapt"])
def test_a_stream_with_a_limit_of_one_checkpoint_resumes_to_the_bit(phase: str, start: Start) -> None:  # noqa: F811
    whole = start("whole", save_total_limit=1)
    whole.train()
    interrupt(start(save_total_limit=1), stop_at(phase, 4))
    assert_ends_as(start(save_total_limit=1), whole)


def test_without_checkpoints_a_phase_is_begun_again(start: Start, phases: Path) -> None:  # noqa: F811
    whole = start("whole", save_strategy="no")
    whole.train()
    interrupt(start(save_strategy="no"), stop_at("shapes-adapt", 3))
    assert not list(phases.glob("*/checkpoint-*"))
    assert_ends_as(start(save_strategy="no"), whole)


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 4, 6])
def test_checkpoints_of_epochs_are_used(step: int, start: Start, phases: Path) -> None:  # noqa: F811
    changes = dict(save_strategy="epoch", num_train_epochs=2)
    whole = start("whole", **changes)
    whole.train()
    interrupt(start(**changes), stop_at("shapes-adapt", step))
    assert checkpoints(phases / "0002-shapes-adapt") == ([4] if step > 4 else [])
    assert_ends_as(start(**changes), whole)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["linear", "constant"])
@pytest.mark.parametrize("steps", [3, 6])
def test_a_phase_that_was_trained_to_its_end_is_not_trained_further(
    scheduler: str,
    steps: int,
    start: Start,  # noqa: F811
) -> None:
    """Its last step is not the last of an epoch; the merge is what was interrupted."""
    changes = dict(lr_scheduler_type=scheduler, max_steps=steps)
    whole = start("whole", **changes)
    whole.train()
    trainer = start(**changes)
    trainer.add_callback(stop_when_trained("shapes-adapt"))
    interrupt(trainer)
    resumed = start(**changes)
    further: list[int] = []
    resumed.add_callback(At("on_step_end", lambda args, state, **kwargs: further.append(state.global_step)))
    assert_ends_as(resumed, whole)
    assert max(further) <= steps
    assert len(further) == 3 * steps  # finetune of shapes, and both phases of sizes


def stop_when_trained(phase: str) -> At:
    """Stop the stream between a phase and its merge."""

    def stop(args: Any, state: Any, **kwargs: Any) -> None:
        if args.output_dir.endswith(phase):
            raise Interruption

    return At("on_train_end", stop)


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 4])
def test_a_checkpoint_of_the_model_alone_is_not_continued_from(
    step: int,
    start: Start,  # noqa: F811
    phases: Path,
) -> None:
    """It has no optimizer, so the phase starts over: the result of a stream must not depend on interruptions."""
    changes = dict(save_only_model=True)
    whole = start("whole", **changes)
    whole.train()
    interrupt(start(**changes), stop_at("shapes-adapt", step))
    newest = phases / "0002-shapes-adapt" / f"checkpoint-{step - 1}"
    assert newest.is_dir()
    assert not list(newest.glob("optimizer*"))
    assert_ends_as(start(**changes), whole)


# ---- The best checkpoint --------------------------------------------------------------------------------------------


class FallingScore:
    """Metrics for which the first checkpoint of a phase is the best."""

    def __init__(self) -> None:
        self.score = 0

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        self.score -= 1
        return {"accuracy": float(self.score)}


def best_trainer(model: Any, folder: Path) -> ShareTrainer:
    return classifier_trainer(
        model,
        folder,
        classification_tasks("colors", "shapes"),
        trainer={"eval_dataset": classification_tasks("colors")["colors"]["test"], "compute_metrics": FallingScore()},
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        save_total_limit=1,
        max_steps=3,
        finetune_num_train_epochs=0.5,
    )


def test_the_best_checkpoint_of_a_phase_is_what_is_merged(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = best_trainer(tiny_model("bert"), tmp_path / "stream")
    first: dict[str, torch.Tensor] = {}
    taken: list[str] = []

    def trained() -> dict[str, torch.Tensor]:
        parameters = trainer.model.named_parameters()
        return {name: value.detach().clone() for name, value in parameters if value.requires_grad}

    def note(args: Any, state: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            first.clear()
            first.update(trained())

    def take(self: ShareTrainer, tasks: tuple[str, ...], phase: Any) -> None:
        found = trained()
        assert found.keys() == first.keys()
        assert not [name for name in first if not torch.equal(found[name], first[name])]
        taken.append(f"{tasks[0]}-{phase}")
        original(self, tasks, phase)

    original = ShareTrainer._take
    monkeypatch.setattr(ShareTrainer, "_take", take)
    trainer.add_callback(At("on_step_end", note))
    trainer.train()
    assert taken == ["colors-init", "colors-finetune", "shapes-adapt", "shapes-finetune"]


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["colors-init", "shapes-adapt", "shapes-finetune"])
@pytest.mark.parametrize("when", ["before its last step", "before its merge"])
def test_the_best_checkpoint_is_known_after_an_interruption(
    phase: str, when: str, tiny_model: Any, tmp_path: Path
) -> None:
    whole = best_trainer(tiny_model("bert"), tmp_path / "whole")
    whole.train()
    interrupted = best_trainer(tiny_model("bert"), tmp_path / "stream")
    interrupt(interrupted, stop_when_trained(phase) if when == "before its merge" else stop_at(phase, 3))
    resumed = best_trainer(tiny_model("bert"), tmp_path / "stream")
    resumed.compute_metrics.score = -100  # falls further, as it would have done without the interruption
    resumed.train(resume_from_checkpoint=True)
    assert_same_tasks(resumed.subspace, whole.subspace)


# ---- Evaluation while a phase trains --------------------------------------------------------------------------------


def with_validation(*names: str) -> dict[str, DatasetDict]:
    """Tasks whose splits differ in length."""
    tasks = classification_tasks(*names)
    for i, splits in enumerate(tasks.values()):
        splits["validation"] = splits["test"].select(range(10 + i))
    return tasks


def test_a_phase_evaluates_the_validation_data_of_its_own_task(start: Start) -> None:  # noqa: F811
    trainer = start(tasks=with_validation("colors", "shapes"), eval_strategy="steps", eval_steps=2)
    evaluated: list[tuple[str, int]] = []

    def note(args: Any, state: Any, **kwargs: Any) -> None:
        if Path(args.output_dir).parent.name == "phases":
            evaluated.append((Path(args.output_dir).name, len(trainer.eval_dataset)))

    trainer.add_callback(At("on_evaluate", note))
    trainer.train()
    assert evaluated == [
        *[("0001-colors-init", 10)] * 2,
        ("0001-colors-finetune", 10),
        *[("0002-shapes-adapt", 11)] * 2,
        ("0002-shapes-finetune", 11),
    ]
    assert sum("eval_loss" in log for log in trainer.state.log_history) == len(evaluated)


def test_the_best_checkpoint_is_chosen_by_the_own_task(start: Start) -> None:  # noqa: F811
    changes = dict(eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, learning_rate=0.5)
    trainer = start(tasks=with_validation("colors", "shapes"), **changes)
    losses: dict[str, list[float]] = {}
    best: dict[str, float] = {}

    def note(args: Any, state: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        if "eval_loss" in metrics:
            losses.setdefault(Path(args.output_dir).name, []).append(metrics["eval_loss"])

    trainer.add_callback(At("on_evaluate", note))
    trainer.add_callback(
        At("on_train_end", lambda args, state, **kwargs: best.update({Path(args.output_dir).name: state.best_metric}))
    )
    trainer.train()
    assert set(best) == {"0001-colors-init", "0001-colors-finetune", "0002-shapes-adapt", "0002-shapes-finetune"}
    assert best == {phase: min(of_phase) for phase, of_phase in losses.items()}


def test_a_task_without_data_to_evaluate_is_refused_before_anything_is_trained(start: Start) -> None:  # noqa: F811
    tasks = classification_tasks("colors", "shapes")
    del tasks["shapes"]["test"]
    with pytest.raises(ValueError, match=r"task 'shapes' has no evaluation data, expected .*'validation'"):
        start(tasks=tasks, eval_strategy="epoch")
