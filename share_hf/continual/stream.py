"""What a stream of tasks has come to, in memory and in its folder, so that any interruption can be continued from.

<output_dir>/stream_state.json    how far the stream has come
<output_dir>/subspace             the tree, after every phase and with scores after every task
<output_dir>/phases/<nr>-<task>-<phase>   the checkpoints of a phase
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..card import write_tree
from ..engines import on_first_process, together
from ..format.files import read_json, write_atomically
from ..format.replacing import standing_at
from ..format.tree import read_tree
from ..shared_subspace import SharedSubspace
from ..state import ContinualMetrics, SubspaceState, combined_metrics
from .checkpoints import MARKER_FILE, check_unclaimed, empty_phase, is_claimed


STREAM_STATE_FILE = "stream_state.json"
SUBSPACE_FOLDER = "subspace"
PHASES_FOLDER = "phases"

Stage = Literal["learn", "finetune", "evaluate"]


@dataclass(frozen=True)
class StreamPosition:
    """Position in a stream: the content of `stream_state.json`.

    Args:
        position: How many tasks are done.
        task: The task in work, None between tasks.
        stage: What is being done with it.
        steps: Length of the subspace's lineage when the stage began. A saved subspace that is one step longer has the
            result of the stage in it.
        trained_steps: Steps of the optimizer in the phases that are done.
        phase_steps: Steps of the stage's own phase, where it is trained and only its result has to be taken.
        metrics: `ContinualMetrics` so far.
        marks_phases: Whether the folders of its phases are marked; those of earlier versions are not.
    """

    position: int = 0
    task: str | None = None
    stage: Stage = "learn"
    steps: int = 0
    trained_steps: int = 0
    phase_steps: int = 0
    metrics: dict[str, Any] | None = None
    marks_phases: bool = False

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / STREAM_STATE_FILE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> StreamPosition | None:
        """The position in a folder, None if no stream was begun there.

        Raises:
            ValueError: If the file is damaged.
        """
        path = folder / STREAM_STATE_FILE
        if not path.is_file():
            return None
        try:
            return cls(**read_json(path))
        except TypeError as error:
            raise ValueError(f"{path}: not a stream state ({error})") from error


class Stream:
    """A stream as its trainer has it.

    Args:
        folder: Where it is kept.
        state: The subspace that it begins from.
        metrics: Empty scores of the stream.
        saves: Tells whether this process writes.

    Attributes:
        state (`SubspaceState`): The subspace so far.
        metrics (`ContinualMetrics`): What was measured so far.
    """

    def __init__(
        self, folder: Path, state: SubspaceState, metrics: ContinualMetrics, saves: Callable[[], bool]
    ) -> None:
        self.folder = folder
        self.state = state
        self.metrics = metrics
        self._saves = saves
        self._begun = False
        self._resumed: tuple[Path, bool] | None = None  # an interrupted stream's folder, and whether it marks phases
        self._on_disk: dict[str, str] = {}

    @property
    def subspace(self) -> SharedSubspace:
        """The subspace as learned so far, with the scores."""
        metrics = combined_metrics(self.state.metrics, self.metrics.as_dict(), self.state.tasks)
        return SharedSubspace(replace(self.state, metrics=metrics))

    def phase_folder(self, position: int, task: str, phase: str) -> Path:
        """Folder for the checkpoints of a phase."""
        return self.folder / PHASES_FOLDER / f"{position + 1:04d}-{task}-{phase}"

    def resumed_phase(self, folder: Path) -> Path | None:
        """The folder in which an interrupted run may have left checkpoints of this phase; the first phase's only."""
        resumed, self._resumed = self._resumed, None
        if resumed is None:
            return None
        interrupted, marks_phases = resumed
        phase = interrupted / folder.relative_to(self.folder)
        return phase if is_claimed(phase) or not marks_phases else None

    def begin(self) -> None:
        """Make the folder this stream's, once: what an earlier run left there must not be taken for it on a resume."""
        if self._begun:
            return
        self._begun = True
        together(lambda: self._saves() and self._clear())
        self.save_subspace()

    def save_position(
        self, done: int, trained_steps: int, task: str | None = None, stage: Stage = "learn", *, phase_steps: int = 0
    ) -> None:
        """Write down how far the stream has come.

        Args:
            done: How many tasks are done.
            trained_steps: Steps of the optimizer in the phases that are done, that of this stage included.
            task: The task in work.
            stage: What is being done with it.
            phase_steps: Steps of the stage's own phase, when it is trained and only has to be taken.
        """
        position = StreamPosition(
            position=done,
            task=task,
            stage=stage,
            steps=len(self.state.lineage),
            trained_steps=trained_steps - phase_steps,
            phase_steps=phase_steps,
            metrics=self.metrics.as_dict(),
            marks_phases=True,
        )
        together(lambda: self._saves() and position.save(self.folder))

    def save_subspace(self, *, draft: bool = True) -> None:
        """Write the tree; without figures and audit while a task is in work."""
        state = self.subspace.state
        together(lambda: self._saves() and self._write_tree(state, draft))

    def restore(self, resumed: Path, tasks: Sequence[str]) -> StreamPosition | None:
        """Take up subspace, metrics and position of an interrupted stream, as the first process finds them.

        Args:
            resumed: The folder of the interrupted stream.
            tasks: The tasks of this stream, in their order.

        Returns:
            The position, None if there is no stream in the folder.

        Raises:
            ValueError: If what is there is damaged, or belongs to a stream with other settings or tasks.
        """
        found, state = on_first_process(lambda: read_stream(resumed, tasks, self.state), known=self.state)
        if found is None:
            return None
        self.state = state if state is not None else self.state
        if found.metrics is not None:
            self.metrics = ContinualMetrics.from_dict(found.metrics)
        if found.task is not None and len(self.state.lineage) > found.steps:
            # The result of the stage was saved, that it is over was not.
            trained_steps = found.trained_steps + found.phase_steps
            stage = "finetune" if found.stage == "learn" else "evaluate"
            found = replace(found, stage=stage, trained_steps=trained_steps)
        self._begun = True
        self._resumed = (resumed, found.marks_phases) if found.task is not None else None
        return found

    def _clear(self) -> None:
        phases = self.folder / PHASES_FOLDER
        check_unclaimed(phases)
        (self.folder / STREAM_STATE_FILE).unlink(missing_ok=True)
        for marker in list(phases.glob(f"*/{MARKER_FILE}")):
            empty_phase(marker.parent)

    def _write_tree(self, state: SubspaceState, draft: bool) -> None:
        folder = self.folder / SUBSPACE_FOLDER
        known, self._on_disk = self._on_disk, {}
        self._on_disk = write_tree(state, folder, known=known, draft=draft)


