"""Tasks whose weights or scores are not finite are refused by name, and everything stays as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from share_hf import ShareCallback, SharedSubspace, ShareTrainer
from share_hf.subspace import DriftToleranceError
from share_hf.tuner.transfer import updates_of

from .cases import (
    BERT_TARGETS,
    LLAMA_TARGETS,
    At,
    assert_same_tasks,
    classification_task,
    classification_tasks,
    config,
    language_task,
)
from .conftest import Make


def diverging(phase: str, value: float, part: str, times: int = 1) -> At:
    """Set the trained weights whose name contains `part` to `value` at the end of a phase."""
    left = [times]

    def spoil(args: TrainingArguments, state: Any, model: Any, **kwargs: Any) -> None:
        if Path(args.output_dir).name.endswith(phase) and state.global_step == state.max_steps and left[0]:
            left[0] -= 1
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.requires_grad and part in name:
                        parameter.fill_(value)

    return At("on_step_end", spoil)


def of_model(trainer: ShareTrainer, task: str) -> dict[str, Tensor]:
    """Return the updates (n, d) of a task by module, as the model has them."""
    return {module: update.dense() for module, update in updates_of(trainer.model, task).items()}


PHASES = {
    "two-init": {"num_init_tasks": 2},
    "two-adapt": {},
    "two-coefficients": {"method": "coefficients"},
    "two-finetune": {"finetune_num_train_epochs": 1},
}


@pytest.mark.parametrize(("value", "part"), [(math.nan, "share_"), (math.inf, "share_"), (math.nan, "classifier")])
@pytest.mark.parametrize("phase", PHASES)
def test_a_task_that_is_not_finite_is_refused_by_name_and_can_be_learned_again(
    phase: str, value: float, part: str, make: Make, tmp_path: Path
) -> None:
    trainer = make(trainer={"callbacks": [diverging(phase, value, part)]}, **PHASES[phase])
    first, second = classification_task(0, 2), classification_task(1, 3)
    trainer.learn_task("one", first["train"], first["test"])
    state, metrics, before = trainer.subspace.state, trainer.metrics, of_model(trainer, "one")

    with pytest.raises(ValueError, match=r"task 'two': .* NaN or infinite entries"):
        trainer.learn_task("two", second["train"], second["test"])

    assert_same_tasks(trainer.subspace.state, state)
    assert trainer.subspace.state.lineage == state.lineage
    assert_same_tasks(SharedSubspace.from_pretrained(tmp_path / "out" / "subspace"), state)
    assert list(trainer.tasks) == list(trainer.model.peft_config) == ["one"]
    assert (trainer.metrics["tasks"], trainer.metrics["matrix"]) == (metrics["tasks"], metrics["matrix"])
    for module, update in of_model(trainer, "one").items():
        assert torch.equal(update, before[module])
    trainer.learn_task("two", second["train"], second["test"])
    assert trainer.subspace.tasks == ("one", "two")
    assert SharedSubspace.from_pretrained(tmp_path / "out" / "subspace").tasks == ("one", "two")


def test_a_first_task_that_is_not_finite_makes_way_for_another(make: Make) -> None:
    trainer = make(trainer={"callbacks": [diverging("one-init", math.nan, "share_")]})
    data = classification_task(0, 2)

    with pytest.raises(ValueError, match=r"task 'one': .* NaN or infinite entries"):
        trainer.learn_task("one", data["train"], data["test"])

    assert trainer.subspace.tasks == ()
    trainer.learn_task("one", data["train"], data["test"])
    assert trainer.subspace.tasks == ("one",)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["shapes-adapt", "shapes-finetune"])
def test_a_stream_continues_from_before_the_phase_that_diverged(phase: str, make: Make) -> None:
    tasks = classification_tasks("colors", "shapes", "sizes")
    options = {"save_strategy": "steps", "save_steps": 1, **PHASES[f"two-{phase.rpartition('-')[2]}"]}
    expected = make(tasks, "expected", **options)
    expected.train()
    broken = make(tasks, trainer={"callbacks": [diverging(phase, math.nan, "share_")]}, **options)
    with pytest.raises(ValueError, match=r"task 'shapes': .* NaN or infinite entries"):
        broken.train()

    resumed = make(tasks, **options)
    resumed.train(resume_from_checkpoint=True)

    assert_same_tasks(resumed.subspace, expected.subspace)
    assert resumed.metrics["matrix"] == expected.metrics["matrix"]


@pytest.mark.parametrize("known", [True, False])
def test_a_callback_refuses_a_task_that_is_not_finite_and_leaves_the_model_as_it_was(
    known: bool, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    model = get_peft_model(tiny_model("llama"), config(LLAMA_TARGETS, task_type="CAUSAL_LM"))
    args = TrainingArguments(
        str(tmp_path), max_steps=2, report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no"
    )

    def train(task: str, subspace: SharedSubspace | None, *others: At) -> ShareCallback:
        callback = ShareCallback(task, subspace)
        data = language_task(0)["train"]
        Trainer(model=model, args=args, train_dataset=data, callbacks=[*others, callback]).train()
        return callback

    subspace = train("one", None).subspace if known else None
    adapters = list(model.peft_config)

    with pytest.raises(ValueError, match=r"task 'two': .* NaN or infinite entries"):
        train("two", subspace, diverging("", math.nan, "share_"))

    assert list(model.peft_config) == adapters
    assert train("two", subspace).subspace.tasks == (("one", "two") if known else ("two",))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_counts_as_not_measured(value: float, make: Make, tmp_path: Path) -> None:
    found = iter([0.5, value, 0.75])
    tasks = classification_tasks("colors", "shapes")
    trainer = make(tasks, trainer={"task_scorer": lambda model, task, data: {"accuracy": next(found)}})

    trainer.train()

    assert trainer.metrics["matrix"] == [[0.5, None], [None, 0.75]]
    assert trainer.metrics["average"] == 0.75
    loaded = SharedSubspace.from_pretrained(tmp_path / "out" / "subspace").state
    assert loaded.metrics["matrix"] == [[0.5, None], [None, 0.75]]
    assert dict(loaded.tasks["colors"].scores) == {"accuracy": 0.5}


def test_a_task_that_diverged_but_is_finite_costs_the_others_no_more_than_is_certified(make: Make) -> None:
    trainer = make(share={"drift_tolerance": 0.05})
    for seed, name in enumerate(("one", "two")):
        data = classification_task(seed, 2)
        trainer.args.learning_rate = 5e-3 if name == "one" else 50.0
        before = of_model(trainer, "one") if name == "two" else {}
        try:
            trainer.learn_task(name, data["train"], data["test"])
        except DriftToleranceError:
            assert name == "two"
    for module, update in before.items():
        assert float((of_model(trainer, "one")[module] - update).norm() / update.norm()) <= 0.05
    assert set(BERT_TARGETS) == {module.rpartition(".")[2] for module in before}
