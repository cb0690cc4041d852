"""Between a model with Share layers and the immutable state of a subspace."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from ..hub.adapters import PEFT_PREFIX, TARGET_FIELDS
from ..hub.state import SubspaceState, TaskInfo
from ..hub.tree import share_adapter_config, share_adapter_tensors
from ..subspace import LayerSubspace, LowRankUpdate
from .config import Phase, ShareConfig
from .layer import ShareLayer
from .model import ShareModel, share_layers
from .origin import attach_bases


# Bias of a label that a task does not have, in a head padded to the labels of its model.
NEVER_PREDICTED = -1e4


def share_config_for(
    state: SubspaceState, task: str, *, trainable: bool = False, phase: Phase = "coefficients"
) -> ShareConfig:
    """The configuration that injects a task of a subspace with its bases."""
    values = copy.deepcopy({**share_adapter_config(state, task), "inference_mode": not trainable, "phase": phase})
    values.pop("peft_type")
    config = ShareConfig(**values)
    attach_bases(config, state.bases())
    return config


def load_tasks(model: PeftModel, state: SubspaceState, tasks: Iterable[str]) -> None:
    """Give tasks of a model that has their adapters the bases, coefficients and heads of a subspace."""
    names = list(tasks)
    load_bases(model, state)
    for module, layer in share_layers(model).items():
        stored = state.layers.get(module)
        for task in names:
            if stored is not None and task in stored.tasks:
                i = stored.index(task)
                layer.set_coefficients(task, stored.coefficients_out[i], stored.coefficients_in[i])
    for task in names:
        if state.tasks[task].head:
            set_peft_model_state_dict(model, _fitting_tensors(model, state, task), adapter_name=task)


def missing_labels(
    task: str, name: str, stored: Tensor, expected: torch.Size | None, head: Mapping[str, Tensor]
) -> int:
    """How many labels a task's head lacks, compared to the parameter `name` of the model, of shape `expected`.

    Raises:
        ValueError: If the model has no such parameter or one for fewer labels, or the head has no bias that could rule
            the missing labels out.
    """
    if expected is None:
        raise ValueError(f"{name!r} of task {task!r} is not in the model, expected a model with this head")
    missing = expected[0] - stored.shape[0] if stored.ndim else 0
    if stored.shape[1:] != expected[1:] or missing < 0 or (missing and f"{name.rpartition('.')[0]}.bias" not in head):
        raise ValueError(
            f"{name!r} of task {task!r} has shape {tuple(stored.shape)}, the model's has {tuple(expected)}: load the "
            f"base model with num_labels={stored.shape[0]}"
        )
    return missing


def _fitting_tensors(model: PeftModel, state: SubspaceState, task: str) -> dict[str, Tensor]:
    """A task's tensors, its head padded to the labels of the model: PEFT keeps one shape for all tasks' heads."""
    tensors = share_adapter_tensors(state, task)
    parameters, head = dict(model.get_base_model().named_parameters()), state.tasks[task].head
    for name, stored in head.items():
        module, _, leaf = name.rpartition(".")
        expected = parameters[f"{module}.modules_to_save.{task}.{leaf}"].shape
        if missing := missing_labels(task, name, stored, expected, head):
            padding = stored.new_full((missing, *expected[1:]), NEVER_PREDICTED if leaf == "bias" else 0.0)
            tensors[f"{PEFT_PREFIX}{name}"] = torch.cat([stored, padding])
    return tensors


def head_of(model: PeftModel, task: str) -> dict[str, Tensor]:
    """Copies of a task's `modules_to_save` weights by name in the base model."""
    tensors = get_peft_model_state_dict(model, adapter_name=task, save_embedding_layers=False)
    return {
        name.removeprefix(PEFT_PREFIX): tensor.detach().cpu().clone()
        for name, tensor in tensors.items()
        if f".{ShareModel.prefix}" not in name
    }


def load_bases(model: PeftModel, state: SubspaceState) -> None:
    """Replace the bases of a model by those of a subspace."""
    for module, layer in share_layers(model).items():
        if (stored := state.layers.get(module)) is not None:
            layer.set_basis(stored.basis_out, stored.basis_in)


def updates_of(model: PeftModel, task: str) -> dict[str, LowRankUpdate]:
    """A task's updates by module, from whatever it was trained as; detached, float32, on the CPU."""
    updates = {}
    for module, layer in share_layers(model).items():
        if layer.has_task(task):
            factors = layer.factors(task)
            updates[module] = LowRankUpdate(factors.out_factor.detach().cpu(), factors.in_factor.detach().cpu())
    return updates


def coefficients_of(model: PeftModel, task: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A task's coefficients (k_out, p), (k_in, p) by module; detached, on the CPU."""
    return {
        module: (layer.share_coefficients_out[task].detach().cpu(), layer.share_coefficients_in[task].detach().cpu())
        for module, layer in share_layers(model).items()
        if task in layer.share_coefficients_out
    }


def state_of(model: PeftModel) -> SubspaceState:
    """The subspace that a model holds: its bases and the tasks with an update, which count as just learned."""
    layers = share_layers(model)
    config = next(iter(model.peft_config.values()))
    tasks = [
        task
        for task in model.peft_config
        if any(_has_update(layer, task) for layer in layers.values() if task in layer.share_coefficients_out)
    ]
    state = SubspaceState(
        settings=config.subspace_settings(),
        base_model_name_or_path=getattr(model.get_base_model(), "name_or_path", None) or None,
    )
    if not tasks:
        return state
    stored = {}
    for module, layer in layers.items():
        bases = layer.share_basis_out.cpu(), layer.share_basis_in.cpu()
        learned = LayerSubspace.from_basis(*bases, config.pseudo_rank)
        for task in tasks:
            if task in layer.share_coefficients_out:
                coefficients = layer.share_coefficients_out[task], layer.share_coefficients_in[task]
                learned = learned.with_task(task, *(side.detach().cpu() for side in coefficients))
        stored[module] = learned
    infos = {task: TaskInfo(target=target_of(model.peft_config[task]), head=head_of(model, task)) for task in tasks}
    return replace(state, layers=stored, tasks=infos)


def target_of(config: ShareConfig) -> dict[str, Any]:
    """Which modules an adapter targets, as JSON."""
    target = {name: value for name in TARGET_FIELDS if (value := getattr(config, name)) is not None}
    for name, value in target.items():
        if isinstance(value, (set, list)):
            # PEFT adds the classifier to `modules_to_save` with every adapter that it is given the configuration of.
            target[name] = sorted(value) if isinstance(value, set) else list(dict.fromkeys(value))
    return target


def _has_update(layer: ShareLayer, task: str) -> bool:
    return bool(layer.share_coefficients_out[task].any() and layer.share_coefficients_in[task].any())


def is_share_model(model: object) -> bool:
    return isinstance(model, PeftModel) and isinstance(model.base_model, ShareModel)
