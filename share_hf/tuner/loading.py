"""What an adapter brings along: the bases it belongs to and the shapes of its head, checked before a model is touched.

The bases come from a subspace in memory, or are found beside the adapter, in the folder or repository that its
configuration was loaded from.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from huggingface_hub.errors import EntryNotFoundError
from peft.config import PeftConfigMixin
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..format.basis_file import SUBSPACE_FILE, BasisFile, StoredBasis, read_bases
from ..format.download import download
from ..format.files import MAX_JSON_BYTES, expect_tensor, read_tensors
from ..format.index import INDEX_FILE, ModuleEntry, TreeIndex, check_file, read_index
from ..format.lora import PEFT_PREFIX, check_head_names
from ..format.saved_modules import saved_names
from ..format.task_files import METRICS_FILE, check_task_files, task_folder
from ..format.tree import check_bases
from ..state import Phase
from ..subspace import rank_in_layer
from .config import SHARE, AdapterOrigin, GivenBases, ShareConfig


_DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "repo_type")


@dataclass(frozen=True)
class StoredAdapter:
    """What belongs to an adapter beside its configuration and its weights.

    Args:
        modules: Shapes of the layers and bases of its subspace, by module; empty for a fresh adapter.
        bases: The bases; empty where the model has them already.
        adapted: The modules that it has coefficients for; None where its configuration says which it adapts.
        head: Shapes of its `modules_to_save` weights, by name in the base model; None if unknown.
        basis_file: The file that the bases are in; None if they are not from a file with a checksum.
    """

    modules: Mapping[str, ModuleEntry] = field(default_factory=dict)
    bases: Mapping[str, StoredBasis] = field(default_factory=dict)
    adapted: Collection[str] | None = None
    head: Mapping[str, tuple[int, ...]] | None = None
    basis_file: BasisFile | None = None


def stored_adapter(config: ShareConfig, loaded: Mapping[str, BasisFile | None]) -> StoredAdapter:
    """What is stored with an adapter, read and checked; nothing for a fresh one.

    Args:
        config: Its origin says where it is from.
        loaded: By module of the model, the file that its basis was read from. The bases are not read again if this is
            the file of all modules of the adapter.

    Raises:
        ValueError: If the configuration was loaded from a place without bases, or they or the adapter's weights are
            damaged.
    """
    if isinstance(config.origin, GivenBases):
        return replace(_with_bases(config.origin.bases), adapted=config.origin.adapted)
    if config.origin is None:
        return StoredAdapter()
    return _read_adapter(config.origin, config, loaded)


def remember_origins() -> None:
    """Make every loader of PEFT configurations note its source on SHARE ones: PEFT's and transformers' own."""
    original = PeftConfigMixin.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(
        cls: type[PeftConfigMixin], pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: object
    ) -> PeftConfigMixin:
        config = original(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if config.peft_type == SHARE:
            options = {name: kwargs[name] for name in _DOWNLOAD_OPTIONS if kwargs.get(name) is not None}
            config.origin = AdapterOrigin(str(pretrained_model_name_or_path), subfolder, options)
        return config

    PeftConfigMixin.from_pretrained = classmethod(from_pretrained)


def _with_bases(bases: Mapping[str, StoredBasis]) -> StoredAdapter:
    modules = {name: ModuleEntry(basis.shape, basis.num_components) for name, basis in bases.items()}
    return StoredAdapter(modules, bases)


def _read_adapter(origin: AdapterOrigin, config: ShareConfig, loaded: Mapping[str, BasisFile | None]) -> StoredAdapter:
    path = _find_beside_adapter(origin)
    index = read_index(path.parent) if (path.parent / INDEX_FILE).is_file() else None
    if index is None:
        stored = _with_bases(read_bases(path))
    else:
        checksum = index.sha256.get(SUBSPACE_FILE, "")
        stored = StoredAdapter(index.modules, basis_file=BasisFile.at(path, checksum))
    adapted = None
    if (weights := _weights_file(origin, index)) is not None:
        of_tree = index is not None and index.is_tree
        adapted, head = _check_weights(weights, config, stored.modules, of_tree=of_tree)
        stored = replace(stored, adapted=adapted, head=head)
        if index is not None:
            _check_against_tree(origin, config, weights, path.parent, index)
    if index is None or (adapted and all(loaded.get(module) == stored.basis_file for module in adapted)):
        return stored
    bases = read_bases(path)
    check_bases(path, bases, index)
    check_file(path.parent, index.sha256, SUBSPACE_FILE)
    return replace(stored, bases=bases)


def _find_beside_adapter(origin: AdapterOrigin) -> Path:
    """`subspace.safetensors` in the adapter's folder, its parent or its grandparent, downloaded if need be.

    Raises:
        ValueError: If there is none.
    """
    folder = origin.folder
    if folder.is_dir():
        for candidate in (folder, folder.absolute().parent, folder.absolute().parent.parent):
            if (path := candidate / SUBSPACE_FILE).is_file():
                return path
    elif not Path(origin.location).is_dir():
        place = PurePosixPath(origin.subfolder or ".")
        for candidate in dict.fromkeys((place, place.parent, place.parent.parent)):
            try:
                index = _fetch(origin, str(candidate / INDEX_FILE), MAX_JSON_BYTES)
                return _fetch(origin, str(candidate / SUBSPACE_FILE), read_index(index.parent).basis_bytes())
            except EntryNotFoundError:
                continue
    raise ValueError(f"{folder}: no {SUBSPACE_FILE} in this folder, its parent or its grandparent")


def _fetch(origin: AdapterOrigin, name: str, limit: int | None = None) -> Path:
    """A file of the place that an adapter is from, downloaded if it is a repository and no larger than it may be."""
    if Path(origin.location).is_dir():
        return Path(origin.location, name)
    return download(origin.location, name, limit=limit, **origin.download_options)


def _weights_file(origin: AdapterOrigin, index: TreeIndex | None) -> Path | None:
    """The file of an adapter's weights; None for a pickled one of the user's own checkpoint, which PEFT reads."""
    name = str(PurePosixPath(origin.subfolder or ".") / SAFETENSORS_WEIGHTS_NAME)
    with suppress(EntryNotFoundError):
        if (path := _fetch(origin, name)).is_file():
            return path
    of_tree = index is not None and index.is_tree
    if not of_tree and (origin.folder / WEIGHTS_NAME).is_file():
        return None
    raise ValueError(f"{origin.location}: no {name}, expected the coefficients of a task as safetensors")


def _check_weights(
    path: Path, config: ShareConfig, modules: Mapping[str, ModuleEntry], *, of_tree: bool
) -> tuple[set[str] | None, dict[str, tuple[int, ...]] | None]:
    """Check the weights of an adapter.

    Returns:
        The modules that it adapts and the shapes of its head; both None for a checkpoint in the middle of a phase.
    """
    tensors = read_tensors(path)
    if not of_tree:  # of a model that its user may have cast before saving it
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
    if config.phase != Phase.COEFFICIENTS:
        return None, None
    adapted, head = set(), {}
    for name, tensor in tensors.items():
        module, found, side = name.removeprefix(PEFT_PREFIX).rpartition(".share_coefficients_")
        if not found:
            head[name.removeprefix(PEFT_PREFIX)] = tuple(tensor.shape)
        elif module not in modules:
            raise ValueError(f"{path}: {name!r} is of no module of {SUBSPACE_FILE}, it has {len(modules)}")
        else:
            k_out, k_in = modules[module].num_components
            p = rank_in_layer(config.pseudo_rank, modules[module].shape)
            expect_tensor(path, tensors, name, (k_out if side == "out" else k_in, p))
            adapted.add(module)
    check_head_names(path, head, saved_names(config.modules_to_save, config.task_type))
    return adapted, head


def _check_against_tree(
    origin: AdapterOrigin, config: ShareConfig, weights: Path, root: Path, index: TreeIndex
) -> None:
    """Compare the files of a task of a tree with their checksums, and its base model with the tree's."""
    task = next((task for task in index.tasks if root / task_folder(task) == weights.parent), None)
    if task is None:  # a checkpoint of the user's own
        return
    _fetch(origin, f"{task_folder(task)}/{METRICS_FILE}", MAX_JSON_BYTES)
    check_task_files(root, index, task)
    if config.base_model_name_or_path != index.base_model_name_or_path:
        raise ValueError(
            f"{weights.parent}: base_model_name_or_path is {config.base_model_name_or_path!r}, expected "
            f"{index.base_model_name_or_path!r} as in {INDEX_FILE}"
        )
