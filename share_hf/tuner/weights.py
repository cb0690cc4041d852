"""Weights of an adapter's file, checked against what the adapter's phase allows, before a model is changed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..format.basis_file import SUBSPACE_FILE
from ..format.coefficients import rank_of_coefficients, with_plain_coefficients
from ..format.embeddings import embedding_of
from ..format.files import expect_tensor, read_pickled_tensors, read_tensors
from ..format.index import ModuleEntry, TreeIndex
from ..format.lora import PEFT_PREFIX, check_head_names
from ..format.saved_modules import saved_module_of, saved_names
from ..format.task_files import FINGERPRINT
from ..state import Phase
from ..subspace import rank_in_layer
from .config import ShareConfig


_COEFFICIENTS = {"share_coefficients_out", "share_coefficients_in"}
_TEMPORARY = {"share_temporary_out", "share_temporary_in"}

# Tensors that an adapter may have in a module. Without a basis, the adapt phase trains free factors as init does.
_PARTS = {
    Phase.COEFFICIENTS: _COEFFICIENTS | {FINGERPRINT},
    Phase.ADAPT: _COEFFICIENTS | _TEMPORARY,
    Phase.INIT: _TEMPORARY,
}

# Name parts that PEFT inserts for further copies if the vocabulary was resized and embeddings are kept whole as well.
_COPY = re.compile(r"(?<=\.)(?:modules_to_save|original_module)\.(?=[^.]+$)")


@dataclass(frozen=True)
class CheckedWeights:
    """The weights of an adapter, checked by name and shape.

    Args:
        tensors: Tensors by name in the file.
        adapted: Modules that it has coefficients or temporary factors for.
        head: Shapes of its `modules_to_save` weights, by name in the base model.
        embeddings: Shapes of the base model's embeddings that PEFT saved with it, by name in the base model.
        fingerprints: Fingerprints by module.
    """

    tensors: dict[str, Tensor]
    adapted: set[str] = field(default_factory=set)
    head: dict[str, tuple[int, ...]] = field(default_factory=dict)
    embeddings: dict[str, tuple[int, ...]] = field(default_factory=dict)
    fingerprints: dict[str, Tensor] = field(default_factory=dict)


def check_weights(
    path: Path,
    config: ShareConfig,
    modules: Mapping[str, ModuleEntry],
    index: TreeIndex | None,
    *,
    is_own: bool,
) -> CheckedWeights:
    """Check every weight of an adapter, because any weight whose name the model has would be loaded into the model.

    Args:
        path: File of the weights.
        config: Configuration of the adapter.
        modules: Shapes of the layers and bases of its subspace.
        index: Index of the folder; None if there is none.
        is_own: Whether this is a checkpoint in the user's own folder, whose embeddings may go into the base model.

    Raises:
        ValueError: If a weight belongs neither to the adapter's phase nor to its `modules_to_save`. Names the weight.
    """
    of_tree = index is not None and index.is_tree
    if of_tree and config.phase != Phase.COEFFICIENTS:
        raise ValueError(f"{path.parent}: phase is {config.phase!r}, expected 'coefficients' for a task of a tree")
    tensors = read_tensors(path) if path.suffix == ".safetensors" else read_pickled_tensors(path)
    if of_tree:
        tensors = with_plain_coefficients(path, tensors, index.settings.coefficient_dtype)
    weights, saved = CheckedWeights(tensors), saved_names(config.modules_to_save, config.task_type)
    if not of_tree:  # the model may have been cast by its user before it was saved
        tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    for name, tensor in tensors.items():
        plain = name.removeprefix(PEFT_PREFIX)
        module, _, part = plain.rpartition(".")
        in_base = _COPY.sub("", plain)
        if is_own and embedding_of(in_base) is not None and f"{PEFT_PREFIX}{in_base}" in tensors:
            if in_base == plain:
                kept = weights.embeddings if saved_module_of(plain, saved) is None else weights.head
                kept[plain.replace(".base_layer.", ".")] = tuple(tensor.shape)
        elif not part.startswith("share_"):
            weights.head[name.removeprefix(PEFT_PREFIX)] = tuple(tensor.shape)
        elif module not in modules:
            raise ValueError(f"{path}: {name!r} belongs to none of the {len(modules)} modules of {SUBSPACE_FILE}")
        else:
            _check_part(path, tensors, name, part, modules[module], config)
            if part == FINGERPRINT:
                weights.fingerprints[module] = tensor
            else:
                weights.adapted.add(module)
    unmarked = weights.adapted - weights.fingerprints.keys() if config.phase == Phase.COEFFICIENTS else ()
    if unmarked and index is not None and index.has_fingerprints:
        raise ValueError(f"{path}: {sorted(unmarked)[0]!r} has coefficients but no {FINGERPRINT}, expected both")
    check_head_names(path, weights.head, saved)
    return weights


def _check_part(
    path: Path, tensors: Mapping[str, Tensor], name: str, part: str, module: ModuleEntry, config: ShareConfig
) -> None:
    """Check a tensor of a module against what the adapter's phase allows there."""
    if part not in _PARTS[config.phase]:
        raise ValueError(
            f"{path}: {name!r} is unexpected in phase {config.phase.value!r}, expected {sorted(_PARTS[config.phase])}"
        )
    side = 0 if part.endswith("_out") else 1
    shape = tuple(tensors[name].shape)
    if part == FINGERPRINT:
        if shape != (8,):
            raise ValueError(f"{path}: {name!r} has shape {shape}, expected (8,)")
    elif part.startswith("share_temporary"):
        if len(shape) != 2 or shape[0] != module.shape[side]:
            raise ValueError(f"{path}: {name!r} has shape {shape}, expected ({module.shape[side]}, any rank)")
    elif config.phase == Phase.COEFFICIENTS:
        p = rank_in_layer(config.pseudo_rank, module.shape)
        if config.tolerance is not None:
            prefix = name.removesuffix("_out").removesuffix("_in")
            p = rank_of_coefficients(path, tensors, prefix, p)
        expect_tensor(path, tensors, name, (module.num_components[side], p))