def read_stream(
    folder: Path, tasks: Sequence[str], state: SubspaceState
) -> tuple[StreamPosition | None, SubspaceState | None]:
    """
    What an interrupted stream has left in its folder.

    Args:
        folder: Folder of the stream.
        tasks: The tasks of the stream that is to go on, in their order.
        state: The subspace that it would begin from.

    Returns:
        Its position and its subspace, each None if there is none.

    Raises:
        ValueError: If what is there is damaged, or belongs to a stream with other settings or tasks.
    """
    begun = StreamPosition.load(folder)
    if begun is None:
        return None, None
    order = list(tasks)
    if begun.task is not None and (begun.position >= len(order) or order[begun.position] != begun.task):
        raise ValueError(
            f"{folder}: the stream was at task {begun.task!r}, number {begun.position + 1}, but tasks is {order}"
        )
    learned = (begun.metrics or {}).get("tasks", [])[: begun.position]
    if learned != order[: begun.position]:
        raise ValueError(f"{folder}: the stream has learned {learned}, but tasks is {order}")
    place = folder / SUBSPACE_FOLDER
    saved = read_tree(place) if standing_at(place).exists() else None
    if saved is not None and saved.settings != state.settings:
        found, expected = vars(saved.settings), vars(state.settings)
        differing = [name for name in expected if found[name] != expected[name]]
        found, expected = (", ".join(f"{name}={of[name]!r}" for name in differing) for of in (found, expected))
        raise ValueError(f"{folder}: the stream has {found}, expected {expected}")
    in_subspace = list((saved or state).tasks)
    if not set(learned) <= set(in_subspace):
        raise ValueError(f"{place}: has tasks {in_subspace}, expected {learned} as in {STREAM_STATE_FILE}")
    return begun, saved
