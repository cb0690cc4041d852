"""Read trees in Hub repositories at a single commit, downloading no more of them than is asked for."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
from huggingface_hub.hf_api import RepoFile
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers.utils import logging

from ..card import MAX_CARD_BYTES, read_card
from ..format.basis_file import SUBSPACE_FILE
from ..format.download import download
from ..format.files import MAX_JSON_BYTES
from ..format.index import INDEX_FILE, TreeIndex, read_index
from ..format.names import listing
from ..format.replacing import standing_at
from ..format.router_file import ROUTER_FILE
from ..format.task_files import METRICS_FILE, task_folder
from ..format.tree import CARD_FILE, expect_tree, read_tree
from ..state import SubspaceState
from .answers import answer_to


logger = logging.get_logger(__name__)


_PATHS_A_REQUEST = 500
# Up to this number, files are downloaded one by one: the listing that starts a larger download may outweigh them.
_FEW_FILES = 8


def is_local(place: str | os.PathLike) -> bool:
    """Return whether this means a folder, existing or not, rather than a repository."""
    path = Path(place)
    named = path.is_absolute() or isinstance(place, Path) or os.fspath(place).startswith(".")
    return named or standing_at(path).exists()


@dataclass(frozen=True)
class RemoteTree:
    """A tree in a Hub repository at one commit, with some of its files in the cache.

    Args:
        repo_id: Id of the repository.
        commit: Commit of the requested revision when the tree was opened.
        folder: Folder of the commit in the cache.
        index: Content of the tree's `share_config.json`.
        download_options: Options `token`, `cache_dir` and `local_files_only`.
        task: Task that was asked for. None means that the tree was asked for.
    """

    repo_id: str
    commit: str
    folder: Path
    index: TreeIndex
    download_options: Mapping[str, Any]
    task: str | None = None

    @classmethod
    def open(
        cls,
        repo_id: str,
        revision: str | None = None,
        *,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> RemoteTree:
        """Download the index of a tree. A task that has no branch of its own is looked up on `main`.

        Raises:
            ValueError: If there is no such revision, or no tree in it.
        """
        options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        try:
            tree = cls._open(repo_id, revision, options)
        except (RevisionNotFoundError, LocalEntryNotFoundError) as error:
            tree = cls._holding(repo_id, revision, options)
            if tree is None:
                raise _unopened(error, repo_id, revision, options) from error
        return replace(tree, task=revision if revision in tree.index.tasks else None)

    @classmethod
    def _open(cls, repo_id: str, revision: str | None, options: Mapping[str, Any]) -> RemoteTree:
        try:
            path = answer_to(lambda: download(repo_id, INDEX_FILE, limit=MAX_JSON_BYTES, revision=revision, **options))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise ValueError(
                f"{repo_id}: no {INDEX_FILE} at revision {revision or 'main'!r}, expected a shared subspace"
            ) from error
        index = read_index(path.parent)
        expect_tree(path.parent, index)
        return cls(repo_id, path.parent.name, path.parent, index, options)

    @classmethod
    def _holding(cls, repo_id: str, task: str | None, options: Mapping[str, Any]) -> RemoteTree | None:
        """Return the tree of `main` if it has the task, else None."""
        if task is None:
            return None
        try:
            tree = cls._open(repo_id, None, options)
        except (ValueError, OSError):
            return None
        return tree if task in tree.index.tasks else None

    def read(self, tasks: Collection[str] | None = None) -> SubspaceState:
        """Read what was downloaded, as `format.tree.read_tree` does. A task that was asked for becomes the default."""
        state = read_tree(self.folder, tasks)
        return state if self.task is None else replace(state, default_task=self.task)

    def fetch(self, tasks: Collection[str] | None = None) -> None:
        """Download the bases and these tasks. None means all tasks, with the metrics of the stream and the card.

        Raises:
            ValueError: If a file is missing, or larger than it can be. Nothing is downloaded in this case.
        """
        files = [SUBSPACE_FILE] if tasks is not None else [SUBSPACE_FILE, METRICS_FILE]
        if self.index.router is not None:
            files.append(ROUTER_FILE)
        routed = set(self.index.routed_tasks)
        for task in self.index.tasks if tasks is None else tasks:
            names = (CONFIG_NAME, METRICS_FILE, SAFETENSORS_WEIGHTS_NAME, *([ROUTER_FILE] if task in routed else ()))
            files += [f"{task_folder(task)}/{name}" for name in names]
        missing = [name for name in files if not (self.folder / name).is_file()]
        wants_card = tasks is None and not (self.folder / CARD_FILE).is_file()
        if not missing and not wants_card:
            return
        if not self.download_options["local_files_only"] and not constants.HF_HUB_OFFLINE:
            sizes = self._sizes([*missing, CARD_FILE])
            self._check_sizes(missing, sizes)
            if wants_card and sizes.get(CARD_FILE, MAX_CARD_BYTES + 1) <= MAX_CARD_BYTES:
                missing.append(CARD_FILE)
        try:
            if len(missing) <= _FEW_FILES:
                for name in missing:
                    answer_to(partial(hf_hub_download, self.repo_id, name, **self._of_commit))
            else:
                answer_to(partial(snapshot_download, self.repo_id, allow_patterns=missing, **self._of_commit))
        except LocalEntryNotFoundError as error:
            raise LocalEntryNotFoundError(
                f"{self.repo_id}: {missing[0]} is not in the cache, and the Hub is offline or cannot be reached"
            ) from error

    @property
    def card(self) -> str | None:
        """Model card. None if there is none that can be read, or it was not downloaded."""
        path = self.folder / CARD_FILE
        try:
            return read_card(path) if path.is_file() else None
        except ValueError as error:
            logger.warning("%s: the model card is left out (%s).", self.repo_id, error)
            return None

    @property
    def _of_commit(self) -> dict[str, Any]:
        return {"revision": self.commit, **self.download_options}

    def _sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Return the sizes in bytes of those files that exist."""
        api, sizes = HfApi(token=self.download_options["token"]), {}
        for start in range(0, len(names), _PATHS_A_REQUEST):
            paths = list(names[start : start + _PATHS_A_REQUEST])
            entries = answer_to(partial(api.get_paths_info, self.repo_id, paths, revision=self.commit))
            sizes |= {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
        return sizes

    def _check_sizes(self, names: Iterable[str], sizes: Mapping[str, int]) -> None:
        """Refuse missing files and files larger than such a file can be, before anything is downloaded."""
        for name in names:
            if (size := sizes.get(name)) is None:
                raise ValueError(f"{self.repo_id}: {name} is missing, but {INDEX_FILE} lists it")
            limit = self._limits().get(name, MAX_JSON_BYTES)
            if size > limit and not name.endswith(SAFETENSORS_WEIGHTS_NAME):
                raise ValueError(f"{self.repo_id}: {name} has {size} bytes, expected at most {limit}")

    def _limits(self) -> dict[str, int]:
        """Return the largest possible sizes in bytes of the files whose size follows from the index."""
        router = {} if self.index.router is None else {ROUTER_FILE: self.index.router.most_bytes()}
        return {SUBSPACE_FILE: self.index.basis_bytes(), **router}


def _unopened(error: Exception, repo_id: str, revision: str | None, options: Mapping[str, Any]) -> Exception:
    """Return the error to raise if a revision, or its index, does not exist."""
    if isinstance(error, LocalEntryNotFoundError):
        known = _cached_revisions(repo_id, options["cache_dir"])
        if revision is None or not known or revision in known:
            return error
    return ValueError(_unknown_revision(repo_id, revision, options))


def _unknown_revision(repo_id: str, revision: str | None, options: Mapping[str, Any]) -> str:
    """Return the message for somebody who asked for a revision that does not exist."""
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
    """Return the tasks of a repository, and the names of its branches and tags."""
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
