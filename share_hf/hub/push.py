"""A subspace as a hub repository: one commit a push, a branch a task, a tag a step.

`main` holds the newest subspace. Branch `<task>` is a whole tree whose root adapter is that task's, so that
`revision="<task>"` gives it to every loader; it is written when the task is new, and again when the task drifted too
far since. Tag `step-0007-<task>` is the state right after the seventh task. The commit on `main` comes first and is
whole by itself; a branch appears only when its tree is complete. Whatever interrupts a push, the next one adds what is
missing.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import (
    CommitInfo,
    CommitOperation,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from peft.utils import CONFIG_NAME
from transformers.utils import logging

from ..card import CardOptions, audit_sentences, write_card, write_tree
from ..format.base_model import published_name
from ..format.files import FolderWriter
from ..format.index import INDEX_FILE, TreeIndex, read_index
from ..format.task_files import METRICS_FILE, task_folder
from ..format.tree import ADAPTER_FILES, CARD_FILE, ROOT_FILES, TREE_ENTRIES, expect_tree, read_tree, write_root
from ..state import SubspaceState, extends, reconcile, rounded, step_tags
from .fetch import RemoteTree


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
        commit_message: Message of the commit on `main`; tells the new tasks if not given.
        commit_description: Description of that commit.
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
class _Tip:
    """What is on a branch of a repository: its commit, the blobs of its files by path, and its tree if it has one."""

    commit: str
    blobs: Mapping[str, str]
    tree: TreeIndex | None
    card: str | None

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.tree.tasks if self.tree is not None else ()


def push_state(
    state: SubspaceState, repo_id: str, *, token: str | bool | None = None, options: PushOptions | None = None
) -> tuple[SubspaceState, CommitInfo]:
    """Push a subspace, merged with what others have pushed since the two had the same steps.

    Args:
        state: Not changed.
        repo_id: Created if need be.
        token: Token of a user who may write to it.
        options: How.

    Returns:
        The subspace as it is on `main` now, and the commit there.

    Raises:
        ValueError: If the repository holds a subspace that this one cannot be merged with, or a name is taken there.
        PushConflictError: If others keep pushing; this or a later push may be tried again.
        HfHubHTTPError: Whatever the hub refuses.
    """
    options = options or PushOptions()
    if not state.tasks:
        raise ValueError("the subspace has no tasks, expected at least one to push")
    if options.default_task is not None and options.default_task not in state.tasks:
        raise ValueError(f"no task {options.default_task!r} in the subspace, it has {list(state.tasks)}")
    ours, state = state, _published(state)
    api = HfApi(token=token)
    if not (options.create_pr and api.repo_exists(repo_id)):
        repo_id = api.create_repo(repo_id, private=options.private, exist_ok=True).repo_id
    for attempt in range(options.max_attempts):
        tip = _tip_of(api, repo_id, "main")
        merged = _with_pushed(state, tip, repo_id, token)
        if options.default_task is not None:
            merged = replace(merged, default_task=options.default_task)
        try:
            commit = _push_once(api, repo_id, merged, tip, options)
            base = merged.base_model_name_or_path or ours.base_model_name_or_path
            return replace(merged, base_model_name_or_path=base), commit
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


def _published(state: SubspaceState) -> SubspaceState:
    """The state as others may see it: without a place on this machine, which the base model may be named by."""
    base = state.base_model_name_or_path
    published = published_name(base)
    if base is None or published is not None:
        return replace(state, base_model_name_or_path=published)
    logger.warning(
        "The base model %r is a place on this machine and is not published: load the model by its id on the hub, or "
        "name it with base_model= of from_adapters or add_adapters.",
        base,
    )
    return replace(state, base_model_name_or_path=None)


def _with_pushed(state: SubspaceState, tip: _Tip, repo_id: str, token: str | bool | None) -> SubspaceState:
    """The state with what the repository has beyond it."""
    if tip.tree is None:
        return state
    if extends(state, tip.tree.lineage):
        return replace(state, default_task=tip.tree.default_task if tip.tree.default_task in state.tasks else None)
    tree = RemoteTree.open(repo_id, tip.commit, token=token)
    tree.fetch()
    return reconcile(state, read_tree(tree.folder))


def _push_once(api: HfApi, repo_id: str, state: SubspaceState, tip: _Tip, options: PushOptions) -> CommitInfo:
    """The commit on `main`, then the tag of the newest task and the branches that are missing or drifted."""
    refs = api.list_repo_refs(repo_id)
    branches = {ref.name for ref in refs.branches}
    tags = {ref.name for ref in refs.tags}
    _check_refs(api, repo_id, state, tip, branches, tags)
    drifts = {task: rounded(drift) for task, drift in state.drifts().items()}
    written = tip.tree.branches if tip.tree is not None else {}
    outdated = [
        task
        for task in state.tasks
        if task not in branches
        or task not in tip.tasks
        or max(0.0, drifts[task] ** 2 - written.get(task, 0.0) ** 2) ** 0.5 > options.branch_tolerance
    ]
    written = {task: drifts[task] if task in outdated else written.get(task, 0.0) for task in state.tasks}
    written = {task: drift for task, drift in written.items() if drift > 0}
    with TemporaryDirectory(prefix="share_hf-") as scratch:
        folder = Path(scratch) / "tree"
        card = CardOptions(
            repo_id=repo_id, template=options.card_template, existing=tip.card, audit=audit_sentences(state)
        )
        sha256 = write_tree(state, folder, card=card, branches={} if options.create_pr else written, there=tip.tree)
        index = read_index(folder)
        commit = api.create_commit(
            repo_id,
            _operations(folder, sorted(_paths(folder) - _unchanged(index, tip)), gone=_gone(index, folder, tip)),
            commit_message=_message(state, tip, options),
            commit_description=options.commit_description,
            revision="main",
            create_pr=options.create_pr,
            parent_commit=tip.commit,
        )
        if options.create_pr:
            return commit
        if tip.tree is not None:  # unless the push that made it was cut off, its tag is there
            _tag_newest(api, repo_id, tip.tree, tip.commit, tags)
        _tag_newest(api, repo_id, index, commit.oid, tags)
        writer = FolderWriter(folder)
        writer.sha256.update(sha256)
        _write_branches(api, repo_id, state, writer, commit.oid, outdated, branches, card)
    return commit


def _paths(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _unchanged(index: TreeIndex, tip: _Tip) -> set[str]:
    """Files that the hub has already, as the checksums in both indices say: nothing need be sent to find that out."""
    there = tip.tree.sha256 if tip.tree is not None else {}
    same = {name for name, checksum in index.sha256.items() if there.get(name) == checksum}
    # The metrics of a task hold the checksums of its other files.
    folders = [task_folder(task) for task in index.tasks if f"{task_folder(task)}/{METRICS_FILE}" in same]
    same |= {f"{folder}/{name}" for folder in folders for name in ADAPTER_FILES}
    return same & tip.blobs.keys()


def _gone(index: TreeIndex, folder: Path, tip: _Tip) -> list[str]:
    """The files of a tree on the hub that the new tree does not have."""
    stays = _paths(folder) | index.sha256.keys()
    return [path for path in tip.blobs if path not in stays and path.split("/")[0] in TREE_ENTRIES]


def _operations(folder: Path, paths: Iterable[str], gone: Iterable[str] = ()) -> list[CommitOperation]:
    """What a commit does; `create_commit` leaves out the files that have not changed."""
    return [
        *(CommitOperationAdd(path, folder / path) for path in paths),
        *(CommitOperationDelete(path) for path in gone),
    ]


def _tip_of(api: HfApi, repo_id: str, revision: str) -> _Tip:
    commit = api.repo_info(repo_id, revision=revision).sha
    entries = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    blobs = {entry.path: entry.blob_id for entry in entries if isinstance(entry, RepoFile)}
    tree = card = None
    if INDEX_FILE in blobs:
        folder = Path(hf_hub_download(repo_id, INDEX_FILE, revision=commit, token=api.token)).parent
        tree = read_index(folder)
        expect_tree(folder, tree)
    elif CONFIG_NAME in blobs:
        raise ValueError(f"{repo_id}: holds an adapter that is no shared subspace, expected another repository")
    if CARD_FILE in blobs:
        path = Path(hf_hub_download(repo_id, CARD_FILE, revision=commit, token=api.token))
        card = path.read_text(encoding="utf-8")
    return _Tip(commit, blobs, tree, card)


def _check_refs(
    api: HfApi,
    repo_id: str,
    state: SubspaceState,
    tip: _Tip,
    branches: Set[str],
    tags: Set[str],
) -> None:
    """Refuse new tasks whose names already mean something else in the repository."""
    for task in state.tasks:
        if task in tags:
            raise ValueError(
                f"{repo_id}: has a tag {task!r}, expected none of a task's name: delete it, or rename the task"
            )
        if task in branches and task not in tip.tasks and not _is_branch_of(api, repo_id, task):
            raise ValueError(
                f"{repo_id}: has a branch {task!r} that is no tree of such a task, expected none: delete it, or "
                "rename the task"
            )


def _is_branch_of(api: HfApi, repo_id: str, task: str) -> bool:
    """Whether a branch was written for a task of its name, before it was removed or in a push that was cut off."""
    try:
        tree = _tip_of(api, repo_id, task).tree
    except ValueError:
        return False
    return tree is not None and task in tree.tasks


def _tag_newest(api: HfApi, repo_id: str, tree: TreeIndex, commit: str, tags: Set[str]) -> None:
    if tree.tasks and (tag := step_tags(tree.lineage, tree.tasks)[tree.tasks[-1]]) not in tags:
        api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True)


def _write_branches(
    api: HfApi,
    repo_id: str,
    state: SubspaceState,
    writer: FolderWriter,
    main: str,
    outdated: list[str],
    branches: Set[str],
    card: CardOptions,
) -> None:
    """Branches for tasks: a new one is made of a commit that already is its whole tree, on a branch of no name.

    Args:
        writer: Has put the tree of `main`.
        main: The commit of that tree.
    """
    index = read_index(writer.scratch)
    workshop, workshop_commit = f"share_hf-{uuid.uuid4().hex}", None
    on_main: _Tip | None = None
    for task in outdated:
        if task == state.root_task and task not in branches:
            api.create_branch(repo_id, branch=task, revision=main, exist_ok=True)
            continue
        of_task = replace(state, default_task=task)
        message = f"Task {task}"
        if task in branches:
            on_main = on_main or _tip_of(api, repo_id, main)
            tip = _tip_of(api, repo_id, task)
            _write_root_of(of_task, writer, index, card)
            same = {path for path, blob in on_main.blobs.items() if tip.blobs.get(path) == blob}
            changed = _paths(writer.scratch) - same - {*ROOT_FILES}
            gone = [path for path in tip.blobs if path not in on_main.blobs and path.split("/")[0] in TREE_ENTRIES]
            api.create_commit(
                repo_id,
                _operations(writer.scratch, [*sorted(changed), *ROOT_FILES], gone),
                commit_message=message,
                revision=task,
                parent_commit=tip.commit,
            )
            continue
        if workshop_commit is None:
            api.create_branch(repo_id, branch=workshop, revision=main)
            workshop_commit = main
        _write_root_of(of_task, writer, index, card)
        workshop_commit = api.create_commit(
            repo_id,
            _operations(writer.scratch, ROOT_FILES),
            commit_message=message,
            revision=workshop,
            parent_commit=workshop_commit,
        ).oid
        api.create_branch(repo_id, branch=task, revision=workshop_commit, exist_ok=True)
    if workshop_commit is not None:
        api.delete_branch(repo_id, branch=workshop)


def _write_root_of(state: SubspaceState, writer: FolderWriter, main: TreeIndex, card: CardOptions) -> None:
    write_root(state, writer, fingerprint=main.fingerprint, branches=main.branches)
    write_card(state, writer.scratch, card)


def _message(state: SubspaceState, tip: _Tip, options: PushOptions) -> str:
    if options.commit_message is not None:
        return options.commit_message
    new = [task for task in state.tasks if task not in tip.tasks]
    if not new:
        return "Update the shared subspace"
    return f"Add task {new[0]}" if len(new) == 1 else f"Add {len(new)} tasks"
