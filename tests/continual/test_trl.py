"""ShareCallback in the trainers of TRL: chats, adapters that TRL rounds on quantized models, and reference models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from share_hf import ShareCallback, SharedSubspace
from share_hf.tuner import share_layers

from .cases import LLAMA_TARGETS, At, P, config, updates


trl = pytest.importorskip("trl", reason="trl is not installed")

# What both kinds of trainers are given. Three steps are enough for learning to show.
ARGUMENTS: dict[str, Any] = dict(
    max_steps=3,
    per_device_train_batch_size=8,
    learning_rate=2e-2,
    lr_scheduler_type="constant",
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
    bf16=False,
)
QUANTIZATIONS = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "int8": dict(load_in_8bit=True),
}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ ' answer ' + message['content'] + ' ' + eos_token if message['role'] == 'assistant' else message['content'] }}"
    "{% endfor %}{{ ' answer' if add_generation_prompt else '' }}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """The words "answer", "4", "5" … "63", each of which is the token with its number: the vocabulary of the tiny
    models.
    """
    words = ["<pad>", "<s>", "</s>", "answer", *map(str, range(4, 64))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )
    return tokenizer


def said(role: str, *numbers: int) -> list[dict[str, str]]:
    return [{"role": role, "content": " ".join(str(4 + number % 60) for number in numbers)}]


def chats(step: int, rows: int = 24) -> Dataset:
    """Chats in which the assistant, given two numbers, continues counting, by a step of the task's own."""
    return Dataset.from_list(
        [
            {
                "prompt": said("user", start, start + step),
                "completion": said("assistant", start + 2 * step, start + 3 * step),
            }
            for start in range(rows)
        ]
    )


def preferences(step: int, rows: int = 24) -> Dataset:
    """Preferences for the answers of `chats` over answers that do not continue counting."""
    return Dataset.from_list(
        [
            {
                "prompt": chat["prompt"],
                "chosen": chat["completion"],
                "rejected": said("assistant", 7 * step + i, i),
            }
            for i, chat in enumerate(chats(step, rows))
        ]
    )


Make = Callable[..., Trainer]


@pytest.fixture
def sft(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Make:
    """Make an SFTTrainer with callbacks, which has not started yet."""

    def make(
        model: Any, *callbacks: Any, step: int = 1, peft_config: Any = None, folder: str = "sft", **options: Any
    ) -> Trainer:
        values = {**ARGUMENTS, "gradient_checkpointing": False, **options}
        return trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(str(tmp_path / folder), **values),
            train_dataset=chats(step),
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=list(callbacks),
        )

    return make


