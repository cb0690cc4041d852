"""The engines that a phase is trained by: what they cannot do is refused, and between phases they are taken off."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import Tensor, nn
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_init, is_deepspeed_zero3_enabled

from ..tuner.model import ShareModel, share_layers
from .fsdp import check_fsdp


def check_engine(trainer: Trainer) -> None:
    """Refuse what no phase could be trained with, before any is begun.

    Raises:
        ValueError: Naming the combination, and what works instead.
    """
    state = trainer.accelerator.state
    asked_for_fsdp = trainer.args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")
    if asked_for_fsdp and state.distributed_type != DistributedType.FSDP:
        raise ValueError(
            f"FSDP was asked for, and accelerate took {state.distributed_type.value}, expected a GPU for each "
            "of several processes, or DDP or DeepSpeed"
        )
    if trainer.is_fsdp_enabled:
        check_fsdp(state.fsdp_plugin)
    if trainer.is_deepspeed_enabled:
        check_deepspeed_config(state.deepspeed_plugin.hf_ds_config.config)
    check_quantized_weights(trainer.model, cast_of_engine(trainer), sharded=trainer.is_fsdp_enabled)


def check_deepspeed_config(config: Mapping[str, Any]) -> None:
    """Refuse what a configuration of DeepSpeed would settle for all phases: they differ in rates and lengths.

    Raises:
        ValueError: Naming it, and what works instead.
    """
    for block, argument in (("optimizer", "optim"), ("scheduler", "lr_scheduler_type")):
        if block in config:
            raise ValueError(
                f"the DeepSpeed configuration has the {block} {config[block].get('type')!r}, expected none there, and "
                f"{argument} in the training arguments: each phase has its own"
            )


def check_foreign_engine() -> None:
    """Refuse engines that keep adapters in parts, in a Trainer from which they cannot be taken off.

    Raises:
        ValueError: Naming the engine, and what works instead.
    """
    sharded = AcceleratorState().distributed_type == DistributedType.FSDP
    if sharded or is_deepspeed_zero3_enabled():
        raise ValueError(
            f"{'FSDP' if sharded else 'ZeRO-3'} keeps every adapter in parts when ShareCallback would merge it, "
            "expected DDP, ZeRO-1 or ZeRO-2, or ShareTrainer, which takes any of them"
        )


def cast_of_engine(trainer: Trainer) -> torch.dtype | None:
    """The dtype that an engine casts floating-point weights to; None if it leaves them as they are."""
    state = trainer.accelerator.state
    if trainer.is_deepspeed_enabled:
        dtype = state.deepspeed_plugin.hf_ds_config.dtype()
        return dtype if dtype != torch.float32 else None
    if trainer.is_fsdp_enabled and state.fsdp_plugin.mixed_precision_policy is not None:
        return state.fsdp_plugin.mixed_precision_policy.param_dtype
    return None


def check_quantized_weights(model: nn.Module, cast: torch.dtype | None, *, sharded: bool) -> None:
    """Refuse weights of bitsandbytes that an engine would make another model of.

    Args:
        model: Quantized or not.
        cast: What the engine casts weights to: a packed 4-bit weight is data of no dtype, kept in tensors of one.
        sharded: Whether FSDP shards them.

    Raises:
        ValueError: Naming a weight, and how to load the model instead.
    """
    for name, parameter in model.named_parameters():
        kind = type(parameter).__name__
        if kind == "Int8Params" and sharded:
            raise ValueError(
                f"{name!r} is in 8 bits, whose scales FSDP leaves behind, expected 4 bits, DDP or DeepSpeed"
            )
        if kind == "Params4bit" and parameter.is_floating_point() and cast not in (None, parameter.dtype):
            raise ValueError(
                f"{name!r} keeps packed 4-bit weights in {parameter.dtype}, which would be cast to {cast}, expected "
                f"BitsAndBytesConfig(bnb_4bit_quant_storage={cast}) or torch.uint8"
            )


def engine_of(trainer: Trainer) -> str:
    """What lays out the optimizer's state in the checkpoints of a phase."""
    if not trainer.is_deepspeed_enabled:
        return "PyTorch"
    return "ZeRO-3" if is_deepspeed_zero3_enabled() else "DeepSpeed"


def engine_that_wrote(checkpoint: Path) -> str:
    """The same, of a checkpoint that was written."""
    if not (checkpoint / "latest").is_file():
        return "PyTorch"
    return "ZeRO-3" if any(checkpoint.glob("*/zero_pp_rank_*_model_states.pt")) else "DeepSpeed"


def release_engine(trainer: Trainer) -> None:
    """Take the engine of a phase off the model, so that adapters are whole and float32, and can come and go.

    DeepSpeed casts the whole model to its precision and keeps what is trained in float32 in its optimizer. Its ZeRO-3
    also partitions every parameter and hooks into every module: the base model's parameters stay partitioned, those of
    adapters, which are small, become plain ones on every process.
    """
    _release(trainer, trained_parameters(trainer.model) if trainer.deepspeed is not None else {})


