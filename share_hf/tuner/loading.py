"""What an adapter brings along: the bases it belongs to and the shapes of its head, checked before a model is touched.

The bases come from a subspace in memory, or are found beside the adapter, in the folder or repository that its
configuration was loaded from.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.config import PeftConfigMixin
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor

from ..format.basis_file import SUBSPACE_FILE, BasisFile, StoredBasis, read_bases
from ..format.download import download
from ..format.embeddings import embedding_of
from ..format.files import MAX_JSON_BYTES, expect_tensor, read_pickled_tensors, read_tensors
from ..format.index import INDEX_FILE, ModuleEntry, TreeIndex, read_index
from ..format.lora import PEFT_PREFIX, check_head_names
from ..format.replacing import holds, reading_whole, retrying_when_replaced
from ..format.saved_modules import saved_module_of, saved_names
from ..format.task_files import FINGERPRINT, METRICS_FILE, check_fingerprint, check_task_files, task_folder
from ..format.tree import check_bases
from ..state import Phase
from ..subspace import rank_in_layer
from .config import SHARE, AdapterOrigin, ShareConfig


_COEFFICIENTS = {"share_coefficients_out", "share_coefficients_in"}
_TEMPORARY = {"share_temporary_out", "share_temporary_in"}

# What an adapter may have in a module. Before there is a basis, the adapt phase trains free factors as init does.
_PARTS = {
    Phase.COEFFICIENTS: _COEFFICIENTS | {FINGERPRINT},
    Phase.ADAPT: _COEFFICIENTS | _TEMPORARY,
    Phase.INIT: _TEMPORARY,
}

# What PEFT puts into the names of further copies, where the vocabulary was resized and embeddings are kept whole too.
_COPY = re.compile(r"(?<=\.)(?:modules_to_save|original_module)\.(?=[^.]+$)")

Loaded = TypeVar("Loaded")

# While a loader of PEFT is at work: the weights that were read and checked, by location and subfolder.
_KEPT: ContextVar[dict[tuple[str, str | None], dict[str, Tensor]] | None] = ContextVar("_KEPT", default=None)

_DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "repo_type")


@dataclass(frozen=True)
class StoredAdapter:
    """What belongs to an adapter beside its configuration and its weights.

    Args:
        modules: Shapes of the layers and bases of its subspace, by module; empty for a fresh adapter.
        bases: The bases; empty where the model has them already.
        adapted: The modules that it has coefficients for; None where its configuration says which it adapts.
        head: Shapes of its `modules_to_save` weights, by name in the base model; None if unknown.
        embeddings: Shapes of the base model's embeddings that PEFT saved with it, by name there: it does so where the
            vocabulary was resized, and loads them into the base model. Only in checkpoints of the user's own.
        basis_file: The file that the bases are in; None if they are not from a file with a checksum.
        fingerprints: By module, the fingerprint of the basis that its coefficients belong to, where they have one.
        weights: What was read of its file, by the names there; empty if it is not from a file.
    """

    modules: Mapping[str, ModuleEntry] = field(default_factory=dict)
    bases: Mapping[str, StoredBasis] = field(default_factory=dict)
    adapted: Collection[str] | None = None
    head: Mapping[str, tuple[int, ...]] | None = None
    embeddings: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    basis_file: BasisFile | None = None
    fingerprints: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Weights:
    """The weights of an adapter, checked by name and shape.

    Args:
        tensors: By the names in the file.
        adapted: The modules that it has a part of its phase for.
        head: Shapes of its `modules_to_save` weights, by name in the base model.
        embeddings: As of `StoredAdapter`.
        fingerprints: By module.
    """

    tensors: dict[str, Tensor]
    adapted: set[str] = field(default_factory=set)
    head: dict[str, tuple[int, ...]] = field(default_factory=dict)
    embeddings: dict[str, tuple[int, ...]] = field(default_factory=dict)
    fingerprints: dict[str, Tensor] = field(default_factory=dict)


def stored_adapter(config: ShareConfig, loaded: Mapping[str, BasisFile | None]) -> StoredAdapter:
    """What is stored with an adapter, read and checked; nothing for a fresh one.

    Args:
        config: Its origin says where it is from, or is what was read there.
        loaded: By module of the model, the file that its basis was read from. The bases are not read again if this is
            the file of all modules of the adapter.

    Raises:
        ValueError: If the configuration was loaded from a place without bases, or they or the adapter's weights are
            damaged.
    """
    if isinstance(config.origin, StoredAdapter):
        return config.origin
    if isinstance(config.origin, AdapterOrigin):
        return _read_adapter(config.origin, config, loaded)
    stored = StoredAdapter()
    if config.origin is not None:
        stored = replace(_with_bases(config.origin.bases), adapted=config.origin.adapted)
    return replace(stored, fingerprints=config.fingerprints or {})


def remember_origins() -> None:
    """Make every loader of PEFT configurations note its source on SHARE ones: PEFT's and transformers' own."""
    original = PeftConfigMixin.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(
        cls: type[PeftConfigMixin], pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: object
    ) -> PeftConfigMixin:
        config = original(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if config.peft_type == SHARE:
            config.origin = origin_of(pretrained_model_name_or_path, {**kwargs, "subfolder": subfolder})
        return config

    PeftConfigMixin.from_pretrained = classmethod(from_pretrained)


def origin_of(location: str | os.PathLike, options: Mapping[str, Any]) -> AdapterOrigin:
    """Where a loader that was called with these keyword arguments reads an adapter."""
    download_options = {name: options[name] for name in _DOWNLOAD_OPTIONS if options.get(name) is not None}
    return AdapterOrigin(str(location), options.get("subfolder"), download_options)


def with_fingerprints(weights: Mapping[str, Tensor], origin: AdapterOrigin) -> dict[str, Tensor]:
    """The weights that a loader read, with the fingerprints that files of format version 1 lack.

    Raises:
        ValueError: If there is no basis beside them.
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
    """The fingerprints in a state dict of coefficients, by module.

    Raises:
        ValueError: If coefficients have none.
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


@functools.lru_cache(maxsize=2)  # for folders of a thousand tasks
def _fingerprints_in(path: Path, _: BasisFile) -> dict[str, Tensor]:
    return {module: basis.fingerprint for module, basis in read_bases(path).items()}


def _with_bases(bases: Mapping[str, StoredBasis]) -> StoredAdapter:
    modules = {name: ModuleEntry(basis.shape, basis.num_components) for name, basis in bases.items()}
    return StoredAdapter(modules, bases)


@contextmanager
def keeping_weights() -> Iterator[None]:
    """Keep the weights of adapters that are read in the block: PEFT reads no others than those that were checked."""
    if _KEPT.get() is not None:
        yield
        return
    token = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(token)


def keep_weights(origin: AdapterOrigin, weights: Mapping[str, Tensor]) -> None:
    """Keep the weights of an adapter for the loader that is at work, if there is one."""
    if (kept := _KEPT.get()) is not None:
        kept[origin.location, origin.subfolder] = dict(weights)


def are_kept(origin: AdapterOrigin) -> bool:
    """Whether the weights of an adapter are kept, so that its basis is in the model."""
    return (origin.location, origin.subfolder) in (_KEPT.get() or {})


def kept_weights(origin: AdapterOrigin) -> dict[str, Tensor] | None:
    """The weights that were kept of an adapter, which are let go; None if there are none."""
    return (_KEPT.get() or {}).pop((origin.location, origin.subfolder), None)


def load_whole(origin: AdapterOrigin, load: Callable[[str], Loaded]) -> Loaded:
    """What a loader makes of an adapter, of which others may be saving a new version.

    Args:
        origin: Where the adapter is.
        load: Is given the location, or where its content stands while a writer replaces it.
    """
    with keeping_weights():
        if (root := _root_of(origin)) is None:
            return load(origin.location)
        location = Path(os.path.abspath(origin.location))

        def load_at(place: Path) -> Loaded:
            moved = place != root and location.is_relative_to(root)
            return load(str(place / location.relative_to(root)) if moved else origin.location)

        return retrying_when_replaced(root, INDEX_FILE, load_at)


def in_folder_of_bases(origin: AdapterOrigin) -> bool:
    """Whether an adapter is in a folder of this machine that has bases beside it."""
    return _root_of(origin) is not None


def _root_of(origin: AdapterOrigin) -> Path | None:
    """The folder of this machine that has the bases of an adapter, which is replaced as a whole; None without one."""
    folder = Path(os.path.abspath(origin.folder))
    candidates = (folder, folder.parent, folder.parent.parent)
    return next((candidate for candidate in candidates if holds(candidate, SUBSPACE_FILE)), None)


def _read_adapter(origin: AdapterOrigin, config: ShareConfig, loaded: Mapping[str, BasisFile | None]) -> StoredAdapter:
    """What is stored with an adapter, all of it of one version of its folder or one commit of its repository."""
    if (root := _root_of(origin)) is None:
        return _read_version(_pinned(origin), config, loaded)
    within = Path(os.path.abspath(origin.folder)).relative_to(root)

    def read(place: Path) -> StoredAdapter:
        here = origin if place == root else AdapterOrigin(str(place / within))
        return _read_version(here, config, loaded)

    return reading_whole(root, INDEX_FILE, read)


def _pinned(origin: AdapterOrigin) -> AdapterOrigin:
    """The place of an adapter in a repository at the commit that its revision is now; as it is where there is none."""
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
    """Where the bases of an adapter of a repository may be: in its folder, the parent or the grandparent."""
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
    weights = _check_weights(place, config, stored.modules, index, is_own=is_own)
    stored = replace(
        stored,
        adapted=weights.adapted,
        head=weights.head,
        embeddings=weights.embeddings,
        fingerprints=weights.fingerprints,
        weights=with_fingerprints(weights.tensors, origin),
    )
    if index is not None:
        _check_against_tree(origin, config, place, path.parent, index)
        if weights.adapted and all(loaded.get(module) == stored.basis_file for module in weights.adapted):
            return stored  # whose fingerprints the model compares with those of its bases
        bases = read_bases(path)
        check_bases(path, bases, index)
        stored = replace(stored, bases=bases)
    for module, fingerprint in weights.fingerprints.items():
        check_fingerprint(place, fingerprint, f"{PEFT_PREFIX}{module}.{FINGERPRINT}", stored.bases[module])
    return stored


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
        for candidate in _places_beside(origin):
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


def _weights_file(origin: AdapterOrigin, index: TreeIndex | None) -> Path:
    """The file of an adapter's weights, which may be a pickled one in a checkpoint of the user's own."""
    name = str(PurePosixPath(origin.subfolder or ".") / SAFETENSORS_WEIGHTS_NAME)
    with suppress(EntryNotFoundError):
        if (path := _fetch(origin, name)).is_file():
            return path
    of_tree = index is not None and index.is_tree
    if not of_tree and (path := origin.folder / WEIGHTS_NAME).is_file():
        return path
    raise ValueError(f"{origin.location}: no {name}, expected the coefficients of a task as safetensors")


def _check_weights(
    path: Path,
    config: ShareConfig,
    modules: Mapping[str, ModuleEntry],
    index: TreeIndex | None,
    *,
    is_own: bool,
) -> _Weights:
    """Check every weight of an adapter: whatever has a name of the model's is loaded into it.

    Args:
        path: The file.
        config: The adapter's configuration.
        modules: Shapes of the layers and bases of its subspace.
        index: That of the folder; None if there is none.
        is_own: Whether this is a checkpoint in a folder of the user's, whose embeddings may go into the base model.

    Raises:
        ValueError: Naming a weight that is not one of the adapter's phase or of its `modules_to_save`.
    """
    of_tree = index is not None and index.is_tree
    if of_tree and config.phase != Phase.COEFFICIENTS:
        raise ValueError(f"{path.parent}: phase is {config.phase!r}, expected 'coefficients' for a task of a tree")
    tensors = read_tensors(path) if path.suffix == ".safetensors" else read_pickled_tensors(path)
    weights, saved = _Weights(tensors), saved_names(config.modules_to_save, config.task_type)
    if not of_tree:  # of a model that its user may have cast before saving it
        tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    for name, tensor in tensors.items():
        plain = name.removeprefix(PEFT_PREFIX)
        module, _, part = plain.rpartition(".")
        in_base = _COPY.sub("", plain)
        if is_own and embedding_of(in_base) is not None and f"{PEFT_PREFIX}{in_base}" in tensors:
            if in_base == plain:
                kept = weights.embeddings if saved_module_of(plain, saved) is None else weights.head
                kept[plain.replace(".base_layer.", ".")] = tuple(tensor.shape)
        elif not part.startswith("share_"):
            weights.head[name.removeprefix(PEFT_PREFIX)] = tuple(tensor.shape)
        elif module not in modules:
            raise ValueError(f"{path}: {name!r} is of no module of {SUBSPACE_FILE}, it has {len(modules)}")
        else:
            _check_part(path, tensors, name, part, modules[module], config)
            if part == FINGERPRINT:
                weights.fingerprints[module] = tensor
            else:
                weights.adapted.add(module)
    unmarked = weights.adapted - weights.fingerprints.keys() if config.phase == Phase.COEFFICIENTS else ()
    if unmarked and index is not None and index.has_fingerprints:
        raise ValueError(f"{path}: {sorted(unmarked)[0]!r} has coefficients but no {FINGERPRINT}, expected both")
    check_head_names(path, weights.head, saved)
    return weights


def _check_part(
    path: Path, tensors: Mapping[str, Tensor], name: str, part: str, module: ModuleEntry, config: ShareConfig
) -> None:
    """Check a tensor of a module by what the adapter's phase has there."""
    if part not in _PARTS[config.phase]:
        raise ValueError(
            f"{path}: {name!r} is unexpected in phase {config.phase.value!r}, expected {sorted(_PARTS[config.phase])}"
        )
    side = 0 if part.endswith("_out") else 1
    shape = tuple(tensors[name].shape)
    if part == FINGERPRINT:
        if shape != (8,):
            raise ValueError(f"{path}: {name!r} has shape {shape}, expected (8,)")
    elif part.startswith("share_temporary"):
        if len(shape) != 2 or shape[0] != module.shape[side]:
            raise ValueError(f"{path}: {name!r} has shape {shape}, expected ({module.shape[side]}, any rank)")
    elif config.phase == Phase.COEFFICIENTS:
        p = rank_in_layer(config.pseudo_rank, module.shape)
        expect_tensor(path, tensors, name, (module.num_components[side], p))


def _check_against_tree(
    origin: AdapterOrigin, config: ShareConfig, weights: Path, root: Path, index: TreeIndex
) -> None:
    """Compare the files of a task of a tree with their checksums, and its base model with the tree's."""
    task = next((task for task in index.tasks if root / task_folder(task) == weights.parent), None)
    if task is None:  # a checkpoint of the user's own
        return
    for name in (CONFIG_NAME, METRICS_FILE):  # PEFT may have read the configuration at an older commit
        _fetch(origin, f"{task_folder(task)}/{name}", MAX_JSON_BYTES)
    check_task_files(root, index, task)
    if config.base_model_name_or_path != index.base_model_name_or_path:
        raise ValueError(
            f"{weights.parent}: base_model_name_or_path is {config.base_model_name_or_path!r}, expected "
            f"{index.base_model_name_or_path!r} as in {INDEX_FILE}"
        )
