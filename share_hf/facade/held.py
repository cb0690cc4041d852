"""The contents of a subspace, some of whose tasks may not be downloaded from its repository yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from ..card import CardOptions
from ..format.collection import Reading
from ..format.names import listing
from ..format.originals import LocalOriginal
from ..hub.fetch import RemoteTree
from ..state import Lineage, SubspaceState, steps_of_tasks
from ..subspace import SubspaceSettings
from ..subspace.dimensions import ChosenDimensions


class HeldSubspace:
    """A subspace as an immutable state, with what is known about the places that it was read from."""

    def __init__(self, state: SubspaceState, *, rest: RemoteTree | None = None) -> None:
        self.chosen: ChosenDimensions | None = None  # the choice of "auto", if the subspace was built with it
        self._held = state
        self._rest = rest
        self._card = CardOptions()
        self._reading = Reading()
        self._seen: dict[Path, Lineage] = {}  # for each folder, the lineage that was last read or written there
        self._originals: dict[str, LocalOriginal] = {}  # for each task, the adapter on this machine that it came from

    @property
    def state(self) -> SubspaceState:
        """Everything the subspace holds, as an immutable value. Access downloads what is still in the repository."""
        if self._rest is not None:
            self._rest.fetch()
            self._card = replace(self._card, existing=self._rest.card)
            self._held, self._rest = self._rest.read(), None
        return self._held

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order in which they were learned."""
        return tuple(self._held.tasks) if self._rest is None else self._rest.index.tasks

    @property
    def reading(self) -> Reading:
        """Result of reading the adapters added last: which were left out, are the same as others, or were renamed."""
        return self._reading

    @property
    def settings(self) -> SubspaceSettings:
        """k, p and the settings of merges."""
        return self._held.settings

    @property
    def base_model_name_or_path(self) -> str | None:
        """Name or path of the base model that the subspace belongs to."""
        return self._held.base_model_name_or_path

    def _holding(self, tasks: Sequence[str]) -> SubspaceState:
        """Return a state with at least these tasks, which suffices to work with them."""
        if self._rest is not None and (more := [task for task in tasks if task not in self._held.tasks]):
            self._rest.fetch(more)
            self._held = self._rest.read([*self._held.tasks, *more])
        return self._held

    def _hold_merged(self, state: SubspaceState, known: Mapping[str, LocalOriginal] | None = None) -> None:
        """Hold the result of a merge with another writer's tasks.

        If that writer replaced a task, the merged task no longer comes from our original adapter, which is forgotten.

        Args:
            state: Result of the merge.
            known: Adapters on this machine that the other writer's tasks came from.
        """
        steps, before = steps_of_tasks(state.lineage), steps_of_tasks(self._held.lineage)
        theirs = {task: original for task, original in (known or {}).items() if task not in self._held.tasks}
        ours = {
            task: original
            for task, original in self._originals.items()
            if steps.get(task, [])[-1:] == before.get(task, [])[-1:]
        }
        self._originals = {task: original for task, original in (theirs | ours).items() if task in state.tasks}
        self._held = state

    def _check_known(self, task: str) -> None:
        if task not in self.tasks:
            near = get_close_matches(str(task), self.tasks, n=1)
            advice = f", did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"no task {task!r} in the subspace, it has {listing(self.tasks)}{advice}")
