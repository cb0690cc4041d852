"""Plain LoRA adapters in and out: PEFT folders and repositories, read as updates and written from them."""

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
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import LoraConfig, TaskType
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor

from ..subspace import LowRankUpdate
from .download import download
from .embeddings import changed_embeddings, embedding_of, with_update
from .files import read_json, read_pickled_tensors, read_tensors, tensor_bytes
from .module_names import PEFT_PREFIX, check_no_single_experts, named_as_in_base, without_wrappers
from .names import HUB_ID
from .patterns import is_name, values_by_module, without_slow_patterns
from .saved_modules import saved_module_of, saved_names, targets_beside


# Which modules an adapter targets, in the fields that LoRA and SHARE configurations have in common.
TARGET_FIELDS = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "fan_in_fan_out",
    "task_type",
)

# Methods that move part of the base weights into the adapter at its start: their LoRA is no update of the base model.
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
    """A plain LoRA: its updates with the scale folded in, and what came with it.

    Args:
        updates: By module of the base model, ``ΔW = out_factor in_factor^T``. Those of a file are scaled when they are
            asked for, and not kept.
        head: Weights of `modules_to_save` by name in the base model, such as `classifier.weight`.
        target: Values of `TARGET_FIELDS`.
        base_model_name_or_path: As the adapter names it.
    """

    updates: Mapping[str, LowRankUpdate]
    head: dict[str, Tensor] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=dict)
    base_model_name_or_path: str | None = None


@dataclass(frozen=True)
class ScaledFactors:
    """A and B of a module as a file has them, and the scale of their product.

    Args:
        a: (r, d), in memory that is mapped from the file where it is a safetensors one.
        b: (n, r).
        scale: ``alpha / r``, or ``alpha / sqrt(r)`` with rslora.
    """

    a: Tensor
    b: Tensor
    scale: float

    def update(self) -> LowRankUpdate:
        """The update; factors that need no rounding and no scale are those of the file."""
        # A power of two rounds nothing in float32; what another scale would round, no drift bound would know of.
        dtype = torch.float32 if math.frexp(self.scale)[0] == 0.5 else torch.float64
        b = self.b.to(dtype)
        return LowRankUpdate(out_factor=b if self.scale == 1 else self.scale * b, in_factor=self.a.T.to(dtype))


class StoredUpdates(Mapping[str, LowRankUpdate]):
    """Updates by module, each made from its file when it is asked for: many adapters need no memory before that."""

    def __init__(self, factors: Mapping[str, ScaledFactors]) -> None:
        self._factors = factors

    def __getitem__(self, module: str) -> LowRankUpdate:
        return self._factors[module].update()

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)


