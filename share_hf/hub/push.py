"""A subspace as a hub repository: one commit a push, a branch a task, a tag a step.

`main` holds the newest subspace. Branch `<task>` is a whole tree whose root adapter is that task's, so that
`revision="<task>"` gives it to every loader; it is written when the task is new, and again when the task drifted too
far since. Tag `step-0007-<task>` is the state right after the seventh task. The commit on `main` comes first and is
whole by itself; a branch appears only when its tree is complete. Whatever interrupts a push, the next one adds what is
missing.
"""

from __future__ import annotations

import hashlib
import random
import time
import uuid
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from peft.utils import CONFIG_NAME
from transformers.utils import logging

from .card import CardOptions, audit_sentences
from .files import sha256_of
from .index import INDEX_FILE, TreeIndex, read_index
from .reconcile import extends, reconcile
from .remote import RemoteTree
from .state import SubspaceState, rounded, step_tags
from .tree import CARD_FILE, ROOT_FILES, TREE_ENTRIES, expect_tree, read_tree, write_root, write_tree


logger = logging.get_logger(__name__)

MAX_ATTEMPTS = 5
_PRECONDITION_FAILED = 412
_SECONDS_BETWEEN_ATTEMPTS = 0.5


class PushConflictError(RuntimeError):
    """Others kept pushing while this push was prepared, as often as it was tried. Nothing is lost, here or there."""


@dataclass(frozen=True)
class PushOptions:
    """How a subspace is pushed.

    Args:
        commit_message: Of the commit on `main`; tells the new tasks if not given.
        commit_description: Of that commit.
        private: Whether a repository that is created is private; as the hub's default if not given.
        create_pr: Open a pull request instead of changing `main`. Branches and tags wait for a push after its merge.
        default_task: The task that the root of `main` stands for; as it is there if not given, the newest at first.
        branch_tolerance: Relative drift since its branch was written from which a task's branch is written again.
        card_template: A Jinja template of one's own for the model card.
        max_attempts: How often to merge and push again when others push at the same time.
    """

    commit_message: str | None = None
    commit_description: str | None = None
    private: bool | None = None
    create_pr: bool = False
    default_task: str | None = None
    branch_tolerance: float = 0.05
    card_template: Path | None = None
    max_attempts: int = MAX_ATTEMPTS


@dataclass(frozen=True)
class _Head:
    """What is on a branch of a repository: its commit and the checksums of its files, and its tree if it has one."""

    commit: str
    files: Mapping[str, Set[str]]
    tree: TreeIndex | None
    card: str | None


def push_state(
    state: SubspaceState, repo_id: str, *, token: str | bool | None = None, options: PushOptions | None = None
) -> tuple[SubspaceState, CommitInfo]:
    """Push a subspace, merged with what others have pushed since the two had the same steps.

    Args:
        state: Not changed.
        repo_id: Created if need be.
        token: Of a user who may write to it.
        options: How.

    Returns:
        The subspace as it is on `main` now, and the commit there.

    Raises:
        ValueError: If the repository holds a subspace that this one cannot be merged with, or a name is taken there.
        PushConflictError: If others keep pushing; this or a later push may be tried again.
        HfHubHTTPError: Of the hub.
    """
    options = options or PushOptions()
    if not state.tasks:
        raise ValueError("the subspace has no tasks, expected at least one to push")
    if options.default_task is not None and options.default_task not in state.tasks:
        raise ValueError(f"no task {options.default_task!r} in the subspace, it has {list(state.tasks)}")
    api = HfApi(token=token)
    if not (options.create_pr and api.repo_exists(repo_id)):
        repo_id = api.create_repo(repo_id, private=options.private, exist_ok=True).repo_id
    for attempt in range(options.max_attempts):
        head = _head_of(api, repo_id, "main")
        merged = _with_pushed(state, head, repo_id, token)
        if options.default_task is not None:
            merged = replace(merged, default_task=options.default_task)
        try:
            return merged, _push_once(api, repo_id, merged, head, options)
        except HfHubHTTPError as error:
            if error.response.status_code != _PRECONDITION_FAILED:
                raise
        if attempt + 1 < options.max_attempts:
            logger.warning("Somebody else pushed to %s meanwhile, merging and pushing again.", repo_id)
            time.sleep(_SECONDS_BETWEEN_ATTEMPTS * random.uniform(0.5, 1.5) * 2**attempt)
    raise PushConflictError(
        f"{repo_id}: others pushed during each of {options.max_attempts} attempts, expected a quieter moment; the "
        "subspace is as before, here and there: push it again"
    )


