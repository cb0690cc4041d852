"""Current names of modules that adapters know by the names of an older version of transformers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TypeVar

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from ..format.module_names import PEFT_PREFIX, without_wrappers
from ..state import SubspaceState
from .loading import StoredAdapter


Value = TypeVar("Value")


def named_as_in(model: nn.Module, state: SubspaceState) -> SubspaceState:
    """Give the modules and heads of a subspace the names that a model has for them, if transformers renamed them.

    Args:
        model: Base model, with or without adapters.
        state: State of the subspace, which is not changed. Whatever the model has no name for keeps its own name.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        return state
    heads = {name.rpartition(".")[0] for info in state.tasks.values() for name in info.head}
    names = {without_wrappers(name) for name, _ in model.named_modules()}
    missing = (state.layers.keys() | heads) - names
    renamed = _current_names(model, missing, names - state.layers.keys()) if missing else {}
    if not renamed:
        return state
    layers = {renamed.get(module, module): layer for module, layer in state.layers.items()}
    tasks = {
        task: replace(info, head={_renamed_weight(name, renamed): weight for name, weight in info.head.items()})
        for task, info in state.tasks.items()
    }
    layouts = {renamed.get(module, module): layout for module, layout in state.layouts.items()}
    return replace(state, layers=dict(sorted(layers.items())), tasks=tasks, layouts=layouts)


def adapter_named_as_in(model: nn.Module, stored: StoredAdapter) -> StoredAdapter:
    """Give the modules, head and weights of an adapter from a file the names of a model. See `named_as_in`."""
    if not isinstance(model, PreTrainedModel) or not stored.weights:
        return stored
    heads = {name.rpartition(".")[0] for name in stored.head or ()}
    names = {without_wrappers(name) for name, _ in model.named_modules()}
    missing = (stored.modules.keys() | heads) - names
    renamed = _current_names(model, missing, names - stored.modules.keys()) if missing else {}
    if not renamed:
        return stored

    def of_modules(values: Mapping[str, Value]) -> dict[str, Value]:
        return {renamed.get(module, module): value for module, value in values.items()}

    weights = {name.removeprefix(PEFT_PREFIX): weight for name, weight in stored.weights.items()}
    return replace(
        stored,
        modules=of_modules(stored.modules),
        bases=of_modules(stored.bases),
        adapted=None if stored.adapted is None else {renamed.get(module, module) for module in stored.adapted},
        fingerprints=of_modules(stored.fingerprints),
        ranks=of_modules(stored.ranks),
        head={_renamed_weight(name, renamed): shape for name, shape in (stored.head or {}).items()},
        weights={f"{PEFT_PREFIX}{_renamed_weight(name, renamed)}": weight for name, weight in weights.items()},
    )


def _current_names(model: PreTrainedModel, modules: Collection[str], free: Collection[str]) -> dict[str, str]:
    """Return the model's name of each module by its old name, leaving out modules that the model has no name for."""
    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    found: dict[str, str] = {}
    for module in sorted(modules):
        weight, _ = rename_source_key(f"{module}.weight", renamings, [])
        found.setdefault(weight.removesuffix(".weight"), module)
    return {module: name for name, module in found.items() if name in free}


def _renamed_weight(name: str, renamed: dict[str, str]) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{renamed.get(module, module)}.{leaf}"
