"""Read plain LoRA adapters from PEFT folders and repositories as updates, and write updates as such adapters."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from peft import LoraConfig, TaskType
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from ..state import Layout
from ..subspace import LowRankUpdate
from .embeddings import changed_embeddings, embedding_of, with_update
from .experts import EXPERT, expert_matrices, expert_tensors, parameter_names, targets_of
from .files import read_json, read_pickled_tensors, read_tensors, tensor_bytes
from .locating import PICKLED, find_adapter
from .lora_tensors import as_matrices, as_tensors, factor_of
from .model_classes import AUTO_MAPPING, read_mapping
from .module_names import PEFT_PREFIX, check_no_single_experts, named_as_in_base, without_wrappers
from .patterns import is_name, values_by_module, without_slow_patterns
from .pipelines import is_never_of_peft, read_component
from .saved_modules import saved_module_of, saved_names, targets_beside
from .unchanged import Stamp


# Fields that LoRA and SHARE configurations have in common and that determine which modules an adapter targets.
TARGET_FIELDS = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "fan_in_fan_out",
    "task_type",
    "target_parameters",
)

# Methods that first move part of the base weights into the adapter: their LoRA is not an update of the base model.
_MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Variants of LoRA that compute more than ``W x + s B A x``.
_VARIANTS = (
    "use_dora",
    "lora_bias",
    "use_bdlora",
    "use_qalora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "trainable_token_indices",
)


@dataclass(frozen=True)
class LoraAdapter:
    """A plain LoRA: its updates, with the scale folded in, and what came with them.

    Args:
        updates: Updates by module of the base model, ``ΔW = out_factor in_factor^T``. Those of a file are scaled on
            access and not kept.
        head: Weights of `modules_to_save` by name in the base model, such as `classifier.weight`.
        target: Values of `TARGET_FIELDS`, and `auto_mapping`.
        base_model_name_or_path: Base model, as the adapter names it.
        layouts: Layout by module, that is, how its matrix lies in its weight. Dense layers have no entry.
        component: Component of a pipeline to which the adapter belongs, if its file names one.
        shapes: Numbers of outputs and inputs of the layers by module, as stored in its file.
        file: File of its weights on this machine. None if the adapter was not read from a file.
    """

    updates: Mapping[str, LowRankUpdate]
    head: dict[str, Tensor] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=dict)
    base_model_name_or_path: str | None = None
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    component: str | None = None
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    file: Path | None = None


@dataclass(frozen=True)
class ScaledFactors:
    """Factors A and B of a module as stored in a file, as matrices, and the scale of their product.

    Args:
        a: Factor A (r, d), in memory mapped from the file if it is a safetensors file.
        b: Factor B (n, r).
        scale: Scale ``alpha / r``, or ``alpha / sqrt(r)`` with rslora.
    """

    a: Tensor
    b: Tensor
    scale: float

    def update(self) -> LowRankUpdate:
        """Return the update. float32 factors stay in the memory of the file where the scale does not change them."""
        # A power of two rounds nothing in float32. Another scale would, and no drift bound would include that error.
        rounds = math.frexp(self.scale)[0] != 0.5 or torch.float64 in (self.a.dtype, self.b.dtype)
        dtype = torch.float64 if rounds else torch.float32
        b = self.b.to(dtype)
        return LowRankUpdate(out_factor=b if self.scale == 1 else self.scale * b, in_factor=self.a.T.to(dtype))


class StoredUpdates(Mapping[str, LowRankUpdate]):
    """Updates by module, each made from its file on access, so that many adapters need no memory until then.

    Args:
        factors: Factors in the file, by module.
        stamp: State of the file if it is mapped into memory. Updates are refused once the file was written to.
    """

    def __init__(self, factors: Mapping[str, ScaledFactors], stamp: Stamp | None = None) -> None:
        self._factors = factors
        self._stamp = stamp

    def __getitem__(self, module: str) -> LowRankUpdate:
        self.expect_unchanged()  # a mapped file that became shorter must not be touched
        update = self._factors[module].update()
        self.expect_unchanged()
        return update

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)

    def expect_unchanged(self) -> None:
        """Refuse a file that was written to since it was opened: its updates may mix the two versions.

        Raises:
            ValueError: If the file has changed. The message names it.
        """
        if self._stamp is not None:
            self._stamp.expect_same_content()


def read_lora(
    location: str | Path,
    *,
    component: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> LoraAdapter:
    """Read a LoRA: the folder of a PEFT adapter, a weights file, or either of these on the Hub.

    Args:
        location: Folder, file, or `org/repo@revision:subfolder`, where the subfolder may also be a file.
        component: Model of a pipeline to read, such as `unet`, if a file has LoRAs of several.
        revision: Revision of a repository, if the location names none.
        token: Token for the Hub.
        cache_dir: Folder in which to keep downloads.

    Raises:
        ValueError: If it is not a plain LoRA (another method, DoRA, a trained bias, an initialization that changes the
            base weights), a tensor is missing, has a wrong shape or is not finite, or a file changes while it is read.
            The message says what was found.
    """
    files = find_adapter(location, revision=revision, token=token, cache_dir=cache_dir)
    weights_path = files.weights
    stamps = [Stamp.of(path) for path in (files.config, weights_path) if path is not None]
    config_path = files.config or weights_path
    if files.config is not None:
        _check_plain_lora(config_path, config := read_json(config_path))
    pickled = weights_path.suffix in PICKLED
    stored = (read_pickled_tensors if pickled else read_tensors)(weights_path)
    given_alphas = found = None
    if files.config is None or is_never_of_peft(stored):
        lora = read_component(weights_path, stored, component)
        stored, config, given_alphas, found = lora.tensors, lora.config, lora.alphas, lora.component
        _check_plain_lora(weights_path, config)
    tensors = named_as_in_base(weights_path, stored)
    for stamp in stamps:
        stamp.expect_same_file()
    target = read_target(config_path, config)
    saved = saved_names(target.get("modules_to_save"), target.get("task_type"))
    factors, head, embeddings = _sort_tensors(weights_path, tensors, saved, bias=config.get("bias", "none"))
    _check_head_shapes(weights_path, head)
    check_no_single_experts(weights_path, factors, config)
    patterns = {without_wrappers(pattern): alpha for pattern, alpha in (config.get("alpha_pattern") or {}).items()}
    alphas = given_alphas or values_by_module(config_path, "alpha_pattern", patterns, factors)
    use_rslora = bool(config.get("use_rslora"))
    scaled: dict[str, ScaledFactors] = {}
    layouts: dict[str, Layout] = {}
    if target.get("target_parameters"):
        scaled, factors = _split_experts(config_path, weights_path, config, target, factors)
        layouts = dict.fromkeys(scaled, EXPERT)
    for module, pair in factors.items():
        a, b, layout = as_matrices(weights_path, module, pair)
        scaled[module] = _scaled(a, b, alphas.get(module, config["lora_alpha"]), use_rslora=use_rslora)
        if layout is not None:
            layouts[module] = layout
    target = without_slow_patterns(target, scaled)
    if not scaled:
        raise ValueError(f"{weights_path}: no lora_A and lora_B in it, expected a LoRA")
    base = config.get("base_model_name_or_path")
    for module, tensors in changed_embeddings(embeddings, base).items():
        adapted = scaled.pop(module, None)
        layout = layouts.pop(module, None)
        head |= with_update(module, tensors, None if adapted is None else adapted.update(), layout)
        saved.append(module)
    if not scaled:
        raise ValueError(f"{weights_path}: it adapts only {sorted(factors)} and stores them whole, expected a LoRA")
    if saved:
        target["modules_to_save"] = saved
    if isinstance(modules := target.get("target_modules"), list):
        target["target_modules"] = targets_beside(modules, saved)
    return LoraAdapter(
        updates=StoredUpdates(scaled, None if pickled else stamps[-1]),
        head=head,
        target=target,
        base_model_name_or_path=base,
        layouts=layouts,
        component=found,
        shapes={module: (len(factors.b), factors.a.shape[1:].numel()) for module, factors in scaled.items()},
        file=weights_path,
    )


def read_target(path: Path | str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given fields of a configuration that determine which modules of which class it targets.

    Raises:
        ValueError: If a field is not of a type that PEFT accepts.
    """
    target = {name: config[name] for name in TARGET_FIELDS if config.get(name) is not None}
    for name, value in target.items():
        texts = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
        whole_numbers = all(type(entry) is int for entry in (value if isinstance(value, list) else [value]))
        usable = {
            "modules_to_save": texts and all(map(is_name, value)),
            "target_parameters": texts and all(map(is_name, value)),
            "layers_to_transform": whole_numbers,
            "fan_in_fan_out": isinstance(value, bool),
            "task_type": value in list(TaskType),
        }.get(name, texts or isinstance(value, str))
        if not usable:
            raise ValueError(f"{path}: {name} is {value!r}, which is not valid there in a PEFT configuration")
        if isinstance(value, str):
            _check_pattern(path, name, value)
    if "task_type" not in target and (of_class := read_mapping(config.get(AUTO_MAPPING))) is not None:
        target[AUTO_MAPPING] = of_class
    try:
        LoraConfig(**target)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: its target modules are not valid in a PEFT configuration ({error})") from error
    return target


