"""The tree of a shared subspace, on disk and on the Hub.

README.md                                the model card
share_config.json                        index, settings, checksums
subspace.safetensors                     the bases, stored once for all tasks
router.safetensors                       what all tasks share for routing inputs to them, if there are routes
adapter_config.json, adapter_model.safetensors   a plain LoRA of the default task, for any PEFT
tasks/<task>/                            one folder per task, see `task_files`
metrics.json, figures/*.png              the stream's accuracy matrix, drift and spectra

The card and the figures are not written here: a tree is complete without them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..state import ContinualMetrics, SubspaceState
from ..subspace import LayerSubspace, SubspaceSettings, TaskRecords, rank_in_layer
from .base_model import base_name
from .basis_file import SUBSPACE_FILE, StoredBasis, bases_of, basis_tensors, fingerprint_of_all, read_bases
from .files import FolderWriter, json_bytes, read_json, tensor_bytes
from .index import (
    INDEX_FILE,
    NO_BRANCHES,
    BranchRecords,
    ModuleEntry,
    TreeIndex,
    check_file,
    index_bytes,
    read_index,
)
from .lora import LoraAdapter, lora_files
from .replacing import reading_whole, replacing_folder
from .router_file import ROUTER_FILE, RouterEntry, read_router, router_bytes
from .task_files import CERTIFICATE_COLUMNS, METRICS_FILE, TASKS_FOLDER, TaskFiles, task_folder
from .task_reader import StoredTask, TaskReader


CARD_FILE = "README.md"
FIGURES_FOLDER = "figures"
FIGURES = ("accuracy_matrix.png", "drift.png", "spectra.png")

# Names at the top of a tree. Anything else in its folder belongs to the owner and stays there.
TREE_ENTRIES = (
    CARD_FILE,
    INDEX_FILE,
    SUBSPACE_FILE,
    ROUTER_FILE,
    CONFIG_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    METRICS_FILE,
    TASKS_FOLDER,
    FIGURES_FOLDER,
)

# Files in a tree that depend on its default task.
ROOT_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, CARD_FILE, INDEX_FILE)

# Files of an adapter: a task, or the plain LoRA at the root of a tree.
ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)

# Files whose checksums are in the metrics of a task.
TASK_FILES = (*ADAPTER_FILES, ROUTER_FILE)


@contextmanager
def writing_tree(
    state: SubspaceState,
    folder: Path,
    *,
    branches: BranchRecords = NO_BRANCHES,
    known: Mapping[str, str] | None = None,
    there: TreeIndex | None = None,
) -> Iterator[FolderWriter]:
    """Write a whole tree when the block ends; a crash writes none of it. Files that are not part of a tree stay.

    Inside the block, the writer's scratch folder holds the whole tree except for the card and the figures.

    Args:
        state: Subspace to write.
        folder: Folder to write to.
        branches: Records in the index about the branches of a repository.
        known: Checksums of files that the folder is known to hold, from an earlier writer.
        there: Same as in `write_root`.
    """
    with replacing_folder(folder, written_files) as scratch:
        writer = FolderWriter(scratch, folder, known)
        bases = bases_of(state.layers)
        writer.put(SUBSPACE_FILE, tensor_bytes(basis_tensors(bases)))
        files = TaskFiles(state, bases)
        for task in state.tasks:
            for name, content in files.of(task).items():
                writer.put(f"{task_folder(task)}/{name}", content)
        writer.put(METRICS_FILE, json_bytes(state.metrics))
        if state.router is not None:
            writer.put(ROUTER_FILE, router_bytes(state.router))
        write_root(state, writer, fingerprint=fingerprint_of_all(bases), branches=branches, there=there)
        yield writer


def written_files(folder: Path) -> set[str]:
    """Return the relative paths of the tree's files in a folder; for a damaged tree, of all possible ones.

    They always include the card, because a new card keeps the text that others wrote into the old one.
    """
    files = {CARD_FILE}
    if not (folder / INDEX_FILE).is_file():
        return files
    files |= {INDEX_FILE, *(f"{FIGURES_FOLDER}/{name}" for name in FIGURES)}
    try:
        index = read_index(folder)
    except ValueError:
        places = [".", *(path.relative_to(folder).as_posix() for path in folder.glob(f"{TASKS_FOLDER}/*"))]
        names = (SUBSPACE_FILE, ROUTER_FILE, METRICS_FILE, *ADAPTER_FILES)
        return files | {(PurePosixPath(place) / name).as_posix() for place in places for name in names}
    return (
        files
        | index.sha256.keys()
        | {f"{task_folder(task)}/{name}" for task in index.tasks for name in ADAPTER_FILES}
        | {f"{task_folder(task)}/{ROUTER_FILE}" for task in index.routed_tasks}
    )


def write_root(
    state: SubspaceState,
    writer: FolderWriter,
    *,
    fingerprint: str,
    branches: BranchRecords = NO_BRANCHES,
    there: TreeIndex | None = None,
) -> None:
    """Write the files of a tree that depend on the default task: root adapter and index. The others must be there.

    Args:
        state: Subspace with the default task.
        writer: Writer that has put the other files.
        fingerprint: Fingerprint of the bases, as in `share_config.json`.
        branches: Records in the index about the branches of a repository.
        there: Index of the tree that will be replaced elsewhere. If its root adapter was computed from the same basis
            and the same task, it stays and is not written: another machine may round the product differently.
    """
    adapter = _root_adapter_of(there, state, writer) if there is not None else {}
    if not adapter and state.root_task is not None:
        for name, content in lora_files(lora_of(state, state.root_task)).items():
            writer.put(name, content)
            adapter[name] = writer.sha256[name]
    rest = [SUBSPACE_FILE, METRICS_FILE, *(f"{task_folder(task)}/{METRICS_FILE}" for task in state.tasks)]
    router = None
    if state.router is not None:
        rest.append(ROUTER_FILE)
        routed = (task for task, info in state.tasks.items() if info.route is not None)
        router = RouterEntry.of(state.router, tuple(routed))
    index = TreeIndex(
        base_model_name_or_path=state.base_model_name_or_path,
        settings=state.settings,
        modules={
            name: ModuleEntry(layer.shape, layer.num_components, state.layouts.get(name))
            for name, layer in state.layers.items()
        },
        tasks=tuple(state.tasks),
        default_task=state.default_task,
        lineage=state.lineage,
        branches=dict(branches.drifts),
        branched=branches.tasks,
        replaced=dict(branches.replaced),
        sha256={**{name: writer.sha256[name] for name in rest}, **adapter},
        fingerprint=fingerprint,
        router=router,
    )
    writer.put(INDEX_FILE, index_bytes(index))


def _root_adapter_of(there: TreeIndex, state: SubspaceState, writer: FolderWriter) -> dict[str, str]:
    """Return the checksums of another tree's root adapter, or none if it differs from that of this state."""
    root = state.root_task
    sources = [SUBSPACE_FILE, f"{task_folder(root)}/{METRICS_FILE}"]  # the metrics have the coefficients' checksum
    same = root == there.root_task and all(writer.sha256.get(name) == there.sha256.get(name) for name in sources)
    return {name: there.sha256[name] for name in ADAPTER_FILES if name in there.sha256} if same else {}


