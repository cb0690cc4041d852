"""Features that PEFT offers only for LoRA: refused by name, with advice, before anything has changed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import fields
from types import ModuleType
from typing import Any

import peft
from peft import LoraConfig, PeftConfig, helpers, mixed_model
from peft.tuners.lora import eva
from peft.utils import hotswap, loftq_utils


_WAY = "export the task as a LoRA with SharedSubspace.export_lora and use it with that LoRA"

# Options of LoRA that have another name here, or are not needed.
_INSTEAD = {
    "r": "expected pseudo_rank, the rank of a task's update, and num_components, the size of the basis",
    "lora_dropout": "expected dropout",
    "lora_alpha": "expected none: the coefficients have the scale of an update in them",
    "use_rslora": "expected none: the coefficients have the scale of an update in them",
}

# Functions that take a model or a configuration, and the modules that hold their names.
_FUNCTIONS: Mapping[str, tuple[ModuleType, ...]] = {
    "rescale_adapter_scale": (helpers,),
    "hotswap_adapter": (hotswap,),
    "hotswap_adapter_from_state_dict": (hotswap,),
    "prepare_model_for_compiled_hotswap": (hotswap,),
    "initialize_lora_eva_weights": (eva, peft),
    "replace_lora_weights_loftq": (loftq_utils, peft.utils, peft),
}


def without_options_of_lora(config_class: type[PeftConfig]) -> type[PeftConfig]:
    """Make a configuration class say what to use instead of an option that only LoRA has."""
    original = config_class.__init__

    @functools.wraps(original)
    def __init__(self: PeftConfig, *args: Any, **kwargs: Any) -> None:
        check_options(config_class, kwargs)
        original(self, *args, **kwargs)

    config_class.__init__ = __init__
    return config_class


def check_options(config_class: type[PeftConfig], options: Iterable[str]) -> None:
    """Refuse options that LoRA has and a configuration class does not have.

    Raises:
        TypeError: If there is one. Names it in Python's own words, by which PEFT knows what it may drop from a file.
    """
    of_lora = {field.name for field in fields(LoraConfig)} - {field.name for field in fields(config_class)}
    for name in sorted(of_lora.intersection(options)):
        raise TypeError(
            f"{config_class.__name__} got an unexpected keyword argument {name!r}, an option of LoRA: "
            f"{_INSTEAD.get(name, _WAY)}"
        )


def refuse(name: str) -> None:
    """Refuse the feature of this name.

    Raises:
        ValueError: Always, with advice on how to get the feature.
    """
    raise ValueError(f"{name} works with LoRA only, expected no SHARE adapter: {_WAY}")


def advise_on_functions_of_lora(config_class: type[PeftConfig]) -> None:
    """Make PEFT's functions for LoRA, and its mixed models, refuse models with adapters of this class."""
    for name, modules in _FUNCTIONS.items():
        function = _for_others(getattr(modules[0], name), name, config_class)
        for module in modules:
            setattr(module, name, function)
    mixed_model._check_config_compatible = _for_others(
        mixed_model._check_config_compatible, "PeftMixedModel", config_class
    )


def _for_others(original: Any, name: str, config_class: type[PeftConfig]) -> Any:
    first = next(iter(inspect.signature(original).parameters))

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        subject = args[0] if args else kwargs.get(first)
        configs = getattr(subject, "peft_config", None) or {"": subject}
        if any(isinstance(config, config_class) for config in configs.values()):
            refuse(name)
        return original(*args, **kwargs)

    return function
