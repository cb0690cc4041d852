"""Cache of a subspace's tasks as plain LoRAs in a folder, written when they are requested by name.

A LoRA is stored in `<task>-<key>`, where the key depends on the checksums of the basis and of the task. A subspace
that has changed therefore yields new places, and files that a server has open stay as they are. A task that a merge
did not change keeps its place.

A server remembers the places it was given, and reads them again whenever its own cache of LoRAs has dropped one.
Nothing is therefore removed unless a maximum number of LoRAs is given. Then a new LoRA displaces the least recently
used one, but never one that was handed out in the last ten minutes, which a server may not have read yet.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import torch
from huggingface_hub import cached_assets_path
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers.utils import logging

from ..format.base_model import base_name, is_same_model
from ..format.basis_file import SUBSPACE_FILE
from ..format.files import FolderWriter, json_bytes, read_json
from ..format.index import INDEX_FILE, TreeIndex, read_index
from ..format.lock import holding
from ..format.lora import LoraAdapter, lora_files
from ..format.names import listing
from ..format.replacing import holds, reading_whole, replacing_folder
from ..format.task_files import task_folder
from ..format.tree import ADAPTER_FILES, expect_tree, lora_of, read_tree
from ..hub.fetch import RemoteTree, is_local
from ..subspace import LowRankUpdate


logger = logging.get_logger(__name__)

SUBSPACE_VARIABLE = "SHARE_HF_SUBSPACE"
CACHE_VARIABLE = "SHARE_HF_SERVING_CACHE"
BASE_MODEL_VARIABLE = "SHARE_HF_BASE_MODEL"
DTYPE_VARIABLE = "SHARE_HF_SERVING_DTYPE"
MOST_VARIABLE = "SHARE_HF_SERVING_MAX_LORAS"

ServingDtype = Literal["float32", "bfloat16", "float16"]

# Describes a LoRA, and what was left out of it, in its folder. It is written together with the LoRA, in one step.
_NOTE_FILE = "share_hf.json"
_FILES = (*ADAPTER_FILES, _NOTE_FILE)
# Part of every key: a LoRA that is written in a different way gets a different place.
_WRITING = "1"
_PLACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}-[0-9a-f]{32}")
_KEPT_SECONDS = 600  # for which a LoRA is kept after it was handed out, so that the server can read it

# A task of the subspace, or of a revision of its repository. Any other name is not a task of this cache.
_NAME = re.compile(r"(?P<task>[A-Za-z0-9][A-Za-z0-9_-]{0,63})(?:@(?P<revision>[A-Za-z0-9](?:[\w-]|\.(?!\.)){0,127}))?")

_same_model = lru_cache(maxsize=64)(is_same_model)  # cached because it may compare the weights of two folders


@dataclass(frozen=True)
class LoraCache:
    """
    The tasks of one subspace as plain LoRAs in a folder, safe for use by any number of threads and processes at once.

    The first request for a task reads the bases of all layers and the coefficients of this one task, but nothing of
    the other tasks. A later request reads only the index. Nothing stays in memory between requests.

    Args:
        subspace (`str`): Folder or Hub id of the subspace.
        folder (`Path`): Folder for the LoRAs.
        base_model (`str`, *optional*):
            Name of the base model on the server, if it differs from the subspace's name for it, such as the name of a
            quantized copy. Not checked.
        dtype (`Literal["float32", "bfloat16", "float16"]`, *optional*, defaults to `"float32"`):
            Type of the factors on disk. A server that computes in a smaller type rounds them to it in any case.
        most (`int`, *optional*):
            Number of LoRAs above which the least recently used ones are removed. None means that nothing is removed.
            A server reads a LoRA again from the place that it was given once, so choose a number larger than that of
            the LoRAs requested between two restarts of the server.

    Raises:
        ValueError: If the type is unknown, or the number is below one.
    """

    subspace: str
    folder: Path
    base_model: str | None = None
    dtype: ServingDtype = "float32"
    most: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in get_args(ServingDtype):
            raise ValueError(f"dtype is {self.dtype!r}, expected one of {list(get_args(ServingDtype))}")
        if self.most is not None and self.most < 1:
            raise ValueError(f"most is {self.most}, expected None, or at least one LoRA")

    @classmethod
    def from_environment(cls) -> LoraCache | None:
        """
        Create the cache that the environment asks for; None if `SHARE_HF_SUBSPACE` is not set.

        `SHARE_HF_SERVING_CACHE` is its folder (`share_hf/loras` in the assets cache of huggingface_hub if not set),
        `SHARE_HF_BASE_MODEL` its `base_model`, `SHARE_HF_SERVING_DTYPE` its `dtype`, `SHARE_HF_SERVING_MAX_LORAS` its
        `most`.

        Raises:
            ValueError: If the subspace is a folder without a subspace, the type is unknown, or the number is invalid.
        """
        subspace = os.path.expanduser(os.environ.get(SUBSPACE_VARIABLE, "").strip())
        if not subspace:
            return None
        if is_local(subspace) and not holds(Path(subspace), INDEX_FILE):
            raise ValueError(
                f"{SUBSPACE_VARIABLE} is {subspace!r}, which has no {INDEX_FILE}, expected the folder of a shared "
                "subspace, or the id of a repository"
            )
        folder = os.environ.get(CACHE_VARIABLE, "").strip()
        most = os.environ.get(MOST_VARIABLE, "").strip()
        if most and not (most.isdecimal() and int(most)):
            raise ValueError(f"{MOST_VARIABLE} is {most!r}, expected a number of LoRAs, at least 1")
        return cls(
            subspace,
            Path(folder).expanduser().absolute() if folder else cached_assets_path("share_hf", namespace="loras"),
            os.environ.get(BASE_MODEL_VARIABLE, "").strip() or None,
            os.environ.get(DTYPE_VARIABLE, "").strip() or "float32",
            int(most) if most else None,
        )

    def folder_of(self, name: str, base_model: str) -> Path | None:
        """
        Return the folder of a task's LoRA, which is written if it does not exist. Heads are left out, with a warning.

        Args:
            name (`str`): Name of a task, or `task@revision` for a task in a revision of the repository, such as
                `mrpc@step-0007-mrpc`.
            base_model (`str`): Name or folder of the base model that is served.

        Returns:
            `Path`: Folder of the LoRA; None if the name is not a task of this subspace.

        Raises:
            ValueError: If the subspace belongs to another base model, there is no such revision, a file of the
                subspace is damaged, or the task adapts a convolution or has entries that the type cannot hold.
            OSError: If the Hub cannot be reached, or the folder cannot be written.
        """
        asked = _NAME.fullmatch(name)
        if asked is None:
            return None
        task, revision = asked["task"], asked["revision"]
        tree = self._tree(revision)
        index = tree.index if isinstance(tree, RemoteTree) else _index_in(tree)
        if task not in index.tasks:
            return None
        self._check_base(index, base_model)
        if not _is_handed_out(place := self._place(task, index)):
            index, adapter = _read(tree, index, task)
            self._write(place := self._place(task, index), name, adapter)
            self._remove_oldest()
        _warn_of_what_is_left_out(place, name)
        return place

    def _tree(self, revision: str | None) -> RemoteTree | Path:
        if not is_local(self.subspace):
            return RemoteTree.open(self.subspace, revision)
        if revision is not None:
            raise ValueError(
                f"revision {revision!r} was asked for, but {self.subspace} is a local folder, which has no revisions"
            )
        return Path(self.subspace)

    def _place(self, task: str, index: TreeIndex) -> Path:
        parts = {
            name: checksum
            for name, checksum in index.sha256.items()
            if name == SUBSPACE_FILE or name.startswith(f"{task_folder(task)}/")
        }
        content = json.dumps([_WRITING, self.dtype, index.base_model_name_or_path, sorted(parts.items())])
        return self.folder / f"{task}-{hashlib.sha256(content.encode()).hexdigest()[:32]}"

    def _check_base(self, index: TreeIndex, served: str) -> None:
        if self.base_model is not None:
            ours = self.base_model
        elif (ours := base_name(index.base_model_name_or_path)) is None:
            return
        if not _same_model(base_name(ours) or "", base_name(served) or ""):
            raise ValueError(
                f"{self.subspace} belongs to base model {ours!r}, but {served!r} is served; if both are the same "
                f"model, set {BASE_MODEL_VARIABLE}={served}"
            )

    def _write(self, place: Path, name: str, adapter: LoraAdapter) -> None:
        files: Mapping[str, bytes] = {
            **lora_files(_without_head(adapter, self.dtype)),
            _NOTE_FILE: json_bytes({"subspace": self.subspace, "task": name, "left_out": sorted(adapter.head)}),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with holding(place):
            if _is_handed_out(place):  # another worker was faster
                return
            with replacing_folder(place, lambda _: _FILES) as scratch:
                writer = FolderWriter(scratch)
                for file, content in files.items():
                    writer.put(file, content)

    def _remove_oldest(self) -> None:
        """Remove surplus LoRAs, except those that were handed out recently."""
        if self.most is None:
            return
        places = [place for place in self.folder.iterdir() if _PLACE.fullmatch(place.name)]
        used = {place: _last_use(place) for place in places if any((place / name).is_file() for name in _FILES)}
        for place in sorted(used, key=used.get)[: max(0, len(used) - self.most)]:
            try:
                with holding(place):
                    if time.time() - _last_use(place) > _KEPT_SECONDS:
                        logger.info("Removing %s, because there are more than %d LoRAs.", place, self.most)
                        _remove(place)
            except OSError as error:  # for example, others own it; the requested LoRA is available all the same
                logger.warning(
                    "%s: could not be removed (%s), though there are more than %d LoRAs.", place, error, self.most
                )


def _is_handed_out(place: Path) -> bool:
    """Return whether a LoRA exists. It then counts as used now, so it is not removed before a server has read it."""
    if not (note := place / _NOTE_FILE).is_file():
        return False
        # The lock excludes processes about to remove it. Where nobody may write, nobody removes it either.
    with suppress(OSError), holding(place):
        os.utime(note)
    return note.is_file()


def _last_use(place: Path) -> float:
    """Return when a LoRA was last handed out, or read if the file system records that; 0 if it is half removed."""
    try:
        return max((place / _NOTE_FILE).stat().st_mtime, (place / SAFETENSORS_WEIGHTS_NAME).stat().st_atime)
    except FileNotFoundError:
        return 0.0


def _remove(place: Path) -> None:
    """Remove a LoRA: first the note, without which it counts as missing, and no files that are not part of it."""
    for name in (_NOTE_FILE, *ADAPTER_FILES):
        (place / name).unlink(missing_ok=True)
    with suppress(OSError):  # the folder contains something else
        place.rmdir()


def _index_in(folder: Path) -> TreeIndex:
    index = reading_whole(folder, INDEX_FILE, read_index)
    expect_tree(folder, index)
    return index


def _read(tree: RemoteTree | Path, index: TreeIndex, task: str) -> tuple[TreeIndex, LoraAdapter]:
    """Return a task's LoRA and the index of the very tree it comes from: a folder may have been replaced since."""
    if isinstance(tree, RemoteTree):
        tree.fetch([task])
        state = tree.read([task])
    else:
        index, state = reading_whole(tree, INDEX_FILE, lambda at: (read_index(at), read_tree(at, [task])))
    if task not in state.tasks:
        raise ValueError(f"{tree}: task {task!r} was removed while it was read")
    adapter = lora_of(state, task)
    for module in adapter.updates:
        if (layout := adapter.layouts.get(module)) is not None and layout.kind == "convolution":
            raise ValueError(f"task {task!r} adapts {module!r} of kind {layout}, which no LoRA server loads")
    return index, adapter


def _without_head(adapter: LoraAdapter, dtype: ServingDtype) -> LoraAdapter:
    """Return the LoRA without its head, with factors of this type."""
    target = {name: value for name, value in adapter.target.items() if name != "modules_to_save"}
    updates = {}
    for module, update in adapter.updates.items():
        factors = [factor.to(getattr(torch, dtype)) for factor in (update.out_factor, update.in_factor)]
        if not all(factor.isfinite().all() for factor in factors):
            raise ValueError(f"{module!r} has factors with entries too large for {dtype}")
        updates[module] = LowRankUpdate(*factors)
    return replace(adapter, head={}, target=target, updates=updates)


def _warn_of_what_is_left_out(place: Path, name: str) -> None:
    if left_out := read_json(place / _NOTE_FILE)["left_out"]:
        logger.warning(
            "%s: the task has weights of its own for %s, which are left out; those of the base model are served.",
            name,
            listing(left_out),
        )
