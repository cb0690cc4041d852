"""Data stored with an adapter: its bases and the shapes of its head, checked before a model is changed.

The bases come from a subspace in memory, or are found next to the adapter, in the folder or repository from which its
configuration was loaded.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TypeVar

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor

from ..format.basis_file import SUBSPACE_FILE, BasisFile, StoredBasis, read_bases
from ..format.download import download
from ..format.files import MAX_JSON_BYTES
from ..format.index import INDEX_FILE, ModuleEntry, TreeIndex, read_index
from ..format.lora import PEFT_PREFIX
from ..format.replacing import holds, reading_whole, retrying_when_replaced
from ..format.task_files import FINGERPRINT, METRICS_FILE, check_fingerprint, check_task_files, task_folder
from ..format.tree import check_bases
from .config import AdapterOrigin, ShareConfig
from .ranks import ranks_of
from .weights import check_weights


Loaded = TypeVar("Loaded")

# Weights that were read and checked, by location and subfolder, while a loader of PEFT is at work.
_KEPT: ContextVar[dict[tuple[str, str | None], dict[str, Tensor]] | None] = ContextVar("_KEPT", default=None)


@dataclass(frozen=True)
class StoredAdapter:
    """Data stored with an adapter, besides its configuration.

    Args:
        modules: Shapes of the layers and bases of its subspace, by module; empty for a fresh adapter.
        bases: Bases by module; empty if the model has them already.
        adapted: Modules that it has coefficients for. None means that its configuration says which ones it adapts.
        head: Shapes of its `modules_to_save` weights, by name in the base model; None if unknown.
        embeddings: Shapes of the base model's embeddings that PEFT saved with the adapter, by name in the base model.
            PEFT does so if the vocabulary was resized, and loads them into the base model. Only in the user's own
            checkpoints.
        basis_file: File that the bases are in; None if they do not come from a file with a checksum.
        fingerprints: Fingerprints of the basis that its coefficients belong to, by module, where they have one.
        weights: Tensors read from its file, by name in the file; empty if it does not come from a file.
        ranks: Ranks of its coefficients, by module, where these are at hand.
    """

    modules: Mapping[str, ModuleEntry] = field(default_factory=dict)
    bases: Mapping[str, StoredBasis] = field(default_factory=dict)
    adapted: Collection[str] | None = None
    head: Mapping[str, tuple[int, ...]] | None = None
    embeddings: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    basis_file: BasisFile | None = None
    fingerprints: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)


def stored_adapter(config: ShareConfig, loaded: Mapping[str, BasisFile | None]) -> StoredAdapter:
    """Read and check what is stored with an adapter; nothing for a fresh one.

    Args:
        config: Configuration of the adapter, whose origin says where the adapter is, or is what was read there.
        loaded: File that each basis of the model was read from, by module. The bases are not read again if this is the
            file of all modules of the adapter.

    Raises:
        ValueError: If the configuration was loaded from a place without bases, or the bases or the adapter's weights
            are damaged.
    """
    if isinstance(config.origin, StoredAdapter):
        return config.origin
    if isinstance(config.origin, AdapterOrigin):
        return _read_adapter(config.origin, config, loaded)
    stored = StoredAdapter()
    if config.origin is not None:
        stored = replace(_with_bases(config.origin.bases), adapted=config.origin.adapted)
    return replace(stored, fingerprints=config.fingerprints or {}, ranks=config.ranks or {})


@contextmanager
def advising(origin: AdapterOrigin, *, beside_tasks: bool = False) -> Iterator[None]:
    """Make a loader of PEFT that fails within the block say where the tasks of a subspace are.

    Args:
        origin: Place that the loader reads.
        beside_tasks: Whether the model has tasks, to which the root of a subspace, a plain LoRA, cannot be added.

    Raises:
        ValueError: If the loader raises one, and the place is the root of a subspace or names a task as a revision.
    """
    try:
        yield
    except ValueError as error:
        task = origin.download_options.get("revision")
        if beside_tasks and origin.subfolder is None and _tree_at(origin) is not None:
            raise ValueError(
                f"{origin.location}: is a whole subspace, expected a task of the subspace that the model has: the "
                "root of a subspace is a plain LoRA, its tasks are at subfolder='tasks/<task>'"
            ) from error
        if task is not None and not Path(origin.location).is_dir() and _is_task_on_main(origin, task):
            raise ValueError(
                f"{origin.location}: has no revision {task!r}, expected that of a branch, a tag or a commit: the task "
                f"{task!r} has no branch of its own, it is at subfolder='tasks/{task}' of main"
            ) from error
        raise


def _is_task_on_main(origin: AdapterOrigin, task: str) -> bool:
    """Return whether a revision is missing and is the name of a task in the repository's newest tree."""
    try:
        _fetch(replace(origin, subfolder=None), INDEX_FILE, MAX_JSON_BYTES)
    except RevisionNotFoundError:
        options = {name: value for name, value in origin.download_options.items() if name != "revision"}
        tree = _tree_at(AdapterOrigin(origin.location, download_options=options))
        return tree is not None and task in tree.tasks
    except (ValueError, OSError):
        return False
    return False