def read_lora(
    location: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> LoraAdapter:
    """Read a PEFT LoRA from a folder or a hub repository.

    Raises:
        ValueError: If it is no plain LoRA (another method, DoRA, a trained bias, an embedding, an initialization that
            changes the base weights), a tensor is missing, of a wrong shape, or not finite; naming what was found.
    """
    config_path, weights_path = (
        _resolve(location, names, revision=revision, token=token, cache_dir=cache_dir)
        for names in ([CONFIG_NAME], [SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME])
    )
    config = read_json(config_path)
    _check_plain_lora(config_path, config)
    target = read_target(config_path, config)
    saved = saved_names(target.get("modules_to_save"), target.get("task_type"))
    read = read_pickled_tensors if weights_path.name == WEIGHTS_NAME else read_tensors
    tensors = named_as_in_base(weights_path, read(weights_path))
    factors, head, embeddings = _sort_tensors(weights_path, tensors, saved, bias=config.get("bias", "none"))
    _check_head_shapes(weights_path, head)
    check_no_single_experts(weights_path, factors, config)
    patterns = {without_wrappers(pattern): alpha for pattern, alpha in (config.get("alpha_pattern") or {}).items()}
    alphas = values_by_module(config_path, "alpha_pattern", patterns, factors)
    use_rslora = bool(config.get("use_rslora"))
    scaled = {}
    for module, pair in factors.items():
        alpha = alphas.get(module, config["lora_alpha"])
        scaled[module] = _scaled(weights_path, module, pair, alpha, use_rslora=use_rslora)
    target = without_slow_patterns(target, scaled)
    if not scaled:
        raise ValueError(f"{weights_path}: no lora_A and lora_B in it, expected a LoRA")
    base = config.get("base_model_name_or_path")
    for module, tensors in changed_embeddings(embeddings, base).items():
        adapted = scaled.pop(module, None)
        head |= with_update(module, tensors, None if adapted is None else adapted.update())
        saved.append(module)
    if not scaled:
        raise ValueError(f"{weights_path}: it adapts {sorted(factors)} only and brings them whole, expected a LoRA")
    if saved:
        target["modules_to_save"] = saved
    if isinstance(modules := target.get("target_modules"), list):
        target["target_modules"] = targets_beside(modules, saved)
    return LoraAdapter(updates=StoredUpdates(scaled), head=head, target=target, base_model_name_or_path=base)


def read_target(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that say which modules it targets, those that are given.

    Raises:
        ValueError: If one is not of a type that PEFT takes.
    """
    target = {name: config[name] for name in TARGET_FIELDS if config.get(name) is not None}
    for name, value in target.items():
        texts = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
        whole_numbers = all(type(entry) is int for entry in (value if isinstance(value, list) else [value]))
        usable = {
            "modules_to_save": texts and all(map(is_name, value)),
            "layers_to_transform": whole_numbers,
            "fan_in_fan_out": isinstance(value, bool),
            "task_type": value in list(TaskType),
        }.get(name, texts or isinstance(value, str))
        if not usable:
            raise ValueError(f"{path}: {name} is {value!r}, which no PEFT configuration has there")
        if isinstance(value, str):
            _check_pattern(path, name, value)
    try:
        LoraConfig(**target)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: its target modules are no PEFT configuration's ({error})") from error
    return target


def check_head_names(path: Path, names: Iterable[str], saved: Iterable[str]) -> None:
    """Refuse weights that belong to no module that the adapter says it saves: a loader would put them into the base.

    Raises:
        ValueError: Naming the first.
    """
    saved = list(saved)
    for name in names:
        if saved_module_of(name, saved) is None:
            raise ValueError(f"{path}: {name!r} is unexpected, expected coefficients and modules_to_save = {saved}")


def _check_pattern(path: Path, name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: {name} is {pattern!r}, which is no regular expression ({error})") from error


def lora_files(adapter: LoraAdapter) -> dict[str, bytes]:
    """The files of updates as a plain PEFT LoRA of scale 1, which any PEFT loads without share_hf.

    Its rank is the largest of its layers'. Factors of a smaller rank, as of layers with fewer outputs or inputs, are
    filled up with zeros: unlike a `rank_pattern`, every PEFT and every server of LoRAs reads that.
    """
    rank = max((update.out_factor.shape[1] for update in adapter.updates.values()), default=1)
    tensors = {f"{PEFT_PREFIX}{name}": tensor for name, tensor in adapter.head.items()}
    for module, update in adapter.updates.items():
        missing = (0, rank - update.out_factor.shape[1])
        tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"] = torch.nn.functional.pad(update.in_factor, missing).T
        tensors[f"{PEFT_PREFIX}{module}.lora_B.weight"] = torch.nn.functional.pad(update.out_factor, missing)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        inference_mode=True,
        base_model_name_or_path=adapter.base_model_name_or_path,
        **{name: value for name, value in adapter.target.items() if value is not None},
    )
    if not config.target_modules or not all(check_target_module_exists(config, name) for name in adapter.updates):
        # Of a model that was wrapped when the adapter was saved: PEFT would pass over what its targets do not match.
        config.target_modules, config.exclude_modules = set(adapter.updates), None
        config.layers_to_transform = config.layers_pattern = None
    return adapter_files(config.to_dict(), tensors)


def adapter_files(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The files of an adapter as PEFT lays it out, with bytes that depend only on the content."""
    text = json.dumps(config, indent=2, sort_keys=True, default=_plain) + "\n"
    return {CONFIG_NAME: text.encode(), SAFETENSORS_WEIGHTS_NAME: tensor_bytes(tensors)}


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{value!r} is not JSON serializable")


def _resolve(location: str | Path, names: Sequence[str], **download_options: Any) -> Path:
    """The first of these files that an adapter has."""
    folder = Path(location)
    if folder.is_dir():
        if path := next((folder / name for name in names if (folder / name).is_file()), None):
            return path
        raise ValueError(f"{folder}: no {names[0]} in it, expected the folder of a PEFT adapter")
    if isinstance(location, Path) or not HUB_ID.fullmatch(location):
        raise ValueError(f"{location}: no such folder")
    missing: EntryNotFoundError | None = None
    for name in names:
        try:
            return download(location, name, **download_options)
        except EntryNotFoundError as error:
            missing = missing or error
    if isinstance(missing, LocalEntryNotFoundError):
        raise LocalEntryNotFoundError(
            f"{location}: no such folder, and no repository in the cache or reach"
        ) from missing
    raise ValueError(f"{location}: no {names[0]} in this repository, expected a PEFT adapter") from missing


def _check_plain_lora(path: Path, config: Mapping[str, Any]) -> None:
    if (kind := config.get("peft_type")) != "LORA":
        advice = ", export its tasks as LoRAs first" if kind == "SHARE" else ""
        raise ValueError(f"{path}: peft_type is {kind!r}, expected 'LORA'{advice}")
    for name in _VARIANTS:
        if config.get(name):
            raise ValueError(f"{path}: {name} is {config[name]!r}, expected a plain LoRA without it")
    if config.get("target_parameters"):
        raise ValueError(f"{path}: target_parameters is {config['target_parameters']!r}, expected linear modules only")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_MUTATING_INITS):
        raise ValueError(
            f"{path}: init_lora_weights is {init!r}, which changes the base weights, expected an adapter that was "
            "converted with path_initial_model_for_weight_conversion"
        )
    base = config.get("base_model_name_or_path")
    if not isinstance(base, (str, NoneType)):
        raise ValueError(f"{path}: base_model_name_or_path is {base!r}, expected text or null")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{path}: alpha_pattern is {patterns!r}, expected an object")
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
        if match := re.fullmatch(r"(.+)\.lora_([AB])\.weight", name):
            factors.setdefault(match[1], {})[match[2]] = tensor
        elif saved_module_of(name, saved) is not None:
            head[name] = tensor
        elif name.endswith("bias") and bias != "none":
            raise ValueError(
                f"{path}: has {name!r}, as bias is {bias!r}, expected 'none': a trained bias is no low-rank update"
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
    """Refuse weights of a head that no layer can have: none at all, or a bias of another length than its weight."""
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
                "a number of the bias for each row"
            )


def _scaled(path: Path, module: str, pair: Mapping[str, Tensor], alpha: float, *, use_rslora: bool) -> ScaledFactors:
    if set(pair) != {"A", "B"}:
        missing = "B" if "A" in pair else "A"
        raise ValueError(f"{path}: {module!r} has no lora_{missing}, expected both lora_A and lora_B")
    a, b = pair["A"], pair["B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise ValueError(
            f"{path}: lora_A and lora_B of {module!r} are {tuple(a.shape)} and {tuple(b.shape)}, expected (r, d) and "
            "(n, r)"
        )
    return ScaledFactors(a, b, alpha / (math.sqrt(a.shape[0]) if use_rslora else a.shape[0]))
