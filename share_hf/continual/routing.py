"""What a trainer learns of the inputs of a task, when the task has been learned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
from torch.utils.data import DataLoader, Subset
from transformers import Trainer

from ..engines.deepspeed import ZeRO3Engine
from ..engines.engine import Engine
from ..engines.fsdp import FSDPEngine
from ..engines.processes import of_each_process
from ..state import SubspaceState
from ..subspace.discriminants import FeatureSums
from ..tuner.learned_routes import layers_for, sums_over, with_learned_route
from .data import Data, is_streamed


def check_engine_routes(engine: Engine) -> None:
    """Refuse engines that hold a model in parts between phases: the base model is run there by each process alone.

    Raises:
        ValueError: Naming the engine.
    """
    if isinstance(engine, (ZeRO3Engine, FSDPEngine)):
        name = "ZeRO-3" if isinstance(engine, ZeRO3Engine) else "FSDP"
        raise ValueError(
            f"routing is True under {name}, expected one process, DDP or ZeRO-1/2; or SharedSubspace.learn_route "
            "after the stream"
        )


def check_data_routes(task: str, data: Data) -> None:
    """Refuse data that may be used up by its training.

    Raises:
        ValueError: Naming the task.
    """
    if is_streamed(data):
        raise ValueError(
            f"task {task!r} has training data without a length and routing is True, expected data that can be "
            "indexed; or SharedSubspace.learn_route after the stream"
        )


def with_route_of(trainer: Trainer, state: SubspaceState, task: str, data: Data) -> SubspaceState:
    """A state that knows the inputs of a task too; each process runs the base model on its part of them.

    Args:
        trainer: Its model has the tasks of the state.
        state: Not changed; as it is, if it knows them already.
        task: One of its tasks.
        data: What the task was learned from.

    Raises:
        ValueError: If there are too few inputs, or their features are not finite; naming the task.
    """
    if state.tasks[task].route is not None:
        return state
    tuner = trainer.model.base_model
    layers = layers_for(state, tuner, None)
    parts = of_each_process(lambda: sums_over(tuner, _own_batches(trainer, data), layers))
    return with_learned_route(state, task, tuner, FeatureSums.together(parts), layers)


def _own_batches(trainer: Trainer, data: Data) -> Iterator[dict[str, Any]]:
    """The batches of this process: every so-manieth example, each once."""
    collate = trainer.data_collator
    if isinstance(data, datasets.Dataset):
        data = trainer._remove_unused_columns(data, description="training")
    else:
        collate = trainer._get_collator_with_removed_columns(collate, description="training")
    args = trainer.args
    own = Subset(data, range(args.process_index, len(data), args.world_size))
    yield from DataLoader(own, batch_size=args.per_device_eval_batch_size, collate_fn=collate)
