"""Editing the tasks of a subspace: removing, renaming, replacing, refitting, and undoing a step."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..format.collection import read_loras
from ..format.history import step_back
from ..format.lock import holding
from ..format.names import check_task_name, listing
from ..format.originals import read_original
from ..state import check_original, hub_originals, refitted, renamed_task, without_scores, without_task
from ..subspace import MergeReport
from .held import HeldSubspace


if TYPE_CHECKING:
    from typing_extensions import Self


class Editing(HeldSubspace):
    """Changes to existing tasks. An operation that fails leaves the subspace unchanged."""

    def remove_task(self, name: str) -> None:
        """Remove a task with its coefficients and head. The basis and the other tasks do not change."""
        self._check_known(name)
        self._held = without_task(self.state, name)
        self._originals.pop(name, None)

    def rename_task(self, name: str, new_name: str) -> None:
        """
        Rename a task. It keeps its place among the tasks, and its certificate, head and scores stay bit-identical.

        Another writer who has the task under its old name gets the new name with the next push or pull. If that
        writer has meanwhile trained the task further, both versions are kept, each under its own name.

        Args:
            name (`str`): Task of the subspace.
            new_name (`str`): New name of the task.

        Raises:
            ValueError: If there is no such task, or the new name is unusable or taken.
        """
        self._check_known(name)
        check_task_name(new_name, [task for task in self.tasks if task != name])
        if new_name == name:
            raise ValueError(f"task {name!r} already has this name, expected another one")
        self._held = renamed_task(self.state, name, new_name)
        self._originals = {new_name if task == name else task: of for task, of in self._originals.items()}

    def replace_task(
        self,
        name: str,
        adapter: str | os.PathLike,
        *,
        tolerance: float | None = None,
        base_model: str | None = None,
        component: str | None = None,
        token: str | bool | None = None,
        progress: bool = True,
    ) -> MergeReport:
        """
        Replace a task by another adapter, which is merged as a new task of the same name, learned last.

        The scores of the old task are removed with it. Directions that only the old task used stay in the basis until
        a refit.

        Args:
            name (`str`): Task of the subspace.
            adapter (`str`): Folder or Hub id of a plain LoRA.
            tolerance:
                Same as in [`~SharedSubspace.add_adapters`], as are `base_model`, `component`, `token` and `progress`.

        Returns:
            [`~share_hf.subspace.MergeReport`]: The drift of every task, layer by layer.

        Raises:
            ValueError: If there is no such task, and as in [`~SharedSubspace.add_adapters`].
        """
        self._check_known(name)
        before = self.state
        without = replace(without_task(before, name), metrics=without_scores(before.metrics, [name]))
        others: Any = type(self)(without)
        report = others.add_adapters(
            {name: adapter},
            tolerance=tolerance,
            base_model=base_model,
            component=component,
            token=token,
            progress=progress,
        )
        self._reading = others.reading
        self._held = replace(others.state, default_task=before.default_task)
        self._originals = {task: of for task, of in self._originals.items() if task != name} | others._originals
        return report

    def refit(
        self,
        originals: Mapping[str, str | os.PathLike] | None = None,
        *,
        component: str | None = None,
        token: str | bool | None = None,
        progress: bool = True,
    ) -> MergeReport:
        """
        Rebuild the bases from the original adapters of the tasks, which merges have truncated since.

        A refit undoes the truncation that has accumulated over many merges, and removes the directions of removed
        tasks from the bases. The lineage records adapters on the Hub, which must not have changed since; the file
        beside the tree, or `originals`, names folders. A task without an original, such as one that was trained here,
        enters as it is stored.

        Args:
            originals (`Mapping[str, str]`, *optional*):
                Folder or Hub id of the adapter of each task whose original is not known or has moved.
            component (`str`, *optional*):
                Component of a pipeline to read from files in `originals` that hold LoRAs of several components.
            token (`str` or `bool`, *optional*): User access token of the Hub.
            progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.

        Returns:
            [`~share_hf.subspace.MergeReport`]: The error of every task in the new bases.

        Raises:
            ValueError: If a task is unknown, no task has an original, or an adapter is missing or is not the one that
                the task was learned from. The subspace stays unchanged.
        """
        given = dict(originals or {})
        for task in given:
            self._check_known(task)
        state = self.state
        on_hub = {task: of for task, of in hub_originals(state.lineage).items() if task in state.tasks}
        folders = {task: of for task, of in self._originals.items() if task in state.tasks}
        if not {*given, *on_hub, *folders}:
            raise ValueError(
                "no original adapter is known, expected the adapter of at least one of the tasks "
                f"{listing(state.tasks)}"
            )
        known = {task: original for task, original in folders.items() if task not in given}
        components = {task: original.component for task, original in known.items()} | dict.fromkeys(given, component)
        places: dict[str, str | Path] = {task: original.place for task, original in known.items()}
        places |= {task: place if isinstance(place, str) else Path(place) for task, place in given.items()}
        loras = read_loras(
            places, components=components, base_model=self.base_model_name_or_path, token=token, progress=progress
        )
        for task, of in on_hub.items():
            if task not in loras:
                loras[task] = read_original(of, token=token)
        for task, lora in loras.items():
            check_original(state, task, lora.updates)
        self._held, report = refitted(state, {task: lora.updates for task, lora in loras.items()}, progress=progress)
        return report

    @classmethod
    def undo(cls, folder: str | os.PathLike) -> Self:
        """
        Undo the last step of a tree that was saved with a history: restore its predecessor, byte for byte.

        A step that was pushed comes back with the next push or pull. Remove or rename its task instead.

        Args:
            folder (`str`): Folder of a tree that was saved with `history=`.

        Returns:
            [`SharedSubspace`]: The restored subspace.

        Raises:
            ValueError: If no predecessor is kept. Nothing has changed then.
        """
        place = Path(folder)
        with holding(place):
            step_back(place)
            return cast(Any, cls).from_pretrained(place)