def _with_pushed(state: SubspaceState, head: _Head, repo_id: str, token: str | bool | None) -> SubspaceState:
    """The state with what the repository has beyond it."""
    if head.tree is None:
        return state
    if extends(state, head.tree.lineage):
        return replace(state, default_task=head.tree.default_task if head.tree.default_task in state.tasks else None)
    tree = RemoteTree.open(repo_id, head.commit, token=token)
    tree.fetch()
    return reconcile(state, read_tree(tree.folder))


def _push_once(api: HfApi, repo_id: str, state: SubspaceState, head: _Head, options: PushOptions) -> CommitInfo:
    """The commit on `main`, then the tag of the newest task and the branches that are missing or drifted."""
    refs = api.list_repo_refs(repo_id)
    branches = {ref.name for ref in refs.branches}
    tags = {ref.name for ref in refs.tags}
    _check_refs(api, repo_id, state, head, branches, tags)
    drifts = {task: rounded(state.drift_of(task)) for task in state.tasks}
    written = head.tree.branches if head.tree is not None else {}
    known = head.tree.tasks if head.tree is not None else ()
    outdated = [
        task
        for task in state.tasks
        if task not in branches
        or task not in known
        or max(0.0, drifts[task] ** 2 - written.get(task, 0.0) ** 2) ** 0.5 > options.branch_tolerance
    ]
    written = {task: drifts[task] if task in outdated else written.get(task, 0.0) for task in state.tasks}
    written = {task: drift for task, drift in written.items() if drift > 0}
    with TemporaryDirectory(prefix="share_hf-") as scratch:
        folder = Path(scratch) / "tree"
        card = CardOptions(
            repo_id=repo_id, template=options.card_template, existing=head.card, audit=audit_sentences(state)
        )
        write_tree(state, folder, card=card, branches={} if options.create_pr else written)
        files = _checksums(folder)
        commit = _commit(
            api,
            repo_id,
            "main",
            folder,
            files,
            head,
            _message(state, head, options),
            description=options.commit_description,
            create_pr=options.create_pr,
        )
        if options.create_pr:
            return commit
        if head.tree is not None:  # unless the push that made it was cut off, its tag is there
            _tag_newest(api, repo_id, head.tree, head.commit, tags)
        on_main = _Head(commit.oid, files, read_index(folder), card.existing)
        _tag_newest(api, repo_id, on_main.tree, commit.oid, tags)
        _write_branches(api, repo_id, state, folder, on_main, outdated, branches, card)
    return commit


def _head_of(api: HfApi, repo_id: str, revision: str) -> _Head:
    commit = api.repo_info(repo_id, revision=revision).sha
    entries = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    files = {
        entry.path: {entry.lfs.sha256 if entry.lfs is not None else entry.blob_id}
        for entry in entries
        if isinstance(entry, RepoFile)
    }
    tree = card = None
    if INDEX_FILE in files:
        folder = Path(hf_hub_download(repo_id, INDEX_FILE, revision=commit, token=api.token)).parent
        tree = read_index(folder)
        expect_tree(folder, tree)
    elif CONFIG_NAME in files:
        raise ValueError(f"{repo_id}: holds an adapter that is no shared subspace, expected another repository")
    if CARD_FILE in files:
        path = Path(hf_hub_download(repo_id, CARD_FILE, revision=commit, token=api.token))
        card = path.read_text(encoding="utf-8")
    return _Head(commit, files, tree, card)


