"""ShareCallback in a plain Trainer: what a merge does to old tasks, checkpoints and heads, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, Trainer, TrainingArguments

from share_hf import ShareCallback, SharedSubspace
from share_hf.subspace import DriftToleranceError

from .cases import (
    BERT_TARGETS,
    LLAMA_TARGETS,
    At,
    Interruption,
    assert_same_tasks,
    assert_same_tensors,
    classification_task,
    config,
    language_task,
    logits,
    updates,
)


Run = Callable[..., Trainer]


@pytest.fixture
def trainer_of(tmp_path: Path) -> Run:
    """Make a plain Trainer of a model with callbacks, for four steps on a language task. It has not started yet."""

    def make(model: Any, *callbacks: Any, data: Any = None, folder: str = "plain", **options: Any) -> Trainer:
        values: Mapping[str, Any] = dict(
            max_steps=4,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        args = TrainingArguments(str(tmp_path / folder), **{**values, **options})
        data = data if data is not None else language_task(0)
        return Trainer(
            model=model,
            args=args,
            train_dataset=data["train"],
            eval_dataset=data.get("test"),
            callbacks=list(callbacks),
        )

    return make


def fresh(model: PreTrainedModel, **options: Any) -> PeftModel:
    return get_peft_model(model, config(LLAMA_TARGETS, task_type="CAUSAL_LM", **options))


def test_a_merge_changes_the_old_task_by_the_drift_it_reports(
    tiny_model: Callable[[str], PreTrainedModel], trainer_of: Run
) -> None:
    model = fresh(tiny_model("llama"), num_components=5, pseudo_rank=4, num_temporary=4)
    first = ShareCallback("ones")
    trainer_of(model, first).train()
    assert first.subspace is not None
    before, data = updates(first.subspace, "ones"), language_task(0)["train"]
    expected = logits(model, data)
    second = ShareCallback("twos", first.subspace)
    trainer_of(model, second, data=language_task(1), gradient_accumulation_steps=2).train()
    assert second.subspace is not None and second.report is not None
    assert second.subspace.tasks == ("ones", "twos")
    assert second.report.max_drift > 1e-3
    changes = {}
    for module, update in updates(second.subspace, "ones").items():
        changes[module] = float((update - before[module]).norm() / before[module].norm())
        assert changes[module] == pytest.approx(second.report.layers[module].drift["ones"], abs=1e-5)
        assert changes[module] <= second.report.layers[module].drift_bound["ones"]
    assert model.active_adapter == "twos"
    model.set_adapter("ones")
    moved = (logits(model, data) - expected).norm() / (expected - logits(tiny_model("llama"), data)).norm()
    assert 1e-4 < moved < 2 * max(changes.values())


def test_the_model_computes_what_the_subspace_says_of_every_task(
    tiny_model: Callable[[str], PreTrainedModel], trainer_of: Run, tmp_path: Path
) -> None:
    model = fresh(tiny_model("llama"))
    callback = None
    for seed, task in enumerate(("ones", "twos", "threes")):
        callback = ShareCallback(task, callback.subspace if callback is not None else None)
        trainer_of(model, callback, data=language_task(seed)).train()
    assert callback is not None and callback.subspace is not None
    assert list(model.peft_config) == ["ones", "twos", "threes"]
    callback.subspace.save_pretrained(tmp_path / "tree")
    applied = SharedSubspace.from_pretrained(tmp_path / "tree").apply(tiny_model("llama"))
    data = language_task(0)["train"]
    for task in callback.subspace.tasks:
        for each in (model, applied):
            each.set_adapter(task)
        assert torch.equal(logits(model, data), logits(applied, data))


def test_a_subspace_that_was_applied_is_adapted(tiny_model: Callable[[str], PreTrainedModel], trainer_of: Run) -> None:
    first = ShareCallback("ones")
    trainer_of(fresh(tiny_model("llama")), first).train()
    assert first.subspace is not None
    ends = []
    for known in (None, first.subspace):
        torch.manual_seed(5)
        callback = ShareCallback("twos", known)
        trainer_of(first.subspace.apply(tiny_model("llama")), callback, data=language_task(1)).train()
        assert callback.subspace is not None
        assert callback.subspace.state.tasks["twos"].learned_by == "adapt"
        ends.append(callback.subspace)
    for module, update in updates(ends[0], "twos").items():
        torch.testing.assert_close(update, updates(ends[1], "twos")[module], rtol=0, atol=1e-5)


def test_a_head_is_learned_with_its_task_and_kept(
    tiny_model: Callable[[str], PreTrainedModel], trainer_of: Run
) -> None:
    model = get_peft_model(tiny_model("bert"), config(BERT_TARGETS, task_type="SEQ_CLS"))
    first = ShareCallback("colors")
    trainer_of(model, first, data=classification_task(0, 3), eval_strategy="steps", eval_steps=2).train()
    assert first.subspace is not None
    second = ShareCallback("shapes", first.subspace)
    trainer_of(model, second, data=classification_task(1, 3)).train()
    assert second.subspace is not None
    heads = [second.subspace.state.tasks[task].head for task in ("colors", "shapes")]
    assert_same_tensors(heads[0], first.subspace.state.tasks["colors"].head)
    assert not torch.equal(heads[0]["classifier.weight"], heads[1]["classifier.weight"])


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["init", "adapt"])
def test_a_run_that_was_cut_off_continues_to_the_bit(
    phase: str, tiny_model: Callable[[str], PreTrainedModel], trainer_of: Run
) -> None:
    known = None
    if phase == "adapt":
        first = ShareCallback("ones")
        trainer_of(fresh(tiny_model("llama")), first, folder="first").train()
        known = first.subspace
    checkpoints = dict(save_strategy="steps", save_steps=1, data=language_task(1))

    def begin(folder: str, *callbacks: Any) -> tuple[Trainer, ShareCallback]:
        torch.manual_seed(3)
        model = known.apply(tiny_model("llama")) if known is not None else fresh(tiny_model("llama"))
        callback = ShareCallback("twos", known)
        return trainer_of(model, callback, *callbacks, folder=folder, **checkpoints), callback

    def stop(args: Any, state: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise Interruption

    trainer, expected = begin("whole")
    trainer.train()
    with pytest.raises(Interruption):
        begin("cut", At("on_step_end", stop))[0].train()
    trainer, resumed = begin("cut")
    trainer.train(resume_from_checkpoint=True)
    assert expected.subspace is not None and resumed.subspace is not None
    assert_same_tasks(resumed.subspace, expected.subspace)


def test_the_model_that_a_trainer_saves_is_loaded_by_peft(
    tiny_model: Callable[[str], PreTrainedModel], trainer_of: Run, tmp_path: Path
) -> None:
    model = fresh(tiny_model("llama"))
    trainer = trainer_of(model, ShareCallback("ones"))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "saved" / "ones")
    data = language_task(0)["train"]
    assert torch.equal(logits(loaded, data), logits(model, data))


# ---- Refusals -------------------------------------------------------------------------------------------------------


def test_drift_that_cannot_be_met_keeps_the_subspace_as_it_was(
    tiny_model: Callable[[str], PreTrainedModel], trainer_of: Run
) -> None:
    strict = dict(num_components=4, pseudo_rank=4, num_temporary=3, drift_tolerance=1e-4, max_components=4)
    model = fresh(tiny_model("llama"), **strict)
    first = ShareCallback("ones")
    trainer_of(model, first).train()
    data = language_task(0)["train"]
    expected, known = logits(model, data), first.subspace
    second = ShareCallback("twos", known)
    with pytest.raises(DriftToleranceError, match=r"drift_tolerance is 0\.0001"):
        trainer_of(model, second, data=language_task(1)).train()
    assert second.report is None
    assert second.subspace is not None and known is not None
    assert_same_tasks(second.subspace, known)
    model.set_adapter("ones")
    assert torch.equal(logits(model, data), expected)


@pytest.mark.parametrize("kind", ["base model", "lora"])
def test_a_model_without_share_is_refused_and_left_as_it_was(
    kind: str, tiny_model: Callable[[str], PreTrainedModel], trainer_of: Run
) -> None:
    model = tiny_model("llama")
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(target_modules=LLAMA_TARGETS))
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=r"needs a PeftModel of a ShareConfig, found .*get_peft_model\(model, Share"):
        trainer_of(model, ShareCallback("ones"))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_a_task_that_the_model_has_is_refused_and_stays(
    tiny_model: Callable[[str], PreTrainedModel], trainer_of: Run
) -> None:
    model = fresh(tiny_model("llama"))
    trainer_of(model, ShareCallback("ones")).train()
    expected = logits(model, language_task(0)["train"])
    with pytest.raises(ValueError, match="task 'ones' already exists"):
        trainer_of(model, ShareCallback("ones"))
    assert list(model.peft_config) == ["ones"]
    assert torch.equal(logits(model, language_task(0)["train"]), expected)
