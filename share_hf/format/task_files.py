"""The folder of one task in a tree: its coefficients and head as a SHARE adapter, and what is known of it.

adapter_config.json         peft_type SHARE
adapter_model.safetensors   coefficients (k_out, min(p, n, d)) and (k_in, min(p, n, d)) of each layer, or of the
                            task's own rank there, as `coefficients` has them; fingerprints of the bases that they
                            belong to, and the head
metrics.json                scores, the norm and drift of each layer, which merges need, checksums of the others
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from ..state import Phase, SubspaceState, TaskInfo, sketch_of
from ..subspace import LARGEST_NORM, rank_in_layer
from .basis_file import SUBSPACE_FILE, StoredBasis
from .coefficients import coefficient_tensors, rank_of_coefficients, with_plain_coefficients
from .files import check_tensors, expect_tensor, json_bytes, read_json, read_tensors
from .index import INDEX_FILE, TreeIndex, check_file
from .lora import PEFT_PREFIX, adapter_files, check_head_names, read_target
from .patterns import without_slow_patterns
from .saved_modules import saved_names


METRICS_FILE = "metrics.json"
TASKS_FOLDER = "tasks"

# After the name of a module, the tensor that says which basis the coefficients there belong to.
FINGERPRINT = "share_fingerprint"

# What a task's metrics hold of each layer, in this order.
CERTIFICATE_COLUMNS = ("norm", "rank_error", "drift_bound", "drift_estimate")

# Of a task in one layer: (ε_out, ε_in, certificate).
StoredTask = tuple[Tensor, Tensor, list[float]]


def task_folder(task: str) -> str:
    return f"{TASKS_FOLDER}/{task}"


def share_adapter_tensors(state: SubspaceState, task: str, bases: Mapping[str, StoredBasis]) -> dict[str, Tensor]:
    """A task's coefficients, the fingerprints of their bases and its head, as PEFT saves and loads them."""
    tensors = {f"{PEFT_PREFIX}{name}": tensor for name, tensor in state.tasks[task].head.items()}
    for module, layer in state.layers_of(task).items():
        tensors |= coefficient_tensors(f"{PEFT_PREFIX}{module}", layer, task, state.settings)
        tensors[f"{PEFT_PREFIX}{module}.{FINGERPRINT}"] = bases[module].fingerprint
    return tensors


def share_adapter_config(state: SubspaceState, task: str) -> dict[str, Any]:
    """The values of a task's `ShareConfig`."""
    settings = state.settings.to_dict()
    del settings["center"]  # a property of merges, which a single task has no say in
    return {
        "peft_type": "SHARE",
        "base_model_name_or_path": state.base_model_name_or_path,
        "inference_mode": True,
        **settings,
        **{name: value for name, value in state.tasks[task].target.items() if value is not None},
    }


def task_files(state: SubspaceState, task: str, bases: Mapping[str, StoredBasis]) -> dict[str, bytes]:
    """The files of a task by name; `bases` are those of the subspace.

    Raises:
        ValueError: If they could not be read again; naming file and tensor.
    """
    info = state.tasks[task]
    config = share_adapter_config(state, task)
    place = Path(task_folder(task))
    # By the rules of the reader: what is written is read again.
    _check_kept(place / SAFETENSORS_WEIGHTS_NAME, info.head, read_target(place / CONFIG_NAME, config))
    check_tensors(place / SAFETENSORS_WEIGHTS_NAME, info.head)  # merges have seen to the rest
    files = adapter_files(config, share_adapter_tensors(state, task, bases))
    certificate = {module: layer.records.rows[layer.index(task)] for module, layer in state.layers_of(task).items()}
    content = {
        "learned_by": info.learned_by,
        "scores": dict(info.scores),
        "labels": None if info.labels is None else list(info.labels),
        "dataset": info.dataset,
        "initialization": info.initialization,
        "certificate": certificate,
        "certificate_columns": list(CERTIFICATE_COLUMNS),
        "sha256": {name: hashlib.sha256(file).hexdigest() for name, file in files.items()},
    }
    return {**files, METRICS_FILE: json_bytes(content)}


def check_task_files(folder: Path, index: TreeIndex, task: str) -> None:
    """Compare the files of a task with the checksums that the index leads to.

    Raises:
        ValueError: Naming the file that is not the one that was saved.
    """
    place = task_folder(task)
    metrics_file = f"{place}/{METRICS_FILE}"
    check_file(folder, index.sha256, metrics_file)
    noted = read_json(folder / metrics_file).get("sha256")
    sha256 = {f"{place}/{name}": checksum for name, checksum in noted.items()} if isinstance(noted, dict) else {}
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        check_file(folder, sha256, f"{place}/{name}", listed_in=metrics_file)