def check_head_names(path: Path | str, names: Iterable[str], saved: Iterable[str]) -> None:
    """Refuse weights outside the modules that an adapter declares as saved: a loader would put them into the base.

    Raises:
        ValueError: If there are such weights. The message names the first.
    """
    saved = list(saved)
    for name in names:
        if saved_module_of(name, saved) is None:
            raise ValueError(f"{path}: {name!r} is unexpected, expected coefficients and modules_to_save = {saved}")


def _check_pattern(path: Path | str, name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: {name} is {pattern!r}, which is not a regular expression ({error})") from error


def lora_files(adapter: LoraAdapter) -> dict[str, bytes]:
    """Return the files of updates as a plain PEFT LoRA of scale 1, which any PEFT loads without share_hf.

    Its rank is the largest rank of its layers. Factors of a smaller rank, such as those of layers with fewer outputs
    or inputs, are padded with zeros: unlike a `rank_pattern`, every version of PEFT and every LoRA server reads that.
    """
    rank = max((update.out_factor.shape[1] for update in adapter.updates.values()), default=1)
    tensors = {f"{PEFT_PREFIX}{name}": tensor for name, tensor in adapter.head.items()}
    experts = {module: update for module, update in adapter.updates.items() if adapter.layouts.get(module) == EXPERT}
    tensors |= {f"{PEFT_PREFIX}{name}": tensor for name, tensor in expert_tensors(experts, rank).items()}
    layers = [module for module in adapter.updates if module not in experts]
    for module in layers:
        tensors |= as_tensors(f"{PEFT_PREFIX}{module}", adapter.updates[module], adapter.layouts.get(module), rank)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        inference_mode=True,
        base_model_name_or_path=adapter.base_model_name_or_path,
        **{name: value for name, value in adapter.target.items() if value is not None},
    )
    config.target_parameters = targets_of(experts, config.target_parameters or []) or None
    if not layers:
        config.target_modules = []  # otherwise PEFT takes its defaults for the model
    elif not config.target_modules or not all(check_target_module_exists(config, name) for name in layers):
        # The model was wrapped when the adapter was saved: PEFT would skip layers that its targets do not match.
        config.target_modules, config.exclude_modules = set(layers), None
        config.layers_to_transform = config.layers_pattern = None
    return adapter_files(config.to_dict(), tensors)


