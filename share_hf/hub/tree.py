"""The tree of a shared subspace, on disk as on the hub.

README.md                                the model card
share_config.json                        index, settings, checksums
subspace.safetensors                     the bases, once for all tasks
adapter_config.json, adapter_model.safetensors   a plain LoRA of the default task, for any PEFT
tasks/<task>/adapter_config.json         peft_type SHARE
tasks/<task>/adapter_model.safetensors   the task's coefficients and head
tasks/<task>/metrics.json                its scores, the norm and drift of each layer, which merges need, and checksums
metrics.json, figures/*.png              the stream's accuracy matrix, drift and spectra
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from ..subspace import LayerSubspace, SubspaceSettings, TaskRecords
from .adapters import PEFT_PREFIX, LoraAdapter, check_head_names, read_target, write_adapter, write_lora
from .basis_file import SUBSPACE_FILE, StoredBasis, basis_tensors, read_bases
from .card import CardOptions, write_card
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
from .metrics import ContinualMetrics
from .state import SubspaceState, TaskInfo, sketch_of


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

# What a task's metrics hold of each layer, in this order.
CERTIFICATE_COLUMNS = ("norm", "rank_error", "drift_bound", "drift_estimate")

_LARGEST = 1e30  # far above any norm of a weight, and its square is a number still

# What in a tree depends on its default task.
ROOT_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, CARD_FILE, INDEX_FILE)

_StoredTask = dict[str, tuple[Tensor, Tensor, list[float]]]


def task_folder(task: str) -> str:
    return f"tasks/{task}"


def write_tree(
    state: SubspaceState,
    folder: Path,
    *,
    card: CardOptions | None = None,
    branches: Mapping[str, float] | None = None,
    draft: bool = False,
) -> None:
    """Write the whole tree, or on a crash none of it. Other files in the folder stay.

    Args:
        state: What to write.
        folder: Where.
        card: How to write the model card, whose text outside the generated part is kept in any case.
        branches: Of `share_config.json`.
        draft: Whether to leave out the figures and the audit, which take longer than all the rest of a small tree.
    """
    card = card or CardOptions()
    if (folder / CARD_FILE).is_file() and (card.existing is None or (folder / INDEX_FILE).is_file()):
        card = replace(card, existing=(folder / CARD_FILE).read_text(encoding="utf-8"))
    if draft:
        card = replace(card, audit=())
    with replacing_folder(folder, TREE_ENTRIES) as scratch:
        write_tensors(scratch / SUBSPACE_FILE, basis_tensors(state.bases()))
        for task in state.tasks:
            _write_task(state, task, scratch)
        write_json(scratch / METRICS_FILE, state.metrics)
        if not draft:
            write_figures(state, scratch / "figures")
        write_root(state, scratch, card=card, branches=branches)


def write_root(
    state: SubspaceState,
    folder: Path,
    *,
    card: CardOptions,
    branches: Mapping[str, float] | None = None,
    unchanged: Mapping[str, str] | None = None,
) -> None:
    """Write what in a tree depends on the default task: root adapter, model card and index. The rest is there.

    Args:
        state: With the default task.
        folder: Of the tree.
        card: How to write the model card.
        branches: Of `share_config.json`.
        unchanged: Checksums of the rest, where they are known.
    """
    if state.root_task is not None:
        write_lora(folder, lora_of(state, state.root_task), state.settings.pseudo_rank)
    write_card(state, folder, card)
    write_index(folder, _index_of(state, folder, branches or {}, unchanged or {}))


def read_tree(folder: Path, tasks: Collection[str] | None = None) -> SubspaceState:
    """Read and check a tree.

    Args:
        folder: Of the tree.
        tasks: Only these of its tasks, and then without the metrics of the stream; the files of others are not
            touched. All if not given.

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
            return _read_whole(folder, tasks)
        except (ValueError, OSError, RuntimeError):
            now = folder.stat() if folder.is_dir() else None
            if now is not None and (now.st_ino, now.st_mtime_ns) == (found.st_ino, found.st_mtime_ns):
                raise  # unlike where a writer replaced the tree meanwhile


def _read_whole(folder: Path, wanted: Collection[str] | None) -> SubspaceState:
    index = read_index(folder)
    expect_tree(folder, index)
    bases = read_bases(folder / SUBSPACE_FILE)
    check_bases(folder / SUBSPACE_FILE, bases, index)
    check_file(folder, index.sha256, SUBSPACE_FILE)
    tasks, stored = {}, {}
    for task in index.tasks:
        if wanted is None or task in wanted:
            tasks[task], stored[task] = _read_task(folder, index, task, bases)
    layers = {module: _layer(module, basis, index.settings, stored) for module, basis in bases.items()}
    metrics: dict[str, Any] = {}
    if wanted is None:
        metrics = read_json(folder / METRICS_FILE)
        check_file(folder, index.sha256, METRICS_FILE)
        _check_metrics(folder / METRICS_FILE, metrics)
    return SubspaceState(
        settings=index.settings,
        layers=layers,
        tasks=tasks,
        base_model_name_or_path=index.base_model_name_or_path,
        default_task=index.default_task if index.default_task in tasks else None,
        metrics=metrics,
        lineage=index.lineage,
    )


