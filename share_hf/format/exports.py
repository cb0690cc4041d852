"""Tasks as adapters for other tools: a weighted sum of several tasks, and the key style of diffusers."""

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

# Names of the models in a pipeline of diffusers. They are the first part of a key there.
COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")

# Fields of a configuration that state how a module stores its weight and for which class the adapter is.
_KEPT_IF_EQUAL = ("fan_in_fan_out", "task_type")


@dataclass(frozen=True)
class CombinedLora:
    """A weighted sum of tasks as one LoRA.

    Args:
        adapter: Sum, truncated to the rank that was asked for.
        error: Relative error ``‖sum - adapter‖ / ‖sum‖`` over all layers, caused by the truncation.
    """

    adapter: LoraAdapter
    error: float


def check_weights(weights: Mapping[str, float], tasks: tuple[str, ...]) -> None:
    """Refuse weights that do not make a sum of these tasks.

    Raises:
        ValueError: If there are no weights, a task is unknown, a weight is not a finite number, or all are zero.
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
    """Return the weighted sum of tasks, optimally truncated layer by layer.

    Args:
        state: Subspace that holds the tasks.
        weights: Weight of each task, as in `check_weights`.
        rank: Largest rank of a layer. None means the exact sum.

    Raises:
        ValueError: If a task has a head of its own, which has no sum, or the rank is not a positive integer.
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
    # Experts are not layers that PEFT could target: `lora_files` names their parameters.
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
    """Return an adapter's file as the pipelines of diffusers load it, with scale 1.

    A key is `<component>.<module>.lora_A.weight`. All modules have one rank, the largest of them, and zeros pad the
    smaller ones: if a file names no alpha, earlier versions of diffusers take the first rank for that of all modules.

    Args:
        adapter: Adapter without a head.
        component: Model of the pipeline to which the modules belong, such as `"unet"`. None means that the names of
            the modules start with it already.

    Raises:
        ValueError: If the model of a module is unknown, a module is neither a dense layer nor a convolution, or the
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