@pytest.fixture
def dpo(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Make:
    """Make a DPOTrainer with callbacks, which has not started yet."""

    def make(model: Any, *callbacks: Any, step: int = 1, peft_config: Any = None, **options: Any) -> Trainer:
        values = {**ARGUMENTS, "gradient_checkpointing": False, "max_steps": 9, **options}
        return trl.DPOTrainer(
            model=model,
            args=trl.DPOConfig(str(tmp_path / "dpo"), **values),
            train_dataset=preferences(step),
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=list(callbacks),
        )

    return make


@pytest.fixture
def quantized_model(tiny_model_folder: Callable[[str], Path]) -> Callable[[str], PreTrainedModel]:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed", exc_type=ImportError)

    def load(kind: str) -> PreTrainedModel:
        quantization = BitsAndBytesConfig(**QUANTIZATIONS[kind])
        return AutoModelForCausalLM.from_pretrained(
            tiny_model_folder("llama"), quantization_config=quantization, dtype=torch.float32
        )

    return load


def fresh(model: PreTrainedModel, **options: Any) -> PeftModel:
    return get_peft_model(model, config(LLAMA_TARGETS, task_type="CAUSAL_LM", **options))


def losses(trainer: Trainer) -> list[float]:
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def shapes(subspace: SharedSubspace) -> dict[str, tuple[Any, ...]]:
    return {
        module: (
            layer.tasks,
            *(
                tuple(getattr(layer, name)[0].shape if "coefficients" in name else getattr(layer, name).shape)
                for name in ("basis_out", "basis_in", "coefficients_out", "coefficients_in")
            ),
        )
        for module, layer in subspace.state.layers.items()
    }


def coefficients(model: PeftModel, task: str) -> dict[str, Tensor]:
    """Return copies of what the layers of a model hold for a task."""
    return {
        f"{module}.{side}": parameters[task].detach().clone()
        for module, layer in share_layers(model).items()
        for side, parameters in (("out", layer.share_coefficients_out), ("in", layer.share_coefficients_in))
    }


@torch.no_grad()
def answers(model: PeftModel, task: str) -> Tensor:
    """Return the logits of a task for some prompts."""
    model.set_adapter(task)
    return model.eval()(input_ids=torch.tensor([[4 + i, 5 + i, 3, 6 + i] for i in range(8)])).logits


def assert_within_the_certificate(found: Tensor, before: Tensor, model: PeftModel, drift: float) -> None:
    """Assert that an old task's logits moved no more than its updates, relative to what the task changes."""
    with model.disable_adapter():
        effect = (before - answers(model, model.active_adapter)).norm()
    assert (found - before).norm() <= 2 * (drift + 1e-5) * effect


# ---- SFTTrainer -----------------------------------------------------------------------------------------------------


def test_sft_trainers_learn_two_tasks_as_plain_trainers_do(
    tiny_model: Callable[[str], PreTrainedModel], sft: Make, tmp_path: Path
) -> None:
    plain_model, chat_model = fresh(tiny_model("llama")), fresh(tiny_model("llama"))
    plain = chat = None
    for step, task in ((1, "ones"), (2, "twos")):
        chat = ShareCallback(task, chat.subspace if chat is not None else None)
        trainer = sft(chat_model, chat, step=step)
        tokens = trainer.train_dataset
        trainer.train()
        assert losses(trainer)[-1] < losses(trainer)[0]
        plain = ShareCallback(task, plain.subspace if plain is not None else None)
        same_data = [{name: row[name] for name in ("input_ids", "labels")} for row in tokens]
        args = TrainingArguments(str(tmp_path / "plain"), **ARGUMENTS)
        Trainer(plain_model, args, train_dataset=same_data, callbacks=[plain]).train()
    assert chat is not None and plain is not None and chat.subspace is not None and plain.subspace is not None
    assert [info.learned_by for info in chat.subspace.state.tasks.values()] == ["init", "adapt"]
    assert shapes(chat.subspace) == shapes(plain.subspace)
    for task in ("ones", "twos"):
        expected = updates(plain.subspace, task)
        for module, update in updates(chat.subspace, task).items():
            assert (update - expected[module]).norm() < 0.02 * expected[module].norm()
    assert list(chat_model.peft_config) == ["ones", "twos"]


def test_an_old_task_answers_as_before_within_the_certificate(
    tiny_model: Callable[[str], PreTrainedModel], sft: Make
) -> None:
    model = fresh(tiny_model("llama"), num_components=5, num_temporary=4)
    first = ShareCallback("ones")
    sft(model, first).train()
    before = answers(model, "ones")
    second = ShareCallback("twos", first.subspace)
    sft(model, second, step=2).train()
    assert second.report is not None and second.report.max_drift > 1e-3
    assert_within_the_certificate(answers(model, "ones"), before, model, second.report.max_drift)


def test_the_defaults_of_sft_config_and_a_config_instead_of_a_peft_model(
    tiny_model: Callable[[str], PreTrainedModel], sft: Make
) -> None:
    callback = ShareCallback("ones")
    trainer = sft(
        tiny_model("llama"),
        callback,
        peft_config=config(LLAMA_TARGETS),
        bf16=None,
        gradient_checkpointing=True,
        save_strategy="steps",
        save_steps=2,
    )
    assert trainer.args.bf16
    trainer.train()
    assert callback.subspace is not None
    assert callback.subspace.tasks == ("ones",)
    assert {tensor.dtype for tensor in coefficients(trainer.model, "ones").values()} == {torch.float32}


# ---- Quantized models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_on_a_quantized_model_all_is_trained_in_float32_and_old_tasks_are_not_rounded(
    kind: str, quantized_model: Callable[[str], PreTrainedModel], sft: Make
) -> None:
    # There is no room to grow, so a merge writes into the coefficients of the old task in place.
    model = fresh(quantized_model(kind), num_components=P, num_temporary=P - 1)
    first = ShareCallback("ones")
    rounded_by_trl = model.get_parameter(
        "base_model.model.model.layers.0.self_attn.q_proj.share_coefficients_in.default"
    )
    seen: list[set[torch.dtype]] = []
    held: list[dict[str, Tensor]] = []

    def look(args: Any, state: Any, model: PeftModel, optimizer: torch.optim.Optimizer, **kwargs: Any) -> None:
        seen.append({parameter.dtype for parameter in model.parameters() if parameter.requires_grad})
        seen.append({parameter.dtype for group in optimizer.param_groups for parameter in group["params"]})
        if "ones" in model.peft_config and model.active_adapter != "ones":
            held.append(coefficients(model, "ones"))

    trainer = sft(model, first, At("on_step_end", look))
    assert rounded_by_trl.dtype == torch.bfloat16  # otherwise this test shows nothing
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    known, before = coefficients(model, "ones"), answers(model, "ones")
    second = ShareCallback("twos", first.subspace)
    sft(model, second, At("on_step_end", look), step=2).train()
    assert seen and all(dtypes == {torch.float32} for dtypes in seen)
    assert held and all(torch.equal(each[name], known[name]) for each in held for name in known)
    for task in ("ones", "twos"):
        assert {tensor.dtype for tensor in coefficients(model, task).values()} == {torch.float32}
    assert second.report is not None
    assert_within_the_certificate(answers(model, "ones"), before, model, second.report.max_drift)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_on_a_quantized_model_an_old_task_without_drift_answers_the_same(
    kind: str, quantized_model: Callable[[str], PreTrainedModel], sft: Make
) -> None:
    model = fresh(quantized_model(kind))
    first = ShareCallback("ones")
    sft(model, first).train()
    before = answers(model, "ones")
    second = ShareCallback("twos", first.subspace)
    sft(model, second, step=2).train()
    assert second.report is not None and second.report.max_drift < 1e-5
    # Where int8 rounds activations, a difference in the last bit can become a difference in the last step.
    torch.testing.assert_close(answers(model, "ones"), before, rtol=0, atol=1e-4 if kind == "nf4" else 2e-2)


