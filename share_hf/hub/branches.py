"""Branches of a repository: each a whole tree whose root adapter is that of one task.

A branch appears only when its tree is complete, and a newer tree is never replaced by an older one. What the commit on
`main` says of branches is what the push is about to do: of one that is to be written again, it notes the commit that
will be replaced, so that the next push sees what was not done.
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

# Which tasks get a branch, beside those that have one.
BranchChoice = Literal["all", "new", "none"] | Collection[str]

_WORDS = ("all", "new", "none")

# Branches are commits, of which the hub takes some hundred an hour.
MAX_BRANCHES_UNASKED = 100

_TASKS_AT_ONCE = 16
_OVERTAKEN = {HTTPStatus.NOT_FOUND, HTTPStatus.PRECONDITION_FAILED}
# Named by the commit on `main` that it begins at; by 32 digits before that.
_WORKSHOP = re.compile(r"share_hf-(?:[0-9a-f]{40}|[0-9a-f]{32})")


@dataclass(frozen=True)
class BranchPlan:
    """What a push does to branches.

    Args:
        due: The tasks whose branches are to be written, in the order they were learned.
        records: What the index on `main` is to say.
    """

    due: tuple[str, ...]
    records: BranchRecords


def branch_choice(given: str | Collection[str] | None) -> BranchChoice | None:
    """Which tasks get a branch, as a command line has it: a word, or names of which one may be that word.

    Raises:
        ValueError: If it is another word.
    """
    names = [given] if isinstance(given, str) else given
    if names is None or len(names) != 1 or next(iter(names)) not in _WORDS:
        check_choice(given, None)
        return given
    return next(iter(names))


def check_choice(choice: BranchChoice | None, tasks: Collection[str] | None) -> None:
    """Refuse what does not say which tasks get a branch.

    Args:
        choice: What was given.
        tasks: The tasks there are, None where that is not known yet.

    Raises:
        ValueError: If it is another word, or has a name that is no task.
    """
    if isinstance(choice, str):
        if choice not in _WORDS:
            raise ValueError(f"branches is {choice!r}, expected 'all', 'new', 'none' or a list of tasks")
    elif choice is not None and tasks is not None and (odd := [task for task in choice if task not in tasks]):
        raise ValueError(f"branches has {odd}, expected tasks of the subspace, which has {list(tasks)}")


def plan_branches(
    state: SubspaceState, tip: Tip, refs: Refs, choice: BranchChoice | None, tolerance: float
) -> BranchPlan:
    """What is to be done to branches when a state replaces what is on `main`.

    Args:
        state: Has all steps of what is on `main`.
        tip: What is on `main`.
        refs: The branches there are.
        choice: Which tasks get a branch; if not given, all up to `MAX_BRANCHES_UNASKED`, none beyond.
        tolerance: Relative drift since it was written from which a branch is written again.
    """
    there = tip.tree.branch_records if tip.tree is not None else BranchRecords()
    lineage = tip.tree.lineage if tip.tree is not None else ()
    steps = state.lineage[shared_steps(state.lineage, lineage) :]
    changed = tasks_touched(steps)
    moved = {new for new, old in renamings(steps).items() if old in refs.branches}  # their branches move along
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
    """The tasks that are to have a branch: those that are asked for, and what an earlier push was to make."""
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
    """Writes the branches of a push, when its commit is on `main`.

    Args:
        repository: Where.
        state: The subspace on `main`.
        main: The commit.
        index: Its index.
        writer: Has put its tree.
        card: How to write model cards.
    """

    repository: HubRepository
    state: SubspaceState
    main: str
    index: TreeIndex
    writer: FolderWriter
    card: CardOptions

    def write(self, due: Collection[str], there: Mapping[str, str]) -> None:
        """Write branches, and delete the workshops of pushes that were cut off.

        Where a later push writes them meanwhile, they are left to it.

        Args:
            due: The tasks whose branches are to be written.
            there: The branches there were before the commit on `main`.
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
        """Delete branches of names that tasks no longer have, unless somebody else has written more there.

        Args:
            there: The branches there were before the commit on `main`.
        """
        old_names = {entry["renamed"][0] for entry in self.state.lineage if "renamed" in entry}
        for name in sorted(old_names & there.keys() - self.state.tasks.keys()):
            index = self.repository.index_at(there[name])
            if index is None or name not in index.tasks:
                continue
            if shared_steps(index.lineage, self.state.lineage) == len(index.lineage):
                self.repository.delete_branch(name)

    def _begin(self, task: str, commit: str) -> None:
        """Make a branch of a commit that already is its whole tree."""
        if not self.repository.create_branch(task, commit):
            self._replace_if_older(task, self.repository.blobs(self.main))

    def _write_new(self, tasks: list[str]) -> None:
        """Make branches whose trees become commits, one after another, on a branch of no task."""
        workshop = f"share_hf-{self.main}"
        if not self.repository.create_branch(workshop, self.main):
            self.repository.delete_branch(workshop)  # of a push that was cut off, after the same commit
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
            logger.info("A later push to %s writes the branches that are missing.", self.repository.repo_id)
            return
        self.repository.delete_branch(workshop)

    def _uploaded(
        self, tasks: list[str], workshop: str, held: dict[str, str | None]
    ) -> Iterator[tuple[str, list[CommitOperationAdd]]]:
        """Roots of trees, large files uploaded, each as it differs from the one before.

        Args:
            tasks: The tasks of these trees.
            workshop: The branch that they become commits of.
            held: Checksums of the root files at its tip; they are kept up to date.
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
            # The hub is asked what its branch has already of these files. Of one that it has now, and no longer when
            # its turn comes, it would have to be asked again.
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
        """Write the root files of a task's tree: their checksums, None for the card."""
        state = replace(self.state, default_task=task)
        write_root(state, self.writer, fingerprint=self.index.fingerprint, branches=self.index.branch_records)
        write_card(state, self.writer.scratch, self.card)
        return {name: self.writer.sha256[name] if name in ADAPTER_FILES else None for name in ROOT_FILES}

    def _replace(self, task: str, there: str, on_main: Mapping[str, str]) -> None:
        """Write a branch again that is at a commit; what on it is no part of a tree stays."""
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
        """Write a branch again that somebody else has written meanwhile, unless with all the steps of this state."""
        commit = self.repository.refs().branches.get(task)
        if commit is None:
            return
        index = self.repository.index_at(commit)
        steps = len(self.state.lineage)
        if index is None or shared_steps(index.lineage, self.state.lineage) < steps:
            self._replace(task, commit, on_main)


def _files_in(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())