def _tree_at(origin: AdapterOrigin) -> TreeIndex | None:
    """Return the index of a tree at the top of a folder or repository; None if there is none."""
    try:
        index = read_index(_fetch(origin, INDEX_FILE, MAX_JSON_BYTES).parent)
    except (ValueError, OSError):
        return None
    return index if index.is_tree else None


def with_fingerprints(weights: Mapping[str, Tensor], origin: AdapterOrigin) -> dict[str, Tensor]:
    """Return the weights that a loader read, with the fingerprints that files of format version 1 lack.

    Raises:
        ValueError: If there is no basis next to the weights.
    """
    modules = {name.removesuffix(".share_coefficients_out") for name in weights if name.endswith("_coefficients_out")}
    adapting = {name.removesuffix(".share_temporary_out") for name in weights if name.endswith("_temporary_out")}
    unmarked = {module for module in modules - adapting if f"{module}.{FINGERPRINT}" not in weights}
    if not unmarked:
        return dict(weights)
    path = _find_beside_adapter(origin)
    found = _fingerprints_in(path, BasisFile.at(path, ""))
    missing = {f"{module}.{FINGERPRINT}": found[module.removeprefix(PEFT_PREFIX)] for module in unmarked}
    return {**weights, **missing}


def fingerprints_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the fingerprints in a state dict of coefficients, by module.

    Raises:
        ValueError: If coefficients have no fingerprint.
    """
    found = {}
    for name in weights:
        module, is_coefficients, suffix = name.partition(".share_coefficients_out")
        if is_coefficients and f"{module}.share_temporary_out{suffix}" not in weights:
            fingerprint = f"{module}.{FINGERPRINT}{suffix}"
            if fingerprint not in weights:
                raise ValueError(
                    f"{name!r} comes without {fingerprint!r}, which says what basis it belongs to: expected the "
                    "weights as PEFT's get_peft_model_state_dict gives them, or as `share-hf upgrade` writes those of "
                    "a tree of format version 1"
                )
            found[module.removeprefix(PEFT_PREFIX)] = weights[fingerprint]
    return found


@functools.lru_cache(maxsize=2)  # speeds up folders with a thousand tasks
def _fingerprints_in(path: Path, _: BasisFile) -> dict[str, Tensor]:
    return {module: basis.fingerprint for module, basis in read_bases(path).items()}


def _with_bases(bases: Mapping[str, StoredBasis]) -> StoredAdapter:
    modules = {name: ModuleEntry(basis.shape, basis.num_components) for name, basis in bases.items()}
    return StoredAdapter(modules, bases)


@contextmanager
def keeping_weights() -> Iterator[None]:
    """Keep the weights of adapters read in the block, so that PEFT reads exactly the weights that were checked."""
    if _KEPT.get() is not None:
        yield
        return
    token = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(token)


def keep_weights(origin: AdapterOrigin, weights: Mapping[str, Tensor]) -> None:
    """Keep the weights of an adapter for the loader at work, if there is one."""
    if (kept := _KEPT.get()) is not None:
        kept[origin.location, origin.subfolder] = dict(weights)


def are_kept(origin: AdapterOrigin) -> bool:
    """Return whether the weights of an adapter are kept, so that its basis is in the model."""
    return (origin.location, origin.subfolder) in (_KEPT.get() or {})


def kept_weights(origin: AdapterOrigin) -> dict[str, Tensor] | None:
    """Return the weights kept for an adapter and forget them; None if there are none."""
    return (_KEPT.get() or {}).pop((origin.location, origin.subfolder), None)


def load_whole(origin: AdapterOrigin, load: Callable[[str], Loaded]) -> Loaded:
    """Run a loader on an adapter that others may be replacing by a new version.

    Args:
        origin: Place of the adapter.
        load: Loader, called with the location, or with the place of its content while a writer replaces it.
    """
    with keeping_weights():
        if (root := _root_of(origin)) is None:
            return load(origin.location)
        location = Path(os.path.abspath(origin.location))

        def load_at(place: Path) -> Loaded:
            moved = place != root and location.is_relative_to(root)
            return load(str(place / location.relative_to(root)) if moved else origin.location)

        return retrying_when_replaced(root, INDEX_FILE, load_at)


def _root_of(origin: AdapterOrigin) -> Path | None:
    """The local folder that has an adapter's bases and is replaced as a whole; None if there is none."""
    folder = Path(os.path.abspath(origin.folder))
    candidates = (folder, folder.parent, folder.parent.parent)
    return next((candidate for candidate in candidates if holds(candidate, SUBSPACE_FILE)), None)


