"""Registration with PEFT: of the tuner called SHARE, and of the basis that is saved with a model."""

from __future__ import annotations

import copy
import functools
import inspect
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import peft
from huggingface_hub import constants, hf_hub_download
from peft import PeftConfig, PeftModel, peft_model
from peft import utils as peft_utils
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME, hotswap, infer_device, save_and_load
from torch import nn
from transformers import PreTrainedModel

from ..format.coefficients import with_unpacked
from .config import SHARE, ShareConfig
from .loading import (
    are_kept,
    fingerprints_of,
    in_folder_of_bases,
    kept_weights,
    load_whole,
    origin_of,
    remember_origins,
    stored_adapter,
    with_fingerprints,
)
from .lora_only import advise_on_functions_of_lora, refuse
from .model import ShareModel, basis_files, layouts_of, stored_bases
from .ranks import ranks_of
from .saving import check_no_remote_tree, check_no_tree, check_same_bases, write_bases


def register() -> None:
    """Register SHARE with PEFT. Registering it twice changes nothing."""
    if SHARE in PEFT_TYPE_TO_TUNER_MAPPING:
        return
    PEFT_TYPE_TO_CONFIG_MAPPING[SHARE] = ShareConfig
    PEFT_TYPE_TO_TUNER_MAPPING[SHARE] = ShareModel
    PEFT_TYPE_TO_PREFIX_MAPPING[SHARE] = ShareModel.prefix
    remember_origins()
    _save_basis_with(PeftModel)
    _save_basis_with(PreTrainedModel)
    _keep_trees_on_the_hub(PeftModel)
    _keep_trees_on_the_hub(PreTrainedModel)
    _advise_on_plain_adapters()
    _advise_on_other_methods()
    advise_on_functions_of_lora(ShareConfig)
    _load_bases_with_given_configs()
    _load_bases_with_adapters_that_are_there()
    _check_coefficients_of_transformers()
    _prepare_weights()


