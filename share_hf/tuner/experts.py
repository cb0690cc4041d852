"""Experts that a model keeps in one parameter, each with an update in a shared subspace of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..format.experts import parameter_of
from ..subspace.factors import without_autocast
from .config import ShareConfig
from .kinds import ExpertWeight
from .layer import ShareLayer
from .linear import Linear


class Expert(Linear):
    """
    One of the experts in a parameter (experts, n, d), or (experts, d, n) where the module says `is_transposed`.

    It has what a dense layer has but a forward: the experts of a parameter are computed together, by `Experts`.
    """

    base_layer: ExpertWeight

    def get_base_weight(self) -> Tensor:
        return self.base_layer.weight.data

    def set_base_weight(self, weight_data: Tensor) -> None:
        self.base_layer.weight.data.copy_(weight_data)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # PEFT makes a LoRA of layers, of which an expert is none

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError("an expert has no forward of its own, the module that holds it computes all of them")


class Experts(nn.Module):
    """
    The module that holds the parameters of experts, computed with their updates in them.

    It has a list of `Expert` for each adapted parameter, by its name. As PEFT's LoRA does, a forward adds the updates
    of all experts to the parameter, for as long as it takes: what the module does with it is its own affair.

    Args:
        base_layer: The module.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.is_transposed = bool(getattr(base_layer, "is_transposed", False))

    def lists(self) -> dict[str, nn.ModuleList]:
        """The experts by name of their parameter."""
        return {name: child for name, child in self.named_children() if name != "base_layer"}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        updated = {}
        for name, experts in self.lists().items():
            first = experts[0]
            if first.disable_adapters:
                for expert in experts:
                    if expert.merged:
                        expert.unmerge()
            elif not first.merged:
                parameter = getattr(self.base_layer, name)
                for task in first.active_adapters:
                    parameter = self._with_task(parameter, experts, task)
                updated[name] = parameter
        if not updated:
            return self.base_layer(*args, **kwargs)
        return torch.func.functional_call(self.base_layer, updated, args, kwargs)

    def _with_task(self, parameter: Tensor, experts: nn.ModuleList, task: str) -> Tensor:
        """The parameter with the update of a task in each expert that it adapts."""
        factors = {
            number: expert.folded_factors(task, parameter.dtype)
            for number, expert in enumerate(experts)
            if expert.has_task(task)
        }
        if not factors:
            return parameter
        absent = tuple(map(torch.zeros_like, next(iter(factors.values()))))
        downs, ups = zip(*(factors.get(number, absent) for number in range(len(experts))), strict=True)
        rank = max(map(len, downs))  # each expert may have one of its own
        down = torch.stack([F.pad(each, (0, 0, 0, rank - len(each))) for each in downs])
        up = torch.stack([F.pad(each, (0, rank - each.shape[1])) for each in ups])
        left, right = (down.mT, up.mT) if self.is_transposed else (up, down)
        with without_autocast(parameter.device):
            return torch.baddbmm(parameter, left, right)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module as it was, or with the adapters in its parameters; PEFT calls it so."""
        if merge:
            for expert in (expert for experts in self.lists().values() for expert in experts):
                expert.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer


def adapt_experts(
    parent: nn.Module,
    name: str,
    adapter_name: str,
    config: ShareConfig,
    parameter: str,
    adapt: Callable[[int, Expert | ExpertWeight], Expert],
) -> None:
    """Add a task to the experts of a parameter.

    Args:
        parent: The module around the one that holds the parameter.
        name: Its name in there; "base_layer" where it is held by an `Experts` already.
        adapter_name: The task.
        config: Its configuration.
        parameter: Name of the parameter.
        adapt: Makes an expert of a number and a weight, or adds the task to one that is there.

    Raises:
        ValueError: If inputs are to be dropped, as no expert has them apart.
    """
    if config.dropout:
        raise ValueError(
            f"dropout is {config.dropout} for {parameter!r}, expected 0: the inputs of experts in one parameter are "
            "not known apart"
        )
    target = getattr(parent, name)
    around = next((module for module in (target, parent) if isinstance(module, Experts)), None)
    holder = target if around is None else around.base_layer
    there = {} if around is None else around.lists()
    if parameter in there:
        for number, expert in enumerate(there[parameter]):
            adapt(number, expert)
        return
    count = len(getattr(holder, parameter))
    made = nn.ModuleList(adapt(number, ExpertWeight(holder, parameter, number)) for number in range(count))
    made.train(holder.training)
    if around is None:
        around = Experts(holder)
        around.train(holder.training)
        setattr(parent, name, around)
    around.add_module(parameter, made)


def parameters_adapted(targets: Sequence[str] | None, adapted: Collection[str]) -> Sequence[str] | None:
    """The `target_parameters` of a stored adapter: PEFT compares each with each parameter of a model.

    Args:
        targets: As its configuration has them.
        adapted: The modules that it has coefficients for.

    Returns:
        The same, or the names of parameters with experts that it has if those are fewer.
    """
    if not targets:
        return targets
    parameters = sorted({parameter_of(module) for module in adapted if module.rpartition(".")[2].isdecimal()})
    return parameters if len(parameters) < len(targets) else targets


def remove_new_layers(model: nn.Module, adapter_name: str, before: Collection[ShareLayer]) -> None:
    """Take an adapter out of a model that could not be added as a whole.

    Args:
        model: The base model, with what was added.
        adapter_name: The adapter.
        before: The layers that were there before; others are unwrapped.
    """
    for module_name, module in list(model.named_modules()):
        parent_name, _, child_name = module_name.rpartition(".")
        if module in before:
            module.delete_adapter(adapter_name)
        elif isinstance(module, Experts):
            for parameter, experts in module.lists().items():
                if not any(expert in before for expert in experts):
                    delattr(module, parameter)
            if not module.lists():
                setattr(model.get_submodule(parent_name), child_name, module.base_layer)
        elif isinstance(module, ShareLayer) and not isinstance(module, Expert):
            setattr(model.get_submodule(parent_name), child_name, module.base_layer)