def adapter_files(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Return the files of an adapter in PEFT's layout, with bytes that depend only on the content."""
    return {CONFIG_NAME: config_bytes(config), SAFETENSORS_WEIGHTS_NAME: tensor_bytes(tensors)}


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """Return the configuration of an adapter as PEFT writes it, with sorted names."""
    return (json.dumps(config, indent=2, sort_keys=True, default=_plain) + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{value!r} is not JSON serializable")


def _check_plain_lora(path: Path, config: Mapping[str, Any]) -> None:
    if (kind := config.get("peft_type")) != "LORA":
        advice = ", export its tasks as LoRAs first (`share-hf export`)" if kind == "SHARE" else ""
        raise ValueError(f"{path}: peft_type is {kind!r}, expected 'LORA'{advice}")
    for name in _VARIANTS:
        if config.get(name):
            raise ValueError(f"{path}: {name} is {config[name]!r}, expected a plain LoRA without it")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_MUTATING_INITS):
        raise ValueError(
            f"{path}: init_lora_weights is {init!r}, which changes the base weights, expected an adapter that was "
            "converted with path_initial_model_for_weight_conversion"
        )
    base = config.get("base_model_name_or_path")
    if not isinstance(base, (str, NoneType)):
        raise ValueError(f"{path}: base_model_name_or_path is {base!r}, expected text or null")
    for field_name in ("alpha_pattern", "rank_pattern"):
        if not isinstance(patterns := config.get(field_name) or {}, dict):
            raise ValueError(f"{path}: {field_name} is {patterns!r}, expected an object")
    patterns = config.get("alpha_pattern") or {}
    for name, alpha in {"lora_alpha": config.get("lora_alpha"), **patterns}.items():
        if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise ValueError(f"{path}: {name} is {alpha!r}, expected a number")
        _check_pattern(path, "alpha_pattern", name)


def _sort_tensors(
    path: Path, tensors: Mapping[str, Tensor], saved: Sequence[str], *, bias: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Split an adapter's tensors into LoRA factors by module, the weights of its head, and embeddings by module."""
    factors: dict[str, dict[str, Tensor]] = {}
    head: dict[str, Tensor] = {}
    embeddings: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if (factor := factor_of(name)) is not None:
            module, side = factor
            factors.setdefault(module, {})[side] = tensor
        elif saved_module_of(name, saved) is not None:
            head[name] = tensor
        elif name.endswith("bias") and bias != "none":
            raise ValueError(
                f"{path}: has {name!r}, since bias is {bias!r}, expected 'none': a trained bias is not a low-rank "
                "update"
            )
        elif (embedding := embedding_of(name)) is not None:
            module, leaf = embedding
            embeddings.setdefault(module, {})[leaf] = tensor
        else:
            raise ValueError(
                f"{path}: unexpected tensor {name!r}, expected lora_A, lora_B and modules_to_save = {list(saved)}"
            )
    return factors, head, embeddings


def _check_head_shapes(path: Path, head: Mapping[str, Tensor]) -> None:
    """Refuse weights of a head that no layer can have: empty ones, or a bias whose length does not fit its weight."""
    for name, tensor in head.items():
        if not tensor.numel():
            raise ValueError(
                f"{path}: {name!r} is {tuple(tensor.shape)}, expected weights: DeepSpeed and FSDP leave empty tensors "
                "where the parts of a model are not gathered before it is saved"
            )
    for name, tensor in head.items():
        module, _, leaf = name.rpartition(".")
        weight = head.get(f"{module}.weight")
        if leaf == "bias" and weight is not None and (tensor.ndim != 1 or tensor.shape[0] not in weight.shape):
            raise ValueError(
                f"{path}: weight and bias of {module!r} are {tuple(weight.shape)} and {tuple(tensor.shape)}, expected "
                "one bias value for each row"
            )


def _split_experts(
    config_path: Path,
    weights_path: Path,
    config: Mapping[str, Any],
    target: Mapping[str, Any],
    factors: Mapping[str, dict[str, Tensor]],
) -> tuple[dict[str, ScaledFactors], dict[str, dict[str, Tensor]]]:
    """Return the experts of an adapter with `target_parameters`, by module, and the factors of its layers."""
    matched = LoraConfig(**without_slow_patterns(target, factors))
    layers = {module: pair for module, pair in factors.items() if check_target_module_exists(matched, module)}
    names = parameter_names(weights_path, factors.keys() - layers.keys(), target["target_parameters"])
    by_pattern = {}
    for field_name in ("rank_pattern", "alpha_pattern"):
        patterns = {without_wrappers(name): value for name, value in (config.get(field_name) or {}).items()}
        by_pattern[field_name] = values_by_module(config_path, field_name, patterns, set(names.values()))
    scaled = {}
    for module, parameter in sorted(names.items()):
        rank = by_pattern["rank_pattern"].get(parameter, config.get("r"))
        if type(rank) is not int or rank < 1:
            raise ValueError(f"{config_path}: r of {parameter!r} is {rank!r}, expected a positive integer")
        alpha = by_pattern["alpha_pattern"].get(parameter, config["lora_alpha"])
        for number, (a, b) in enumerate(expert_matrices(weights_path, parameter, factors[module], rank)):
            scaled[f"{parameter}.{number}"] = _scaled(a, b, alpha, use_rslora=bool(config.get("use_rslora")))
    return scaled, layers


def _scaled(a: Tensor, b: Tensor, alpha: float, *, use_rslora: bool) -> ScaledFactors:
    return ScaledFactors(a, b, alpha / (math.sqrt(a.shape[0]) if use_rslora else a.shape[0]))