def test_rounded_tasks_without_their_subspace_are_refused_with_advice(
    quantized_model: Callable[[str], PreTrainedModel], sft: Make
) -> None:
    model = fresh(quantized_model("nf4"))
    sft(model, ShareCallback("ones")).train()
    with pytest.raises(ValueError, match=r"coefficients of \['ones'\] .* pass the subspace .*ShareCallback\('twos', "):
        sft(model, ShareCallback("twos"), step=2)


def test_tasks_of_an_applied_subspace_are_not_rounded(
    quantized_model: Callable[[str], PreTrainedModel], sft: Make
) -> None:
    first = ShareCallback("ones")
    sft(fresh(quantized_model("nf4")), first).train()
    assert first.subspace is not None
    callback = ShareCallback("twos")
    sft(first.subspace.apply(quantized_model("nf4")), callback, step=2).train()
    assert callback.subspace is not None and callback.report is not None
    assert callback.subspace.tasks == ("ones", "twos")
    expected = updates(first.subspace, "ones")
    for module, update in updates(callback.subspace, "ones").items():
        torch.testing.assert_close(update, expected[module], rtol=0, atol=1e-6)


# ---- DPOTrainer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_by", ["peft_config", "peft model"])
@pytest.mark.parametrize("kind", ["float32", "nf4"])
def test_dpo_trainers_learn_two_tasks(
    kind: str,
    first_by: str,
    tiny_model: Callable[[str], PreTrainedModel],
    request: pytest.FixtureRequest,
    dpo: Make,
) -> None:
    base = tiny_model("llama") if kind == "float32" else request.getfixturevalue("quantized_model")(kind)
    share_config = config(LLAMA_TARGETS, task_type="CAUSAL_LM", init_std=0.3)
    first = ShareCallback("ones")
    if first_by == "peft_config":
        trainer = dpo(base, first, peft_config=copy.deepcopy(share_config))
    else:
        trainer = dpo(get_peft_model(base, copy.deepcopy(share_config)), first)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3)  # at the start, no policy differs from its reference
    assert sum(losses(trainer)[-3:]) < sum(losses(trainer)[:3])
    model = trainer.model
    before = answers(model, "ones")
    model.add_adapter("default", copy.deepcopy(share_config))
    second = ShareCallback("twos", first.subspace)
    trainer = dpo(model, second, step=2)
    trainer.train()
    assert sum(losses(trainer)[-3:]) < sum(losses(trainer)[:3])
    assert list(model.peft_config) == ["ones", "twos"]
    assert model.active_adapter == "twos"
    assert second.subspace is not None and second.report is not None
    assert second.subspace.tasks == ("ones", "twos")
    assert second.report.max_drift < 1e-5
    torch.testing.assert_close(answers(model, "ones"), before, rtol=0, atol=1e-4)


class TestRouting:
    """The inputs of a task are learned from what TRL makes of them."""

    def test_chats_are_learned(self, sft: Make, tiny_model: Callable[[str], PreTrainedModel]) -> None:
        callback = ShareCallback("count", routing=True)
        sft(get_peft_model(tiny_model("llama"), config(LLAMA_TARGETS)), callback).train()
        assert callback.subspace.routed_tasks == ("count",)
        assert callback.subspace.state.tasks["count"].route.measured == len(chats(1))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"packing": True, "packing_strategy": "wrapped", "max_length": 16}, "packing is True"),
            ({"padding_free": True, "max_length": None}, "batches with 1 rows for two examples"),
        ],
        ids=["packed", "padding-free"],
    )
    def test_joined_chats_are_refused(
        self, options: dict[str, Any], message: str, sft: Make, tiny_model: Callable[[str], PreTrainedModel]
    ) -> None:
        model = get_peft_model(tiny_model("llama"), config(LLAMA_TARGETS))
        trainer = sft(model, ShareCallback("count", routing=True), **options)
        with pytest.raises(ValueError, match=f"{message}.*routing is True|routing is True.*{message}"):
            trainer.train()

    def test_preferences_are_refused(self, dpo: Make, tiny_model: Callable[[str], PreTrainedModel]) -> None:
        trainer = dpo(tiny_model("llama"), ShareCallback("count", routing=True), peft_config=config(LLAMA_TARGETS))
        with pytest.raises(ValueError, match="batches with 4 rows for two examples and routing is True"):
            trainer.train()
