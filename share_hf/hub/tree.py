"""The tree of a shared subspace, on disk as on the hub.

README.md                                the model card
share_config.json                        index, settings, checksums
subspace.safetensors                     the bases, once for all tasks
adapter_config.json, adapter_model.safetensors   a plain LoRA of the default task, for any PEFT
tasks/<task>/adapter_config.json         peft_type SHARE
tasks/<task>/adapter_model.safetensors   the task's coefficients and head
tasks/<task>/metrics.json                its scores, and the norm and drift of each layer, which merges need
metrics.json, figures/*.png              the stream's accuracy matrix, drift and spectra
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from ..subspace import LayerSubspace, SubspaceSettings, TaskRecords
from .adapters import PEFT_PREFIX, TARGET_FIELDS, LoraAdapter, write_adapter, write_lora
from .basis_file import SUBSPACE_FILE, StoredBasis, basis_tensors, read_bases
from .card import write_card
from .figures import write_figures
from .files import (
    expect_tensor,
    read_json,
    read_tensors,
    replacing_folder,
    restore_folder,
    sha256_of,
    write_json,
    write_tensors,
)
from .index import INDEX_FILE, ModuleEntry, TreeIndex, check_file, read_index, write_index
from .state import SubspaceState, TaskInfo


METRICS_FILE = "metrics.json"
CARD_FILE = "README.md"

# Everything a tree consists of; what else a folder holds is its owner's and stays there.
TREE_ENTRIES = (
    CARD_FILE,
    INDEX_FILE,
    SUBSPACE_FILE,
    CONFIG_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    METRICS_FILE,
    "tasks",
    "figures",
)

_CERTIFICATE = ("norm", "rank_error", "drift_bound", "drift_estimate")


def task_folder(task: str) -> str:
    return f"tasks/{task}"


def write_tree(state: SubspaceState, folder: Path) -> None:
    """Write the whole tree, or on a crash none of it. Other files in the folder stay."""
    with replacing_folder(folder, TREE_ENTRIES) as scratch:
        _write_loadable(state, scratch)
        write_json(scratch / METRICS_FILE, state.metrics)
        write_figures(state, scratch / "figures")
        write_card(state, scratch)
        write_index(scratch, _index_of(state, scratch))


def read_tree(folder: Path) -> SubspaceState:
    """Read and check the whole tree.

    Raises:
        ValueError: If a file is missing, damaged, edited or of a newer format; naming file, tensor, what was found and
            what was expected.
    """
    while True:
        restore_folder(folder)
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        found = folder.stat()
        try:
            return _read_whole(folder)
        except (ValueError, OSError, RuntimeError):
            now = folder.stat() if folder.is_dir() else None
            if now is not None and (now.st_ino, now.st_mtime_ns) == (found.st_ino, found.st_mtime_ns):
                raise  # unlike where a writer replaced the tree meanwhile


def _read_whole(folder: Path) -> SubspaceState:
    index = read_index(folder)
    if index.kind != "tree":
        raise ValueError(
            f"{folder}: the checkpoint of a PeftModel, expected a tree of SharedSubspace.save_pretrained; load it "
            "with PeftModel.from_pretrained"
        )
    bases = read_bases(folder / SUBSPACE_FILE)
    _check_bases(folder / SUBSPACE_FILE, bases, index)
    check_file(folder, index, SUBSPACE_FILE)
    tasks, stored = {}, {}
    for task in index.tasks:
        tasks[task], stored[task] = _read_task(folder, index, task, bases)
    layers = {module: _layer(module, basis, index.settings, stored) for module, basis in bases.items()}
    metrics = read_json(folder / METRICS_FILE)
    check_file(folder, index, METRICS_FILE)
    return SubspaceState(
        settings=index.settings,
        layers=layers,
        tasks=tasks,
        base_model_name_or_path=index.base_model_name_or_path,
        default_task=index.default_task,
        metrics=metrics,
        lineage=index.lineage,
    )


def lora_of(state: SubspaceState, task: str) -> LoraAdapter:
    """A task as a plain LoRA of rank p."""
    info = state.tasks[task]
    return LoraAdapter(
        updates={module: layer.update_of(task) for module, layer in state.layers_of(task).items()},
        head=dict(info.head),
        target=dict(info.target),
        base_model_name_or_path=state.base_model_name_or_path,
    )


def share_adapter_tensors(state: SubspaceState, task: str) -> dict[str, Tensor]:
    """A task's coefficients and head under the names that PEFT saves and loads them by."""
    tensors = {f"{PEFT_PREFIX}{name}": tensor for name, tensor in state.tasks[task].head.items()}
    for module, layer in state.layers_of(task).items():
        i = layer.index(task)
        tensors[f"{PEFT_PREFIX}{module}.share_coefficients_out"] = layer.coefficients_out[i]
        tensors[f"{PEFT_PREFIX}{module}.share_coefficients_in"] = layer.coefficients_in[i]
    return tensors


