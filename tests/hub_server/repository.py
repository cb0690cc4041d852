"""What the Hub stores of a model: immutable commits, branches, tags, pull requests, and large files by SHA-256."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatch
from functools import cached_property
from typing import Any

from .cards import card_problems


MAX_REGULAR_BYTES = 10 * 1024**2
README = "README.md"
GIT_ATTRIBUTES = ".gitattributes"
_SAMPLE_BYTES = 512  # number of bytes of a file that a client sends to ask how to upload it
_LFS_RULE = "filter=lfs diff=lfs merge=lfs -text"
_LFS_SUFFIXES = (
    "7z arrow bin bz2 ckpt gz h5 joblib msgpack npy npz onnx parquet pickle pkl pt pth safetensors tar tgz zip"
)
_REF_NAME = re.compile(r"(?!/|.*//|.*\.\.|.*@\{|refs/|[0-9a-f]{40}$)[^\s~^:?*\[\\\x00-\x1f]+(?<!/)(?<!\.)(?<!\.lock)")
_SHORT_OID = re.compile(r"[0-9a-f]{7,40}")


class HubError(Exception):
    """A request that is refused.

    Args:
        status: Status of the answer.
        message: Message in the body and in `X-Error-Message`.
        code: Value of `X-Error-Code`.
        headers: Additional headers.
        body: Additional fields of the body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        **body: Any,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = headers or {}
        self.body = {"error": message, **body}


@dataclass(frozen=True)
class Blob:
    """Content of a file. For a file in LFS, Git holds a pointer to it."""

    content: bytes
    in_lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        header = "version https://git-lfs.github.com/spec/v1"
        return f"{header}\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()

    @cached_property
    def oid(self) -> str:
        """Hash of the content, as `git hash-object` computes it."""
        data = self.pointer if self.in_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.in_lfs else self.oid


@dataclass(frozen=True, eq=False)
class Commit:
    """A state of all files, and how it came about."""

    files: Mapping[str, Blob]
    title: str
    description: str = ""
    author: str = "system"
    parent: Commit | None = None
    date: datetime = field(default_factory=lambda: datetime.now(timezone.utc))

    @cached_property
    def oid(self) -> str:
        parent = self.parent.oid if self.parent else None
        told = (parent, self.oid_of(""), self.title, self.description, self.author, self.date.isoformat())
        return hashlib.sha1(json.dumps(told).encode()).hexdigest()

    def history(self) -> Iterator[Commit]:
        """Yield this commit and those before it, the newest first."""
        commit: Commit | None = self
        while commit is not None:
            yield commit
            commit = commit.parent

    def oid_of(self, path: str) -> str | None:
        """Return Git's hash of a file or a folder (`""` is the root), or None if there is neither."""
        if path in self.files:
            return self.files[path].oid
        inside = sorted((name, blob.oid) for name, blob in self.files.items() if _is_inside(name, path))
        return hashlib.sha1(json.dumps(inside).encode()).hexdigest() if inside or not path else None

    def paths_in(self, folder: str, recursive: bool) -> list[str]:
        """Return the files and folders in a folder."""
        found = set()
        for name in self.files:
            if _is_inside(name, folder):
                parts = name.split("/")
                depth = len(folder.split("/")) if folder else 0
                ends = range(depth + 1, len(parts) + 1) if recursive else [depth + 1]
                found.update("/".join(parts[:end]) for end in ends)
        return sorted(found)

    def last_change_of(self, path: str) -> Commit:
        """Return the commit that made a file or a folder what it is in this commit."""
        oid, last = self.oid_of(path), self
        for commit in self.history():
            if commit.oid_of(path) != oid:
                break
            last = commit
        return last

    def keeps_in_lfs(self, path: str, content: bytes, size: int | None = None) -> bool:
        """Return whether a file belongs in LFS: by the rules of `.gitattributes`, by its size, or as a binary file.

        Args:
            path: Path in the repository.
            content: Content of the file, or its beginning.
            size: Number of bytes in the file, if `content` is only its beginning.
        """
        if (len(content) if size is None else size) > MAX_REGULAR_BYTES or b"\0" in content[:_SAMPLE_BYTES]:
            return True
        return _has_lfs_rule(self.files, path)


