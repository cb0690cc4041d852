"""Registration with PEFT: of the tuner called SHARE, and of the basis that is saved with a model.

`register` replaces or extends functions of PEFT and transformers. The table in `upstream` says why each one is needed.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Collection, Mapping
from inspect import BoundArguments
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils import infer_device
from transformers import PreTrainedModel

from ..format.coefficients import with_unpacked
from . import upstream
from .config import SHARE, AdapterOrigin, ShareConfig, with_origin
from .loading import (
    advising,
    are_kept,
    fingerprints_of,
    kept_weights,
    load_whole,
    stored_adapter,
)
from .model import ShareModel, basis_files
from .ranks import ranks_of
from .saving import adapters_of, check_no_remote_tree, check_no_tree, check_same_bases, save_bases, stored_bases
from .upstream import Function


def register() -> None:
    """Register SHARE with PEFT. Registering it again changes nothing, and after a reload it takes the new code."""
    upstream.CONFIG_CLASSES.enter(SHARE, ShareConfig)
    upstream.TUNER_CLASSES.enter(SHARE, ShareModel)
    upstream.PREFIXES.enter(SHARE, ShareModel.prefix)
    upstream.LOADED_CONFIGS.replace(_remembering_origins)
    upstream.SAVED_PEFT_MODELS.replace(_saving_bases)
    upstream.SAVED_MODELS.replace(_saving_bases)
    upstream.PUSHED_PEFT_MODELS.replace(_keeping_trees_on_the_hub)
    upstream.PUSHED_MODELS.replace(_keeping_trees_on_the_hub)
    upstream.LOADED_PEFT_MODELS.replace(_loading_bases_with_given_configs)
    upstream.LOADED_ADAPTERS.replace(_loading_bases_with_adapters_that_are_there)
    upstream.LOADED_NATIVE_ADAPTERS.replace(_checking_coefficients)
    upstream.READ_WEIGHTS.replace(_taking_checked_weights)
    upstream.check(upstream.OF_TUNER)


def _remembering_origins(original: Function) -> Function:
    """Make `PeftConfig.from_pretrained` record the place of configurations of SHARE."""

    def from_pretrained(
        cls: type[PeftConfig],
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> PeftConfig:
        options = {**kwargs, "subfolder": subfolder}
        with advising(AdapterOrigin.of(pretrained_model_name_or_path, options)):
            config = original(cls, pretrained_model_name_or_path, **options)
        return with_origin(config, pretrained_model_name_or_path, options)

    return from_pretrained


def _saving_bases(original: Function) -> Function:
    """Make `save_pretrained` write the bases once, at the top of the folder, whatever adapters it saves there.

    It never writes into the tree of a subspace.
    """

    def save_pretrained(self: PeftModel | PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        given = _by_name(inspect.signature(original).bind(self, *args, **kwargs))
        folder, adapters, bases = Path(given["save_directory"]), adapters_of(self), stored_bases(self)
        if adapters:
            check_no_tree(folder)
            if given.get("push_to_hub"):
                check_no_remote_tree(given.get("repo_id") or folder.name, given.get("revision"), given.get("token"))
        if bases and given.get("path_initial_model_for_weight_conversion") is not None:
            raise ValueError(
                "path_initial_model_for_weight_conversion works with LoRA only, expected none for tasks: export a "
                "task as a LoRA with SharedSubspace.export_lora"
            )
        if bases:
            check_same_bases(folder, bases, given.get("selected_adapters") or adapters)
        result = original(self, *args, **kwargs)
        if bases and adapters and given.get("is_main_process", True):
            save_bases(self, folder)
        return result

    return save_pretrained


def _keeping_trees_on_the_hub(original: Function) -> Function:
    """Keep `push_to_hub` of a model with adapters from overwriting a subspace."""

    def push_to_hub(self: PeftModel | PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "peft_config", None):
            given = _by_name(inspect.signature(original).bind(self, *args, **kwargs))
            check_no_remote_tree(given["repo_id"], given.get("revision"), given.get("token"))
        return original(self, *args, **kwargs)

    return push_to_hub


def _loading_bases_with_given_configs(original: Function) -> Function:
    """Make `PeftModel.from_pretrained(config=…)` read the basis from where it reads the coefficients."""

    def from_pretrained(cls: type[PeftModel], *args: Any, **kwargs: Any) -> PeftModel:
        call = inspect.signature(original).bind(cls, *args, **kwargs)
        options, config = call.arguments.get("kwargs", {}), call.arguments.get("config")
        origin = AdapterOrigin.of(call.arguments["model_id"], options)

        def load(location: str) -> PeftModel:
            call.arguments["model_id"] = location
            if isinstance(config, ShareConfig):
                call.arguments["config"] = with_origin(copy.copy(config), location, options)
            return original(*call.args, **call.kwargs)

        with advising(origin):
            return load_whole(origin, load)

    return from_pretrained


def _loading_bases_with_adapters_that_are_there(original: Function) -> Function:
    """Make `PeftModel.load_adapter` read the basis too where it only reads weights: under an existing name."""

    def load_adapter(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(original).bind(self, *args, **kwargs)
        options, adapter_name = call.arguments.get("kwargs", {}), call.arguments["adapter_name"]
        origin = AdapterOrigin.of(call.arguments["model_id"], options)

        def load(location: str) -> Any:
            call.arguments["model_id"] = location
            here = AdapterOrigin.of(location, options)
            # A model that was just made for the adapter already has its basis.
            if isinstance(self.peft_config.get(adapter_name), ShareConfig) and not are_kept(here):
                self.base_model.take_basis(adapter_name, here)
            return original(*call.args, **call.kwargs)

        with advising(origin, beside_tasks=isinstance(self.base_model, ShareModel)):
            return load_whole(origin, load)

    return load_adapter


def _checking_coefficients(original: Function) -> Function:
    """Make transformers' `load_adapter` compare coefficients with the bases and load exactly what was checked."""

    def load_adapter(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(original).bind(self, *args, **kwargs)
        given = _by_name(call)
        weights, config = given.get("adapter_state_dict"), given.get("peft_config")
        if weights is not None:
            if isinstance(config, ShareConfig):
                config = call.arguments["peft_config"] = copy.copy(config)
                config.fingerprints, config.ranks = fingerprints_of(weights), ranks_of(weights)
            return original(*call.args, **call.kwargs)
        load_config = given.get("load_config")
        options = {**(getattr(load_config, "download_kwargs", None) or {}), **given}
        options |= given.get("adapter_kwargs") or {}
        location = given.get("peft_model_id") or getattr(load_config, "pretrained_model_name_or_path", None)
        if location is None:
            return original(*call.args, **call.kwargs)

        def load(place: str) -> Any:
            of_adapter = copy.copy(config) or _config_at(place, options)
            if not isinstance(of_adapter, ShareConfig):
                return original(*call.args, **call.kwargs)
            with_origin(of_adapter, place, options)
            of_adapter.origin = stored = stored_adapter(of_adapter, basis_files(self))
            call.arguments |= {
                "peft_model_id": None,
                "peft_config": of_adapter,
                "adapter_state_dict": dict(stored.weights),
            }
            return original(*call.args, **call.kwargs)

        return load_whole(AdapterOrigin.of(location, options), load)

    return load_adapter


def _config_at(location: str | os.PathLike[str], options: Mapping[str, Any]) -> PeftConfig | None:
    """Return the configuration of an adapter; None if there is none, of which the loader itself will tell."""
    origin = AdapterOrigin.of(location, options)
    try:
        return PeftConfig.from_pretrained(origin.location, subfolder=origin.subfolder, **origin.download_options)
    except (ValueError, OSError, KeyError, TypeError):
        return None


def _taking_checked_weights(original: Function) -> Function:
    """Make PEFT load the weights that were read and checked with the basis, rather than read them once more."""

    def load_peft_weights(*args: Any, **kwargs: Any) -> dict[str, Any]:
        given = _by_name(inspect.signature(original).bind(*args, **kwargs))
        kept = kept_weights(AdapterOrigin.of(given["model_id"], given))
        if kept is None:
            return original(*args, **kwargs)
        if given.get("key_mapping"):
            _check_not_renamed(with_unpacked(given["model_id"], original(*args, **kwargs)), kept)
        device = given.get("device") or infer_device()
        return {name: weight.to(device) for name, weight in kept.items()}

    return load_peft_weights


def _check_not_renamed(renamed: Collection[str], stored: Collection[str]) -> None:
    """Refuse a `key_mapping` that renames a task's weights: the modules of its basis keep their stored names."""
    if odd := sorted(set(stored) - set(renamed)):
        raise ValueError(
            f"key_mapping renames {odd[0]!r}, expected a mapping that leaves the weights of a task as they are: the "
            "modules of its basis would have other names"
        )


def _by_name(call: BoundArguments) -> dict[str, Any]:
    """Return the arguments of a call by name, among them those that the function takes as `**kwargs`."""
    given = dict(call.arguments)
    for name, parameter in call.signature.parameters.items():
        if parameter.kind == parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    return given
