"""Between a model with Share layers and the immutable state of a subspace."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from ..format.base_model import base_name
from ..format.basis_file import bases_of
from ..format.lora import PEFT_PREFIX, TARGET_FIELDS
from ..format.module_names import without_wrappers
from ..format.saved_modules import saved_names, targets_beside
from ..format.task_files import share_adapter_config
from ..state import SubspaceState, TaskInfo
from ..state.layout import named
from ..subspace import LayerSubspace, LowRankUpdate
from .config import GivenBases, ShareConfig
from .head import check_apart, check_head, saved_tensors, with_labels_of
from .kinds import layer_named, layout_of, matrix_shape
from .layer import ShareLayer
from .model import ShareModel, layouts_of, share_layers
from .renaming import named_as_in
from .routing import TaskRouter


def share_config_for(state: SubspaceState, task: str, *, trainable: bool = False) -> ShareConfig:
    """The configuration that injects a task of a subspace with its bases, into the modules that it has."""
    values = copy.deepcopy({**share_adapter_config(state, task), "inference_mode": not trainable})
    values.pop("peft_type")
    config = ShareConfig(**values)
    config.origin = GivenBases(bases_of(state.layers), adapted=frozenset(state.layers_of(task)))
    return config


def inject_tasks(
    model: nn.Module, state: SubspaceState, tasks: Sequence[str], *, trainable: bool = False
) -> PeftModel:
    """A base model with tasks of a subspace, one adapter each; the first is active.

    Args:
        model: The base model, without adapters.
        state: The subspace.
        tasks: At least one of its tasks.
        trainable: Whether the active task's coefficients are trained.

    Raises:
        ValueError: If a task does not fit the model, which is as it was then.
    """
    state = named_as_in(model, state)
    _check_fits(model, state, tasks)
    base = getattr(model, "name_or_path", None) or state.base_model_name_or_path
    peft_model = None
    for name in tasks:
        config = share_config_for(state, name, trainable=trainable)
        config.base_model_name_or_path = base
        if peft_model is None:
            peft_model = get_peft_model(model, config, adapter_name=name)
        else:
            peft_model.add_adapter(name, config)
    load_tasks(peft_model, state, tasks)
    load_router(peft_model, state)
    return peft_model


def router_of(state: SubspaceState) -> TaskRouter | None:
    """The routes of a subspace, None where there are none."""
    routes = {task: info.route for task, info in state.tasks.items() if info.route is not None}
    return TaskRouter(state.router, routes) if state.router is not None and routes else None


def load_router(model: PeftModel, state: SubspaceState) -> None:
    """Give a model the routes of a subspace, or none where it has none."""
    model.base_model.router = router_of(state)


def load_tasks(
    model: PeftModel,
    state: SubspaceState,
    tasks: Collection[str] | None = None,
    *,
    held: SubspaceState | None = None,
    trained: str | None = None,
) -> None:
    """Give tasks of a subspace to a model that has their adapters: bases, coefficients and heads.

    Args:
        model: Has an adapter for each task.
        state: The subspace.
        tasks: The tasks; all of the subspace if not given.
        held: The subspace that the model holds now, to the bit: what is the same there is not loaded again. A model
            that was cast since, as for an evaluation in bfloat16, is loaded whole.
        trained: A task of `held` whose adapter was trained since.
    """
    if held is not None and _was_cast(model):
        held = None
    load_bases(model, state, held=held)
    wanted = state.tasks.keys() if tasks is None else set(tasks)
    known = set() if held is None else held.tasks.keys() - {trained}
    for module, layer in share_layers(model).items():
        if (stored := state.layers.get(module)) is None:
            continue
        before = held.layers.get(module) if held is not None else None
        unmoved = before is not None and _same_basis(before, stored)
        for task in stored.tasks:
            if task in wanted and not (unmoved and task in known):
                coefficients = stored.coefficients_of(task, trimmed=state.settings.has_ranks)
                layer.set_coefficients(task, *coefficients)
    for task in wanted:
        head = state.tasks[task].head
        if head and not (task in known and held.tasks[task].head is head):
            set_peft_model_state_dict(model, _fitting_head(model, state, task), adapter_name=task)


def load_bases(model: PeftModel, state: SubspaceState, *, held: SubspaceState | None = None) -> None:
    """Replace the bases of a model by those of a subspace; `held` as for `load_tasks`."""
    for module, layer in share_layers(model).items():
        stored = state.layers.get(module)
        before = held.layers.get(module) if held is not None else None
        if stored is not None and not (before is not None and _same_basis(before, stored)):
            layer.set_basis(stored.basis_out, stored.basis_in)


def _was_cast(model: PeftModel) -> bool:
    """Whether the coefficients are no longer in float32; a cast of a model casts them all, so one a layer tells."""
    first = (next(iter(layer.share_coefficients_out.values()), None) for layer in share_layers(model).values())
    return any(coefficients is not None and coefficients.dtype != torch.float32 for coefficients in first)


def _same_basis(layer: LayerSubspace, other: LayerSubspace) -> bool:
    return layer.basis_out is other.basis_out and layer.basis_in is other.basis_in


def _check_fits(model: nn.Module, state: SubspaceState, tasks: Sequence[str]) -> None:
    if isinstance(model, PeftModel) or getattr(model, "peft_config", None):
        raise ValueError("model has adapters already, expected the base model")
    modules = {without_wrappers(name): module for name, module in model.named_modules()}
    for task in tasks:
        for module, layer in state.layers_of(task).items():
            if (found := layer_named(module, modules)) is None:
                raise ValueError(f"task {task!r} adapts {module!r}, which {type(model).__name__} does not have")
            if (shape := matrix_shape(found)) != layer.shape:
                raise ValueError(f"{module!r} has shape {shape}, the subspace expects {layer.shape}")
            if (layout := layout_of(found)) != (expected := state.layouts.get(module)):
                raise ValueError(f"{module!r} is a {named(layout)}, the subspace expects a {named(expected)}")
        if head := state.tasks[task].head:
            shapes = {name: tuple(tensor.shape) for name, tensor in head.items()}
            try:
                check_head(model, _saved_by(state, task), shapes, may_lack_labels=True)
            except ValueError as error:
                raise ValueError(f"task {task!r}: {error}") from error
            for name, tensor in saved_tensors(model, _saved_by(state, task)).items():
                if tensor.is_meta:
                    raise ValueError(
                        f"{name!r} is offloaded, and task {task!r} has its own, expected it on a device: give it one "
                        "in device_map"
                    )
    saved = {name for task in tasks for name in _saved_by(state, task)}
    check_apart({module for task in tasks for module in state.layers_of(task)}, saved)


def _fitting_head(model: PeftModel, state: SubspaceState, task: str) -> dict[str, Tensor]:
    """A task's head with all labels of the model, under the names that PEFT loads it by."""
    head = with_labels_of(model, _saved_by(state, task), state.tasks[task].head)
    return {f"{PEFT_PREFIX}{name}": tensor for name, tensor in head.items()}