def read_tree(folder: Path, tasks: Collection[str] | None = None) -> SubspaceState:
    """Read and check a tree.

    Args:
        folder: Folder of the tree.
        tasks: Tasks to read, without the metrics of the stream. The files of other tasks are not touched. None means
            all tasks, with these metrics.

    Raises:
        ValueError: If a file is missing, damaged, edited or of a newer format. The message gives the file, the tensor,
            what was found and what was expected.
    """
    return reading_whole(folder, INDEX_FILE, partial(_read_whole, wanted=tasks))


def _read_whole(folder: Path, wanted: Collection[str] | None) -> SubspaceState:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    index = read_index(folder)
    expect_tree(folder, index)
    bases = read_bases(folder / SUBSPACE_FILE)
    check_bases(folder / SUBSPACE_FILE, bases, index)
    names = [task for task in index.tasks if wanted is None or task in wanted]
    reader, tasks = TaskReader(folder, index, bases), {}
    rows = {module: _LayerRows(basis, index.settings, len(names)) for module, basis in bases.items()}
    for task in names:
        tasks[task], stored = reader.read(task)
        for module, of_task in stored.items():
            rows[module].add(task, of_task)
    layers = {module: of_layer.layer() for module, of_layer in rows.items()}
    metrics: Mapping[str, Any] = {}
    if wanted is None:
        content = read_json(folder / METRICS_FILE)
        check_file(folder, index.sha256, METRICS_FILE)
        metrics = _metrics(folder / METRICS_FILE, content)
    router = None
    if index.router is not None:
        router = read_router(folder / ROUTER_FILE, index.router)
        check_file(folder, index.sha256, ROUTER_FILE)
    return SubspaceState(
        settings=index.settings,
        layers=layers,
        tasks=tasks,
        base_model_name_or_path=base_name(index.base_model_name_or_path),
        default_task=index.default_task if index.default_task in tasks else None,
        metrics=metrics,
        lineage=index.lineage,
        layouts={name: entry.layout for name, entry in index.modules.items() if entry.layout is not None},
        router=router,
    )