def recover_engine(trainer: Trainer) -> None:
    """Take off the engine of a phase that was broken off, without asking other processes, which may be gone.

    Raises:
        RuntimeError: Under ZeRO-3, where they have parts of the adapters.
    """
    if is_deepspeed_zero3_enabled():
        raise RuntimeError(
            "a phase was broken off under ZeRO-3, which leaves adapters in parts, expected a new process: "
            "resume_from_checkpoint=True goes on from what is saved"
        )
    _release(trainer, {})


def _release(trainer: Trainer, trained: Mapping[str, Tensor]) -> None:
    if trainer.deepspeed is not None:
        _take_off(trainer, trained)
    elif not trainer.is_sharded:
        _unprepare(trainer)


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Whole float32 values of what an engine trains, by name, on the CPU of every process."""
    from deepspeed.utils import safe_get_full_fp32_param

    values = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = safe_get_full_fp32_param(parameter)
            values[name] = (parameter.data if value is None else value).detach().float().cpu().clone()
    return values


def take_trained_values(model: nn.Module) -> None:
    """Give a model's adapters the float32 values that DeepSpeed trained, in a Trainer whose engine stays."""
    if AcceleratorState().distributed_type == DistributedType.DEEPSPEED:
        _make_adapters_whole(model, trained_parameters(model))


# What other libraries say of each other at every step, and no user can change.
NOISE = (
    ".*broadcast_buffers.*",
    ".*torch.distributed.*is deprecated.*",
    ".*is_gradient_checkpointing.*is deprecated.*",
)


@contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings that make the output of an engine unreadable."""
    with warnings.catch_warnings():
        for message in NOISE:
            warnings.filterwarnings("ignore", message, FutureWarning)
        yield


@contextmanager
def without_empty_parameters(model: nn.Module) -> Iterator[None]:
    """ZeRO-3 cannot partition what has no elements: the coefficients of a layer whose updates are zero so far.

    Inside of it, such a layer does not have the task, which computes the same.
    """
    taken: list[tuple[nn.ParameterDict, str, nn.Parameter]] = []
    if is_deepspeed_zero3_enabled():
        for layer in share_layers(model).values():
            for task in layer.tasks:
                holders = [getattr(layer, name) for name in layer.adapter_layer_names]
                found = [(holder, task, holder[task]) for holder in holders if task in holder]
                if any(parameter.numel() == 0 for *_, parameter in found):
                    taken += found
    for holder, task, _ in taken:
        del holder[task]
    try:
        yield
    finally:
        for holder, task, parameter in taken:
            holder[task] = parameter


@contextmanager
def ready_for_inference(trainer: Trainer) -> Iterator[None]:
    """The model can be run inside of it: with ZeRO-3, an engine gathers its parameters where they are used."""
    if is_deepspeed_zero3_enabled():
        with without_empty_parameters(trainer.model), quietly():
            deepspeed_init(trainer, num_training_steps=0, inference=True)
            trainer.deepspeed = trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
            trainer.is_broken_off = True
            yield
            _take_off(trainer, {})
            trainer.is_broken_off = False
        return
    # Other stages keep parameters whole. The Trainer would look for an engine where none has been trained yet.
    enabled, trainer.is_deepspeed_enabled = trainer.is_deepspeed_enabled, False
    try:
        yield
    finally:
        trainer.is_deepspeed_enabled = enabled
        if not trainer.is_sharded:
            _unprepare(trainer)


def _unprepare(trainer: Trainer) -> None:
    """Undo what a model is prepared by for a phase or an evaluation: the next would wrap it again, or not at all."""
    trainer.accelerator._models.clear()
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    vars(trainer.model).pop("_is_accelerate_prepared", None)


def _take_off(trainer: Trainer, trained: Mapping[str, Tensor]) -> None:
    if is_deepspeed_zero3_enabled():
        trainer.accelerator.free_memory()
        trainer.deepspeed = None
        for parameter in trainer.model.parameters():
            if hasattr(parameter, "ds_id"):
                # What was gathered in the inference mode of a scorer, and kept, could not be trained through.
                parameter.partition()
        for module in trainer.model.modules():
            # Functions that an engine ties to a module: a copy of it, such as a new task's head, would call these.
            for name in ("pre_bwd_fn", "post_bwd_fn"):
                vars(module).pop(name, None)
    trainer.model_wrapped = trainer.model
    _make_adapters_whole(trainer.model, trained)


def _make_adapters_whole(model: nn.Module, trained: Mapping[str, Tensor]) -> None:
    import deepspeed

    adapters = [
        (module, name, f"{path}.{name}", parameter)
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if f".{ShareModel.prefix}" in path or ".modules_to_save." in path
    ]
    partitioned = [parameter for *_, parameter in adapters if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned):
        whole = [
            (trained[path].to(parameter.device) if path in trained else parameter.data.float()).clone()
            for _, _, path, parameter in adapters
        ]
    for (module, name, _, parameter), value in zip(adapters, whole, strict=True):
        setattr(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
