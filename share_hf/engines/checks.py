"""Checks that refuse what an engine cannot do before any phase begins, and name what works instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, parse_flag_from_env
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..tuner.experts import Experts
from .fsdp import check_fsdp


if TYPE_CHECKING:  # the import also loads datasets and pandas, which only the `train` command needs
    from transformers import Trainer


def check_engine(trainer: Trainer) -> None:
    """Refuse combinations with which no phase could be trained.

    Raises:
        ValueError: If there is one. The message names the combination and what works instead.
    """
    state = trainer.accelerator.state
    asked_for_fsdp = trainer.args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")
    if asked_for_fsdp and state.distributed_type != DistributedType.FSDP:
        raise ValueError(
            f"FSDP was requested, but accelerate chose {state.distributed_type.value}, expected a GPU for each of "
            "several processes, or DDP or DeepSpeed"
        )
    if trainer.is_fsdp_enabled:
        check_fsdp(state.fsdp_plugin)
    if trainer.is_deepspeed_enabled:
        check_deepspeed_config(state.deepspeed_plugin.hf_ds_config.config)
    if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
        check_no_experts(trainer.model, "FSDP" if trainer.is_fsdp_enabled else "ZeRO-3")
    check_quantized_weights(trainer.model, _cast_of_engine(trainer), sharded=trainer.is_fsdp_enabled)


def check_no_experts(model: nn.Module, engine: str) -> None:
    """Refuse adapted experts in an engine that divides their common parameter: updates are added to all of it.

    Args:
        model: Model with adapters.
        engine: Name of the engine, for the message.

    Raises:
        ValueError: If there are such experts. The message names the module that holds the parameter.
    """
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            raise ValueError(
                f"{engine} divides the parameters of {name!r}, whose experts are adapted, expected DDP, ZeRO-1 or "
                "ZeRO-2, which keep them whole"
            )


def check_placement(model: nn.Module) -> None:
    """Refuse a model that was loaded in a way in which no phase could be trained on it.

    Args:
        model: Base model, which may be quantized, or spread over devices, memory and disk, or over processes.

    Raises:
        ValueError: If the model is unusable. The message says how it was loaded, and how to load it instead.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if getattr(model, "is_quantized", False) and quantizer is not None and not quantizer.is_trainable:
        method = quantizer.quantization_config.quant_method
        raise ValueError(
            f"the model is quantized by {getattr(method, 'value', method)!r}, on which a Trainer trains no adapters, "
            "expected its original weights, or another quantization of them; a subspace learned there can be applied "
            "here"
        )
    places = getattr(model, "hf_device_map", None) or {}
    if getattr(model, "is_distributed_loading_by_transformers", False):
        raise ValueError(
            "the model was loaded in parts by distributed_config, expected a whole one, which DeepSpeed or FSDP divide"
        )
    if len(places) > 1 and PartialState().num_processes > 1:
        raise ValueError(
            f"the model is spread by a device_map over {sorted(map(str, set(places.values())))}, expected one "
            "process, or a model loaded without device_map, which DeepSpeed or FSDP divide"
        )
    offloaded = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if offloaded is not None and len(places) < 2:
        raise ValueError(
            f"{offloaded!r} is offloaded or was never loaded, and no device_map says where other weights are, "
            "expected the model loaded whole, or by a device_map that offloads a part of it"
        )


def check_heads(model: nn.Module) -> None:
    """Refuse a model with an offloaded head: accelerate would restore its loaded values at every forward pass.

    Args:
        model: Model with adapters.

    Raises:
        ValueError: If a head is offloaded. The message names it.
    """
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and any(p.is_meta for p in module.parameters()):
            raise ValueError(
                f"{name!r} is offloaded, and trained by each task, expected it on a device: assign one in device_map"
            )


def check_foreign_engine() -> None:
    """Refuse engines that partition adapters, in a Trainer from which the engine cannot be removed.

    Raises:
        ValueError: If the Trainer has such an engine. The message names the engine and what works instead.
    """
    sharded = AcceleratorState().distributed_type == DistributedType.FSDP
    if sharded or is_deepspeed_zero3_enabled():
        raise ValueError(
            f"{'FSDP' if sharded else 'ZeRO-3'} keeps every adapter in parts when ShareCallback would merge it, "
            "expected DDP, ZeRO-1 or ZeRO-2, or ShareTrainer, which takes any of them"
        )


def check_deepspeed_config(config: Mapping[str, Any]) -> None:
    """Refuse an optimizer or scheduler in a DeepSpeed configuration: phases differ in learning rates and lengths.

    Raises:
        ValueError: If there is one. The message names it and what works instead.
    """
    for block, argument in (("optimizer", "optim"), ("scheduler", "lr_scheduler_type")):
        if block in config:
            raise ValueError(
                f"the DeepSpeed configuration has the {block} {config[block].get('type')!r}, expected none there, and "
                f"{argument} in the training arguments: each phase has its own"
            )


def check_quantized_weights(model: nn.Module, cast: torch.dtype | None, *, sharded: bool) -> None:
    """Refuse bitsandbytes weights that an engine would corrupt.

    Args:
        model: Model, quantized or not.
        cast: Dtype that the engine casts weights to. A packed 4-bit weight has no meaningful dtype, but the tensor
            that stores it has one, and a cast would destroy it.
        sharded: Whether FSDP shards the weights.

    Raises:
        ValueError: If there is such a weight. The message names it, and how to load the model instead.
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


def _cast_of_engine(trainer: Trainer) -> torch.dtype | None:
    """Return the dtype that an engine casts floating-point weights to, or None if it leaves them unchanged."""
    state = trainer.accelerator.state
    if trainer.is_deepspeed_enabled:
        dtype = state.deepspeed_plugin.hf_ds_config.dtype()
        return dtype if dtype != torch.float32 else None
    if trainer.is_fsdp_enabled and state.fsdp_plugin.mixed_precision_policy is not None:
        return state.fsdp_plugin.mixed_precision_policy.param_dtype
    return None