def _check_refs(
    api: HfApi,
    repo_id: str,
    state: SubspaceState,
    head: _Head,
    branches: Set[str],
    tags: Set[str],
) -> None:
    """Refuse new tasks whose names already mean something else in the repository."""
    known = head.tree.tasks if head.tree is not None else ()
    for task in state.tasks:
        if task in tags:
            raise ValueError(
                f"{repo_id}: has a tag {task!r}, expected none of a task's name: delete it, or rename the task"
            )
        if task in branches and task not in known and not _is_branch_of(api, repo_id, task):
            raise ValueError(
                f"{repo_id}: has a branch {task!r} that is no tree of such a task, expected none: delete it, or "
                "rename the task"
            )


def _is_branch_of(api: HfApi, repo_id: str, task: str) -> bool:
    """Whether a branch was written for a task of its name, before it was removed or in a push that was cut off."""
    try:
        tree = _head_of(api, repo_id, task).tree
    except ValueError:
        return False
    return tree is not None and task in tree.tasks


def _commit(
    api: HfApi,
    repo_id: str,
    revision: str,
    folder: Path,
    files: Mapping[str, Set[str]],
    head: _Head,
    message: str,
    *,
    description: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Commit what differs from the head; where nothing does, its last commit stands."""
    changed = [path for path, known in files.items() if not known & head.files.get(path, set())]
    gone = [path for path in head.files if path not in files and path.split("/")[0] in TREE_ENTRIES]
    if not changed and not gone:
        url = f"{api.endpoint}/{repo_id}/commit/{head.commit}"
        return CommitInfo(commit_url=url, commit_message=message, commit_description="", oid=head.commit)
    return api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(path, folder / path) for path in changed),
            *(CommitOperationDelete(path) for path in gone),
        ],
        commit_message=message,
        commit_description=description,
        revision=revision,
        create_pr=create_pr,
        parent_commit=head.commit,
    )


def _tag_newest(api: HfApi, repo_id: str, tree: TreeIndex, commit: str, tags: Set[str]) -> None:
    if tree.tasks and (tag := step_tags(tree.lineage, tree.tasks)[tree.tasks[-1]]) not in tags:
        api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True)


def _write_branches(
    api: HfApi,
    repo_id: str,
    state: SubspaceState,
    folder: Path,
    main: _Head,
    outdated: list[str],
    branches: Set[str],
    card: CardOptions,
) -> None:
    """Branches for tasks: a new one is made of a commit that already is its whole tree, on a branch of no name."""
    workshop = f"share_hf-{uuid.uuid4().hex}"
    workshop_head = None
    for task in outdated:
        if task == state.root_task and task not in branches:
            api.create_branch(repo_id, branch=task, revision=main.commit, exist_ok=True)
            continue
        of_task = replace(state, default_task=task)
        write_root(of_task, folder, card=card, branches=main.tree.branches, unchanged=main.tree.sha256)
        files = {**main.files, **{name: _checksums_of(folder / name) for name in ROOT_FILES}}
        message = f"Task {task}"
        if task in branches:
            _commit(api, repo_id, task, folder, files, _head_of(api, repo_id, task), message)
            continue
        if workshop_head is None:
            api.create_branch(repo_id, branch=workshop, revision=main.commit)
            workshop_head = main
        commit = _commit(api, repo_id, workshop, folder, files, workshop_head, message)
        workshop_head = replace(main, commit=commit.oid, files=files)
        api.create_branch(repo_id, branch=task, revision=commit.oid, exist_ok=True)
    if workshop_head is not None:
        api.delete_branch(repo_id, branch=workshop)


def _message(state: SubspaceState, head: _Head, options: PushOptions) -> str:
    if options.commit_message is not None:
        return options.commit_message
    known = head.tree.tasks if head.tree is not None else ()
    new = [task for task in state.tasks if task not in known]
    if not new:
        return "Update the shared subspace"
    return f"Add task {new[0]}" if len(new) == 1 else f"Add {len(new)} tasks"


def _checksums(folder: Path) -> dict[str, Set[str]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _checksums_of(path) for path in paths}


def _checksums_of(path: Path) -> Set[str]:
    """What the hub may know a file by: its sha256 if it keeps it as a large file, and else git's own checksum."""
    if path.suffix == ".safetensors":
        return {sha256_of(path)}
    content = path.read_bytes()
    of_git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return {sha256_of(path), of_git.hexdigest()}
