"""Transfer between a model with Share layers and the immutable state of a subspace."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..format.base_model import base_name
from ..format.basis_file import bases_of
from ..format.lora import TARGET_FIELDS
from ..format.model_classes import AUTO_MAPPING, mapping_to
from ..format.module_names import without_wrappers
from ..format.saved_modules import saved_names, targets_beside
from ..format.task_files import share_adapter_config
from ..state import SubspaceState, TaskInfo
from ..state.layout import named
from ..subspace import LayerSubspace, LowRankUpdate
from .config import GivenBases, ShareConfig
from .head import check_apart, check_shapes, saved_tensors, shape_of, with_labels_of
from .kinds import layer_named, layout_of, matrix_shape
from .layer import ShareLayer
from .mixed_heads import head_wrappers
from .model import ShareModel, layouts_of, share_layers
from .routing import TaskRouter


def share_config_for(state: SubspaceState, task: str, *, trainable: bool = False) -> ShareConfig:
    """Return the configuration that injects a task of a subspace, with its bases, into the modules that it adapts."""
    values = copy.deepcopy({**share_adapter_config(state, task), "inference_mode": not trainable})
    values.pop("peft_type")
    config = ShareConfig(**values)
    config.origin = GivenBases(bases_of(state.layers), adapted=frozenset(state.layers_of(task)))
    return config


def router_of(state: SubspaceState) -> TaskRouter | None:
    """Return the router of a subspace; None if it has no routes."""
    routes = {task: info.route for task, info in state.tasks.items() if info.route is not None}
    return TaskRouter(state.router, routes) if state.router is not None and routes else None


def load_router(model: PeftModel, state: SubspaceState) -> None:
    """Give a model the router of a subspace, or None if it has no routes."""
    model.base_model.router = router_of(state)


def load_tasks(
    model: PeftModel,
    state: SubspaceState,
    tasks: Collection[str] | None = None,
    *,
    held: SubspaceState | None = None,
    trained: Collection[str] = (),
) -> None:
    """Load tasks of a subspace into a model that has their adapters: bases, coefficients and heads.

    Args:
        model: PEFT model with an adapter for each task.
        state: State of the subspace.
        tasks: Names of the tasks. None means all tasks of the subspace.
        held: State that the model holds now, bit for bit. What is the same there is not loaded again. A model that was
            cast in the meantime, as for an evaluation in bfloat16, is loaded completely.
        trained: Tasks of `held` whose adapters were trained since.
    """
    if held is not None and _was_cast(model):
        held = None
    load_bases(model, state, held=held)
    wanted = state.tasks.keys() if tasks is None else set(tasks)
    load_coefficients(model, state, wanted, held=held, trained=trained)


def load_coefficients(
    model: PeftModel,
    state: SubspaceState,
    wanted: Collection[str],
    *,
    held: SubspaceState | None = None,
    trained: Collection[str] = (),
) -> None:
    """Load the coefficients and heads of tasks into a model that has the subspace's bases. See `load_tasks`."""
    known = set() if held is None else held.tasks.keys() - set(trained)
    for module, layer in share_layers(model).items():
        if (stored := state.layers.get(module)) is None:
            continue
        before = held.layers.get(module) if held is not None else None
        unmoved = before is not None and _same_basis(before, stored)
        _load_coefficients(
            layer,
            stored,
            [task for task in stored.tasks if task in wanted and not (unmoved and task in known)],
            has_ranks=state.settings.has_ranks,
        )
    heads = {
        task: state.tasks[task].head
        for task in wanted
        if state.tasks[task].head and not (task in known and held.tasks[task].head is state.tasks[task].head)
    }
    _load_heads(model, state, heads)


def _load_coefficients(layer: ShareLayer, stored: LayerSubspace, tasks: Sequence[str], *, has_ranks: bool) -> None:
    if not tasks:
        return
    places = [stored.index(task) for task in tasks]
    ranks = stored.ranks[places].tolist() if has_ranks else [stored.pseudo_rank] * len(tasks)
    sides = stored.coefficients_out, stored.coefficients_in
    if len(tasks) < len(stored.tasks):
        sides = (side[places] for side in sides)
    layer.set_all_coefficients(*sides, dict(zip(tasks, ranks, strict=True)))


