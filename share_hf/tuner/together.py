"""Several tasks of a model that are trained at once, each on its own samples of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn


if TYPE_CHECKING:
    from .layer import ShareLayer


def check_trained(adapter_names: Iterable[str], tuner: BaseTuner) -> None:
    """Refuse a mixed batch in training mode with tasks that are not trained: their samples would teach nothing.

    Args:
        adapter_names: A task or `"__base__"` for each sample.
        tuner: The tuner of a model, in training mode or not.

    Raises:
        ValueError: Naming the others, and what trains several tasks.
    """
    if tuner.training and (others := sorted(set(adapter_names) - set(tuner.active_adapters))):
        raise ValueError(
            f"adapter_names has {others} in training mode, expected trained tasks, as {tuner.active_adapters} are: "
            "call model.eval() for inference, or learn several tasks by ShareTrainer(..., together=[...])"
        )


def activate_together(tuner: BaseTuner, tasks: list[str], inference_mode: bool) -> None:
    """Make several tasks the active ones of all layers, and train their heads; the head of the first is active.

    Args:
        tuner: The tuner of a model with these tasks.
        tasks: At least two.
        inference_mode: Whether they stay frozen.
    """
    for module in tuner.model.modules():
        if isinstance(module, tuner.tuner_layer_cls):
            module.set_adapter(tasks, inference_mode)
    train_heads(tuner.model, tasks, trained=not inference_mode)
    tuner.active_adapter = tasks


def train_heads(model: nn.Module, tasks: Sequence[str], *, trained: bool) -> None:
    """Set whether the heads of tasks are trained. PEFT has one active head, and turns off that one alone.

    Args:
        model: Has the `modules_to_save` of the tasks, if they have any.
        tasks: The tasks.
        trained: Whether their heads require gradients from now on.
    """
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.set_requires_grad(tasks, trained)


def dropped_inputs(layer: ShareLayer, x: Tensor, adapter_names: Sequence[str]) -> Tensor:
    """Inputs (samples, ...) of a mixed update; in training, those of each sample are dropped as its task says.

    The ids that an embedding looks up are no numbers to drop.

    Args:
        layer: The layer whose update it is.
        x: The inputs.
        adapter_names: A task or `"__base__"` for each sample.
    """
    probabilities = [layer.share_dropout.get(name, 0.0) for name in adapter_names]
    if not layer.training or not any(probabilities) or not x.is_floating_point():
        return x
    if len(set(probabilities)) == 1:
        return F.dropout(x, probabilities[0])
    kept = 1 - torch.tensor(probabilities, device=x.device).view(-1, *[1] * (x.ndim - 1))
    return x * (torch.bernoulli(kept.expand_as(x)) / kept).to(x.dtype)


def trained_by_task(model: nn.Module, tasks: Sequence[str]) -> dict[str, list[nn.Parameter]]:
    """By task, the parameters of it that are trained: coefficients, temporary factors, and modules that it keeps.

    Args:
        model: Has the tasks as adapters.
        tasks: The tasks.
    """
    found: dict[str, list[nn.Parameter]] = {task: [] for task in tasks}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        kept = parts.index("modules_to_save") + 1 if "modules_to_save" in parts else -1
        if parameter.requires_grad and parts[kept] in found:
            found[parts[kept]].append(parameter)
    return found