def _read_adapter(origin: AdapterOrigin, config: ShareConfig, loaded: Mapping[str, BasisFile | None]) -> StoredAdapter:
    """Read what is stored with an adapter, all from one version of its folder or one commit of its repository."""
    if (root := _root_of(origin)) is None:
        return _read_version(_pinned(origin), config, loaded)
    within = Path(os.path.abspath(origin.folder)).relative_to(root)

    def read(place: Path) -> StoredAdapter:
        here = origin if place == root else AdapterOrigin(str(place / within))
        return _read_version(here, config, loaded)

    return reading_whole(root, INDEX_FILE, read)


def _pinned(origin: AdapterOrigin) -> AdapterOrigin:
    """Pin an adapter in a repository to the commit of its revision; without such a commit, return it unchanged."""
    if Path(origin.location).is_dir():
        return origin
    for candidate in _places_beside(origin):
        with suppress(EntryNotFoundError):
            found = hf_hub_download(
                origin.location, str(candidate / INDEX_FILE), dry_run=True, **origin.download_options
            )
            return replace(origin, download_options={**origin.download_options, "revision": found.commit_hash})
    return origin


def _places_beside(origin: AdapterOrigin) -> list[PurePosixPath]:
    """Folders of a repository that may hold an adapter's bases: its own, the parent or the grandparent."""
    place = PurePosixPath(origin.subfolder or ".")
    return list(dict.fromkeys((place, place.parent, place.parent.parent)))