def share_adapter_config(state: SubspaceState, task: str) -> dict[str, Any]:
    """The values of a task's `ShareConfig`."""
    settings = state.settings
    return {
        "peft_type": "SHARE",
        "base_model_name_or_path": state.base_model_name_or_path,
        "inference_mode": True,
        "num_components": settings.num_components,
        "pseudo_rank": settings.pseudo_rank,
        "basis": settings.basis,
        "explained_variance": settings.explained_variance,
        "drift_tolerance": settings.drift_tolerance,
        "max_components": settings.max_components,
        **{name: value for name, value in state.tasks[task].target.items() if value is not None},
    }


def _write_loadable(state: SubspaceState, folder: Path) -> None:
    write_tensors(folder / SUBSPACE_FILE, basis_tensors(state.bases()))
    for task in state.tasks:
        place = folder / task_folder(task)
        write_adapter(place, share_adapter_config(state, task), share_adapter_tensors(state, task))
        write_json(place / METRICS_FILE, _task_metrics(state, task))
    if state.root_task is not None:
        write_lora(folder, lora_of(state, state.root_task), state.settings.pseudo_rank)


def _task_metrics(state: SubspaceState, task: str) -> dict[str, Any]:
    info = state.tasks[task]
    certificate = {}
    for module, layer in state.layers_of(task).items():
        i, records = layer.index(task), layer.records
        values = (records.norms, records.rank_errors, records.drift_bounds, records.drift_estimates)
        certificate[module] = dict(zip(_CERTIFICATE, (float(value[i]) for value in values), strict=True))
    return {
        "learned_by": info.learned_by,
        "scores": dict(info.scores),
        "labels": None if info.labels is None else list(info.labels),
        "certificate": certificate,
    }


def _index_of(state: SubspaceState, folder: Path) -> TreeIndex:
    of_tasks = [str(path.relative_to(folder)) for path in sorted(folder.glob("tasks/*/*"))]
    depended_on = [SUBSPACE_FILE, METRICS_FILE, *of_tasks]
    if state.tasks:
        depended_on += [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME]
    return TreeIndex(
        base_model_name_or_path=state.base_model_name_or_path,
        settings=state.settings,
        modules={name: ModuleEntry(layer.shape, layer.num_components) for name, layer in state.layers.items()},
        tasks=tuple(state.tasks),
        default_task=state.default_task,
        lineage=state.lineage,
        sha256={relative: sha256_of(folder / relative) for relative in depended_on},
    )


def _check_bases(path: Path, bases: Mapping[str, StoredBasis], index: TreeIndex) -> None:
    if set(bases) != set(index.modules):
        odd = sorted(set(bases) ^ set(index.modules))
        raise ValueError(f"{path}: modules {odd} are in only one of it and {INDEX_FILE}, expected the same in both")
    for module, basis in bases.items():
        found = ModuleEntry(basis.shape, basis.num_components)
        if found != index.modules[module]:
            raise ValueError(f"{path}: {module!r} is {found}, expected {index.modules[module]} as in {INDEX_FILE}")


