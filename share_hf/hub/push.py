"""Push a subspace to a Hub repository: one commit per push, a branch per task, a tag per step.

`main` holds the newest subspace. Branch `<task>` is a whole tree whose root adapter is that task's, so
`revision="<task>"` gives it to every loader. The branch is written when the task is new, and again when the task
changed or drifted too far since. Tag `step-0007-<task>` is the state right after the seventh task. The commit on
`main` comes first and is complete by itself. If a push is interrupted, the next one adds what is missing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import logging

from ..card import CardOptions, audit_sentences, write_tree
from ..format.base_model import named_alike, published_name
from ..format.files import FolderWriter
from ..format.index import TreeIndex, read_index
from ..format.task_files import METRICS_FILE, task_folder
from ..format.tree import TASK_FILES, TREE_ENTRIES
from ..state import SubspaceState, extends, reconcile, shared_steps, step_tags
from .branches import BranchChoice, BranchWriter, check_choice, plan_branches
from .fetch import RemoteTree
from .repository import MAIN, HubRepository, Refs, Tip, operations


logger = logging.get_logger(__name__)

# An attempt fails only because somebody else pushes first, so this many may push at once.
MAX_ATTEMPTS = 50
_SECONDS_BETWEEN_ATTEMPTS = 0.5
_LONGEST_WAIT = 8.0  # seconds


class PushConflictError(RuntimeError):
    """Others kept pushing during every attempt of this push. Nothing is lost, neither here nor there."""


@dataclass(frozen=True)
class PushOptions:
    """Options for pushing a subspace.

    Args:
        commit_message: Message of the commit on `main`. None means a message about the new tasks.
        commit_description: Description of that commit.
        private: Whether a newly created repository is private. None means the Hub's default.
        create_pr: Whether to open a pull request instead of changing `main`. Branches and tags wait for a push after
            its merge.
        default_task: Task at the root of `main`. None keeps the one that is there, at first the newest.
        branches: Tasks that get a branch. Same as `choice` in `branches.plan_branches`.
        branch_tolerance: Relative drift since a task's branch was written above which it is written again.
        upcoming_tasks: Names of tasks that are still to be learned here. Nobody else may have pushed them.
        base_model: Name of the base model here and there, whatever they call it. It is not checked.
        card_template: Custom Jinja template for the model card.
        max_attempts: Number of attempts to merge and push when others push at the same time.
    """

    commit_message: str | None = None
    commit_description: str | None = None
    private: bool | None = None
    create_pr: bool = False
    default_task: str | None = None
    branches: BranchChoice | None = None
    branch_tolerance: float = 0.05
    upcoming_tasks: Collection[str] = ()
    base_model: str | None = None
    card_template: Path | None = None
    max_attempts: int = MAX_ATTEMPTS


def push_state(
    state: SubspaceState, repo_id: str, *, token: str | bool | None = None, options: PushOptions | None = None
) -> tuple[SubspaceState, CommitInfo]:
    """Push a subspace, merged with what others have pushed since the two last had the same steps.

    Args:
        state: Subspace to push. It is not changed.
        repo_id: Id of the repository, which is created if necessary.
        token: Token of a user who may write to the repository.
        options: Options for pushing.

    Returns:
        The subspace as it is now on `main`, and the commit there.

    Raises:
        ValueError: If the repository holds a subspace with which this one cannot be merged, or a name is taken there.
        PushConflictError: If others keep pushing. The push may be tried again later.
        HubAnswerError: If something other than the Hub answers.
        HfHubHTTPError: If the Hub refuses a request.
    """
    options = options or PushOptions()
    if not state.tasks:
        raise ValueError("the subspace has no tasks, expected at least one to push")
    if options.default_task is not None and options.default_task not in state.tasks:
        raise ValueError(f"no task {options.default_task!r} in the subspace, it has {list(state.tasks)}")
    check_choice(options.branches, state.tasks)
    if options.base_model is not None:
        if published_name(options.base_model) is None:
            raise ValueError(f"base_model is {options.base_model!r}, expected a Hub id")
        state = replace(state, base_model_name_or_path=options.base_model)
    ours, state = state, _published(state)
    repository = HubRepository.existing(repo_id, token=token) if options.create_pr else None
    if repository is None:
        repository = HubRepository.create(repo_id, token=token, private=options.private)
    for attempt in range(options.max_attempts):
        refs = repository.refs()
        tip = repository.tip(refs.branches[MAIN])
        _check_upcoming(repository, state, tip, options.upcoming_tasks)
        merged = _with_pushed(state, tip, repository, options.base_model)
        if options.default_task is not None:
            merged = replace(merged, default_task=options.default_task)
        try:
            commit = _push_once(repository, merged, tip, refs, options)
            base = merged.base_model_name_or_path or ours.base_model_name_or_path
            return replace(merged, base_model_name_or_path=base), commit
        except HfHubHTTPError as error:
            if error.response.status_code != HTTPStatus.PRECONDITION_FAILED:
                raise
        if attempt + 1 < options.max_attempts:
            logger.warning(
                "Somebody else pushed to %s in the meantime; merging and pushing again.", repository.repo_id
            )
            longest = min(_LONGEST_WAIT, _SECONDS_BETWEEN_ATTEMPTS * 2 ** min(attempt, 10))
            time.sleep(longest * random.uniform(0.1, 1.0))
    raise PushConflictError(
        f"{repository.repo_id}: others pushed during each of {options.max_attempts} attempts; the subspace is "
        "unchanged, here and on the Hub: push it again later"
    )


def _published(state: SubspaceState) -> SubspaceState:
    """Return the state that others may see, without a path on this machine as the name of the base model."""
    base = state.base_model_name_or_path
    published = published_name(base)
    if base is None or published is not None:
        return replace(state, base_model_name_or_path=published)
    logger.warning(
        "The base model %r is a path on this machine, and its name is not published: load the model by its Hub id, or "
        "name it with base_model= of from_adapters or add_adapters.",
        base,
    )
    return replace(state, base_model_name_or_path=None)


def _check_upcoming(
    repository: HubRepository, state: SubspaceState, tip: Tip, upcoming_tasks: Collection[str]
) -> None:
    """Refuse a pushed task with the name of one still to be learned here, which would then count as learned."""
    if taken := [task for task in upcoming_tasks if task in tip.tasks and task not in state.tasks]:
        raise ValueError(
            f"{repository.repo_id}: already has {taken}, which somebody else pushed and which are still to be learned "
            "here: give them other names here, remove those there (remove_task, and push), or push to another "
            "repository"
        )


def _with_pushed(state: SubspaceState, tip: Tip, repository: HubRepository, base_model: str | None) -> SubspaceState:
    """Return the state merged with what the repository has beyond it."""
    if tip.tree is None:
        return state
    if extends(state, tip.tree.lineage):
        return replace(state, default_task=tip.tree.default_task if tip.tree.default_task in state.tasks else None)
    tree = RemoteTree.open(repository.repo_id, tip.commit, token=repository.api.token)
    tree.fetch()
    return reconcile(*named_alike(state, tree.read(), base_model))


def _push_once(
    repository: HubRepository, state: SubspaceState, tip: Tip, refs: Refs, options: PushOptions
) -> CommitInfo:
    """Make the commit on `main`, then the tag of the newest task and the branches that are due."""
    _check_refs(repository, state, tip, refs)
    plan = plan_branches(state, tip, refs, options.branches, options.branch_tolerance)
    with TemporaryDirectory(prefix="share_hf-") as scratch:
        folder = Path(scratch) / "tree"
        card = CardOptions(
            repo_id=repository.repo_id,
            template=options.card_template,
            existing=tip.card,
            audit=audit_sentences(state),
            branches=plan.records.tasks,
        )
        sha256 = write_tree(state, folder, card=card, branches=plan.records, there=tip.tree)
        index = read_index(folder)
        if tip.tree is None and not options.create_pr:
            _delete_foreign_tags(repository, index, refs)
        commit = repository.commit(
            MAIN,
            operations(folder, sorted(_paths(folder) - _unchanged(index, tip)), gone=_gone(index, folder, tip)),
            parent=tip.commit,
            message=_message(state, tip, options),
            description=options.commit_description,
            create_pr=options.create_pr,
        )
        if options.create_pr:
            return commit
        if tip.tree is not None:  # its tag exists unless the push that made it was interrupted
            _tag_newest(repository, tip.tree, tip.commit, refs)
        if tip.tree is None or commit.oid != tip.commit:
            _tag_newest(repository, index, commit.oid, refs)
        writer = FolderWriter(folder)
        writer.sha256.update(sha256)
        branches = BranchWriter(repository, state, commit.oid, index, writer, card)
        branches.write(plan.due, refs.branches)
        branches.delete_renamed(refs.branches)
    return commit


def _paths(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _unchanged(index: TreeIndex, tip: Tip) -> set[str]:
    """Return files that the Hub has already. The checksums in both indices tell, so nothing is sent to find out."""
    there = tip.tree.sha256 if tip.tree is not None else {}
    same = {name for name, checksum in index.sha256.items() if there.get(name) == checksum}
    # The metrics of a task hold the checksums of its other files.
    folders = [task_folder(task) for task in index.tasks if f"{task_folder(task)}/{METRICS_FILE}" in same]
    same |= {f"{folder}/{name}" for folder in folders for name in TASK_FILES}
    return same & tip.blobs.keys()


def _gone(index: TreeIndex, folder: Path, tip: Tip) -> list[str]:
    """Return the files of the tree on the Hub that the new tree does not have."""
    stays = _paths(folder) | index.sha256.keys()
    return [path for path in tip.blobs if path not in stays and path.split("/")[0] in TREE_ENTRIES]


def _check_refs(repository: HubRepository, state: SubspaceState, tip: Tip, refs: Refs) -> None:
    """Refuse new tasks whose names already mean something else in the repository."""
    for task in state.tasks:
        if task in refs.tags:
            raise ValueError(
                f"{repository.repo_id}: has a tag {task!r}, expected no tag with the name of a task: delete it, or "
                "rename the task"
            )
        if task in refs.branches and task not in tip.tasks:
            # It may have been written before the task was removed, or in a push that was interrupted.
            index = repository.index_at(refs.branches[task])
            if index is None or task not in index.tasks:
                raise ValueError(
                    f"{repository.repo_id}: has a branch {task!r} that does not hold such a task, expected no other "
                    "branch of this name: delete it, or rename the task"
                )


def _delete_foreign_tags(repository: HubRepository, index: TreeIndex, refs: Refs) -> None:
    """Delete the tags of a subspace that was removed from the repository if they would pass for tags of this one."""
    for tag in step_tags(index.lineage, index.tasks).values():
        if tag in refs.tags:
            repository.delete_tag(tag)


def _tag_newest(repository: HubRepository, tree: TreeIndex, commit: str, refs: Refs) -> None:
    """Tag the state right after the newest task, unless it has its tag."""
    if not tree.tasks:
        return
    tag = step_tags(tree.lineage, tree.tasks)[tree.tasks[-1]]
    there = refs.tags.get(tag)
    if there == commit:
        return
    if there is not None:
        tagged = repository.index_at(there)
        if tagged is not None and tagged.tasks[-1:] == tree.tasks[-1:] and _is_before(tagged, tree):
            return
        repository.delete_tag(tag)
    repository.create_tag(tag, commit)


def _is_before(earlier: TreeIndex, later: TreeIndex) -> bool:
    return shared_steps(earlier.lineage, later.lineage) == len(earlier.lineage)


def _message(state: SubspaceState, tip: Tip, options: PushOptions) -> str:
    if options.commit_message is not None:
        return options.commit_message
    new = [task for task in state.tasks if task not in tip.tasks]
    if not new:
        return "Update the shared subspace"
    return f"Add task {new[0]}" if len(new) == 1 else f"Add {len(new)} tasks"
