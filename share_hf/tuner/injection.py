"""Injection of a subspace's tasks into a model: all at once, or a few more at run time."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence

from peft import PeftModel, get_peft_model
from torch import nn

from ..format.task_files import share_adapter_config
from ..state import SubspaceState
from .config import ShareConfig
from .mixed_heads import head_wrappers
from .model import share_layers
from .renaming import named_as_in
from .transfer import check_fits, load_coefficients, load_router, load_tasks, share_config_for


def inject_tasks(
    model: nn.Module, state: SubspaceState, tasks: Sequence[str], *, trainable: bool = False
) -> PeftModel:
    """Inject tasks of a subspace into a base model, one adapter each; the first is active.

    Args:
        model: Base model without adapters.
        state: State of the subspace.
        tasks: Names of tasks in the subspace, at least one.
        trainable: Whether the active task's coefficients are trained.

    Raises:
        ValueError: If a task does not fit the model, which is then unchanged.
    """
    if isinstance(model, PeftModel) or getattr(model, "peft_config", None):
        raise ValueError("model has adapters already, expected the base model")
    state = named_as_in(model, state)
    check_fits(model, state, tasks)
    config = share_config_for(state, tasks[0], trainable=trainable)
    config.base_model_name_or_path = getattr(model, "name_or_path", None) or state.base_model_name_or_path
    peft_model = get_peft_model(model, config, adapter_name=tasks[0])
    add_adapters(peft_model, state, tasks, trainable=trainable)
    load_tasks(peft_model, state, tasks)
    load_router(peft_model, state)
    return peft_model


def add_tasks(model: PeftModel, state: SubspaceState, tasks: Sequence[str]) -> None:
    """Add tasks of a subspace to a model that has some of them already; the tasks that it has stay as they are.

    Raises:
        ValueError: If a task does not fit the model, or the model has another basis. The model is then unchanged.
    """
    state = named_as_in(model, state)
    check_fits(model.get_base_model(), state, tasks)
    add_adapters(model, state, tasks)
    load_coefficients(model, state, tasks)
    load_router(model, state)


def add_adapters(model: PeftModel, state: SubspaceState, tasks: Sequence[str], *, trainable: bool = False) -> None:
    """Add adapters for tasks of a subspace, whose coefficients and heads are loaded later.

    PEFT goes over the whole model for each adapter that it adds. It therefore adds only one of each kind here, and the
    others are set up like it. Most subspaces have only one kind.

    Args:
        model: PEFT model with at least one adapter.
        state: State of the subspace.
        tasks: Names of tasks in the subspace, the first of which the model may already have.
        trainable: Whether the configurations say that the adapters are trained while they are active.
    """
    alike: dict[str, list[str]] = {}
    for task in tasks:
        alike.setdefault(_kind_of(state, task), []).append(task)
    fresh: dict[str, list[str]] = {}
    for first, *others in alike.values():
        if first not in model.peft_config:
            config = share_config_for(state, first, trainable=trainable)
            config.base_model_name_or_path = next(iter(model.peft_config.values())).base_model_name_or_path
            model.add_adapter(first, config)
        if new := [task for task in others if task not in model.peft_config]:
            fresh[first] = new
    layers = share_layers(model)
    for first, new in fresh.items():
        for layer in layers.values():
            if layer.has_task(first):
                layer.add_alike(new, first)
    _configure_alike(model, fresh)


def add_untrained(model: PeftModel, tasks: Sequence[str], config: ShareConfig) -> None:
    """Add adapters for new, untrained tasks. PEFT goes over the whole model for the first one only.

    Args:
        model: PEFT model with another adapter and none of these. The first task is its active one afterwards.
        tasks: Names of the tasks, at least one. None of them adapts the experts of a parameter.
        config: Configuration of all of them. The first adapter takes it as it is.
    """
    first, *others = tasks
    model.add_adapter(first, config)
    model.set_adapter(first)
    _configure_alike(model, {first: others})
    layers = [layer for layer in share_layers(model).values() if layer.has_task(first)]
    for task in others:
        for layer in layers:
            layer.update_layer(task, config, inference_mode=config.inference_mode)


def _configure_alike(model: PeftModel, alike: Mapping[str, Sequence[str]]) -> None:
    """Set up new tasks with the configuration, and copies of the heads, of existing ones.

    Args:
        model: PEFT model that has the keys of `alike` as adapters.
        alike: New tasks to set up, by the adapter that they are set up like.
    """
    wrappers = head_wrappers(model)
    for first, new in alike.items():
        for task in new:
            model.peft_config[task] = config = copy.copy(model.peft_config[first])
            config.modules_to_save = copy.copy(config.modules_to_save)  # PEFT extends it in place
            for wrapper in wrappers.values():
                if first in wrapper.modules_to_save:
                    wrapper.update(task)


def _kind_of(state: SubspaceState, task: str) -> str:
    """Return a key that is equal for tasks whose adapters are set up alike."""
    config = share_adapter_config(state, task)
    modules = [module for module, layer in state.layers.items() if layer.has(task)]
    return json.dumps([config, modules], sort_keys=True, default=str)