def _save_basis_with(model_class: type[PeftModel] | type[PreTrainedModel]) -> None:
    """Make `save_pretrained` write the basis once, at the top of the folder, whatever adapters it saves there.

    It never writes into the tree of a subspace.
    """
    original = model_class.save_pretrained

    @functools.wraps(original)
    def save_pretrained(
        self: PeftModel | PreTrainedModel, save_directory: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> Any:
        call = inspect.signature(original).bind(self, save_directory, *args, **kwargs)
        # Adapters may sit in a part of the model, such as the language model of a multimodal one.
        configs = (module.peft_config for module in self.modules() if getattr(module, "peft_config", None))
        folder, adapters = Path(save_directory), next(configs, {})
        bases = stored_bases(self)
        if adapters:
            check_no_tree(folder)
            if kwargs.get("push_to_hub"):
                check_no_remote_tree(kwargs.get("repo_id") or folder.name, kwargs.get("revision"), kwargs.get("token"))
        if bases and call.arguments.get("path_initial_model_for_weight_conversion") is not None:
            refuse("path_initial_model_for_weight_conversion")
        if bases:
            check_same_bases(folder, bases, call.arguments.get("selected_adapters") or adapters)
        result = original(self, save_directory, *args, **kwargs)
        if bases and adapters and call.arguments.get("is_main_process", True):
            write_bases(folder, bases, layouts_of(self), next(iter(adapters.values())))
        return result

    model_class.save_pretrained = save_pretrained


def _keep_trees_on_the_hub(model_class: type[PeftModel] | type[PreTrainedModel]) -> None:
    """Keep `push_to_hub` of a model with adapters from overwriting a subspace."""
    original = model_class.push_to_hub

    @functools.wraps(original)
    def push_to_hub(self: PeftModel | PreTrainedModel, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "peft_config", None):
            check_no_remote_tree(repo_id, kwargs.get("revision"), kwargs.get("token"))
        return original(self, repo_id, *args, **kwargs)

    model_class.push_to_hub = push_to_hub


def _advise_on_plain_adapters() -> None:
    """Make a model with tasks say how to load a task when it is given a LoRA, such as the root of a subspace."""
    original = PeftModel.add_adapter

    @functools.wraps(original)
    def add_adapter(self: PeftModel, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        if isinstance(self.base_model, ShareModel) and peft_config.peft_type != SHARE:
            raise ValueError(
                f"adapter {adapter_name!r} is {peft_config.peft_type}, expected a task of the subspace that the model "
                "has: the root of a subspace is a plain LoRA, its tasks are at subfolder='tasks/<task>'; other "
                "adapters become tasks with SharedSubspace.add_adapters"
            )
        original(self, adapter_name, peft_config, *args, **kwargs)

    PeftModel.add_adapter = add_adapter


def _advise_on_other_methods() -> None:
    """Make transformers' `add_adapter` and `load_adapter` say that other methods cannot be used beside tasks."""
    original = peft.inject_adapter_in_model

    @functools.wraps(original)
    def inject_adapter_in_model(
        peft_config: PeftConfig, model: nn.Module, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> nn.Module:
        others = getattr(model, "peft_config", {}).values()
        if not isinstance(peft_config, ShareConfig) and any(isinstance(other, ShareConfig) for other in others):
            raise ValueError(
                f"adapter {adapter_name!r} is {peft_config.peft_type.value}, expected SHARE beside the tasks that the "
                "model has: delete these first, or make the adapter a task with SharedSubspace.add_adapters; "
                "SharedSubspace.export_lora makes a task a LoRA"
            )
        return original(peft_config, model, adapter_name, *args, **kwargs)

    for module in (peft, peft.mapping):
        module.inject_adapter_in_model = inject_adapter_in_model


def _load_bases_with_given_configs() -> None:
    """Make `PeftModel.from_pretrained(config=…)` read the basis from where it reads the coefficients."""
    original = PeftModel.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(
        cls: type[PeftModel], model: nn.Module, model_id: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> PeftModel:
        call = inspect.signature(original).bind(cls, model, model_id, *args, **kwargs)
        options, config = call.arguments.get("kwargs", {}), call.arguments.get("config")

        def load(location: str) -> PeftModel:
            call.arguments["model_id"] = location
            if isinstance(config, ShareConfig):
                call.arguments["config"] = copy.copy(config)
                call.arguments["config"].origin = origin_of(location, options)
            return original(*call.args, **call.kwargs)

        return load_whole(origin_of(model_id, options), load)

    PeftModel.from_pretrained = classmethod(from_pretrained)


def _load_bases_with_adapters_that_are_there() -> None:
    """Make `PeftModel.load_adapter` read the basis too where it only reads weights: under an existing name."""
    original = PeftModel.load_adapter

    @functools.wraps(original)
    def load_adapter(
        self: PeftModel, model_id: str | os.PathLike, adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        def load(location: str) -> Any:
            origin = origin_of(location, kwargs)
            # A model that was just made for the adapter already has its basis.
            if isinstance(self.peft_config.get(adapter_name), ShareConfig) and not are_kept(origin):
                self.base_model.take_basis(adapter_name, origin)
            return original(self, location, adapter_name, *args, **kwargs)

        return load_whole(origin_of(model_id, kwargs), load)

    PeftModel.load_adapter = load_adapter


def _check_coefficients_of_transformers() -> None:
    """Make transformers' `load_adapter` compare coefficients with the bases and load exactly what was checked."""
    original = PreTrainedModel.load_adapter

    @functools.wraps(original)
    def load_adapter(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(original).bind(self, *args, **kwargs)
        weights, location = call.arguments.get("adapter_state_dict"), call.arguments.get("peft_model_id")
        config = call.arguments.get("peft_config")
        if weights is not None and isinstance(config, ShareConfig):
            config = call.arguments["peft_config"] = copy.copy(config)
            config.fingerprints, config.ranks = fingerprints_of(weights), ranks_of(weights)
        if weights is not None or location is None:
            return original(*call.args, **call.kwargs)
        options = {**call.arguments.get("kwargs", {}), **(call.arguments.get("adapter_kwargs") or {})}
        origin = origin_of(location, options)
        if not isinstance(config, ShareConfig) and not in_folder_of_bases(origin):
            return original(*call.args, **call.kwargs)

        def load(place: str) -> Any:
            here = origin_of(place, options)
            of_adapter = config or PeftConfig.from_pretrained(place, subfolder=here.subfolder)
            if not isinstance(of_adapter, ShareConfig):
                return original(*call.args, **call.kwargs)
            of_adapter = copy.copy(of_adapter)
            of_adapter.origin = here
            stored = stored_adapter(of_adapter, basis_files(self))
            of_adapter.origin = stored
            call.arguments |= {
                "peft_model_id": None,
                "peft_config": of_adapter,
                "adapter_state_dict": dict(stored.weights),
            }
            return original(*call.args, **call.kwargs)

        return load_whole(origin, load)

    PreTrainedModel.load_adapter = load_adapter


def _prepare_weights() -> None:
    """Make PEFT find weights in a subfolder of a cached repository, and add fingerprints that old files lack.

    Offline, PEFT looks for the subfolder inside the subfolder itself.
    """
    original = save_and_load.load_peft_weights

    @functools.wraps(original)
    def load_peft_weights(model_id: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        origin = origin_of(model_id, kwargs)
        if (kept := kept_weights(origin)) is not None:
            if kwargs.get("key_mapping"):
                _check_not_renamed(with_unpacked(model_id, original(model_id, *args, **kwargs)), kept)
            device = args[0] if args else kwargs.get("device")
            return {name: weight.to(device or infer_device()) for name, weight in kept.items()}
        subfolder = kwargs.get("subfolder")
        if subfolder is not None and constants.HF_HUB_OFFLINE and not Path(model_id).is_dir():
            names = ("revision", "cache_dir", "repo_type")
            options = {name: kwargs.pop(name) for name in names if kwargs.get(name) is not None}
            kwargs.pop("subfolder")
            weights = hf_hub_download(model_id, f"{subfolder}/{SAFETENSORS_WEIGHTS_NAME}", **options)
            model_id = str(Path(weights).parent)
        weights = with_unpacked(model_id, original(model_id, *args, **kwargs))
        if kwargs.get("key_mapping") and any(".share_" in name for name in weights):
            _check_not_renamed(weights, original(model_id, *args, **{**kwargs, "key_mapping": None}))
        return with_fingerprints(weights, origin)

    for module in (save_and_load, peft_model, hotswap, peft_utils, peft):
        module.load_peft_weights = load_peft_weights


def _check_not_renamed(renamed: Collection[str], stored: Collection[str]) -> None:
    """Refuse a `key_mapping` that renames a task's weights: the modules of its basis keep their stored names."""
    if odd := sorted(set(stored) - set(renamed)):
        raise ValueError(
            f"key_mapping renames {odd[0]!r}, expected a mapping that leaves the weights of a task as they are: the "
            "modules of its basis would have other names"
        )