def _read_version(origin: AdapterOrigin, config: ShareConfig, loaded: Mapping[str, BasisFile | None]) -> StoredAdapter:
    path = _find_beside_adapter(origin)
    index = read_index(path.parent) if (path.parent / INDEX_FILE).is_file() else None
    if index is None:
        stored = _with_bases(read_bases(path))
    else:
        checksum = index.sha256.get(SUBSPACE_FILE, "")
        stored = StoredAdapter(index.modules, basis_file=BasisFile.at(path, checksum))
    place = _weights_file(origin, index)
    is_own = Path(origin.location).is_dir() and not (index is not None and index.is_tree)
    weights = check_weights(place, config, stored.modules, index, is_own=is_own)
    stored = replace(
        stored,
        adapted=weights.adapted,
        head=weights.head,
        embeddings=weights.embeddings,
        fingerprints=weights.fingerprints,
        weights=with_fingerprints(weights.tensors, origin),
        ranks=ranks_of(weights.tensors),
    )
    if index is not None:
        _check_against_tree(origin, config, place, path.parent, index)
        if weights.adapted and all(loaded.get(module) == stored.basis_file for module in weights.adapted):
            return stored  # the model compares its fingerprints with those of the model's bases
        bases = read_bases(path)
        check_bases(path, bases, index)
        stored = replace(stored, bases=bases)
    for module, fingerprint in weights.fingerprints.items():
        check_fingerprint(place, fingerprint, f"{PEFT_PREFIX}{module}.{FINGERPRINT}", stored.bases[module])
    return stored


def _find_beside_adapter(origin: AdapterOrigin) -> Path:
    """Find `subspace.safetensors` in the adapter's folder, its parent or its grandparent, downloading it if needed.

    Raises:
        ValueError: If there is none.
    """
    folder = origin.folder
    if folder.is_dir():
        for candidate in (folder, folder.absolute().parent, folder.absolute().parent.parent):
            if (path := candidate / SUBSPACE_FILE).is_file():
                return path
    elif not Path(origin.location).is_dir():
        for candidate in _places_beside(origin):
            try:
                index = _fetch(origin, str(candidate / INDEX_FILE), MAX_JSON_BYTES)
                return _fetch(origin, str(candidate / SUBSPACE_FILE), read_index(index.parent).basis_bytes())
            except EntryNotFoundError:
                continue
    raise ValueError(f"{folder}: no {SUBSPACE_FILE} in this folder, its parent or its grandparent")


def _fetch(origin: AdapterOrigin, name: str, limit: int | None = None) -> Path:
    """Return a file from an adapter's location, downloaded within its size limit if the location is a repository."""
    if Path(origin.location).is_dir():
        return Path(origin.location, name)
    return download(origin.location, name, limit=limit, **origin.download_options)


def _weights_file(origin: AdapterOrigin, index: TreeIndex | None) -> Path:
    """Find the file of an adapter's weights, which may be a pickled one in the user's own checkpoint."""
    name = str(PurePosixPath(origin.subfolder or ".") / SAFETENSORS_WEIGHTS_NAME)
    with suppress(EntryNotFoundError):
        if (path := _fetch(origin, name)).is_file():
            return path
    of_tree = index is not None and index.is_tree
    if not of_tree and (path := origin.folder / WEIGHTS_NAME).is_file():
        return path
    raise ValueError(f"{origin.location}: no {name}, expected the coefficients of a task as safetensors")


def _check_against_tree(
    origin: AdapterOrigin, config: ShareConfig, weights: Path, root: Path, index: TreeIndex
) -> None:
    """Compare the files of a task in a tree with their checksums, and its base model with the tree's."""
    task = next((task for task in index.tasks if root / task_folder(task) == weights.parent), None)
    if task is None:  # the user's own checkpoint
        return
    for name in (CONFIG_NAME, METRICS_FILE):  # PEFT may have read the configuration from an older commit
        _fetch(origin, f"{task_folder(task)}/{name}", MAX_JSON_BYTES)
    check_task_files(root, index, task)
    if config.base_model_name_or_path != index.base_model_name_or_path:
        raise ValueError(
            f"{weights.parent}: base_model_name_or_path is {config.base_model_name_or_path!r}, expected "
            f"{index.base_model_name_or_path!r} as in {INDEX_FILE}"
        )
