"""Small operations on the models of the matrix, whatever their architecture."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from share_hf.tuner import share_layers

from ..cases import task_parameters, update_by_hand, with_updates_in_weights
from .architectures import Architecture


def output(model: nn.Module, inputs: Mapping[str, Tensor], **kwargs: Any) -> Tensor:
    """Return what the model computes without gradients: its first tensor, if there are several."""
    with torch.no_grad():
        return first_tensor(model(**inputs, **kwargs))


def first_tensor(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def adapted(base: nn.Module, architecture: Architecture, *tasks: str, **config: Any) -> PeftModel:
    """Return the model with tasks that each have an effect, including their heads. The first one is active."""
    torch.manual_seed(0)
    model = get_peft_model(base, architecture.share_config(**config), adapter_name=tasks[0])
    for task in tasks[1:]:
        model.add_adapter(task, architecture.share_config(**config))
    for seed, task in enumerate(tasks):
        fill(model, task, seed)
    return model.eval()


def fill(model: nn.Module, task: str, seed: int = 0) -> None:
    """Move all that belongs to a task by random numbers that are large enough to show in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters_of(model, task).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.4)


def parameters_of(model: nn.Module, task: str) -> dict[str, nn.Parameter]:
    """Return a task's parameters, in Share layers and in heads, by full name."""
    heads = {name: p for name, p in model.named_parameters() if f".modules_to_save.{task}." in name}
    return task_parameters(model, task) | heads


def with_task_in_weights(base: nn.Module, model: nn.Module, task: str) -> nn.Module:
    """Return a copy of the base model without adapters, with a task's update in its weights, by definition."""
    updates = {
        name: update_by_hand(layer, task) for name, layer in share_layers(model).items() if layer.has_task(task)
    }
    return with_head(with_updates_in_weights(base, updates), model, task)


def with_head(base: nn.Module, model: nn.Module, task: str) -> nn.Module:
    """Return the base model with what a task keeps whole in place of its own modules."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name, module in inner.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            base.get_submodule(name).load_state_dict(module.modules_to_save[task].state_dict())
    return base


def values(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies, to see later what has changed."""
    return {name: copy.deepcopy(tensor.detach()) for name, tensor in parameters.items()}
