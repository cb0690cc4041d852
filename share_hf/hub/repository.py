"""A repository as a push sees it: its content, and the requests that change it, one after another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperation,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
)
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError
from huggingface_hub.hf_api import RepoFile
from peft.utils import CONFIG_NAME

from ..card import MAX_CARD_BYTES, read_card
from ..format.download import download
from ..format.files import MAX_JSON_BYTES
from ..format.index import INDEX_FILE, TreeIndex, read_index
from ..format.tree import CARD_FILE, expect_tree
from .answers import answer_to


MAIN = "main"


@dataclass(frozen=True)
class Refs:
    """Branches and tags of a repository, and the commit of each."""

    branches: Mapping[str, str]
    tags: Mapping[str, str]


@dataclass(frozen=True)
class Tip:
    """Content of a commit: the blobs of its files by path, its tree if it has one, and its model card."""

    commit: str
    blobs: Mapping[str, str]
    tree: TreeIndex | None
    card: str | None

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.tree.tasks if self.tree is not None else ()


@dataclass(frozen=True)
class HubRepository:
    """A model repository to write to.

    Args:
        api: Client of the writing user.
        repo_id: Id of the repository.
    """

    api: HfApi
    repo_id: str

    @classmethod
    def create(cls, repo_id: str, *, token: str | bool | None, private: bool | None) -> HubRepository:
        """Return a repository, and create it if it does not exist."""
        api = HfApi(token=token)
        return cls(api, answer_to(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id)

    @classmethod
    def existing(cls, repo_id: str, *, token: str | bool | None) -> HubRepository | None:
        """Return a repository, which may belong to somebody else; None if it does not exist."""
        api = HfApi(token=token)
        return cls(api, repo_id) if answer_to(lambda: api.repo_exists(repo_id)) else None

    def refs(self) -> Refs:
        """Return the current branches and tags.

        Raises:
            ValueError: If there is no branch `main`.
        """
        found = answer_to(lambda: self.api.list_repo_refs(self.repo_id))
        branches, tags = ({ref.name: ref.target_commit for ref in refs} for refs in (found.branches, found.tags))
        if MAIN not in branches:
            raise ValueError(f"{self.repo_id}: has the branches {sorted(branches)}, expected {MAIN!r} among them")
        return Refs(branches, tags)

    def tip(self, commit: str) -> Tip:
        """Return the content of a commit.

        Raises:
            ValueError: If it holds something other than a tree, or its index or card cannot be read.
        """
        files = self._files(commit)
        tree = card = None
        if INDEX_FILE in files:
            folder = self._download(INDEX_FILE, commit, files[INDEX_FILE].size, MAX_JSON_BYTES).parent
            tree = read_index(folder)
            expect_tree(folder, tree)
        elif CONFIG_NAME in files:
            raise ValueError(
                f"{self.repo_id}: holds an adapter that is not a shared subspace, expected another repository"
            )
        if CARD_FILE in files:
            card = read_card(self._download(CARD_FILE, commit, files[CARD_FILE].size, MAX_CARD_BYTES))
        return Tip(commit, {path: file.blob_id for path, file in files.items()}, tree, card)

    def blobs(self, commit: str) -> dict[str, str]:
        """Return the blobs of a commit's files, by path."""
        return {path: file.blob_id for path, file in self._files(commit).items()}

    def index_at(self, commit: str) -> TreeIndex | None:
        """Return the index of the tree in a commit; None if there is none that can be read."""
        try:
            options = {"limit": MAX_JSON_BYTES, "revision": commit, "token": self.api.token}
            return read_index(answer_to(lambda: download(self.repo_id, INDEX_FILE, **options)).parent)
        except (RemoteEntryNotFoundError, ValueError):
            return None

    def commit(
        self,
        branch: str,
        operations: Iterable[CommitOperation],
        *,
        parent: str,
        message: str,
        description: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Commit to a branch that is at `parent`. Files that it has already are left out.

        Raises:
            HfHubHTTPError: With status 412 if the branch is at another commit.
        """
        operations = list(operations)
        return answer_to(
            lambda: self.api.create_commit(
                self.repo_id,
                operations,
                commit_message=message,
                commit_description=description,
                revision=branch,
                create_pr=create_pr,
                parent_commit=parent,
            )
        )

    def upload(self, additions: Iterable[CommitOperationAdd], *, branch: str) -> None:
        """Upload the large files of upcoming commits to the storage, all at once."""
        additions = list(additions)
        answer_to(lambda: self.api.preupload_lfs_files(self.repo_id, additions, revision=branch, free_memory=False))

    def create_branch(self, name: str, commit: str) -> bool:
        """Create a branch at a commit, and return whether it was created; False if the name is taken."""
        try:
            answer_to(lambda: self.api.create_branch(self.repo_id, branch=name, revision=commit))
        except HfHubHTTPError as error:
            if error.response.status_code != HTTPStatus.CONFLICT:
                raise
            return False
        return True

    def delete_branch(self, name: str) -> None:
        """Delete a branch, unless somebody else already did."""
        try:
            answer_to(lambda: self.api.delete_branch(self.repo_id, branch=name))
        except HfHubHTTPError as error:
            if error.response.status_code != HTTPStatus.NOT_FOUND:
                raise

    def create_tag(self, name: str, commit: str) -> None:
        """Tag a commit, unless somebody else already did."""
        answer_to(lambda: self.api.create_tag(self.repo_id, tag=name, revision=commit, exist_ok=True))

    def delete_tag(self, name: str) -> None:
        """Delete a tag, unless somebody else already did."""
        try:
            answer_to(lambda: self.api.delete_tag(self.repo_id, tag=name))
        except HfHubHTTPError as error:
            if error.response.status_code != HTTPStatus.NOT_FOUND:
                raise

    def _files(self, commit: str) -> dict[str, RepoFile]:
        entries = answer_to(lambda: list(self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit)))
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def _download(self, name: str, commit: str, size: int, limit: int) -> Path:
        if size > limit:
            raise ValueError(f"{self.repo_id}: {name} has {size} bytes, expected at most {limit}")
        return Path(answer_to(lambda: hf_hub_download(self.repo_id, name, revision=commit, token=self.api.token)))


def operations(folder: Path, paths: Iterable[str], gone: Iterable[str] = ()) -> list[CommitOperation]:
    """Return the operations of a commit that adds files of a folder and deletes others."""
    return [
        *(CommitOperationAdd(path, folder / path) for path in paths),
        *(CommitOperationDelete(path) for path in gone),
    ]