def _read_task(
    folder: Path, index: TreeIndex, task: str, bases: Mapping[str, StoredBasis]
) -> tuple[TaskInfo, dict[str, tuple[Tensor, Tensor, list[float]]]]:
    """What is known of a task, and its (ε_out, ε_in, certificate) by module."""
    place = task_folder(task)
    config_path, weights_path, metrics_path = (
        folder / place / name for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, METRICS_FILE)
    )
    config, metrics = read_json(config_path), read_json(metrics_path)
    tensors = read_tensors(weights_path)
    stored = {}
    coefficients: set[str] = set()
    try:
        for module, values in metrics["certificate"].items():
            if module not in bases:
                raise ValueError(f"{metrics_path}: {module!r} is not in {SUBSPACE_FILE}, expected one of its modules")
            prefix = f"{PEFT_PREFIX}{module}.share_coefficients"
            coefficients |= {f"{prefix}_out", f"{prefix}_in"}
            k_out, k_in = index.modules[module].num_components
            p = index.settings.pseudo_rank
            stored[module] = (
                expect_tensor(weights_path, tensors, f"{prefix}_out", (k_out, p)),
                expect_tensor(weights_path, tensors, f"{prefix}_in", (k_in, p)),
                _certificate(metrics_path, module, values),
            )
        info = TaskInfo(
            learned_by=metrics["learned_by"],
            target={name: config[name] for name in TARGET_FIELDS if config.get(name) is not None},
            head={
                name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items() if name not in coefficients
            },
            scores=metrics["scores"],
            labels=None if metrics["labels"] is None else tuple(metrics["labels"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{metrics_path}: a field is missing or of the wrong type ({error!r})") from error
    if odd := [name for name in info.head if ".share_coefficients_" in name]:
        raise ValueError(f"{weights_path}: {odd[0]!r} is unexpected, {metrics_path} has no certificate of its module")
    for path in (config_path, weights_path, metrics_path):
        check_file(folder, index, f"{place}/{path.name}")
    return info, stored


def _certificate(path: Path, module: str, values: Mapping[str, Any]) -> list[float]:
    for name in _CERTIFICATE:
        if not isinstance(values[name], (int, float)) or not 0 <= values[name] < float("inf"):
            raise ValueError(f"{path}: {name} of {module!r} is {values[name]!r}, expected a number of 0 or more")
    return [float(values[name]) for name in _CERTIFICATE]


def _layer(
    module: str,
    basis: StoredBasis,
    settings: SubspaceSettings,
    stored: Mapping[str, Mapping[str, tuple[Tensor, Tensor, list[float]]]],
) -> LayerSubspace:
    present = [task for task, modules in stored.items() if module in modules]
    empty = LayerSubspace.empty(*basis.shape, settings.pseudo_rank)
    certificate = torch.tensor([stored[task][module][2] for task in present], dtype=torch.float64).reshape(-1, 4)
    return LayerSubspace(
        tasks=tuple(present),
        basis_out=basis.beta,
        basis_in=basis.alpha,
        coefficients_out=_stack([stored[task][module][0] for task in present], basis.beta, empty.coefficients_out),
        coefficients_in=_stack([stored[task][module][1] for task in present], basis.alpha, empty.coefficients_in),
        records=TaskRecords(*certificate.unbind(1)),
        spectrum_out=basis.spectrum_out.double(),
        spectrum_in=basis.spectrum_in.double(),
    )


def _stack(coefficients: list[Tensor], basis: Tensor, empty: Tensor) -> Tensor:
    return torch.stack(coefficients) if coefficients else empty.new_zeros(0, basis.shape[1], empty.shape[2])
