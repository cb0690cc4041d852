"""Streams of tasks that ShareTrainer learns on the device, in each precision and on quantized backbones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from share_hf import SharedSubspace, ShareTrainer
from share_hf.tuner import share_layers
from tests.continual.cases import (
    LLAMA_TARGETS,
    At,
    Interruption,
    arguments,
    assert_same_tasks,
    config,
    language_task,
    language_tasks,
)
from tests.trees import distance
from tests.tuner.cases import LLAMA, assert_close, assert_differ, logits, update_by_hand, with_tasks
from tests.tuner.test_quantized import assert_near, dequantized_weights, kind_of, parameter


TASKS = ("up", "down")

# Every step has all data of a task, so that losses can be compared.
OPTIONS: dict[str, Any] = dict(
    per_device_train_batch_size=24,
    max_steps=-1,
    num_train_epochs=6,
    finetune_num_train_epochs=2,
    learning_rate=2e-2,
    dataloader_pin_memory=False,
)
PHASES = {"init": range(6), "finetune": range(6, 8), "adapt": range(8, 14), "finetune again": range(14, 16)}
STEPS = 16

# By name: dtype of the base model, arguments of the trainer, and what rounding may do to losses and logits.
PRECISIONS: dict[str, tuple[torch.dtype, dict[str, Any], float]] = {
    "float32": (torch.float32, {}, 1e-3),
    "bf16": (torch.float32, {"bf16": True}, 0.05),
    "fp16": (torch.float32, {"fp16": True}, 0.02),
    "bfloat16-base": (torch.bfloat16, {}, 0.1),
    "bfloat16-base-bf16": (torch.bfloat16, {"bf16": True}, 0.1),
    "float16-base": (torch.float16, {}, 0.02),
    "float16-base-fp16": (torch.float16, {"fp16": True}, 0.02),
}

MakeModel = Callable[[str], PreTrainedModel]


def trainer_of(model: PreTrainedModel, folder: Path, device: torch.device, *callbacks: Any, **options: Any) -> Any:
    args = arguments(folder, use_cpu=device.type == "cpu", **{**OPTIONS, **options})
    share = config(LLAMA_TARGETS, num_components=5, num_temporary=3)  # 5 of the 7 directions that two tasks have
    return ShareTrainer(model, args, share, language_tasks(*TASKS), callbacks=list(callbacks))


def losses_of(trainer: ShareTrainer) -> list[float]:
    """Return the loss of each step of the stream."""
    return [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]


def assert_learned(trainer: ShareTrainer, device: torch.device) -> None:
    """Assert that the loss fell in every phase, and trained parameters stayed on the device, whole and in float32."""
    losses = losses_of(trainer)
    assert len(losses) == STEPS
    for phase, steps in PHASES.items():
        assert losses[steps[-1]] < losses[steps[0]], phase
    for layer in share_layers(trainer.model).values():
        assert set(layer.tasks) == set(TASKS)
        tensors = [layer.share_basis_out, layer.share_basis_in]
        tensors += [each for name in layer.adapter_layer_names for each in getattr(layer, name).values()]
        assert len(tensors) == 2 + 2 * len(TASKS)
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
        assert {tensor.device.type for tensor in tensors} == {device.type}
    for layer in trainer.subspace.state.layers.values():
        identity = torch.eye(layer.basis_out.shape[1])
        torch.testing.assert_close(layer.basis_out.T @ layer.basis_out, identity, rtol=0, atol=1e-5)
        assert not torch.equal(layer.coefficients_out, layer.coefficients_out.bfloat16().float())
        assert not torch.equal(layer.coefficients_out, layer.coefficients_out.half().float())


@dataclass(frozen=True)
class Learned:
    """What a stream has left. Its trainer cannot be asked later: accelerate has the state of the newest one."""

    subspace: SharedSubspace
    drift: dict[str, float]
    losses: dict[str, float]


@pytest.fixture(scope="module")
def in_float32(
    pristine_models: dict[str, PreTrainedModel], device: torch.device, tmp_path_factory: pytest.TempPathFactory
) -> Learned:
    """A stream without any reduced precision."""
    trainer = trainer_of(copy.deepcopy(pristine_models["llama"]), tmp_path_factory.mktemp("float32"), device)
    trainer.train()
    losses = {task: metrics["loss"] for task, metrics in trainer.evaluate_tasks().items()}
    return Learned(trainer.subspace, trainer.metrics["drift"], losses)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_stream_is_learned_merged_and_evaluated(
    precision: str,
    tiny_model: MakeModel,
    device: torch.device,
    in_float32: Learned,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    dtype, options, tolerance = PRECISIONS[precision]
    if "fp16" in options:
        request.getfixturevalue("cuda")
    base = tiny_model("llama").to(dtype)
    trainer = trainer_of(base, tmp_path, device, **options)
    trainer.train()
    assert_learned(trainer, device)
    assert {parameter.dtype for name, parameter in base.named_parameters() if ".share_" not in name} == {dtype}

    for task, metrics in trainer.evaluate_tasks().items():
        assert metrics["loss"] == pytest.approx(in_float32.losses[task], rel=max(tolerance, 0.05))
    # On the CPU in float32, from the files alone.
    batch = {"input_ids": torch.tensor(language_task(0)["validation"]["input_ids"])}
    loaded = SharedSubspace.from_pretrained(tmp_path / "subspace").apply(tiny_model("llama"))
    of = {}
    for task in TASKS:
        trainer.model.eval().set_adapter(task)
        loaded.set_adapter(task)
        of[task] = logits(loaded, batch)
        assert_close(logits(trainer.model, batch).cpu(), of[task], tolerance)
    assert_differ(*of.values())


def test_the_device_learns_what_the_cpu_learns_in_double_precision(
    tiny_model: MakeModel, in_float32: Learned, tmp_path: Path
) -> None:
    reference = trainer_of(tiny_model("llama").double(), tmp_path, torch.device("cpu"))
    reference.train()
    for task in TASKS:
        assert distance(in_float32.subspace, reference.subspace, task) < 1e-3
    assert max(reference.metrics["drift"].values()) > 0.02
    assert in_float32.drift == pytest.approx(reference.metrics["drift"], abs=1e-3)


@pytest.mark.parametrize("phase", ["adapt", pytest.param("finetune again", marks=pytest.mark.slow)])
def test_a_stream_that_is_cut_off_resumes_to_the_same_end(
    phase: str, tiny_model: MakeModel, device: torch.device, tmp_path: Path
) -> None:
    """The two are equal bit by bit on the CPU; CUDA may add in another order."""
    checkpoints: dict[str, Any] = dict(save_strategy="steps", save_steps=1)
    whole = trainer_of(tiny_model("llama"), tmp_path / "whole", device, **checkpoints)
    whole.train()
    steps_left = iter(range(PHASES[phase][1]))

    def interrupt(*args: Any, steps_left: Iterator[int] = steps_left, **kwargs: Any) -> None:
        if next(steps_left, None) is None:
            raise Interruption

    folder = tmp_path / "cut"
    with pytest.raises(Interruption):
        trainer_of(tiny_model("llama"), folder, device, At("on_step_end", interrupt), **checkpoints).train()
    steps_taken: list[int] = []
    counts = At("on_step_end", lambda args, state, **kwargs: steps_taken.append(state.global_step))
    resumed = trainer_of(tiny_model("llama"), folder, device, counts, **checkpoints)
    resumed.train(resume_from_checkpoint=True)
    assert len(steps_taken) == STEPS - PHASES[phase][1]
    if device.type == "cpu":
        assert_same_tasks(resumed.subspace, whole.subspace)
    for task in TASKS:
        assert distance(resumed.subspace, whole.subspace, task) < 1e-3


each_quantization = pytest.mark.parametrize(
    "quantization", [parameter(name) for name in ("nf4", "fp4-nested-bfloat16", "int8")]
)


@each_quantization
def test_a_quantized_backbone_learns_merges_and_evaluates_again(
    quantization: Any, tiny_model_folder: Callable[[str], Path], device: torch.device, tmp_path: Path
) -> None:
    base = quantization.load(tiny_model_folder("llama"))
    assert kind_of(base.model.layers[0].self_attn.o_proj) == quantization.kind
    assert base.device.type == device.type
    weights = dequantized_weights(base)
    trainer = trainer_of(base, tmp_path, device, evaluate_before=True)
    trainer.train()
    assert_learned(trainer, device)
    after = trainer.evaluate_tasks()
    for task, before in zip(TASKS, trainer.metrics["baseline"], strict=True):
        assert -after[task]["loss"] > before, task
    for name, weight in dequantized_weights(trainer.model.get_base_model()).items():
        assert_near(weight, weights[name], 0.005)


@each_quantization
def test_merging_into_a_quantized_backbone_keeps_the_sum_of_weight_and_update(
    quantization: Any, tiny_model_folder: Callable[[str], Path], device: torch.device
) -> None:
    model = with_tasks(quantization.load(tiny_model_folder("llama")), LLAMA, "one")
    expected = logits(model, LLAMA.batch())
    with model.disable_adapter():
        plain = logits(model, LLAMA.batch())
    sums = {
        name: layer.get_base_weight().double() + update_by_hand(layer, "one")
        for name, layer in share_layers(model).items()
    }
    merged = model.merge_and_unload()
    assert merged.device.type == device.type
    assert not share_layers(merged)
    weights = dequantized_weights(merged)
    for name, weight in sums.items():
        assert kind_of(merged.get_submodule(name)) == quantization.kind
        assert_near(weights[name].double(), weight, 0.15)
    assert (logits(merged, LLAMA.batch()) - expected).norm() < 0.5 * (plain - expected).norm()
