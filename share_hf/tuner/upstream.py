"""What share_hf replaces in other libraries, and what it relies on there although it is private.

Each entry of the tables below says what does not work without it, and which change of the library would make it
unnecessary. Where a library has changed so that an entry no longer fits, share_hf leaves the function alone and warns
of what does not work. `tests/tuner/test_upstream.py` fails if share_hf replaces a function of PEFT, transformers or
accelerate that is not listed, and if an entry is no longer needed.
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeAlias

from transformers.utils import logging


logger = logging.get_logger(__name__)

Function: TypeAlias = Callable[..., Any]

_MARK = "__share_hf__"  # attribute of a function that share_hf put in the place of another


@dataclass(frozen=True)
class Upstream:
    """
    A function, mapping or attribute of another library.

    Args:
        owner: Module or class that has it, as `pkgutil.resolve_name` takes it.
        name: Its name there.
        parameters: Parameters of the function that share_hf relies on.
        without: What does not work if it is missing, or lacks one of these parameters.
        until: Change of the library that would make the entry unnecessary.
    """

    owner: str
    name: str
    parameters: tuple[str, ...]
    without: str
    until: str

    @property
    def label(self) -> str:
        """Name to show, for example `peft.PeftModel.save_pretrained`."""
        return f"{self.owner.replace(':', '.')}.{self.name}"

    def fits(self) -> bool:
        """Return whether share_hf can use it as it does. If not, warn once of what does not work."""
        problem = self._problem()
        if problem is not None:
            library = self.label.partition(".")[0]
            version = getattr(sys.modules.get(library), "__version__", "of this version")
            logger.warning_once(
                f"{self.label} {problem} in {library} {version}, so {self.without}. "
                "Nothing else is affected; a newer share_hf may support this version."
            )
        return problem is None

    def replace(self, make: Callable[[Function], Function]) -> None:
        """Put another function in the place of this one, if it fits. A repetition replaces what the first one put.

        Args:
            make: Function that returns the new function for the original one.
        """
        if not self.fits():
            return
        holder = pkgutil.resolve_name(self.owner)
        found = inspect.getattr_static(holder, self.name)
        original = _plain(found)
        replaced = getattr(original, _MARK, None)  # also if others have wrapped it by functools.wraps since
        if replaced is not None:
            replaced.function = make(replaced.original)
            return
        current = SimpleNamespace(original=original, function=make(original))

        @functools.wraps(original)
        def function(*args: Any, **kwargs: Any) -> Any:
            return current.function(*args, **kwargs)

        setattr(function, _MARK, current)
        setattr(holder, self.name, classmethod(function) if isinstance(found, classmethod) else function)

    def enter(self, key: str, value: Any) -> None:
        """Add an entry to this mapping, if there is one, or replace the entry."""
        if self.fits():
            getattr(pkgutil.resolve_name(self.owner), self.name)[key] = value

    def _problem(self) -> str | None:
        try:
            found = _plain(inspect.getattr_static(pkgutil.resolve_name(self.owner), self.name))
        except (ImportError, AttributeError):
            return "is missing"
        try:
            known = inspect.signature(found).parameters if self.parameters else {}
        except (TypeError, ValueError):
            return "is no function with a signature"
        missing = [name for name in self.parameters if name not in known]
        return f"has no parameter {missing[0]!r}" if missing else None


def original_of(function: Function) -> Function | None:
    """Return the function in whose place share_hf put this one; None if it did not."""
    replaced = getattr(function, _MARK, None)
    return None if replaced is None else replaced.original


def check(entries: Iterable[Upstream]) -> None:
    """Warn of what does not work, by the entries that do not fit."""
    for entry in entries:
        entry.fits()


def _plain(found: Any) -> Any:
    return found.__func__ if isinstance(found, (classmethod, staticmethod)) else found


# ---- Replaced or extended when share_hf is imported -----------------------------------------------------------------

_REGISTERED = {
    "without": "PEFT does not know SHARE, and get_peft_model and its loaders refuse a ShareConfig",
    "until": "peft.utils.register_peft_method takes the name of a method that PeftType does not have",
}
CONFIG_CLASSES = Upstream("peft.mapping", "PEFT_TYPE_TO_CONFIG_MAPPING", (), **_REGISTERED)
TUNER_CLASSES = Upstream("peft.mapping", "PEFT_TYPE_TO_TUNER_MAPPING", (), **_REGISTERED)
PREFIXES = Upstream("peft.mapping", "PEFT_TYPE_TO_PREFIX_MAPPING", (), **_REGISTERED)

LOADED_CONFIGS = Upstream(
    "peft.config:PeftConfigMixin",
    "from_pretrained",
    ("pretrained_model_name_or_path", "subfolder"),
    without="PeftConfig.from_pretrained returns configurations that do not know their basis; "
    "ShareConfig.from_pretrained and the loaders of models do",
    until="PeftConfig.from_pretrained calls from_pretrained of the class that the file names",
)
SAVED_PEFT_MODELS = Upstream(
    "peft:PeftModel",
    "save_pretrained",
    ("save_directory",),
    without="save_pretrained of a PeftModel writes no bases, which share_hf.tuner.save_bases(model, folder) writes, "
    "and may write over a subspace",
    until="PeftModel.save_pretrained calls methods of the tuner with the folder before and after it writes",
)
SAVED_MODELS = Upstream(
    "transformers:PreTrainedModel",
    "save_pretrained",
    ("save_directory",),
    without="save_pretrained of a model of transformers writes no bases, which share_hf.tuner.save_bases(model, "
    "folder) writes, and may write over a subspace",
    until="PreTrainedModel.save_pretrained calls PEFT with the folder before and after it writes adapters",
)
PUSHED_PEFT_MODELS = Upstream(
    "peft:PeftModel",
    "push_to_hub",
    ("repo_id",),
    without="push_to_hub of a PeftModel may write over a subspace",
    until="PeftModel.push_to_hub calls a method of the tuner with the repository before it writes",
)
PUSHED_MODELS = Upstream(
    "transformers:PreTrainedModel",
    "push_to_hub",
    ("repo_id",),
    without="push_to_hub of a model of transformers with adapters may write over a subspace",
    until="PreTrainedModel.push_to_hub calls PEFT with the repository before it writes adapters",
)
LOADED_PEFT_MODELS = Upstream(
    "peft:PeftModel",
    "from_pretrained",
    ("model_id", "config", "kwargs"),
    without="PeftModel.from_pretrained finds no basis for a given config, and may fail while the folder is replaced",
    until="PeftModel.from_pretrained tells a given configuration where its weights are, and reads one version of a "
    "folder",
)
LOADED_ADAPTERS = Upstream(
    "peft:PeftModel",
    "load_adapter",
    ("model_id", "adapter_name", "kwargs"),
    without="PeftModel.load_adapter brings no other basis to an adapter that is there, and may fail while the folder "
    "is replaced",
    until="PeftModel.load_adapter calls a method of the tuner before it loads weights into an adapter that is there, "
    "and reads one version of a folder",
)
LOADED_NATIVE_ADAPTERS = Upstream(
    "transformers:PreTrainedModel",
    "load_adapter",
    ("peft_model_id", "peft_config", "adapter_state_dict", "local_files_only", "adapter_kwargs", "load_config"),
    without="load_adapter of a model of transformers neither reads coefficients of 4 bits nor compares weights in "
    "memory with the basis",
    until="PreTrainedModel.load_adapter loads weights by peft.set_peft_model_state_dict",
)
READ_WEIGHTS = Upstream(
    "peft.peft_model",
    "load_peft_weights",
    ("model_id", "device", "key_mapping"),
    without="PEFT reads weights a second time after they were checked, and finds none in a subfolder of a repository "
    "without a network",
    until="PeftModel.load_adapter takes the weights from the tuner if this has read them",
)
REPLACED = (
    *(CONFIG_CLASSES, TUNER_CLASSES, PREFIXES, LOADED_CONFIGS),
    *(SAVED_PEFT_MODELS, SAVED_MODELS, PUSHED_PEFT_MODELS, PUSHED_MODELS),
    *(LOADED_PEFT_MODELS, LOADED_ADAPTERS, LOADED_NATIVE_ADAPTERS, READ_WEIGHTS),
)

# ---- Extended in the models that have tasks -------------------------------------------------------------------------

MIXED_HEADS = Upstream(
    "peft.utils:ModulesToSaveWrapper",
    "forward",
    (),
    without="a batch cannot mix tasks of which one has no head of its own",
    until="ModulesToSaveWrapper uses the original module for adapters without a copy of it",
)

# ---- Private, and overridden or used --------------------------------------------------------------------------------

_TUNER = functools.partial(
    Upstream,
    "peft.tuners.tuners_utils:BaseTuner",
    until="PEFT declares the methods that a tuner overrides as public",
)
_LAYER = functools.partial(
    Upstream,
    "peft.tuners.tuners_utils:BaseTunerLayer",
    until="PEFT declares the methods that the layers of a tuner override or use as public",
)
OF_TUNER = (
    _TUNER("_check_new_adapter_config", ("config",), "adapters of other methods are not refused beside tasks"),
    _TUNER("_prepare_model", ("peft_config", "model"), "adapters are not loaded with their bases"),
    _TUNER("_check_target_module_exists", ("peft_config", "key"), "stored tasks may adapt other modules than before"),
    _TUNER("_check_target_module_compatiblity", ("target_name",), "layers that take no update may be adapted"),
    _TUNER(
        "_create_and_replace",
        ("peft_config", "adapter_name", "target", "target_name", "parent", "current_key", "parameter_name"),
        "layers cannot be adapted",
    ),
    _TUNER("_replace_module", ("parent", "child_name", "new_module", "child"), "offloaded layers cannot be adapted"),
    _TUNER("_cast_adapter_dtype", ("adapter_name", "autocast_adapter_dtype"), "autocast_adapter_dtype has no effect"),
    _TUNER(
        "_get_adapter_state_dict",
        ("model", "adapter_name"),
        "adapters saved under FSDP may not name their basis",
    ),
    _TUNER(
        "_remap_adapter_state_dict_for_load",
        ("model", "config", "adapter_name", "state_dict"),
        "state dicts with coefficients of 4 bits cannot be loaded",
    ),
    _TUNER("_check_merge_allowed", (), "tasks may be merged into layers that share their weight"),
    _TUNER(
        "_unload_and_optionally_merge",
        ("merge", "progressbar", "safe_merge", "adapter_names"),
        "merge_and_unload(safe_merge=True) may leave a model half merged",
    ),
    _LAYER("_move_adapter_to_device_of_base_layer", ("adapter_name", "device"), "tasks stay on their first device"),
    _LAYER("_get_base_layer_device_and_dtype", ("base_layer",), "layers cannot be adapted"),
    _LAYER("_get_embed_scale", (), "embeddings cannot be adapted"),
    _LAYER("_disable_adapters", (), "features for routing may include the updates of tasks"),
    _LAYER("_active_adapter", (), "the active task may not be computed"),
    Upstream(
        "peft.tuners.tuners_utils",
        "_get_in_out_features",
        ("module",),
        without="layers cannot be adapted",
        until="PEFT declares the function as public",
    ),
    Upstream(
        "peft:PeftModel",
        "_enable_peft_forward_hooks",
        (),
        without="adapter_names has no effect, so that batches cannot mix tasks",
        until="PEFT declares the method that prepares a tuner for a call as public",
    ),
    Upstream(
        "transformers:PreTrainedModel",
        "_no_split_modules",
        (),
        without="FSDP does not find the layers of a model",
        until="transformers declares the attribute as public",
    ),
)

_TRAINER = functools.partial(
    Upstream,
    "transformers:Trainer",
    until="transformers declares the method as public, or offers a callback in its place",
)
OF_TRAINER = (
    _TRAINER("_remove_unused_columns", ("dataset", "description"), "columns that a transform reads are removed"),
    _TRAINER(
        "_get_collator_with_removed_columns", ("data_collator", "description"), "tasks cannot be trained together"
    ),
    _TRAINER("_get_train_sampler", ("train_dataset",), "tasks cannot be trained together"),
    _TRAINER("_clip_grad_norm", ("model",), "gradients of tasks trained together are not clipped one by one"),
    _TRAINER("_get_grad_norm", ("model", "grad_norm"), "gradients of tasks trained together are not scaled"),
    _TRAINER("_load_from_checkpoint", ("resume_from_checkpoint",), "tasks trained together cannot be resumed"),
    _TRAINER("_load_best_model", (), "the best checkpoint may be loaded into parts of an adapter"),
    _TRAINER("_save_checkpoint", ("model", "trial"), "errors in writing a checkpoint do not name it"),
    _TRAINER("_save_rng_state", ("output_dir",), "a checkpoint of several processes may be taken for whole too early"),
)

# Attributes that the libraries set on instances, so that nothing can be checked when share_hf is imported.
_ATTRIBUTE = functools.partial(Upstream, parameters=(), until="the library declares the attribute as public")
OF_INSTANCES = (
    _ATTRIBUTE("transformers:Trainer", "_loss_shifts_labels", without="tasks cannot be trained together"),
    _ATTRIBUTE(
        "transformers:Trainer",
        "_eval_dataloaders",
        without="persistent workers evaluate every phase on the data of the first one",
    ),
    _ATTRIBUTE(
        "accelerate:Accelerator", "_models", without="accelerate's save_state saves a model once for each phase"
    ),
    _ATTRIBUTE("torch.nn:Module", "_is_accelerate_prepared", without="a model is not prepared for a second phase"),
    _ATTRIBUTE("torch.nn:Module", "_hf_hook", without="layers that accelerate offloads cannot be adapted"),
    _ATTRIBUTE(
        "torch:Tensor", "_is_hf_initialized", without="modules that the checkpoint of a model lacks are not found"
    ),
)
