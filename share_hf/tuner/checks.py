"""Checks that an adapter fits the model that is to take it."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from torch import nn

from ..format.module_names import without_wrappers
from .config import ShareConfig
from .kinds import layer_named
from .loading import StoredAdapter


class TaskConfigs(dict[str, PeftConfig]):
    """The configurations of a model's adapters, by name, which takes those of tasks only.

    PEFT would inject an adapter of another method around the layers of tasks.
    """

    def __setitem__(self, name: str, config: PeftConfig) -> None:
        if not isinstance(config, ShareConfig):
            raise ValueError(
                f"adapter {name!r} is {getattr(config.peft_type, 'value', None)}, expected SHARE beside the tasks "
                "that the model has: delete these first, or make the adapter a task by SharedSubspace.add_adapters; "
                "SharedSubspace.export_lora makes a task a LoRA"
            )
        super().__setitem__(name, config)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, config in dict(*args, **kwargs).items():
            self[name] = config


def check_modules(model: nn.Module, stored: StoredAdapter, *, from_file: bool) -> None:
    """Refuse an adapter that PEFT would load only in part, because PEFT ignores what the model has no place for.

    Raises:
        ValueError: If the model lacks a module of the adapter, or has it inside a compiled module. Names the module.
    """
    modules = {without_wrappers(name): module for name, module in model.named_modules()}
    names = {without_wrappers(name): name for name, _ in model.named_modules()}
    adapted = stored.modules if stored.adapted is None else stored.adapted
    unknown = [] if stored.adapted is None else sorted(set(adapted) - names.keys())
    missing = [name for name in unknown if layer_named(name, modules) is None]
    if missing:
        raise ValueError(
            f"the adapter has coefficients for {missing[0]!r}, which {type(model).__name__} does not have; of "
            f"{len(adapted)} modules {len(missing)} are missing"
        )
    compiled = [names[module] for module in adapted if "_orig_mod" in names.get(module, "")]
    if compiled and from_file:
        raise ValueError(
            f"the model has {compiled[0]!r} inside a compiled module, where PEFT finds no weights: load the adapter "
            "first and then compile, or use SharedSubspace.apply"
        )


def check_has_basis(stored: StoredAdapter, module_name: str) -> None:
    """Refuse a module for which the stored subspace has no basis.

    Raises:
        ValueError: If there is no basis. Names the module.
    """
    if stored.modules and module_name not in stored.modules:
        raise ValueError(f"the stored subspace has no basis for {module_name!r}, it has {len(stored.modules)}")


def check_same_dimensions(config: ShareConfig, name: str, other: ShareConfig, other_name: str) -> None:
    for field in ("num_components", "pseudo_rank"):
        if getattr(other, field) != getattr(config, field):
            raise ValueError(
                f"{field} of {name} is {getattr(config, field)}, expected {getattr(other, field)} as {other_name} "
                "has: they share one subspace"
            )
