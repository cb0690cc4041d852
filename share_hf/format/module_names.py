"""Names of tensors in the file of an adapter, without what wrapped the model when they were saved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor


PEFT_PREFIX = "base_model.model."

# Parts that torch.compile, FSDP (the last: before torch 2) and activation checkpointing put into the names of modules.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module"}

# What a PeftModel puts before a name, a PeftModel of a PeftModel twice, and DDP or DeepSpeed before that.
_ABOVE_BASE = re.compile(rf"^(?:(?:module\.)*{re.escape(PEFT_PREFIX)})+")

# Names of adapters, which a state dict of the model has and a file that PEFT wrote has not.
_OF_LORA = re.compile(r"(?P<before>.*\.lora_[AB]\.)(?P<adapter>[^.]+)\.(?P<after>weight)")
_OF_LORA_OF_EMBEDDING = re.compile(r"(?P<before>.*\.lora_embedding_[AB])\.(?P<adapter>[^.]+)(?P<after>)")
_OF_HEAD = re.compile(r"(?P<before>(?:.*\.)?)modules_to_save\.(?P<adapter>[^.]+)\.(?P<after>.+)")
_BASE_COPY = re.compile(r"((?:.*\.)?)original_module\.(.+)")

# transformers 5 keeps the experts of a layer in one parameter; those of version 4 were linear layers, one by one.
_EXPERT = re.compile(r"(?:.*\.)?experts\.\d+\..+")

# The adapters of a collection have the same names, a few thousand at most.
_NAMES_KEPT = 2**14


@lru_cache(maxsize=_NAMES_KEPT)
def without_wrappers(name: str) -> str:
    """The name of a module or tensor as it is when the model is not compiled, sharded or checkpointed."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS) if "_" in name else name


@lru_cache(maxsize=_NAMES_KEPT)
def _parsed(key: str) -> tuple[str, str | None, bool]:
    """A tensor's name in the base model, the adapter that it names, and whether it is a copy of the base model's."""
    name = _ABOVE_BASE.sub("", without_wrappers(key))
    if match := _OF_LORA.fullmatch(name) or _OF_LORA_OF_EMBEDDING.fullmatch(name) or _OF_HEAD.fullmatch(name):
        return match["before"] + match["after"], match["adapter"], False
    if match := _BASE_COPY.fullmatch(name):
        return match[1] + match[2], None, True
    return name, None, False


def named_as_in_base(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an adapter by their names in the base model.

    Args:
        path: The file that they are from, for messages.
        tensors: By the names in the file.

    Raises:
        ValueError: If they are of several adapters, or two would have one name.
    """
    named: dict[str, Tensor] = {}
    adapters: set[str] = set()
    copies: set[str] = set()
    for key, tensor in tensors.items():
        name, adapter, is_copy = _parsed(key)
        if adapter is not None:
            adapters.add(adapter)
        if is_copy:
            copies.add(name)
            continue
        if name in named:
            raise ValueError(f"{path}: {key!r} is a second tensor called {name!r}, expected one")
        named[name] = tensor
    if len(adapters) > 1:
        raise ValueError(f"{path}: has weights of the adapters {sorted(adapters)}, expected those of one")
    if lost := sorted(copies - named.keys()):
        raise ValueError(f"{path}: {lost[0]!r} is there as the base model has it only, expected what was trained")
    return named


def check_no_single_experts(path: Path, modules: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuse the expert layers of transformers 4 one by one: no model of transformers 5 has them.

    Args:
        path: The file that they are from.
        modules: By the names of modules that the adapter adapts.
        config: The configuration of the adapter; PEFT notes in it the class of a model that is not transformers' own.

    Raises:
        ValueError: Naming a module.
    """
    of_class = config.get("auto_mapping")
    library = of_class.get("parent_library") if isinstance(of_class, dict) else None
    if isinstance(library, str) and library.partition(".")[0] != "transformers":
        return
    if (expert := next(filter(_EXPERT.fullmatch, modules), None)) is not None:
        raise ValueError(
            f"{path}: adapts {expert!r}, one of the experts that transformers 5 keeps in one parameter, expected an "
            "adapter of linear layers alone"
        )
