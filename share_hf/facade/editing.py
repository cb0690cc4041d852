"""Edits of the tasks of a subspace: removed, renamed and replaced ones."""

from __future__ import annotations

import math
import os
from dataclasses import replace

from ..format.names import check_task_name
from ..state import renamed_task, without_scores, without_task
from ..subspace import MergeReport
from .held import HeldSubspace


class Editing(HeldSubspace):
    """Changes to the tasks that there are. Whatever fails leaves the subspace as it was."""

    def remove_task(self, name: str) -> None:
        """Forget a task: its coefficients and head. The basis and the other tasks stay as they are."""
        self._check_known(name)
        self._held = without_task(self.state, name)

    def rename_task(self, name: str, new_name: str) -> None:
        """
        Give a task another name. It keeps its place among the tasks, its certificate, head and scores, to the bit.

        Another writer who has the task under its old name gets the new one with the next push or pull. Where that
        writer trained the task further meanwhile, both are kept, each under its name.

        Args:
            name (`str`): A task of the subspace.
            new_name (`str`): Its new name.

        Raises:
            ValueError: If there is no such task, or the new name is unusable or taken.
        """
        self._check_known(name)
        check_task_name(new_name, [task for task in self.tasks if task != name])
        if new_name == name:
            raise ValueError(f"task {name!r} has this name already, expected another one")
        self._held = renamed_task(self.state, name, new_name)

    def replace_task(
        self,
        name: str,
        adapter: str | os.PathLike,
        *,
        tolerance: float | None = None,
        base_model: str | None = None,
        token: str | bool | None = None,
        progress: bool = True,
    ) -> MergeReport:
        """
        Put another adapter in the place of a task: it is merged as a new task of that name, learned last.

        The scores of the old task go with it. Directions that only it had stay in the basis until a refit.

        Args:
            name (`str`): A task of the subspace.
            adapter (`str`): Folder or hub id of a plain LoRA.
            tolerance: As for [`~SharedSubspace.add_adapters`], as are `base_model`, `token` and `progress`.

        Returns:
            [`~share_hf.subspace.MergeReport`]: The drift of every task, layer by layer.

        Raises:
            ValueError: If there is no such task; also as for [`~SharedSubspace.add_adapters`].
        """
        self._check_known(name)
        before = self.state
        without = replace(without_task(before, name), metrics=without_scores(before.metrics, [name]))
        others = type(self)(without)
        report = others.add_adapters(
            {name: adapter}, tolerance=tolerance, base_model=base_model, token=token, progress=progress
        )
        self._held = replace(others.state, default_task=before.default_task)
        return report


def check_tolerance(tolerance: float | None) -> None:
    """Refuse what is no relative part of an update.

    Raises:
        ValueError: If it is not None, and no number from 0 to below 1.
    """
    if tolerance is None:
        return
    number = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool) and math.isfinite(tolerance)
    if not number or not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is {tolerance!r}, expected None or a number of at least 0 and below 1")
