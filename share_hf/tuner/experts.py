"""Experts that a model keeps in one parameter, each of which has an update in a shared subspace of its own."""

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
    One of the experts in a parameter (experts, n, d), or (experts, d, n) if the module has `is_transposed` set.

    It has everything that a dense layer has except a forward: `Experts` computes all experts of a parameter together.
    """

    base_layer: ExpertWeight

    def get_base_weight(self) -> Tensor:
        return self.base_layer.weight.data

    def set_base_weight(self, weight_data: Tensor) -> None:
        self.base_layer.weight.data.copy_(weight_data)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # PEFT converts layers to LoRA, and an expert is not a layer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError("an expert has no forward of its own, the module that holds it computes all of them")


class Experts(nn.Module):
    """
    A module that holds the parameters of experts, computed with the experts' updates applied.

    It has a list of `Expert` for each adapted parameter, under the parameter's name. Like PEFT's LoRA, a forward adds
    the updates of all experts to the parameter for the duration of the call. What the module does with the parameter
    does not matter.

    Args:
        base_layer: Module that holds the parameters.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.is_transposed = bool(getattr(base_layer, "is_transposed", False))

    def lists(self) -> dict[str, nn.ModuleList]:
        """The experts, by the name of their parameter."""
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
        """Return the parameter with a task's update added to each expert that the task adapts."""
        factors = {
            number: expert.folded_factors(task, parameter.dtype)
            for number, expert in enumerate(experts)
            if expert.has_task(task)
        }
        if not factors:
            return parameter
        absent = tuple(map(torch.zeros_like, next(iter(factors.values()))))
        downs, ups = zip(*(factors.get(number, absent) for number in range(len(experts))), strict=True)
        rank = max(map(len, downs))  # experts may differ in rank
        down = torch.stack([F.pad(each, (0, 0, 0, rank - len(each))) for each in downs])
        up = torch.stack([F.pad(each, (0, rank - each.shape[1])) for each in ups])
        left, right = (down.mT, up.mT) if self.is_transposed else (up, down)
        with without_autocast(parameter.device):
            return torch.baddbmm(parameter, left, right)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the module as it was, or with the adapters merged into its parameters. Called by PEFT."""
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
        parent: Parent of the module that holds the parameter.
        name: Name of that module in its parent; "base_layer" if an `Experts` holds it already.
        adapter_name: Name of the task.
        config: Configuration of the task.
        parameter: Name of the parameter.
        adapt: Function that makes an expert from a number and a weight, or adds the task to an existing expert.

    Raises:
        ValueError: If inputs are to be dropped, because the inputs of an expert are not available separately.
    """
    if config.dropout:
        raise ValueError(
            f"dropout is {config.dropout} for {parameter!r}, expected 0: the inputs of experts in one parameter are "
            "not known separately"
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
    """Shorten the `target_parameters` of a stored adapter, each of which PEFT compares with each parameter of a model.

    Args:
        targets: Targets in the adapter's configuration.
        adapted: Modules that the adapter has coefficients for.

    Returns:
        The same targets, or the names of the adapter's parameters with experts if there are fewer of these.
    """
    if not targets:
        return targets
    parameters = sorted({parameter_of(module) for module in adapted if module.rpartition(".")[2].isdecimal()})
    return parameters if len(parameters) < len(targets) else targets


def remove_new_layers(model: nn.Module, adapter_name: str, before: Collection[ShareLayer]) -> None:
    """Remove an adapter that could not be added to a model as a whole.

    Args:
        model: Base model, with the layers that were added.
        adapter_name: Name of the adapter.
        before: Layers that were there before. All others are unwrapped.
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
