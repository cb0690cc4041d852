"""Learning a route to a task in a trainer, after the task has been learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
from peft import PeftModel
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, TrainingArguments

from ..engines.deepspeed import ZeRO3Engine
from ..engines.engine import Engine
from ..engines.fsdp import FSDPEngine
from ..engines.processes import of_each_process
from ..state import SubspaceState
from ..subspace.discriminants import LEAST_INPUTS, FeatureSums
from ..tuner.learned_routes import layers_for, sums_over, with_learned_route
from ..tuner.routing import count_of
from .data import Data, cannot_be_indexed


def check_engine_routes(engine: Engine) -> None:
    """Refuse engines that partition a model between phases, as each process runs the base model by itself then.

    Raises:
        ValueError: If the engine is one of them. The message names it.
    """
    if isinstance(engine, (ZeRO3Engine, FSDPEngine)):
        name = "ZeRO-3" if isinstance(engine, ZeRO3Engine) else "FSDP"
        raise ValueError(
            f"routing is True under {name}, expected one process, DDP or ZeRO-1/2; or SharedSubspace.learn_route "
            "after the stream"
        )


def check_data_routes(task: str, data: Data) -> None:
    """Refuse data that training may use up, or that cannot be indexed.

    Raises:
        ValueError: If the data is unusable. The message names the task.
    """
    if cannot_be_indexed(data):
        raise ValueError(
            f"task {task!r} has training data that is streamed and routing is True, expected data that can be "
            "indexed; or SharedSubspace.learn_route after the stream"
        )


def with_route_of(trainer: Trainer, state: SubspaceState, task: str, data: Data) -> SubspaceState:
    """Return a state with a route to a task. Each process runs the base model on its part of the inputs.

    Args:
        trainer: Trainer whose model has the tasks of the state.
        state: State to add the route to. It is not changed, and returned as it is if the task has a route.
        task: Task of the state.
        data: Data that the task was learned from.

    Raises:
        ValueError: If there are too few inputs, or their features are not finite. The message names the task.
    """
    if state.tasks[task].route is not None:
        return state
    collate = trainer.data_collator
    if isinstance(data, datasets.Dataset):
        data = trainer._remove_unused_columns(data, description="training")
    else:
        collate = trainer._get_collator_with_removed_columns(collate, description="training")
    return _with_route(trainer.model, state, task, data, collate, trainer.args)


def check_loader_routes(task: str, loader: Any, args: TrainingArguments) -> None:
    """Refuse training batches of a Trainer that do not have one row for each input.

    Args:
        task: Task that the Trainer trains.
        loader: Data loader of its training batches.
        args: Arguments of the Trainer.

    Raises:
        ValueError: If the batches are unusable. The message names the task and the problem with its data.
    """
    instead = "or SharedSubspace.learn_route after the training"
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"task {task!r} is trained from a {type(loader).__name__} and routing is True, expected a DataLoader; "
            f"{instead}"
        )
    check_data_routes(task, loader.dataset)
    if getattr(args, "packing", False):
        raise ValueError(
            f"packing is True and routing is True for task {task!r}, expected examples that are not joined; {instead}"
        )
    if (found := len(loader.dataset)) < LEAST_INPUTS:
        raise ValueError(f"task {task!r} has {found} examples and routing is True, expected at least {LEAST_INPUTS}")
    batch = loader.collate_fn([loader.dataset[0], loader.dataset[1]])
    if (found := count_of(batch)) != 2:
        raise ValueError(
            f"task {task!r} has batches with {found} rows for two examples and routing is True, expected a row for "
            f"each, unlike preferences or padding_free; {instead}"
        )


def with_route_from(
    loader: DataLoader, args: TrainingArguments, model: PeftModel, state: SubspaceState, task: str
) -> SubspaceState:
    """Return a state with a route to a task, learned from the examples that a Trainer trained the task on.

    Args:
        loader: Data loader of the Trainer's training batches, which `check_loader_routes` has accepted.
        args: Arguments of the Trainer.
        model: Model with the tasks of the state.
        state: State to add the route to. It is not changed.
        task: Task of the state.

    Raises:
        ValueError: As in `with_route_of`.
    """
    return _with_route(model, state, task, loader.dataset, loader.collate_fn, args)


def _with_route(
    model: PeftModel,
    state: SubspaceState,
    task: str,
    data: Data,
    collate: Callable[[list[Any]], Any],
    args: TrainingArguments,
) -> SubspaceState:
    """Learn a route as `with_route_of` does. The processes share the examples, each of which is read once."""
    own = Subset(data, range(args.process_index, len(data), args.world_size))
    batches = DataLoader(own, batch_size=args.per_device_eval_batch_size, collate_fn=collate)
    tuner = model.base_model
    layers = layers_for(state, tuner, None)
    parts = of_each_process(lambda: sums_over(tuner, batches, layers))
    return with_learned_route(state, task, tuner, FeatureSums.together(parts), layers)
