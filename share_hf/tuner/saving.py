"""Files that a model's `save_pretrained` writes next to its adapters, and files that it must not overwrite."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import cast

import torch
from huggingface_hub import get_full_repo_name
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
)
from peft import PeftConfig
from peft.utils import CONFIG_NAME
from torch import nn

from ..format.basis_file import SUBSPACE_FILE, StoredBasis, basis_tensors, fingerprint_of_all, read_bases
from ..format.download import download
from ..format.files import MAX_JSON_BYTES, FolderWriter, read_json, tensor_bytes
from ..format.index import INDEX_FILE, ModuleEntry, TreeIndex, index_bytes, read_index
from ..format.names import listing
from ..format.replacing import standing_at
from ..format.task_files import TASKS_FOLDER
from .config import SHARE, ShareConfig
from .model import layouts_of, share_layers


def check_no_tree(folder: Path) -> None:
    """Refuse to save adapters into a tree, or over a task in one.

    Raises:
        ValueError: If the folder belongs to a tree. Names the tree.
    """
    of_task = folder.absolute().parent
    trees = [folder, *([of_task.parent] if of_task.name == TASKS_FOLDER else [])]
    for tree in trees:
        if _is_tree(standing_at(tree)):
            raise ValueError(
                f"{folder}: {tree} holds a shared subspace, which the adapters of a model would overwrite; expected "
                "another folder. Save a subspace with SharedSubspace.save_pretrained or ShareTrainer; add an adapter "
                "to one with SharedSubspace.add_adapters"
            )


def check_no_remote_tree(repo_id: str, revision: str | None, token: str | bool | None) -> None:
    """Refuse to push adapters to a repository that holds a tree.

    Raises:
        ValueError: If it holds one. Names the repository.
    """
    try:
        full_id = repo_id if "/" in repo_id else get_full_repo_name(repo_id, token=token)
        index = download(full_id, INDEX_FILE, limit=MAX_JSON_BYTES, revision=revision, token=token)
    except (HfHubHTTPError, LocalEntryNotFoundError, EntryNotFoundError, LocalTokenNotFoundError):
        return  # there is nothing to overwrite, or the push itself reports the error
    if _is_tree(index.parent):
        raise ValueError(
            f"{repo_id}: holds a shared subspace, which the adapters of a model would overwrite; expected another "
            "repository. Push a subspace with SharedSubspace.push_to_hub or ShareTrainer"
        )


def check_same_bases(folder: Path, bases: Mapping[str, StoredBasis], saved: Collection[str]) -> None:
    """Refuse to replace the bases of a checkpoint that other adapters need.

    Args:
        folder: Folder in which the model is about to be saved.
        bases: Bases of the model.
        saved: Names of the adapters that are about to be saved.

    Raises:
        ValueError: If other adapters in the folder need other bases. Names these adapters.
    """
    if not (folder / SUBSPACE_FILE).is_file():
        return
    places = {path.parent.name: path for path in folder.glob(f"*/{CONFIG_NAME}")}
    places["default"] = folder / CONFIG_NAME
    others = [name for name, path in places.items() if name not in saved and _is_share(path)]
    if others and _fingerprint_in(folder) != fingerprint_of_all(bases):
        raise ValueError(
            f"{folder}: holds the adapters {listing(others)} of a model with another basis, which this one would "
            "replace; expected another folder"
        )


def save_bases(model: nn.Module, folder: Path) -> None:
    """Write the bases of a model's tasks to the folder that its adapters are saved in.

    `save_pretrained` of PEFT's and transformers' models does so.

    Args:
        model: Model with tasks.
        folder: Folder that `save_pretrained` was called with.
    """
    config = cast(ShareConfig, next(iter(adapters_of(model).values())))
    writer, bases, layouts = FolderWriter(folder), stored_bases(model), layouts_of(model)
    writer.put(SUBSPACE_FILE, tensor_bytes(basis_tensors(bases)))
    index = TreeIndex(
        kind="checkpoint",
        base_model_name_or_path=config.base_model_name_or_path,
        settings=config.subspace_settings(),
        modules={
            name: ModuleEntry(basis.shape, basis.num_components, layouts.get(name)) for name, basis in bases.items()
        },
        tasks=(),
        sha256=dict(writer.sha256),
        fingerprint=fingerprint_of_all(bases),
    )
    writer.put(INDEX_FILE, index_bytes(index))


def stored_bases(model: nn.Module) -> dict[str, StoredBasis]:
    """Return the bases of a model's layers as `subspace.safetensors` holds them; a model does not know the spectra."""
    return {
        name: StoredBasis(
            beta=layer.share_basis_out,
            alpha=layer.share_basis_in,
            spectrum_out=torch.zeros(layer.share_basis_out.shape[1]),
            spectrum_in=torch.zeros(layer.share_basis_in.shape[1]),
            explained_variance=0.0,
        )
        for name, layer in share_layers(model).items()
    }


def adapters_of(model: nn.Module) -> Mapping[str, PeftConfig]:
    """Return the configurations of the adapters of a model, or of a part of it, such as its language model."""
    configs = (getattr(module, "peft_config", None) for module in model.modules())
    return next(filter(None, configs), {})


def _is_tree(folder: Path) -> bool:
    if not (folder / INDEX_FILE).is_file():
        return False
    try:
        return read_json(folder / INDEX_FILE).get("kind") == "tree"
    except ValueError:  # damaged
        return (folder / TASKS_FOLDER).is_dir()


def _is_share(path: Path) -> bool:
    try:
        return read_json(path).get("peft_type") == SHARE
    except ValueError:  # missing, or not an adapter of this library
        return False


def _fingerprint_in(folder: Path) -> str | None:
    try:
        known = read_index(folder).fingerprint if (folder / INDEX_FILE).is_file() else None
        return known or fingerprint_of_all(read_bases(folder / SUBSPACE_FILE))
    except ValueError:  # damaged, so nothing is lost
        return None