def expect_tree(folder: Path, index: TreeIndex) -> None:
    """Refuse an index that does not belong to a tree.

    Raises:
        ValueError: If it belongs to the checkpoint of a model.
    """
    if not index.is_tree:
        raise ValueError(
            f"{folder}: the checkpoint of a PeftModel, expected a tree of SharedSubspace.save_pretrained; load it "
            "with PeftModel.from_pretrained"
        )


def lora_of(state: SubspaceState, task: str) -> LoraAdapter:
    """Return a task as a plain LoRA of rank p, or of the task's own rank where it has one."""
    info = state.tasks[task]
    return LoraAdapter(
        updates=state.updates_of(task),
        head=dict(info.head),
        target=dict(info.target),
        layouts=state.layouts,
        base_model_name_or_path=state.base_model_name_or_path,
    )


def check_bases(path: Path, bases: Mapping[str, StoredBasis], index: TreeIndex) -> None:
    """Compare the bases in a file with the modules, the checksum and the fingerprint in the index.

    Raises:
        ValueError: If a module is in only one of them or has another shape, or the bases are not those of the index.
    """
    if set(bases) != set(index.modules):
        odd = sorted(set(bases) ^ set(index.modules))
        raise ValueError(
            f"{path}: modules {odd} are missing here or in {INDEX_FILE}, expected the same modules in both"
        )
    for module, basis in bases.items():
        found = ModuleEntry(basis.shape, basis.num_components, (expected := index.modules[module]).layout)
        if found != expected:
            raise ValueError(f"{path}: {module!r} is {found}, expected {expected} as in {INDEX_FILE}")
    check_file(path.parent, index.sha256, SUBSPACE_FILE)
    if index.has_fingerprints and index.fingerprint != (expected := fingerprint_of_all(bases)):
        raise ValueError(
            f"{path.with_name(INDEX_FILE)}: fingerprint is {index.fingerprint!r}, expected {expected!r}, that of the "
            f"bases in {path.name}"
        )


def _metrics(path: Path, metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the measurements of a stream, as in `ContinualMetrics.as_dict`, with fields of later versions kept."""
    if not metrics:
        return {}
    try:
        return {**metrics, **ContinualMetrics.from_dict(metrics).as_dict()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: a field is missing or of the wrong type ({error!r})") from error


class _LayerRows:
    """Tasks of one layer while they are read. Each is copied to its place at once, so that memory holds it once.

    Args:
        basis: Basis of the layer.
        settings: Settings of the subspace.
        most: Largest number of tasks.
    """

    def __init__(self, basis: StoredBasis, settings: SubspaceSettings, most: int) -> None:
        self._basis, self._tasks, self._certificates = basis, [], []
        p = rank_in_layer(settings.pseudo_rank, basis.shape)
        self._sides = tuple(torch.empty(most, k, p) for k in basis.num_components)
        self._arrays = tuple(side.numpy() for side in self._sides)  # share the memory and are quicker to write to

    def add(self, task: str, stored: StoredTask) -> None:
        """Append a task."""
        coefficients, certificate = stored
        for array, side in zip(self._arrays, coefficients, strict=True):
            array[len(self._tasks)] = side
        self._tasks.append(task)
        self._certificates.append(certificate)

    def layer(self) -> LayerSubspace:
        """Return the layer with the tasks that were added."""
        count, basis = len(self._tasks), self._basis
        out, in_ = (side if len(side) == count else side[:count].clone() for side in self._sides)
        certificates = torch.tensor(self._certificates, dtype=torch.float64).reshape(-1, len(CERTIFICATE_COLUMNS))
        return LayerSubspace(
            tasks=tuple(self._tasks),
            basis_out=basis.beta,
            basis_in=basis.alpha,
            coefficients_out=out,
            coefficients_in=in_,
            records=TaskRecords(*certificates.unbind(1)),
            spectrum_out=basis.spectrum_out.double(),
            spectrum_in=basis.spectrum_in.double(),
            explained_by_basis=basis.explained_variance,
        )
