"""Branches of a repository: each is a whole tree whose root adapter is that of one task.

A branch appears only when its tree is complete, and a newer tree is never replaced by an older one. The commit on
`main` records what the push is about to do to branches: for a branch that is to be written again, it records the
commit that will be replaced, so that the next push sees what was not done.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import logging

from ..card import CardOptions, write_card
from ..format.files import FolderWriter
from ..format.index import BranchRecords, TreeIndex
from ..format.tree import ADAPTER_FILES, ROOT_FILES, TREE_ENTRIES, write_root
from ..state import SubspaceState, renamings, rounded, shared_steps, tasks_touched
from .repository import HubRepository, Refs, Tip, operations


logger = logging.get_logger(__name__)

# Tasks that get a branch, in addition to those that have one.
BranchChoice = Literal["all", "new", "none"] | Collection[str]

_WORDS = ("all", "new", "none")

# Branches are commits, and the Hub accepts some hundred of these per hour.
MAX_BRANCHES_UNASKED = 100

_TASKS_AT_ONCE = 16
_OVERTAKEN = {HTTPStatus.NOT_FOUND, HTTPStatus.PRECONDITION_FAILED}
# The name contains the commit on `main` where the branch begins; before that, it contained 32 digits.
_WORKSHOP = re.compile(r"share_hf-(?:[0-9a-f]{40}|[0-9a-f]{32})")


@dataclass(frozen=True)
class BranchPlan:
    """Actions of a push on branches.

    Args:
        due: Tasks whose branches are to be written, in the order in which the tasks were learned.
        records: Records for the index on `main`.
    """

    due: tuple[str, ...]
    records: BranchRecords


def branch_choice(given: str | Collection[str] | None) -> BranchChoice | None:
    """Return which tasks get a branch from a command line's value: a word, or names, of which one may be a word.

    Raises:
        ValueError: If it is an unknown word.
    """
    names = [given] if isinstance(given, str) else given
    if names is None or len(names) != 1 or next(iter(names)) not in _WORDS:
        check_choice(given, None)
        return given
    return next(iter(names))


def check_choice(choice: BranchChoice | None, tasks: Collection[str] | None) -> None:
    """Refuse a value that does not say which tasks get a branch.

    Args:
        choice: Value to check.
        tasks: Existing tasks. None means that they are not known yet.

    Raises:
        ValueError: If it is an unknown word, or contains a name that is not a task.
    """
    if isinstance(choice, str):
        if choice not in _WORDS:
            raise ValueError(f"branches is {choice!r}, expected 'all', 'new', 'none' or a list of tasks")
    elif choice is not None and tasks is not None and (odd := [task for task in choice if task not in tasks]):
        raise ValueError(f"branches has {odd}, expected tasks of the subspace, which has {list(tasks)}")


def plan_branches(
    state: SubspaceState, tip: Tip, refs: Refs, choice: BranchChoice | None, tolerance: float
) -> BranchPlan:
    """Return what to do to branches when a state replaces what is on `main`.

    Args:
        state: State with all the steps that are on `main`.
        tip: Content of `main`.
        refs: Existing branches.
        choice: Tasks that get a branch. None means all of up to `MAX_BRANCHES_UNASKED` tasks, and no new ones beyond.
        tolerance: Relative drift since a branch was written above which it is written again.
    """
    there = tip.tree.branch_records if tip.tree is not None else BranchRecords()
    lineage = tip.tree.lineage if tip.tree is not None else ()
    steps = state.lineage[shared_steps(state.lineage, lineage) :]
    changed = tasks_touched(steps)
    moved = {new for new, old in renamings(steps).items() if old in refs.branches}  # a renamed task keeps its branch
    wanted = {*_wanted(state, tip, choice), *moved}
    drifts = {task: rounded(drift) for task, drift in state.drifts().items()}

    def is_due(task: str) -> bool:
        if task not in refs.branches:
            return task in wanted
        since = max(0.0, drifts[task] ** 2 - there.drifts.get(task, 0.0) ** 2) ** 0.5
        was_cut_off = there.replaced.get(task) == refs.branches[task]
        return was_cut_off or task in changed or task not in tip.tasks or since > tolerance

    due = dict.fromkeys(task for task in state.tasks if is_due(task))
    branched = tuple(task for task in state.tasks if task in due or task in refs.branches)
    written = {task: drifts[task] if task in due else there.drifts.get(task, 0.0) for task in branched}
    kept = {task: there.replaced[task] for task in branched if task in there.replaced}
    replaced = {task: refs.branches[task] for task in due if task in refs.branches}
    records = BranchRecords(
        drifts={task: drift for task, drift in written.items() if drift > 0},
        tasks=None if len(branched) == len(state.tasks) else branched,
        replaced={**kept, **replaced},
    )
    return BranchPlan(tuple(due), records)


def _wanted(state: SubspaceState, tip: Tip, choice: BranchChoice | None) -> Collection[str]:
    """Return the tasks that should have a branch: those asked for, and those that an earlier push was to make."""
    if choice == "none":
        return ()
    promised = tip.tree.branched if tip.tree is not None and tip.tree.branched is not None else tip.tasks
    if choice == "all" or (choice is None and len(state.tasks) <= MAX_BRANCHES_UNASKED):
        return state.tasks
    if choice is None:
        return promised
    asked = [task for task in state.tasks if task not in tip.tasks] if choice == "new" else choice
    return {*asked, *promised}


@dataclass(frozen=True)
class BranchWriter:
    """Writes the branches of a push once its commit is on `main`.

    Args:
        repository: Repository to write to.
        state: Subspace on `main`.
        main: Commit on `main`.
        index: Index of that commit.
        writer: Writer that has put the tree of that commit.
        card: Options for model cards.
    """

    repository: HubRepository
    state: SubspaceState
    main: str
    index: TreeIndex
    writer: FolderWriter
    card: CardOptions

    def write(self, due: Collection[str], there: Mapping[str, str]) -> None:
        """Write branches, and delete the workshops of interrupted pushes.

        If a later push writes the branches meanwhile, they are left to that push.

        Args:
            due: Tasks whose branches are to be written.
            there: Branches that existed before the commit on `main`.
        """
        for name in there:
            if _WORKSHOP.fullmatch(name):
                self.repository.delete_branch(name)
        new = [task for task in due if task not in there]
        if self.state.root_task in new:
            new.remove(self.state.root_task)
            self._begin(self.state.root_task, self.main)
        if new:
            self._write_new(new)
        on_main = None
        for task in due:
            if task in there:
                on_main = on_main if on_main is not None else self.repository.blobs(self.main)
                self._replace(task, there[task], on_main)

    def delete_renamed(self, there: Mapping[str, str]) -> None:
        """Delete branches with names that tasks no longer have, unless somebody else has written more there.

        Args:
            there: Branches that existed before the commit on `main`.
        """
        old_names = {entry["renamed"][0] for entry in self.state.lineage if "renamed" in entry}
        for name in sorted(old_names & there.keys() - self.state.tasks.keys()):
            index = self.repository.index_at(there[name])
            if index is None or name not in index.tasks:
                continue
            if shared_steps(index.lineage, self.state.lineage) == len(index.lineage):
                self.repository.delete_branch(name)

    def _begin(self, task: str, commit: str) -> None:
        """Create a branch at a commit that is its whole tree already."""
        if not self.repository.create_branch(task, commit):
            self._replace_if_older(task, self.repository.blobs(self.main))

    def _write_new(self, tasks: list[str]) -> None:
        """Create branches whose trees become commits, one after another, on a temporary branch of no task."""
        workshop = f"share_hf-{self.main}"
        if not self.repository.create_branch(workshop, self.main):
            self.repository.delete_branch(workshop)  # left by an interrupted push after the same commit
            self.repository.create_branch(workshop, self.main)
        try:
            tip = self.main
            held = {name: self.index.sha256.get(name) for name in ROOT_FILES}
            remaining = iter(tasks)
            while chunk := list(islice(remaining, _TASKS_AT_ONCE)):
                for task, additions in self._uploaded(chunk, workshop, held):
                    tip = self.repository.commit(workshop, additions, parent=tip, message=f"Task {task}").oid
                    self._begin(task, tip)
        except HfHubHTTPError as error:
            if error.response.status_code not in _OVERTAKEN:
                raise
            logger.info("A later push to %s will write the missing branches.", self.repository.repo_id)
            return
        self.repository.delete_branch(workshop)

    def _uploaded(
        self, tasks: list[str], workshop: str, held: dict[str, str | None]
    ) -> Iterator[tuple[str, list[CommitOperationAdd]]]:
        """Upload large root files of several trees, and yield for each tree what differs from the one before it.

        Args:
            tasks: Tasks of these trees.
            workshop: Branch on which the trees become commits.
            held: Checksums of the root files at the tip of that branch, kept up to date.
        """
        with TemporaryDirectory(prefix="share_hf-") as folder:
            before, roots = dict(held), {}
            for task in tasks:
                roots[task] = {
                    name: (checksum, Path(folder, task, name)) for name, checksum in self._root(task).items()
                }
                Path(folder, task).mkdir()
                for name, (_, path) in roots[task].items():
                    (self.writer.scratch / name).replace(path)
            # The upload asks the Hub which of these files the branch already has. A file that the branch has now, but
            # no longer when its turn comes, would have to be asked about again, so it is left out.
            additions = {
                task: {
                    name: CommitOperationAdd(name, path)
                    for name, (checksum, path) in root.items()
                    if checksum is None or checksum != before[name]
                }
                for task, root in roots.items()
            }
            self.repository.upload(
                [one for of_task in additions.values() for one in of_task.values()], branch=workshop
            )
            for task, root in roots.items():
                changed = [name for name, (checksum, _) in root.items() if checksum is None or checksum != held[name]]
                yield task, [additions[task].get(name) or CommitOperationAdd(name, root[name][1]) for name in changed]
                held.update({name: checksum for name, (checksum, _) in root.items()})

    def _root(self, task: str) -> dict[str, str | None]:
        """Write the root files of a task's tree, and return their checksums, with None for the card."""
        state = replace(self.state, default_task=task)
        write_root(state, self.writer, fingerprint=self.index.fingerprint, branches=self.index.branch_records)
        write_card(state, self.writer.scratch, self.card)
        return {name: self.writer.sha256[name] if name in ADAPTER_FILES else None for name in ROOT_FILES}

    def _replace(self, task: str, there: str, on_main: Mapping[str, str]) -> None:
        """Rewrite a branch that is at the commit `there`. Files on it that are not part of a tree stay."""
        self._root(task)
        held = self.repository.blobs(there)
        files = {path.relative_to(self.writer.scratch).as_posix() for path in _files_in(self.writer.scratch)}
        same = {path for path, blob in on_main.items() if held.get(path) == blob}
        gone = [path for path in held if path not in on_main and path.split("/")[0] in TREE_ENTRIES]
        changed = [*sorted(files - same - {*ROOT_FILES}), *ROOT_FILES]
        try:
            self.repository.commit(
                task, operations(self.writer.scratch, changed, gone), parent=there, message=f"Task {task}"
            )
        except HfHubHTTPError as error:
            if error.response.status_code not in _OVERTAKEN:
                raise
            self._replace_if_older(task, on_main)

    def _replace_if_older(self, task: str, on_main: Mapping[str, str]) -> None:
        """Rewrite a branch that somebody else wrote meanwhile, unless it has all the steps of this state."""
        commit = self.repository.refs().branches.get(task)
        if commit is None:
            return
        index = self.repository.index_at(commit)
        steps = len(self.state.lineage)
        if index is None or shared_steps(index.lineage, self.state.lineage) < steps:
            self._replace(task, commit, on_main)


def _files_in(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())
