"""Streams of tasks on backbones that bitsandbytes has quantized, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from share_hf import SharedSubspace, ShareTrainer
from share_hf.tuner import share_layers

from .cases import (
    LLAMA_TARGETS,
    At,
    Interruption,
    arguments,
    assert_same_tasks,
    config,
    language_task,
    language_tasks,
    logits,
)


pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed", exc_type=ImportError)

QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "fp4-nested": dict(
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    "int8": dict(load_in_8bit=True),
}

# Every step has all data of a task, so that losses can be compared, and there is an evaluation between steps.
OPTIONS: dict[str, Any] = dict(
    per_device_train_batch_size=24,
    max_steps=-1,
    num_train_epochs=3,
    finetune_num_train_epochs=2,
    learning_rate=2e-2,
    eval_strategy="steps",
    eval_steps=1,
    gradient_checkpointing=True,
    gradient_checkpointing_kwargs={"use_reentrant": False},
)
STEPS_OF_PHASES = {"init": range(3), "finetune": range(3, 5), "adapt": range(5, 8), "finetune again": range(8, 10)}

Start = Callable[..., ShareTrainer]


@pytest.fixture(params=QUANTIZATIONS.values(), ids=QUANTIZATIONS)
def load(request: pytest.FixtureRequest, tiny_model_folder: Callable[[str], Path]) -> Callable[[], PreTrainedModel]:
    """Load the tiny Llama, newly quantized, as `prepare_model_for_kbit_training` leaves it."""

    def load() -> PreTrainedModel:
        quantization_config = BitsAndBytesConfig(**request.param)
        model = AutoModelForCausalLM.from_pretrained(
            tiny_model_folder("llama"), quantization_config=quantization_config, dtype=torch.float32
        )
        return prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})

    return load


@pytest.fixture
def start(load: Callable[[], PreTrainedModel], tmp_path: Path) -> Start:
    """Make a new trainer of two tasks in a folder, as a new process would."""

    def make(folder: str, *callbacks: Any, **changes: Any) -> ShareTrainer:
        return ShareTrainer(
            load(),
            arguments(tmp_path / folder, **OPTIONS, **changes),
            config(LLAMA_TARGETS),
            language_tasks("up", "down"),
            callbacks=list(callbacks),
            eval_dataset=language_task(0)["validation"],
        )

    return make


def test_a_quantized_stream_learns_in_every_phase_and_evaluates_between_steps(start: Start) -> None:
    found: list[dict[str, float]] = []
    trainer = start("stream", At("on_log", lambda args, state, logs, **kwargs: found.append(dict(logs))))
    weights = {name: layer.get_base_weight().clone() for name, layer in share_layers(trainer.model).items()}
    trainer.train()
    losses = [logs["loss"] for logs in found if "loss" in logs]
    assert len(losses) == len([logs for logs in found if "eval_loss" in logs]) == 10
    for phase, steps in STEPS_OF_PHASES.items():
        assert losses[steps[-1]] < losses[steps[0]], phase
    for name, layer in share_layers(trainer.model).items():
        assert torch.equal(layer.get_base_weight(), weights[name])
        assert set(layer.tasks) == {"up", "down"}
        for kind in layer.adapter_layer_names:
            assert {each.dtype for each in getattr(layer, kind).values()} <= {torch.float32}


def test_a_saved_subspace_gives_the_same_logits_on_a_fresh_quantized_model(
    start: Start, load: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    trainer = start("stream")
    trainer.train()
    loaded = SharedSubspace.from_pretrained(tmp_path / "stream" / "subspace").apply(load())
    data = language_task(1)["validation"]
    for task in ("up", "down"):
        trainer.model.set_adapter(task)
        loaded.set_adapter(task)
        assert torch.equal(logits(loaded, data), logits(trainer.model, data))
    with loaded.disable_adapter():
        assert (logits(loaded, data) - logits(trainer.model, data)).abs().max() > 0.01


@pytest.mark.slow
def test_a_quantized_stream_that_is_cut_off_ends_the_same_to_the_bit(start: Start) -> None:
    checkpoints: dict[str, Any] = dict(save_strategy="steps", save_steps=1)
    whole = start("whole", **checkpoints)
    whole.train()
    for phase in ("adapt", "finetune again"):
        steps_left = iter(range(STEPS_OF_PHASES[phase][1]))

        def interrupt(*args: Any, steps_left: Iterator[int] = steps_left, **kwargs: Any) -> None:
            if next(steps_left, None) is None:
                raise Interruption

        with pytest.raises(Interruption):
            start(phase, At("on_step_end", interrupt), **checkpoints).train()
        resumed = start(phase, **checkpoints)
        resumed.train(resume_from_checkpoint=True)
        assert_same_tasks(resumed.subspace, whole.subspace)