def _load_heads(model: PeftModel, state: SubspaceState, heads: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Load the heads of tasks, extended to all labels of the model, in one pass over the model."""
    if not heads:
        return
    wrappers = head_wrappers(model)
    shapes: dict[tuple[str, ...], dict[str, tuple[int, ...]]] = {}
    for task, head in heads.items():
        saved = tuple(saved_by(state, task))
        if saved not in shapes:
            shapes[saved] = {name: shape_of(tensor) for name, tensor in saved_tensors(model, saved).items()}
        fitting = with_labels_of(shapes[saved], head)
        for name, wrapper in wrappers.items():
            if task in wrapper.modules_to_save:
                prefix = f"{name}."
                own = {key.removeprefix(prefix): fitting[key] for key in fitting if key.startswith(prefix)}
                wrapper.modules_to_save[task].load_state_dict(own)


def load_bases(model: PeftModel, state: SubspaceState, *, held: SubspaceState | None = None) -> None:
    """Replace the bases of a model by those of a subspace. See `load_tasks` for `held`."""
    for module, layer in share_layers(model).items():
        stored = state.layers.get(module)
        before = held.layers.get(module) if held is not None else None
        if stored is not None and not (before is not None and _same_basis(before, stored)):
            layer.set_basis(stored.basis_out, stored.basis_in)


def _was_cast(model: PeftModel) -> bool:
    """Return whether the coefficients are no longer float32. One per layer is enough, as a cast converts them all."""
    first = (next(iter(layer.share_coefficients_out.values()), None) for layer in share_layers(model).values())
    return any(coefficients is not None and coefficients.dtype != torch.float32 for coefficients in first)


def _same_basis(layer: LayerSubspace, other: LayerSubspace) -> bool:
    return layer.basis_out is other.basis_out and layer.basis_in is other.basis_in


def check_fits(model: nn.Module, state: SubspaceState, tasks: Sequence[str]) -> None:
    """Refuse tasks that do not fit a base model, before it is changed.

    Raises:
        ValueError: If a task does not fit. Names the task or module, and says what does not fit.
    """
    modules = {without_wrappers(name): module for name, module in model.named_modules()}
    adapted = {module: layer for module, layer in state.layers.items() if any(map(layer.has, tasks))}
    for module, layer in adapted.items():
        if (found := layer_named(module, modules)) is None:
            task = next(filter(layer.has, tasks))
            raise ValueError(f"task {task!r} adapts {module!r}, which {type(model).__name__} does not have")
        if (shape := matrix_shape(found)) != layer.shape:
            raise ValueError(f"{module!r} has shape {shape}, the subspace expects {layer.shape}")
        if (layout := layout_of(found)) != (expected := state.layouts.get(module)):
            raise ValueError(f"{module!r} is of kind {named(layout)}, the subspace expects {named(expected)}")
    of_model: dict[tuple[str, ...], dict[str, Tensor]] = {}
    for task in tasks:
        saved = tuple(saved_by(state, task))
        if saved not in of_model:
            of_model[saved] = saved_tensors(model, saved)
        if head := state.tasks[task].head:
            _check_head_of_task(of_model[saved], saved, task, head)
    check_apart(adapted, {name for saved in of_model for name in saved})


def _check_head_of_task(
    of_model: Mapping[str, Tensor], saved: Sequence[str], task: str, head: Mapping[str, Tensor]
) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in head.items()}
    expected = {name: shape_of(tensor) for name, tensor in of_model.items()}
    try:
        check_shapes(saved, shapes, expected, may_lack_labels=True)
    except ValueError as error:
        raise ValueError(f"task {task!r}: {error}") from error
    for name, tensor in of_model.items():
        if tensor.is_meta:
            raise ValueError(
                f"{name!r} is offloaded, and task {task!r} has its own, expected it on a device: assign one in "
                "device_map"
            )


def saved_by(state: SubspaceState, task: str) -> list[str]:
    """Return the modules that a task keeps whole, as PEFT names them."""
    target = state.tasks[task].target
    return saved_names(target.get("modules_to_save"), target.get("task_type"))


def head_of(model: PeftModel, task: str) -> dict[str, Tensor]:
    """Return copies of a task's `modules_to_save` weights, by name in the base model."""
    return {
        f"{name}.{key}": tensor.detach().cpu().clone()
        for name, wrapper in head_wrappers(model).items()
        if task in wrapper.modules_to_save
        for key, tensor in wrapper.modules_to_save[task].state_dict().items()
    }


def updates_of(model: PeftModel, task: str) -> dict[str, LowRankUpdate]:
    """Return a task's updates by module, whatever phase it was trained in; detached, float32, on the CPU."""
    updates = {}
    for module, layer in share_layers(model).items():
        if layer.has_task(task):
            factors = layer.factors(task)
            updates[module] = LowRankUpdate(factors.out_factor.detach().cpu(), factors.in_factor.detach().cpu())
    return updates


def coefficients_of(model: PeftModel, task: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return a task's coefficients (k_out, p), (k_in, p) by module; detached, on the CPU."""
    return {
        module: (layer.share_coefficients_out[task].detach().cpu(), layer.share_coefficients_in[task].detach().cpu())
        for module, layer in share_layers(model).items()
        if task in layer.share_coefficients_out
    }


def state_of(model: PeftModel) -> SubspaceState:
    """Return the subspace that a model holds: its bases and the tasks with an update, which count as just learned."""
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
    infos = {task: TaskInfo(target=target_of(model, task), head=head_of(model, task)) for task in tasks}
    return replace(state, layers=stored, tasks=infos, layouts=layouts_of(model))


def target_of(model: PeftModel, task: str) -> dict[str, Any]:
    """Return the modules, and the class of the model, that an adapter targets, as JSON."""
    config = model.peft_config[task]
    target = {name: value for name in TARGET_FIELDS if (value := getattr(config, name, None)) is not None}
    for name, value in target.items():
        if isinstance(value, (set, list)):
            # PEFT adds the classifier to `modules_to_save` again with every adapter that uses the configuration.
            target[name] = sorted(value) if isinstance(value, set) else list(dict.fromkeys(value))
    if isinstance(modules := target.get("target_modules"), list):
        target["target_modules"] = targets_beside(modules, target.get("modules_to_save", []))
    if "task_type" not in target and (of_class := mapping_to(type(model.get_base_model()))) is not None:
        target[AUTO_MAPPING] = of_class
    return target


def _has_update(layer: ShareLayer, task: str) -> bool:
    return bool(layer.share_coefficients_out[task].any() and layer.share_coefficients_in[task].any())


def is_share_model(model: object) -> TypeGuard[PeftModel]:
    return isinstance(model, PeftModel) and isinstance(model.base_model, ShareModel)
