"""Tasks as adapters that other tools read: a weighted sum of several, and the key style of diffusers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..state import SubspaceState, of_experts
from ..subspace.combining import weighted_sum
from .files import tensor_bytes
from .lora import LoraAdapter
from .lora_tensors import as_tensors
from .names import listing


DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"

# Names of the models in a pipeline of diffusers, which are the first part of a key there.
COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")

# What a configuration says of how a module stores its weight, and for which class it is.
_KEPT_IF_EQUAL = ("fan_in_fan_out", "task_type")


@dataclass(frozen=True)
class CombinedLora:
    """A weighted sum of tasks as one LoRA.

    Args:
        adapter: The sum, cut to the rank that was asked for.
        error: ``‖sum - adapter‖ / ‖sum‖`` over all layers: what the rank cost.
    """

    adapter: LoraAdapter
    error: float


def check_weights(weights: Mapping[str, float], tasks: tuple[str, ...]) -> None:
    """Refuse weights that make no sum of these tasks.

    Raises:
        ValueError: If there are none, a task is unknown, a weight is no finite number, or all are zero.
    """
    if not weights:
        raise ValueError("weights is empty, expected a weight for at least one task")
    for task, weight in weights.items():
        if task not in tasks:
            raise ValueError(f"no task {task!r} in the subspace, it has {listing(tasks)}")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"the weight of task {task!r} is {weight!r}, expected a finite number")
    if not any(weights.values()):
        raise ValueError(f"all weights of {listing(tuple(weights))} are 0, expected one that is not")


def combined_lora(state: SubspaceState, weights: Mapping[str, float], rank: int | None) -> CombinedLora:
    """The weighted sum of tasks by optimal truncation, layer by layer.

    Args:
        state: Holds the tasks.
        weights: As `check_weights` takes them.
        rank: Largest rank of a layer; the exact sum if not given.

    Raises:
        ValueError: If a task has a head of its own, which has no sum, or the rank is no positive integer.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank is {rank!r}, expected a positive integer")
    for task in weights:
        if head := state.tasks[task].head:
            raise ValueError(
                f"task {task!r} has weights of its own for {listing(tuple(head))}, which have no sum: expected tasks "
                "without modules_to_save, or one task alone"
            )
    updates, energy, lost = {}, 0.0, 0.0
    for module, layer in state.layers.items():
        if any(map(layer.has, weights)):
            updates[module], norm, error = weighted_sum(layer, weights, rank)
            energy, lost = energy + norm**2, lost + error**2
    targets = [state.tasks[task].target for task in weights]
    layouts = {module: layout for module, layout in state.layouts.items() if module in updates}
    # Experts have no layer of their own: `lora_files` names their parameters.
    target: dict[str, Any] = {"target_modules": sorted(updates.keys() - of_experts(layouts))}
    for name in _KEPT_IF_EQUAL:
        values = {of_task.get(name) for of_task in targets}
        if len(values) == 1 and (value := values.pop()) is not None:
            target[name] = value
    adapter = LoraAdapter(
        updates,
        target=target,
        base_model_name_or_path=state.base_model_name_or_path,
        layouts=layouts,
    )
    return CombinedLora(adapter, (lost / energy) ** 0.5 if energy else 0.0)


def diffusers_files(adapter: LoraAdapter, component: str | None = None) -> dict[str, bytes]:
    """The file of an adapter as the pipelines of diffusers load it, of scale 1.

    A key is `<component>.<module>.lora_A.weight`. All have one rank, the largest of the modules'; zeros fill up
    smaller ones: where a file names no alpha, earlier versions of diffusers take the first rank for that of all.

    Args:
        adapter: Without a head.
        component: The model of the pipeline that the modules belong to, such as `"unet"`; not given where the modules
            are named by it already.

    Raises:
        ValueError: If it is not known to which model a module belongs, it is no dense layer or convolution, or the
            adapter has a head.
    """
    if adapter.head:
        raise ValueError(
            f"the task has weights of its own for {listing(tuple(adapter.head))}, which diffusers has no key for: "
            "expected a task without modules_to_save"
        )
    if component is not None and component not in COMPONENTS:
        raise ValueError(f"component is {component!r}, expected one of {list(COMPONENTS)}")
    rank = max((update.out_factor.shape[1] for update in adapter.updates.values()), default=1)
    tensors = {}
    for module, update in adapter.updates.items():
        layout = adapter.layouts.get(module)
        if layout is not None and layout.kind != "convolution":
            raise ValueError(f"{module!r} is an {layout.kind}, which diffusers has no key for")
        tensors |= as_tensors(_in_pipeline(module, component), update, layout, rank)
    return {DIFFUSERS_WEIGHTS: tensor_bytes({name: tensor.to(torch.float32) for name, tensor in tensors.items()})}


def _in_pipeline(module: str, component: str | None) -> str:
    if component is not None:
        return module if module.startswith(f"{component}.") else f"{component}.{module}"
    if module.split(".")[0] not in COMPONENTS:
        raise ValueError(
            f"{module!r} may be a module of any model of a pipeline, expected component= (share-hf: --component) to "
            f"be one of {list(COMPONENTS)}"
        )
    return module
