"""Heads (`modules_to_save`) in batches in which each sample has its own task."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..format.module_names import without_wrappers
from .rows import BASE, Rows
from .upstream import MIXED_HEADS


class MixedHead(ModulesToSaveWrapper):
    """
    PEFT's wrapper of a module of which each task has a copy, extended to mixed batches.

    PEFT's own wrapper computes a mixed batch only if the active task has a copy, all tasks of the batch have one, and
    the module is a single layer. This one uses the base model's module for tasks without a copy, and supports any
    module that returns one tensor for a batch.
    """

    share_rows: Rows

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        batch = None if self.disable_adapters or "adapter_names" in kwargs else self.share_rows.current()
        if batch is None or not args:
            return super().forward(*args, **kwargs)
        x, *others = args
        places: dict[str, list[int]] = {}
        for place, name in enumerate(batch.names_of(len(x))):
            places.setdefault(name if name in self.modules_to_save else BASE, []).append(place)
        outputs = []
        for name, of_task in places.items():
            module = self.original_module if name == BASE else self.modules_to_save[name]
            output = module(x[torch.tensor(of_task, device=x.device)], *others, **kwargs)
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"{type(module).__name__} returns {type(output).__name__}, expected modules_to_save that return a "
                    "tensor, to mix tasks in a batch"
                )
            outputs.append(output)
        order = torch.tensor([place for of_task in places.values() for place in of_task], device=x.device)
        return torch.cat(outputs)[order.argsort()]


def head_wrappers(model: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """PEFT's wrappers of the modules that tasks keep whole, by the module's name in the base model."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    wrappers = ((name, module) for name, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper))
    return {without_wrappers(name): module for name, module in wrappers}


def mix_heads(model: nn.Module, rows: Rows) -> None:
    """Make PEFT's wrappers of heads in a model support mixed batches."""
    if not MIXED_HEADS.fits():
        return
    for module in model.modules():
        if type(module) is ModulesToSaveWrapper:
            module.__class__ = MixedHead
            module.share_rows = rows
