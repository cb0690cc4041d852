"""Whole embeddings that PEFT saves with a plain LoRA: kept unless the base model has the same ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ..state import Layout
from ..subspace import LowRankUpdate
from .names import HUB_ID
from .saved_modules import EMBEDDINGS


logger = logging.get_logger(__name__)


def embedding_of(name: str) -> tuple[str, str] | None:
    """Return the module and parameter that an adapter's tensor copies, or None if it is not one of an embedding.

    Args:
        name: Name of the tensor in the base model, with `base_layer` in it if the embedding is adapted.
    """
    module, _, leaf = name.rpartition(".")
    module = module.removesuffix(".base_layer")
    return (module, leaf) if leaf in ("weight", "bias") and module.split(".")[-1] in EMBEDDINGS else None


def changed_embeddings(
    embeddings: Mapping[str, Mapping[str, Tensor]], base_model: str | None
) -> dict[str, Mapping[str, Tensor]]:
    """Return the embeddings that differ from those of the base model.

    Args:
        embeddings: Tensors by module of the base model and by name.
        base_model: Folder or Hub id of the base model. Nothing is downloaded: without its files, all are kept.
    """
    changed = {}
    for module, tensors in embeddings.items():
        originals = {leaf: _original(base_model, module, leaf) for leaf in tensors}
        if not all(_equal(tensor, originals[leaf]) for leaf, tensor in tensors.items()):
            changed[module] = tensors
        if any(original is None for original in originals.values()):
            logger.warning_once(
                f"The weights of {base_model} are neither in a folder nor in the cache. Embeddings that adapters "
                "bring cannot be compared with the model's own, and are kept whole with each task. To leave out "
                "copies, download the model first."
            )
    return changed


def with_update(
    module: str, tensors: Mapping[str, Tensor], update: LowRankUpdate | None, layout: Layout | None
) -> dict[str, Tensor]:
    """Return the tensors of an embedding or head by name in the base model, with an update added to the weight."""
    kept = {f"{module}.{leaf}": tensor for leaf, tensor in tensors.items()}
    if update is not None:
        weight = f"{module}.weight"
        kept[weight] = kept[weight].float() + (update.dense() if layout is None else update.dense().T)
    return kept


def _equal(tensor: Tensor, original: Tensor | None) -> bool:
    """Return whether a tensor is the original, as it is or cast to another type."""
    return original is not None and torch.equal(original.to(tensor.dtype), tensor)


def _original(base_model: str | None, module: str, leaf: str) -> Tensor | None:
    """Return a tensor of an embedding from the base model's files; if tied, from the embedding it is tied to."""
    files = dict(_tensor_files(base_model)) if base_model else {}
    kind = module.split(".")[-1]
    found = {name for name in files if name.endswith(f".{leaf}") and name.split(".")[-2] == kind}
    if not found and kind == "lm_head" and leaf == "weight":
        found = {name for name in files if name.endswith(".weight") and name.split(".")[-2] in EMBEDDINGS}
    exact = {name for name in found if f".{module}.{leaf}".endswith(f".{name}") or name.endswith(f"{module}.{leaf}")}
    names = sorted(exact or found)
    if len(names) != 1:
        return None
    try:
        with safe_open(files[names[0]], framework="pt") as file:
            return file.get_tensor(names[0])
    except (SafetensorError, OSError):
        return None


def _tensor_files(base_model: str) -> Iterator[tuple[str, Path]]:
    """Yield the name of each tensor of the base model with the local file that holds it."""
    try:
        if (index := _at_hand(base_model, SAFE_WEIGHTS_INDEX_NAME)) is not None:
            for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
                if (path := _at_hand(base_model, file)) is not None:
                    yield name, path
        elif (path := _at_hand(base_model, SAFE_WEIGHTS_NAME)) is not None:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
            yield from ((name, path) for name in names)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # whatever is wrong with the files of the base model, its loader has to report it


def _at_hand(base_model: str, name: str) -> Path | None:
    if (path := Path(base_model, name)).is_file():
        return path
    cached = try_to_load_from_cache(base_model, name) if HUB_ID.fullmatch(base_model) else None
    return Path(cached) if isinstance(cached, str) else None
