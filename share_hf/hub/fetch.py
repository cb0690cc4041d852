"""Trees in hub repositories, read at one commit and no more of them than is asked for."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, scan_cache_dir, snapshot_download
from huggingface_hub.errors import (
    CacheNotFound,
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RevisionNotFoundError,
)
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..format.basis_file import SUBSPACE_FILE
from ..format.download import download
from ..format.files import MAX_JSON_BYTES
from ..format.index import INDEX_FILE, TreeIndex, read_index
from ..format.names import listing
from ..format.replacing import standing_at
from ..format.task_files import METRICS_FILE, task_folder
from ..format.tree import CARD_FILE, expect_tree


_PATHS_A_REQUEST = 500
# Up to here one by one: the listing that a download of many begins with may be larger than they are.
_FEW_FILES = 8


def is_local(place: str | os.PathLike) -> bool:
    """Whether this means a folder, there or not, rather than a repository."""
    path = Path(place)
    named = path.is_absolute() or isinstance(place, Path) or os.fspath(place).startswith(".")
    return named or standing_at(path).exists()


@dataclass(frozen=True)
class RemoteTree:
    """A tree in a hub repository at one commit, of which some files are in the cache.

    Args:
        repo_id: The repository.
        commit: What its revision was when the tree was opened.
        folder: The commit's folder in the cache.
        index: Its `share_config.json`.
        download_options: `token`, `cache_dir` and `local_files_only`.
    """

    repo_id: str
    commit: str
    folder: Path
    index: TreeIndex
    download_options: Mapping[str, Any]

    @classmethod
    def open(
        cls,
        repo_id: str,
        revision: str | None = None,
        *,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> RemoteTree:
        """Download the index of a tree.

        Raises:
            ValueError: If there is no such revision, or no tree in it.
        """
        options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        try:
            path = download(repo_id, INDEX_FILE, limit=MAX_JSON_BYTES, revision=revision, **options)
        except RevisionNotFoundError as error:
            raise ValueError(_unknown_revision(repo_id, revision, options)) from error
        except LocalEntryNotFoundError as error:
            known = _cached_revisions(repo_id, cache_dir)
            if revision is not None and known and revision not in known:
                raise ValueError(_unknown_revision(repo_id, revision, options)) from error
            raise
        except EntryNotFoundError as error:
            raise ValueError(
                f"{repo_id}: no {INDEX_FILE} at revision {revision or 'main'!r}, expected a shared subspace"
            ) from error
        index = read_index(path.parent)
        expect_tree(path.parent, index)
        return cls(repo_id, path.parent.name, path.parent, index, options)

    def fetch(self, tasks: Collection[str] | None = None) -> None:
        """Download the bases and these tasks, or all of them, the metrics of the stream and the card.

        Raises:
            ValueError: If a file is missing, or far larger than it should be; nothing was downloaded then.
        """
        files = [SUBSPACE_FILE]
        if tasks is None:
            files.append(METRICS_FILE)
            with suppress(EntryNotFoundError):  # which also says that it is not in the cache
                hf_hub_download(self.repo_id, CARD_FILE, revision=self.commit, **self.download_options)
        for task in self.index.tasks if tasks is None else tasks:
            names = (CONFIG_NAME, METRICS_FILE, SAFETENSORS_WEIGHTS_NAME)
            files += [f"{task_folder(task)}/{name}" for name in names]
        missing = [name for name in files if not (self.folder / name).is_file()]
        if not missing:
            return
        if not self.download_options["local_files_only"] and not constants.HF_HUB_OFFLINE:
            self._check_sizes(missing)
        try:
            if len(missing) <= _FEW_FILES:
                for name in missing:
                    hf_hub_download(self.repo_id, name, revision=self.commit, **self.download_options)
            else:
                snapshot_download(self.repo_id, revision=self.commit, allow_patterns=missing, **self.download_options)
        except LocalEntryNotFoundError as error:
            raise LocalEntryNotFoundError(
                f"{self.repo_id}: {missing[0]} is not in the cache, and the hub is offline or cannot be reached"
            ) from error

    @property
    def card(self) -> str | None:
        """The model card, None where there is none or it was not downloaded."""
        path = self.folder / CARD_FILE
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def _check_sizes(self, files: Collection[str]) -> None:
        """Refuse, before anything is downloaded, what cannot be what it is called."""
        api, names = HfApi(token=self.download_options["token"]), list(files)
        sizes = {}
        for start in range(0, len(names), _PATHS_A_REQUEST):
            paths = names[start : start + _PATHS_A_REQUEST]
            for entry in api.get_paths_info(self.repo_id, paths, revision=self.commit):
                sizes[entry.path] = getattr(entry, "size", None)
        for name in names:
            if (size := sizes.get(name)) is None:
                raise ValueError(f"{self.repo_id}: {name} is missing, but {INDEX_FILE} lists it")
            limit = self.index.basis_bytes() if name == SUBSPACE_FILE else MAX_JSON_BYTES
            if size > limit and not name.endswith(SAFETENSORS_WEIGHTS_NAME):
                raise ValueError(f"{self.repo_id}: {name} has {size} bytes, expected at most {limit}")


def _unknown_revision(repo_id: str, revision: str | None, options: Mapping[str, Any]) -> str:
    """What to tell somebody who asked for a revision that does not exist."""
    message = f"{repo_id}: no revision {revision!r}"
    try:
        tasks, known = _revisions(repo_id, options)
    except (HfHubHTTPError, OSError):
        return message
    names = {name.casefold(): name for name in known}
    near = [names[name] for name in difflib.get_close_matches((revision or "").casefold(), names, n=3, cutoff=0.5)]
    if near:
        return f"{message}, did you mean {' or '.join(repr(name) for name in near)}? It has the tasks {listing(tasks)}"
    return f"{message}, expected one of its tasks {listing(tasks)} or of its revisions {listing(known)}"


def _revisions(repo_id: str, options: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Tasks of a repository, and names of its branches and tags."""
    if options["local_files_only"] or constants.HF_HUB_OFFLINE:
        known = _cached_revisions(repo_id, options["cache_dir"])
    else:
        refs = HfApi(token=options["token"]).list_repo_refs(repo_id)
        known = [ref.name for ref in (*refs.branches, *refs.tags)]
    try:
        tasks = list(RemoteTree.open(repo_id, **options).index.tasks)
    except (ValueError, OSError):
        tasks = [name for name in known if name != "main" and not name.startswith("step-")]
    return tasks, known


def _cached_revisions(repo_id: str, cache_dir: str | Path | None) -> list[str]:
    try:
        cached = scan_cache_dir(cache_dir).repos
    except CacheNotFound:
        return []
    return sorted(ref for repo in cached if (repo.repo_id, repo.repo_type) == (repo_id, "model") for ref in repo.refs)