def read_task(
    folder: Path, index: TreeIndex, task: str, bases: Mapping[str, StoredBasis]
) -> tuple[TaskInfo, dict[str, StoredTask]]:
    """What is known of a task, and its (ε_out, ε_in, certificate) by module."""
    place = folder / task_folder(task)
    config_path, weights_path, metrics_path = (
        place / name for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, METRICS_FILE)
    )
    config, metrics = read_json(config_path), read_json(metrics_path)
    tensors = with_plain_coefficients(weights_path, read_tensors(weights_path), index.settings.coefficient_dtype)
    stored: dict[str, StoredTask] = {}
    coefficients: set[str] = set()
    try:
        if metrics["certificate_columns"] != list(CERTIFICATE_COLUMNS):
            raise ValueError(
                f"{metrics_path}: certificate_columns is {metrics['certificate_columns']!r}, expected "
                f"{list(CERTIFICATE_COLUMNS)}"
            )
        for module, values in metrics["certificate"].items():
            if module not in bases:
                raise ValueError(f"{metrics_path}: {module!r} is not in {SUBSPACE_FILE}, expected one of its modules")
            prefix = f"{PEFT_PREFIX}{module}.share_coefficients"
            coefficients |= {f"{prefix}_out", f"{prefix}_in"}
            if index.has_fingerprints:
                fingerprint = f"{PEFT_PREFIX}{module}.{FINGERPRINT}"
                coefficients.add(fingerprint)
                check_fingerprint(weights_path, tensors.get(fingerprint), fingerprint, bases[module])
            k_out, k_in = index.modules[module].num_components
            p = rank_in_layer(index.settings.pseudo_rank, index.modules[module].shape)
            rank = p
            if index.settings.has_ranks:
                rank = rank_of_coefficients(weights_path, tensors, prefix, p)
            out = expect_tensor(weights_path, tensors, f"{prefix}_out", (k_out, rank))
            in_ = expect_tensor(weights_path, tensors, f"{prefix}_in", (k_in, rank))
            filled = (torch.nn.functional.pad(side, (0, p - rank)) for side in (out, in_))
            stored[module] = (*filled, _certificate(metrics_path, module, values))
        head = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items() if name not in coefficients}
        try:
            info = _task_info(config_path, config, metrics_path, metrics, head)
        except ValueError as error:
            raise ValueError(str(error) if str(place) in str(error) else f"{metrics_path}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{metrics_path}: a field is missing or of the wrong type ({error!r})") from error
    if odd := [name for name in info.head if ".share_coefficients_" in name]:
        raise ValueError(f"{weights_path}: {odd[0]!r} is unexpected, {metrics_path} has no certificate of its module")
    if (base := config.get("base_model_name_or_path")) != index.base_model_name_or_path:
        raise ValueError(
            f"{config_path}: base_model_name_or_path is {base!r}, expected {index.base_model_name_or_path!r} as in "
            f"{INDEX_FILE}"
        )
    check_task_files(folder, index, task)
    return info, stored


def check_fingerprint(path: Path, found: Tensor | None, name: str, basis: StoredBasis) -> None:
    """Compare the fingerprint of this name in a file of coefficients with the basis that is beside it.

    Raises:
        ValueError: If it is missing or of another basis.
    """
    expected = basis.fingerprint
    if found is None or not torch.equal(found.float(), expected.float()):
        value = "missing" if found is None else found.tolist()
        raise ValueError(
            f"{path}: {name!r} is {value}, expected {expected.tolist()}: the coefficients do not belong to the basis "
            f"in {SUBSPACE_FILE}, such as after another model was saved there"
        )


def _task_info(
    config_path: Path,
    config: Mapping[str, Any],
    metrics_path: Path,
    metrics: Mapping[str, Any],
    head: dict[str, Tensor],
) -> TaskInfo:
    target = without_slow_patterns(read_target(config_path, config), metrics["certificate"])
    _check_kept(config_path.parent / SAFETENSORS_WEIGHTS_NAME, head, target)
    labels, dataset, initialization = metrics["labels"], metrics["dataset"], metrics["initialization"]
    for name, value in (("dataset", dataset), ("initialization", initialization)):
        if not isinstance(value, (str, NoneType)):
            raise ValueError(f"{metrics_path}: {name} is {value!r}, expected text or null")
    info = TaskInfo(
        learned_by=Phase(metrics["learned_by"]),
        target=target,
        head=head,
        scores={name: _finite_score(metrics_path, name, score) for name, score in metrics["scores"].items()},
        labels=None if labels is None else tuple(str(label) for label in labels),
        dataset=dataset,
        initialization=initialization,
    )
    sketch_of(info)
    return info


def _finite_score(path: Path, name: str, score: Any) -> float:
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
        raise ValueError(f"{path}: score {name!r} is {score!r}, expected a finite number")
    return float(score)


def _check_kept(path: Path, head: Iterable[str], target: Mapping[str, Any]) -> None:
    check_head_names(path, head, saved_names(target.get("modules_to_save"), target.get("task_type")))


def _certificate(path: Path, module: str, values: Sequence[Any]) -> list[float]:
    if len(values) != len(CERTIFICATE_COLUMNS):
        raise ValueError(f"{path}: certificate of {module!r} is {values!r}, expected {list(CERTIFICATE_COLUMNS)}")
    for name, value in zip(CERTIFICATE_COLUMNS, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < LARGEST_NORM:
            raise ValueError(f"{path}: {name} of {module!r} is {value!r}, expected a number of 0 or more")
    return [float(value) for value in values]
