"""Options of LoRA that SHARE lacks: refused by name, with advice."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from peft import LoraConfig, PeftConfig


_WAY = "export the task as a LoRA with SharedSubspace.export_lora and use it with that LoRA"

# Options of LoRA that have another name here, or are not needed.
_INSTEAD = {
    "r": "expected pseudo_rank, the rank of a task's update, and num_components, the size of the basis",
    "lora_dropout": "expected dropout",
    "lora_alpha": "expected none: the coefficients have the scale of an update in them",
    "use_rslora": "expected none: the coefficients have the scale of an update in them",
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
