"""Edits of the tasks of a subspace: removed ones, and others to come."""

from __future__ import annotations

from ..state import without_task
from .held import HeldSubspace


class Editing(HeldSubspace):
    """Changes to the tasks that need no new adapters, or put one in place of another."""

    def remove_task(self, name: str) -> None:
        """Forget a task: its coefficients and head. The basis and the other tasks stay as they are."""
        self._check_known(name)
        self._held = without_task(self.state, name)