def _saved_by(state: SubspaceState, task: str) -> list[str]:
    target = state.tasks[task].target
    return saved_names(target.get("modules_to_save"), target.get("task_type"))


def head_of(model: PeftModel, task: str) -> dict[str, Tensor]:
    """Copies of a task's `modules_to_save` weights by name in the base model."""
    tensors = get_peft_model_state_dict(model, adapter_name=task, save_embedding_layers=False)
    return {
        without_wrappers(name).removeprefix(PEFT_PREFIX): tensor.detach().cpu().clone()
        for name, tensor in tensors.items()
        if f".{ShareModel.prefix}" not in name
    }


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
        base_model_name_or_path=base_name(getattr(model.get_base_model(), "name_or_path", None)),
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
                out, in_ = (side.detach().cpu() for side in coefficients)
                learned = learned.with_task(task, out, in_, dtype=state.settings.coefficient_dtype)
        stored[module] = learned
    infos = {task: TaskInfo(target=target_of(model.peft_config[task]), head=head_of(model, task)) for task in tasks}
    return replace(state, layers=stored, tasks=infos, layouts=layouts_of(model))


def target_of(config: ShareConfig) -> dict[str, Any]:
    """Which modules an adapter targets, as JSON."""
    target = {name: value for name in TARGET_FIELDS if (value := getattr(config, name, None)) is not None}
    for name, value in target.items():
        if isinstance(value, (set, list)):
            # PEFT adds the classifier to `modules_to_save` with every adapter that it is given the configuration of.
            target[name] = sorted(value) if isinstance(value, set) else list(dict.fromkeys(value))
    if isinstance(modules := target.get("target_modules"), list):
        target["target_modules"] = targets_beside(modules, target.get("modules_to_save", []))
    return target


def _has_update(layer: ShareLayer, task: str) -> bool:
    return bool(layer.share_coefficients_out[task].any() and layer.share_coefficients_in[task].any())


def is_share_model(model: object) -> bool:
    return isinstance(model, PeftModel) and isinstance(model.base_model, ShareModel)