class Repository:
    """A model repository. It starts with one commit that holds `.gitattributes`."""

    def __init__(self, repo_id: str, *, private: bool = False, gated: bool = False) -> None:
        self.id = repo_id
        self.private = private
        self.gated = gated
        self.granted: set[str] = set()  # users who may read it although it is gated
        self.branches: dict[str, Commit] = {}
        self.tags: dict[str, Commit] = {}
        self.pull_requests: dict[str, Commit] = {}  # by refs/pr/1
        self.lfs: dict[str, bytes] = {}  # by SHA-256
        self._commits: dict[str, Commit] = {}
        self._lock = threading.RLock()
        rules = "".join(f"*.{suffix} {_LFS_RULE}\n" for suffix in _LFS_SUFFIXES.split())
        self.branches["main"] = self._keep(Commit({GIT_ATTRIBUTES: Blob(rules.encode())}, "initial commit"))

    @property
    def namespace(self) -> str:
        return self.id.rpartition("/")[0]

    def commit_at(self, revision: str) -> Commit:
        """Return the commit for a branch, a tag, a pull request, or a commit id of 7 digits or more.

        Raises:
            HubError: 404 if there is none.
        """
        for refs in (self.branches, self.tags, self.pull_requests):
            if revision in refs:
                return refs[revision]
        if _SHORT_OID.fullmatch(revision):
            matches = [commit for oid, commit in self._commits.items() if oid.startswith(revision)]
            if len(matches) == 1:
                return matches[0]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def lfs_objects_of(self, path: str) -> set[str]:
        """Return the SHA-256 of everything that a file has ever been, on any branch, while it was in LFS."""
        blobs = (commit.files.get(path) for commit in self._commits.values())
        return {blob.sha256 for blob in blobs if blob is not None and blob.in_lfs}

    def write(
        self, files: Mapping[str, bytes | None], *, revision: str = "main", title: str = "Write files"
    ) -> Commit:
        """Commit files as a client would, without HTTP; None deletes a file."""
        operations: list[tuple[str, dict[str, Any]]] = []
        for path, content in files.items():
            if content is None:
                operations.append(("deletedFile", {"path": path}))
            elif self.commit_at(revision).keeps_in_lfs(path, content):
                oid = Blob(content).sha256
                self.lfs[oid] = content
                operations.append(("lfsFile", {"path": path, "oid": oid, "size": len(content)}))
            else:
                operations.append(("file", {"path": path, "content": base64.b64encode(content).decode()}))
        return self.commit(operations, title, revision=revision)[0]

    def commit(
        self,
        operations: Sequence[tuple[str, dict[str, Any]]],
        title: str,
        *,
        description: str = "",
        author: str = "system",
        revision: str = "main",
        parent: str | None = None,
        create_pr: bool = False,
    ) -> tuple[Commit, str]:
        """Make a commit, and return it with the ref that points to it.

        Args:
            operations: `file`, `lfsFile`, `deletedFile` and `deletedFolder` as clients send them.
            title: First line of the message.
            description: Rest of the message.
            author: Name of a user.
            revision: Branch or pull request to commit to; with `create_pr`, the branch that the pull request is for.
            parent: Id of the commit that the branch must be at; with `create_pr`, the start of the pull request.
            create_pr: Whether to open a pull request with the commit.

        Raises:
            HubError: 412 if the branch is not at `parent`, 404 or 400 if an operation cannot be done.
        """
        with self._lock:
            head = self.commit_at(revision)
            if create_pr:
                head = self.commit_at(parent) if parent else head
                refs, ref = self.pull_requests, f"refs/pr/{len(self.pull_requests) + 1}"
            else:
                refs, ref = self.pull_requests if revision in self.pull_requests else self.branches, revision
                if ref not in refs:
                    raise HubError(400, f"Invalid ref: {revision} is not a branch")
                if parent is not None and not (_SHORT_OID.fullmatch(parent) and head.oid.startswith(parent)):
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(head.files)
            for key, value in operations:
                self._apply(key, value, files, head)
            refs[ref] = self._keep(Commit(files, title, description, author, head))
            return refs[ref], ref

    def create_branch(self, name: str, starting_point: str) -> None:
        """Make a branch that starts at a revision.

        Raises:
            HubError: 409 if the name is taken, 400 if it is not valid for a branch.
        """
        with self._lock:
            if not _REF_NAME.fullmatch(name):
                raise HubError(400, f"Invalid reference for a branch: {name}")
            if name in self.branches:
                raise HubError(409, "Reference already exists")
            self.branches[name] = self.commit_at(starting_point)

    def delete_branch(self, name: str) -> None:
        """Delete a branch; its commits stay.

        Raises:
            HubError: 404 if there is no such branch, 403 if it is the main one.
        """
        with self._lock:
            if name == "main":
                raise HubError(403, "Cannot delete refs/heads/main")
            if self.branches.pop(name, None) is None:
                raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")

    def create_tag(self, name: str, revision: str) -> None:
        """Give a name to a revision's commit.

        Raises:
            HubError: 409 if the name is taken, 400 if it is not valid for a tag.
        """
        with self._lock:
            if not _REF_NAME.fullmatch(name):
                raise HubError(400, f"Invalid reference for a tag: {name}")
            if name in self.tags:
                raise HubError(409, "Tag reference exists already")
            self.tags[name] = self.commit_at(revision)

    def delete_tag(self, name: str) -> None:
        """Delete a tag.

        Raises:
            HubError: 404 if there is no such tag.
        """
        with self._lock:
            if self.tags.pop(name, None) is None:
                raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")

    def _keep(self, commit: Commit) -> Commit:
        self._commits[commit.oid] = commit
        return commit

    def _apply(self, key: str, value: dict[str, Any], files: dict[str, Blob], head: Commit) -> None:
        """Apply one operation of a commit to the files that it will hold."""
        path = str(value.get("path", "")).rstrip("/")
        if not path or any(part in ("", ".", "..", ".git") for part in path.split("/")):
            raise HubError(400, f"Invalid path in the commit: {path!r}")
        match key:
            case "file":
                files[path] = _regular_file(path, value, head)
            case "lfsFile":
                files[path] = self._lfs_file(path, value)
                if not _has_lfs_rule(files, path):
                    rules = files.get(GIT_ATTRIBUTES, Blob(b"")).content
                    files[GIT_ATTRIBUTES] = Blob(rules + f"{path} {_LFS_RULE}\n".encode())
            case "deletedFile":
                if files.pop(path, None) is None:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            case "deletedFolder":
                inside = [name for name in files if _is_inside(name, path)]
                if not inside:
                    raise HubError(404, "A folder with this name doesn't exist", "EntryNotFound")
                for name in inside:
                    del files[name]
            case _:
                raise HubError(400, f"Invalid operation in the commit: {key!r}")

    def _lfs_file(self, path: str, value: dict[str, Any]) -> Blob:
        content = self.lfs.get(value["oid"])
        if content is None or value.get("size", len(content)) != len(content):
            message = "Your push was rejected because an LFS pointer pointed to a file that does not exist"
            raise HubError(400, f"{message}: {path}")
        return Blob(content, in_lfs=True)


def _regular_file(path: str, value: dict[str, Any], head: Commit) -> Blob:
    """A file whose content came with the commit."""
    try:
        content = base64.b64decode(value["content"], validate=True)
    except (KeyError, binascii.Error) as error:
        raise HubError(400, f"Invalid content of {path} in the commit") from error
    if content and head.keeps_in_lfs(path, content):
        message = "Your push was rejected because it contains binary or large files outside of LFS"
        raise HubError(400, f"{message}: {path}")
    if path == README and (problems := card_problems(content.decode())[0]):
        raise HubError(400, f"Invalid metadata in {README}: {'; '.join(problems)}")
    return Blob(content)


def _is_inside(path: str, folder: str) -> bool:
    return not folder or path.startswith(f"{folder}/")


def _has_lfs_rule(files: Mapping[str, Blob], path: str) -> bool:
    rules = files.get(GIT_ATTRIBUTES, Blob(b"")).content.decode().splitlines()
    patterns = [rule.split()[0] for rule in rules if "filter=lfs" in rule]
    name = path.rpartition("/")[2]
    return any(fnmatch(path if "/" in pattern else name, pattern) for pattern in patterns)
