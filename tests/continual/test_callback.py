"""Adapting and merging in a Trainer that is not ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, Trainer, TrainingArguments

from share_hf import ShareCallback, ShareConfig, SharedSubspace

from .conftest import language_data


@pytest.fixture
def config() -> ShareConfig:
    return ShareConfig(num_components=8, pseudo_rank=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Trainer]:
    def run(model: Any, callback: ShareCallback, shift: int, **arguments: Any) -> Trainer:
        values = {"num_train_epochs": 2, "learning_rate": 5e-3, "save_strategy": "no", **arguments}
        args = TrainingArguments(
            str(tmp_path / f"out{shift}"), report_to="none", disable_tqdm=True, use_cpu=True, **values
        )
        trainer = Trainer(model=model, args=args, train_dataset=language_data(shift), callbacks=[callback])
        trainer.train()
        return trainer

    return run


def logits(model: PeftModel, adapter: str) -> torch.Tensor:
    model.set_adapter(adapter)
    model.eval()
    with torch.no_grad():
        return model(torch.arange(3, 11).unsqueeze(0)).logits


def test_the_first_task_starts_a_subspace(
    tiny_model: Callable[[str], PreTrainedModel], config: ShareConfig, train: Callable[..., Trainer]
) -> None:
    model = get_peft_model(tiny_model("llama"), config)
    callback = ShareCallback("one")
    train(model, callback, 1)
    assert callback.subspace is not None and callback.report is not None
    assert callback.subspace.tasks == ("one",)
    assert list(model.peft_config) == ["one"]
    assert callback.report.drift["one"] < 1e-5


def test_the_next_task_is_adapted_and_merged_and_the_old_one_stays(
    tiny_model: Callable[[str], PreTrainedModel], config: ShareConfig, train: Callable[..., Trainer], tmp_path: Path
) -> None:
    model = get_peft_model(tiny_model("llama"), config)
    first = ShareCallback("one")
    train(model, first, 1)
    before = logits(model, "one")
    second = ShareCallback("two", first.subspace)
    train(model, second, 2, gradient_accumulation_steps=2)
    assert second.subspace is not None and second.report is not None
    assert second.subspace.state.tasks["two"].learned_by == "adapt"
    assert second.report.max_drift < 1e-5
    assert torch.allclose(logits(model, "one"), before, atol=1e-4)
    second.subspace.save_pretrained(tmp_path / "tree")
    loaded = SharedSubspace.from_pretrained(tmp_path / "tree").apply(tiny_model("llama"))
    assert torch.allclose(logits(loaded, "two"), logits(model, "two"), atol=1e-6)


def test_a_subspace_is_taken_from_the_model_when_none_is_given(
    tiny_model: Callable[[str], PreTrainedModel], config: ShareConfig, train: Callable[..., Trainer]
) -> None:
    model = get_peft_model(tiny_model("llama"), config)
    train(model, ShareCallback("one"), 1)
    callback = ShareCallback("two")
    train(model, callback, 2)
    assert callback.subspace is not None
    assert callback.subspace.tasks == ("one", "two")


def test_a_run_resumes_from_a_checkpoint_of_its_trainer(
    tiny_model: Callable[[str], PreTrainedModel], config: ShareConfig, train: Callable[..., Trainer]
) -> None:
    whole = ShareCallback("one")
    torch.manual_seed(1)
    model = get_peft_model(tiny_model("llama"), config)
    trainer = train(model, whole, 1, save_strategy="steps", save_steps=2)
    torch.manual_seed(2)
    again = ShareCallback("one")
    resumed = Trainer(
        model=get_peft_model(tiny_model("llama"), config),
        args=trainer.args,
        train_dataset=language_data(1),
        callbacks=[again],
    )
    resumed.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-2"))
    assert whole.subspace is not None and again.subspace is not None
    for module, layer in whole.subspace.state.layers.items():
        expected, found = layer.update_of("one").dense(), again.subspace.state.layers[module].update_of("one").dense()
        assert torch.allclose(found, expected, atol=1e-6)


def test_a_callback_that_comes_too_late_says_how_to_pass_it(
    tiny_model: Callable[[str], PreTrainedModel], config: ShareConfig, tmp_path: Path
) -> None:
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, save_strategy="no")
    trainer = Trainer(model=get_peft_model(tiny_model("llama"), config), args=args, train_dataset=language_data(1))
    trainer.add_callback(ShareCallback("one"))
    with pytest.raises(RuntimeError, match=r"callbacks=\[ShareCallback"):
        trainer.train()


def test_a_callback_learns_one_task_only(
    tiny_model: Callable[[str], PreTrainedModel], config: ShareConfig, train: Callable[..., Trainer]
) -> None:
    trainer = train(get_peft_model(tiny_model("llama"), config), ShareCallback("one"), 1)
    with pytest.raises(RuntimeError, match="task 'one' is already merged"):
        trainer.train()


def test_a_model_without_share_is_refused_with_advice(
    tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="ShareCallback needs a PeftModel of a ShareConfig, found LlamaForCausalLM"):
        Trainer(model=tiny_model("llama"), args=args, callbacks=[ShareCallback("one")])


@pytest.mark.parametrize("name", ["main", "a.b", ""])
def test_an_unusable_name_is_refused_before_anything_else(name: str) -> None:
    with pytest.raises(ValueError, match="task name"):
        ShareCallback(name)


@pytest.mark.parametrize("shift", [1, 2])
def test_the_best_checkpoint_is_what_is_merged(
    shift: int,
    tiny_model: Callable[[str], PreTrainedModel],
    config: ShareConfig,
    train: Callable[..., Trainer],
    tmp_path: Path,
) -> None:
    model = get_peft_model(tiny_model("llama"), config)
    subspace = None
    if shift == 2:
        first = ShareCallback("one")
        train(model, first, 1)
        subspace = first.subspace
    args = TrainingArguments(
        str(tmp_path / "best"),
        **dict(load_best_model_at_end=True, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1),
        **dict(max_steps=8, learning_rate=0.3, lr_scheduler_type="constant"),
        **dict(report_to="none", disable_tqdm=True, use_cpu=True),
    )
    callback = ShareCallback("task", subspace)
    data = dict(
        train_dataset=language_data(shift), eval_dataset=language_data(7)
    )  # what one task learns is wrong for the other
    trainer = Trainer(model=model, args=args, callbacks=[callback], **data)
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert min(losses) < losses[-1] - 0.1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-4)
    assert callback.subspace is not None and callback.report is not None


def test_an_optimizer_that_was_made_before_the_task_is_refused(
    tiny_model: Callable[[str], PreTrainedModel], config: ShareConfig, tmp_path: Path
) -> None:
    model = get_peft_model(tiny_model("llama"), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="optimizers has the optimizer SGD, made before the parameters of the task"):
        Trainer(model=model, args=args, callbacks=[ShareCallback("one")], optimizers=(optimizer, None))


def test_a_model_that_is_made_in_training_is_refused(
    tiny_model: Callable[[str], PreTrainedModel], config: ShareConfig, tmp_path: Path
) -> None:
    trainer = Trainer(
        model_init=lambda: get_peft_model(tiny_model("llama"), config),
        args=TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True),
        train_dataset=language_data(1),
        callbacks=[ShareCallback("one")],
    )
    with pytest.raises(ValueError, match=r"the model has no adapter 'one', .*model_init makes another"):
        trainer.train()


def test_a_phase_that_a_signal_may_end_is_refused(
    tiny_model: Callable[[str], PreTrainedModel], config: ShareConfig, tmp_path: Path
) -> None:
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    args.enable_jit_checkpoint = True
    callback, model = ShareCallback("one"), get_peft_model(tiny_model("llama"), config)
    with pytest.raises(ValueError, match=r"enable_jit_checkpoint is True, expected False: .*half trained"):
        callback.on_init_end(args, None, None, model=model)


class TestRouting:
    """Tests of `ShareCallback(..., routing=True)`."""

    def test_a_task_has_the_route_that_learn_route_learns(
        self,
        tiny_model: Callable[[str], PreTrainedModel],
        config: ShareConfig,
        train: Callable[..., Trainer],
    ) -> None:
        model = get_peft_model(tiny_model("llama"), config)
        callbacks = [first := ShareCallback("one", routing=True)]
        train(model, first, 1, dataloader_drop_last=True, per_device_eval_batch_size=4)
        callbacks.append(second := ShareCallback("two", first.subspace, routing=True))
        train(model, second, 2)
        state = second.subspace.state
        assert second.subspace.routed_tasks == ("one", "two")
        for shift, callback in enumerate(callbacks, 1):
            ids = torch.tensor(language_data(shift)["input_ids"])
            alone = SharedSubspace(callback.subspace.state)
            alone.learn_route(callback.task, tiny_model("llama"), [{"input_ids": rows} for rows in ids.split(4)])
            route, expected = (of.tasks[callback.task].route for of in (state, alone.state))
            assert route.measured == len(ids)
            torch.testing.assert_close(route.mean, expected.mean)
            torch.testing.assert_close(route.distances, expected.distances)
        ids = torch.tensor(language_data(2)["input_ids"])
        assert set(model.eval().route(ids, false_rejects=None).names) <= {"one", "two"}

    def test_it_changes_nothing_that_is_merged(
        self, tiny_model: Callable[[str], PreTrainedModel], config: ShareConfig, train: Callable[..., Trainer]
    ) -> None:
        states = []
        for routing in (False, True):
            torch.manual_seed(0)
            callback = ShareCallback("one", routing=routing)
            train(get_peft_model(tiny_model("llama"), config), callback, 1)
            states.append(callback.subspace.state)
        assert states[0].router is None
        for module, layer in states[0].layers.items():
            assert torch.equal(layer.coefficients_out, states[1].layers[module].coefficients_out)

    def test_streamed_data_is_refused_before_anything_is_trained(
        self, tiny_model: Callable[[str], PreTrainedModel], config: ShareConfig, tmp_path: Path
    ) -> None:
        model = get_peft_model(tiny_model("llama"), config)
        args = TrainingArguments(str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True, max_steps=1)
        data = language_data(1).to_iterable_dataset()
        trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[ShareCallback("one", routing=True)])
        with pytest.raises(ValueError, match="task 'one' has training data that is streamed and routing is True"):
            trainer.train()

    def test_too_few_examples_are_refused_before_anything_is_trained(
        self, tiny_model: Callable[[str], PreTrainedModel], config: ShareConfig, tmp_path: Path
    ) -> None:
        model = get_peft_model(tiny_model("llama"), config)
        args = TrainingArguments(str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True, max_steps=1)
        data = language_data(1).select(range(2))
        trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[ShareCallback("one", routing=True)])
        with pytest.raises(ValueError, match="task 'one' has 2 examples and routing is True, expected at least 3"):
            trainer.train()
