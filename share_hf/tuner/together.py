"""Training of several tasks of a model at once, each on its own samples of a batch."""

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
    """Refuse a mixed batch in training mode with untrained tasks, because nothing would be learned from their samples.

    Args:
        adapter_names: Name of a task or `"__base__"` for each sample.
        tuner: Tuner of a model, in training mode or not.

    Raises:
        ValueError: If there are untrained tasks. Names them, and says how to train several tasks.
    """
    if tuner.training and (others := sorted(set(adapter_names) - set(tuner.active_adapters))):
        raise ValueError(
            f"adapter_names has {others} in training mode, expected trained tasks, as {tuner.active_adapters} are: "
            "call model.eval() for inference, or learn several tasks with ShareTrainer(..., together=[...])"
        )


def activate_together(tuner: BaseTuner, tasks: list[str], inference_mode: bool) -> None:
    """Activate several tasks in all layers and train their heads; the first task's head is the active one.

    Args:
        tuner: Tuner of a model with these tasks.
        tasks: Names of the tasks, at least two.
        inference_mode: Whether they stay frozen.
    """
    for module in tuner.model.modules():
        if isinstance(module, tuner.tuner_layer_cls):
            module.set_adapter(tasks, inference_mode)
    train_heads(tuner.model, tasks, trained=not inference_mode)
    tuner.active_adapter = tasks


def train_heads(model: nn.Module, tasks: Sequence[str], *, trained: bool) -> None:
    """Set whether the heads of tasks are trained. PEFT has one active head, and turns off only that one.

    Args:
        model: Model with the `modules_to_save` of the tasks, if they have any.
        tasks: Names of the tasks.
        trained: Whether their heads require gradients from now on.
    """
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.set_requires_grad(tasks, trained)


def dropped_inputs(layer: ShareLayer, x: Tensor, adapter_names: Sequence[str]) -> Tensor:
    """Apply dropout, in training, to the inputs (samples, ...) of a mixed update: for each sample that of its task.

    Ids that an embedding looks up are not numbers, and are not dropped.

    Args:
        layer: Layer that the update belongs to.
        x: Inputs of the layer.
        adapter_names: Name of a task or `"__base__"` for each sample.
    """
    probabilities = [layer.share_dropout.get(name, 0.0) for name in adapter_names]
    if not layer.training or not any(probabilities) or not x.is_floating_point():
        return x
    if len(set(probabilities)) == 1:
        return F.dropout(x, probabilities[0])
    kept = 1 - torch.tensor(probabilities, device=x.device).view(-1, *[1] * (x.ndim - 1))
    return x * (torch.bernoulli(kept.expand_as(x)) / kept).to(x.dtype)


def trained_by_task(model: nn.Module, tasks: Sequence[str]) -> dict[str, list[nn.Parameter]]:
    """Return the trained parameters of each task: coefficients, temporary factors, and modules that it keeps whole.

    Args:
        model: Model that has the tasks as adapters.
        tasks: Names of the tasks.
    """
    found: dict[str, list[nn.Parameter]] = {task: [] for task in tasks}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        kept = parts.index("modules_to_save") + 1 if "modules_to_save" in parts else -1
        if parameter.requires_grad and parts[kept] in found:
            found[parts[kept]].append(parameter)
    return found
