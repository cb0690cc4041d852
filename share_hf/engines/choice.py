"""Choosing the engine of a trainer, and recognizing the engine that wrote a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from .checks import check_engine
from .deepspeed import DeepSpeedEngine, ZeRO3Engine, make_adapters_whole, trained_parameters
from .engine import Engine
from .fsdp import FSDPEngine
from .local import LocalEngine


if TYPE_CHECKING:  # the import also loads datasets and pandas, which only the `train` command needs
    from transformers import Trainer


def engine_for(trainer: Trainer) -> Engine:
    """Create and prepare the engine that the arguments of a trainer or its launcher ask for.

    Raises:
        ValueError: If the engine could not train any phase.
    """
    check_engine(trainer)
    if trainer.is_fsdp_enabled:
        kind = FSDPEngine
    elif trainer.is_deepspeed_enabled:
        kind = ZeRO3Engine if is_deepspeed_zero3_enabled() else DeepSpeedEngine
    else:
        kind = LocalEngine
    engine = kind(trainer)
    engine.prepare()
    return engine


def engine_that_wrote(checkpoint: Path) -> str:
    """Return the `writes` attribute of the engine that wrote a checkpoint."""
    if not (checkpoint / "latest").is_file():
        return LocalEngine.writes
    zero3 = any(checkpoint.glob("*/zero_pp_rank_*_model_states.pt"))
    return ZeRO3Engine.writes if zero3 else DeepSpeedEngine.writes


def take_trained_values(model: nn.Module) -> None:
    """Give a model's adapters the float32 values that DeepSpeed trained, in a Trainer that keeps its engine."""
    if AcceleratorState().distributed_type == DistributedType.DEEPSPEED:
        make_adapters_whole(model, trained_parameters(model))
