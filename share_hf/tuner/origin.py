"""Where an adapter's configuration was loaded from, so that the basis it was saved with can be found."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.config import PeftConfig, PeftConfigMixin
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..hub.adapters import PEFT_PREFIX, check_head_names
from ..hub.basis_file import SUBSPACE_FILE, StoredBasis, read_bases
from ..hub.files import MAX_JSON_BYTES, expect_tensor, read_tensors
from ..hub.index import INDEX_FILE, TreeIndex, check_file, read_index
from ..hub.remote import basis_bytes, check_size_on_hub
from ..hub.tree import METRICS_FILE, check_bases, check_task_files, task_folder


_DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "repo_type")


@dataclass(frozen=True)
class AdapterOrigin:
    """A folder or repository, the adapter's place in it, and how to download from it."""

    location: str
    subfolder: str | None = None
    download_options: dict[str, Any] = field(default_factory=dict)


def known_bases(config: PeftConfig) -> dict[str, StoredBasis]:
    """The bases that belong to a configuration: given in memory, or saved beside it; none for a fresh one.

    The weights of the adapter that was saved there are checked too, before a loader takes them into a model.

    Raises:
        ValueError: If the configuration was loaded from a place without bases, or they or the adapter's weights are
            damaged.
    """
    if (bases := getattr(config, "_share_bases", None)) is not None:
        return bases
    origin = getattr(config, "_share_origin", None)
    if origin is None:
        return {}
    path = find_beside_adapter(origin)
    index = read_index(path.parent) if (path.parent / INDEX_FILE).is_file() else None
    bases = read_bases(path)
    if index is not None:
        check_bases(path, bases, index)
        check_file(path.parent, index.sha256, SUBSPACE_FILE)
    if (weights := _weights_file(origin, index)) is not None:
        of_tree = index is not None and index.kind == "tree"
        config._share_head = _check_weights(weights, config, bases, any_precision=not of_tree)
        if index is not None and (task := _task_of(weights.parent, path.parent, index)) is not None:
            _fetch(origin, f"{task_folder(task)}/{METRICS_FILE}", MAX_JSON_BYTES)
            check_task_files(path.parent, index, task)
            if config.base_model_name_or_path != index.base_model_name_or_path:
                raise ValueError(
                    f"{weights.parent}: base_model_name_or_path is {config.base_model_name_or_path!r}, expected "
                    f"{index.base_model_name_or_path!r} as in {INDEX_FILE}"
                )
    return bases


def stored_head(config: PeftConfig) -> Mapping[str, tuple[int, ...]] | None:
    """Shapes of the `modules_to_save` weights beside a configuration, by name in the base model; None if unknown."""
    return getattr(config, "_share_head", None)


def attach_bases(config: PeftConfig, bases: Mapping[str, StoredBasis]) -> None:
    """Let a configuration made in this process bring these bases along, as one loaded from a folder does."""
    config._share_bases = dict(bases)


def find_beside_adapter(origin: AdapterOrigin) -> Path:
    """`subspace.safetensors` in the adapter's folder, its parent or its grandparent, downloaded if need be.

    Raises:
        ValueError: If there is none.
    """
    folder = Path(origin.location, origin.subfolder or "")
    if folder.is_dir():
        for candidate in (folder, folder.absolute().parent, folder.absolute().parent.parent):
            if (path := candidate / SUBSPACE_FILE).is_file():
                return path
    elif not Path(origin.location).is_dir():
        place = PurePosixPath(origin.subfolder or ".")
        for candidate in dict.fromkeys((place, place.parent, place.parent.parent)):
            try:
                index = _fetch(origin, str(candidate / INDEX_FILE), MAX_JSON_BYTES)
                limit = basis_bytes(read_index(index.parent))
                return _fetch(origin, str(candidate / SUBSPACE_FILE), limit)
            except EntryNotFoundError:
                continue
    raise ValueError(f"{folder}: no {SUBSPACE_FILE} in this folder, its parent or its grandparent")


def _fetch(origin: AdapterOrigin, name: str, limit: int | None = None) -> Path:
    """A file of the place that an adapter is from, downloaded if it is a repository and no larger than it may be."""
    if Path(origin.location).is_dir():
        return Path(origin.location, name)
    if limit is not None:
        check_size_on_hub(origin.location, name, limit, origin.download_options)
    return Path(hf_hub_download(origin.location, name, **origin.download_options))


def _weights_file(origin: AdapterOrigin, index: TreeIndex | None) -> Path | None:
    """The file of an adapter's weights; None for a pickled one of the user's own checkpoint, which PEFT reads."""
    name = str(PurePosixPath(origin.subfolder or ".") / SAFETENSORS_WEIGHTS_NAME)
    with suppress(EntryNotFoundError):
        if (path := _fetch(origin, name)).is_file():
            return path
    of_tree = index is not None and index.kind == "tree"
    if not of_tree and Path(origin.location, origin.subfolder or "", WEIGHTS_NAME).is_file():
        return None
    raise ValueError(f"{origin.location}: no {name}, expected the coefficients of a task as safetensors")


def _check_weights(
    path: Path, config: PeftConfig, bases: Mapping[str, StoredBasis], *, any_precision: bool
) -> dict[str, tuple[int, ...]] | None:
    """Check the weights of an adapter; shapes of its head, None for a checkpoint in the middle of a phase."""
    tensors = read_tensors(path)
    if any_precision:  # of a model that its user cast before saving it
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
    if config.phase != "coefficients":
        return None
    head = {}
    for name, tensor in tensors.items():
        module, found, side = name.removeprefix(PEFT_PREFIX).rpartition(".share_coefficients_")
        if not found:
            head[name.removeprefix(PEFT_PREFIX)] = tuple(tensor.shape)
        elif module not in bases:
            raise ValueError(f"{path}: {name!r} is of no module of {SUBSPACE_FILE}, it has {len(bases)}")
        else:
            k_out, k_in = bases[module].num_components
            expect_tensor(path, tensors, name, (k_out if side == "out" else k_in, config.pseudo_rank))
    check_head_names(path, head, config.modules_to_save or [])
    return head


def _task_of(folder: Path, root: Path, index: TreeIndex) -> str | None:
    """The task whose folder in a tree this is; None for the folder of anything else."""
    return next((task for task in index.tasks if root / task_folder(task) == folder), None)


def remember_origins() -> None:
    """Make every loader of PEFT configurations leave a note of its source on SHARE ones.

    One wrapper serves PEFT's loaders and transformers' own; the note is no field, so it is never saved.
    """
    original = PeftConfigMixin.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(
        cls: type[PeftConfigMixin], pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfigMixin:
        config = original(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if config.peft_type == "SHARE":
            options = {name: kwargs[name] for name in _DOWNLOAD_OPTIONS if kwargs.get(name) is not None}
            config._share_origin = AdapterOrigin(str(pretrained_model_name_or_path), subfolder, options)
        return config

    PeftConfigMixin.from_pretrained = classmethod(from_pretrained)