def expect_tree(folder: Path, index: TreeIndex) -> None:
    """Refuse what is no tree.

    Raises:
        ValueError: If it is the checkpoint of a model.
    """
    if index.kind != "tree":
        raise ValueError(
            f"{folder}: the checkpoint of a PeftModel, expected a tree of SharedSubspace.save_pretrained; load it "
            "with PeftModel.from_pretrained"
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


def _write_task(state: SubspaceState, task: str, folder: Path) -> None:
    place = folder / task_folder(task)
    write_adapter(place, share_adapter_config(state, task), share_adapter_tensors(state, task))
    info = state.tasks[task]
    certificate = {}
    for module, layer in state.layers_of(task).items():
        i, records = layer.index(task), layer.records
        values = (records.norms, records.rank_errors, records.drift_bounds, records.drift_estimates)
        certificate[module] = [float(value[i]) for value in values]
    content = {
        "learned_by": info.learned_by,
        "scores": dict(info.scores),
        "labels": None if info.labels is None else list(info.labels),
        "dataset": info.dataset,
        "initialization": info.initialization,
        "certificate": certificate,
        "certificate_columns": list(CERTIFICATE_COLUMNS),
        "sha256": {name: sha256_of(place / name) for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)},
    }
    write_json(place / METRICS_FILE, content)


def _index_of(
    state: SubspaceState, folder: Path, branches: Mapping[str, float], unchanged: Mapping[str, str]
) -> TreeIndex:
    rest = [SUBSPACE_FILE, METRICS_FILE, *(f"{task_folder(task)}/{METRICS_FILE}" for task in state.tasks)]
    root = [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME] if state.tasks else []
    sha256 = {name: unchanged.get(name) or sha256_of(folder / name) for name in rest}
    return TreeIndex(
        base_model_name_or_path=state.base_model_name_or_path,
        settings=state.settings,
        modules={name: ModuleEntry(layer.shape, layer.num_components) for name, layer in state.layers.items()},
        tasks=tuple(state.tasks),
        default_task=state.default_task,
        lineage=state.lineage,
        branches=dict(branches),
        sha256={**sha256, **{name: sha256_of(folder / name) for name in root}},
    )


def check_bases(path: Path, bases: Mapping[str, StoredBasis], index: TreeIndex) -> None:
    """Compare the bases in a file with the modules of the index.

    Raises:
        ValueError: If a module is in only one of them, or of another shape.
    """
    if set(bases) != set(index.modules):
        odd = sorted(set(bases) ^ set(index.modules))
        raise ValueError(f"{path}: modules {odd} are in only one of it and {INDEX_FILE}, expected the same in both")
    for module, basis in bases.items():
        found = ModuleEntry(basis.shape, basis.num_components)
        if found != index.modules[module]:
            raise ValueError(f"{path}: {module!r} is {found}, expected {index.modules[module]} as in {INDEX_FILE}")


def _check_metrics(path: Path, metrics: Mapping[str, Any]) -> None:
    if metrics:
        try:
            ContinualMetrics.from_dict(metrics)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: a field is missing or of the wrong type ({error!r})") from error


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


def _read_task(
    folder: Path, index: TreeIndex, task: str, bases: Mapping[str, StoredBasis]
) -> tuple[TaskInfo, _StoredTask]:
    """What is known of a task, and its (ε_out, ε_in, certificate) by module."""
    place = folder / task_folder(task)
    config_path, weights_path, metrics_path = (
        place / name for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, METRICS_FILE)
    )
    config, metrics = read_json(config_path), read_json(metrics_path)
    tensors = read_tensors(weights_path)
    stored: _StoredTask = {}
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
            k_out, k_in = index.modules[module].num_components
            p = index.settings.pseudo_rank
            stored[module] = (
                expect_tensor(weights_path, tensors, f"{prefix}_out", (k_out, p)),
                expect_tensor(weights_path, tensors, f"{prefix}_in", (k_in, p)),
                _certificate(metrics_path, module, values),
            )
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


def _task_info(
    config_path: Path,
    config: Mapping[str, Any],
    metrics_path: Path,
    metrics: Mapping[str, Any],
    head: dict[str, Tensor],
) -> TaskInfo:
    target = read_target(config_path, config)
    check_head_names(config_path.parent / SAFETENSORS_WEIGHTS_NAME, head, target.get("modules_to_save", []))
    labels, dataset, initialization = metrics["labels"], metrics["dataset"], metrics["initialization"]
    for name, value in (("dataset", dataset), ("initialization", initialization)):
        if not isinstance(value, (str, NoneType)):
            raise ValueError(f"{metrics_path}: {name} is {value!r}, expected text or null")
    info = TaskInfo(
        learned_by=str(metrics["learned_by"]),
        target=target,
        head=head,
        scores={name: float(score) for name, score in metrics["scores"].items()},
        labels=None if labels is None else tuple(str(label) for label in labels),
        dataset=dataset,
        initialization=initialization,
    )
    sketch_of(info)
    return info


def _certificate(path: Path, module: str, values: Sequence[Any]) -> list[float]:
    if len(values) != len(CERTIFICATE_COLUMNS):
        raise ValueError(f"{path}: certificate of {module!r} is {values!r}, expected {list(CERTIFICATE_COLUMNS)}")
    for name, value in zip(CERTIFICATE_COLUMNS, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < _LARGEST:
            raise ValueError(f"{path}: {name} of {module!r} is {value!r}, expected a number of 0 or more")
    return [float(value) for value in values]


def _layer(
    module: str,
    basis: StoredBasis,
    settings: SubspaceSettings,
    stored: Mapping[str, _StoredTask],
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
        explained_by_basis=basis.explained_variance,
    )


def _stack(coefficients: list[Tensor], basis: Tensor, empty: Tensor) -> Tensor:
    return torch.stack(coefficients) if coefficients else empty.new_zeros(0, basis.shape[1], empty.shape[2])
