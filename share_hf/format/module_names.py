"""Names of tensors in an adapter's file, without the traces of what wrapped the model when it was saved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor


PEFT_PREFIX = "base_model.model."

# Parts that torch.compile, FSDP (the last one: before torch 2) and activation checkpointing add to module names.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module"}

# Prefixes of a PeftModel (a PeftModel of a PeftModel has two), and of DDP or DeepSpeed in front of them.
_ABOVE_BASE = re.compile(rf"^(?:(?:module\.)*{re.escape(PEFT_PREFIX)})+")

# Names of adapters, which are in a model's state dict but not in a file written by PEFT.
_OF_LORA = re.compile(r"(?P<before>.*\.lora_[AB]\.)(?P<adapter>[^.]+)\.(?P<after>weight)")
_OF_LORA_OF_EMBEDDING = re.compile(r"(?P<before>.*\.lora_embedding_[AB])\.(?P<adapter>[^.]+)(?P<after>)")
_OF_HEAD = re.compile(r"(?P<before>(?:.*\.)?)modules_to_save\.(?P<adapter>[^.]+)\.(?P<after>.+)")
_BASE_COPY = re.compile(r"((?:.*\.)?)original_module\.(.+)")

# transformers 5 keeps the experts of a layer in one parameter. In version 4, each was a linear layer.
_EXPERT = re.compile(r"(?:.*\.)?experts\.\d+\..+")

# Number of names to cache. The adapters of a collection share names, a few thousand at most.
_NAMES_KEPT = 2**14


@lru_cache(maxsize=_NAMES_KEPT)
def without_wrappers(name: str) -> str:
    """Return the name that a module or tensor has when the model is not compiled, sharded or checkpointed."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS) if "_" in name else name


@lru_cache(maxsize=_NAMES_KEPT)
def _parsed(key: str) -> tuple[str, str | None, bool]:
    """Return a tensor's name in the base model, the adapter it names, and whether it is a copy of the base model's."""
    name = _ABOVE_BASE.sub("", without_wrappers(key))
    if match := _OF_LORA.fullmatch(name) or _OF_LORA_OF_EMBEDDING.fullmatch(name) or _OF_HEAD.fullmatch(name):
        return match["before"] + match["after"], match["adapter"], False
    if match := _BASE_COPY.fullmatch(name):
        return match[1] + match[2], None, True
    return name, None, False


def named_as_in_base(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an adapter by their names in the base model.

    Args:
        path: File from which they come, for messages.
        tensors: Tensors by their names in the file.

    Raises:
        ValueError: If they belong to several adapters, or two would have the same name, or the file has only the base
            model's copy of a trained tensor.
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
        raise ValueError(f"{path}: has weights of the adapters {sorted(adapters)}, expected those of one adapter")
    if lost := sorted(copies - named.keys()):
        raise ValueError(f"{path}: {lost[0]!r} is there only as the base model has it, expected its trained weights")
    return named


def check_no_single_experts(path: Path, modules: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuse the single expert layers of transformers 4, which no model of transformers 5 has.

    Args:
        path: File from which they come.
        modules: Mapping whose keys are the names of the adapted modules.
        config: Configuration of the adapter. In it, PEFT records the class of a model that is not transformers' own.

    Raises:
        ValueError: If there is such a layer. The message names the module.
    """
    of_class = config.get("auto_mapping")
    library = of_class.get("parent_library") if isinstance(of_class, dict) else None
    if isinstance(library, str) and library.partition(".")[0] != "transformers":
        return
    if (expert := next(filter(_EXPERT.fullmatch, modules), None)) is not None:
        raise ValueError(
            f"{path}: adapts {expert!r}, one of the experts that transformers 5 keeps in one parameter, expected an "
            "adapter of linear layers only"
        )
