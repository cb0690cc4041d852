"""The subspaces that visitors of the page have opened, with their models: all visitors share them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import cached_property
from pathlib import Path

from answering import BASE, ROUTER, Answerer, Line, parsed
from subspaces import DemoError, Summary, TaskFacts, facts_of_tasks, open_subspace, summary_of

from share_hf import SharedSubspace


KEPT = 3  # subspaces in memory


class Opened:
    """A subspace that was opened.

    Args:
        place: Folder or Hub id that it came from.
        subspace: The subspace.
    """

    def __init__(self, place: str, subspace: SharedSubspace) -> None:
        self.place, self.subspace = place, subspace
        self._lock = threading.Lock()
        self.answerers: dict[str, Answerer] = {}

    @cached_property
    def tasks(self) -> list[TaskFacts]:
        """Facts about each task."""
        return facts_of_tasks(self.subspace)

    @cached_property
    def summary(self) -> Summary:
        """Sizes, means, and what is missing."""
        return summary_of(self.subspace, self.tasks)

    @property
    def may_generate(self) -> bool:
        """Whether the tasks may be those of a language model, as far as the subspace tells."""
        return any(info.target.get("task_type") != "SEQ_CLS" for info in self.subspace.state.tasks.values())

    @property
    def is_scored(self) -> bool:
        """Whether scores were measured over the stream."""
        return bool(self.subspace.state.metrics.get("matrix"))

    def answerer(self, base_model: str) -> Answerer:
        """Return the model with all tasks. The first call for a base model loads it, in place of another one.

        Raises:
            DemoError: If it cannot be loaded.
        """
        with self._lock:
            if base_model not in self.answerers:
                self.answerers = {base_model: Answerer(self.subspace, base_model)}
            return self.answerers[base_model]

    def menu(self) -> list[tuple[str, str]]:
        """Return what a text can be asked: titles and values of a menu, of which the browser shows some at a time."""
        router = [("the router chooses", ROUTER)] if self.subspace.routed_tasks else []
        return [*router, *((name, name) for name in self.subspace.tasks), ("the base model alone", BASE)]

    def examples(self, file: Path) -> list[Line]:
        """Return the lines of a file, each of which is `task: text`, that are about a task of this subspace."""
        if not file.is_file():
            return []
        lines = file.read_text(encoding="utf-8").splitlines()
        known = [line for line in lines if line.partition(":")[0].strip() in self.subspace.tasks]
        return parsed("\n".join(known), self.subspace)


class Desk:
    """The subspaces that were opened last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opened: OrderedDict[str, Opened] = OrderedDict()

    def open(self, place: str) -> Opened:
        """Read a subspace. If it has changed in nothing but its scores, its model stays in memory.

        Raises:
            DemoError: If there is no subspace.
        """
        place = place.strip()
        subspace = open_subspace(place)
        with self._lock:
            known = self._opened.pop(place, None)
            opened = self._opened[place] = Opened(place, subspace)
            if known is not None and known.subspace.state.lineage == subspace.state.lineage:
                opened.answerers = known.answerers
            while len(self._opened) > KEPT:
                self._opened.popitem(last=False)
        return opened

    def get(self, place: str) -> Opened:
        """Return a subspace that was opened, which is read again if it had to give way to others.

        Raises:
            DemoError: If none was opened, or it is gone.
        """
        if not place:
            raise DemoError("No subspace is open.")
        with self._lock:
            known = self._opened.get(place)
        return known or self.open(place)
