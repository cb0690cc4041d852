"""The progress of a stream of tasks, in memory and in its folder, so that it can resume after any interruption.

<output_dir>/stream_state.json    how far the stream has come
<output_dir>/subspace             the tree, after every phase, and with scores after every task
<output_dir>/phases/<nr>-<task>-<phase>   the checkpoints of a phase
<output_dir>/earlier/<nr>         state and subspace of a stream that was here when another one began
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

from accelerate import PartialState
from transformers.utils import logging

from ..card import write_tree
from ..engines import on_first_process, together
from ..format.index import read_index
from ..format.replacing import standing_at
from ..format.tree import read_tree
from ..shared_subspace import SharedSubspace
from ..state import ContinualMetrics, SubspaceState, combined_metrics, extends
from .checkpoints import MARKER_FILE, check_unclaimed, empty_phase, is_claimed
from .data import TaskSplits
from .folder_lock import holding
from .interruption import telling_how_to_resume
from .position import STREAM_STATE_FILE, Stage, StreamPosition
from .record import StreamRecord, changed_arguments, changed_data, check_base_model, data_record


SUBSPACE_FOLDER = "subspace"
PHASES_FOLDER = "phases"
EARLIER_FOLDER = "earlier"

logger = logging.get_logger(__name__)


class Stream:
    """The stream of a trainer.

    Args:
        folder: Folder that holds the stream.
        state: Subspace that the stream begins from.
        metrics: Metrics of the stream, without scores yet.
        record: Record of what the stream is learned with, without data.
        saves: Function that returns whether this process writes.

    Attributes:
        state (`SubspaceState`): Subspace so far.
        metrics (`ContinualMetrics`): Metrics so far.
        awaited (`set[str]`): Begun or learned tasks of a resumed stream whose data is not given yet.
    """

    def __init__(
        self,
        folder: Path,
        state: SubspaceState,
        metrics: ContinualMetrics,
        record: StreamRecord,
        saves: Callable[[], bool],
    ) -> None:
        self.folder = folder
        self.state = state
        self.metrics = metrics
        self.awaited: set[str] = set()
        self._record = record
        self._saves = saves
        self._begun = False
        self._interrupted: StreamPosition | None = None  # until its task resumes
        self._resumed: tuple[Path, bool] | None = None  # folder of an interrupted stream, and whether it marks phases
        self._on_disk: dict[str, str] = {}

    @property
    def subspace(self) -> SharedSubspace:
        """The subspace learned so far, with the scores."""
        metrics = combined_metrics(self.state.metrics, self.metrics.as_dict(), self.state.tasks)
        return SharedSubspace(replace(self.state, metrics=metrics))

    @contextmanager
    def at_work(self, task: str | None = None) -> Iterator[None]:
        """Hold the folder while the block runs, and log how to resume the stream if a person interrupts it.

        Args:
            task: Task that is learned by itself, if any.

        Raises:
            FolderInUseError: If another trainer is at work in the folder.
        """
        then = "" if task is None else f", then learn_task({task!r}, ...)"
        line = f"{self.folder}: the stream was interrupted; train(resume_from_checkpoint=True){then} continues it."
        with holding(self.folder), telling_how_to_resume(lambda: line if self._begun else None):
            yield

    def phase_folder(self, position: int, task: str, phase: str) -> Path:
        """Return the folder for the checkpoints of a phase."""
        return self.folder / PHASES_FOLDER / f"{position + 1:04d}-{task}-{phase}"

    def resumed_phase(self, folder: Path) -> Path | None:
        """Return the folder where an interrupted run may have left checkpoints of this phase.

        This is None for all but the first phase after a resume.
        """
        resumed, self._resumed = self._resumed, None
        if resumed is None:
            return None
        interrupted, marks_phases = resumed
        phase = interrupted / folder.relative_to(self.folder)
        return phase if is_claimed(phase) or not marks_phases else None

    def begin(self) -> None:
        """Claim the folder for this stream, once: a resume must not mistake files of an earlier run for its own."""
        if self._begun:
            return
        self._begun = True
        together(lambda: self._saves() and self._clear())
        self.save_subspace()

    def is_done(self, task: str) -> bool:
        """Return whether the subspace has a task, and its learning was not interrupted."""
        return task in self.state.tasks and (self._interrupted is None or task not in self._interrupted.in_work)

    def check_next(self, task: str) -> None:
        """Refuse to learn a task while another one is merged but not finished; warn if the other is not merged.

        Raises:
            ValueError: If another task must be finished first. The message names it.
        """
        left = self._interrupted
        if left is None or left.task in (None, task):
            return
        if left.together and left.task in self.state.tasks:
            raise ValueError(
                f"{self.folder}: the stream was interrupted after it had learned {left.together} together, expected "
                f"train(resume_from_checkpoint=True) of a trainer with them before {task!r}, to finish them"
            )
        if left.task in self.state.tasks:
            raise ValueError(
                f"{self.folder}: the stream was interrupted after the merge of task {left.task!r}, expected "
                f"learn_task({left.task!r}, ...) before {task!r}, to finish it"
            )
        if PartialState().is_main_process:
            logger.warning(
                "%s: the stream was interrupted while it learned task %r; %r replaces that task.",
                *(self.folder, left.task, task),
            )

    def take_up(self, data: Mapping[str, TaskSplits]) -> Stage | None:
        """Begin one task, or several that are learned together, or resume where they were interrupted.

        Args:
            data: Data of each task.

        Returns:
            The stage in which they were interrupted, None if they begin.
        """
        interrupted, self._interrupted = self._interrupted, None
        stage = interrupted.stage if interrupted is not None and interrupted.in_work == list(data) else None
        if stage is None:
            self._resumed = None
        self.awaited -= data.keys()
        self.metrics.add_tasks(list(data))
        if stage in (None, "learn"):
            records = {task: data_record(splits) for task, splits in data.items()}
            self._record = replace(self._record, data={**self._record.data, **records})
        return stage

    def compare_data(self, task: str, data: TaskSplits) -> None:
        """Warn if the data of a task that the stream has begun has changed. A phase on it then begins anew."""
        found = self._record.data.get(task, {})
        if on_first_process(lambda: _is_changed(self.folder, task, found, data)):
            self._resumed = None

    def save_position(
        self,
        done: int,
        trained_steps: int,
        tasks: Sequence[str] = (),
        stage: Stage = "learn",
        *,
        phase_steps: int = 0,
    ) -> None:
        """Write down how far the stream has come.

        Args:
            done: Number of finished tasks.
            trained_steps: Number of optimizer steps in the trained phases, including that of this stage if it is
                trained.
            tasks: Current task, or those that are learned together.
            stage: Stage of the current task.
            phase_steps: Number of steps of the stage's own phase, if it is trained and only its result is yet to be
                taken.
        """
        position = StreamPosition(
            position=done,
            task=next(iter(tasks), None),
            together=list(tasks) if len(tasks) > 1 else [],
            stage=stage,
            steps=len(self.state.lineage),
            trained_steps=trained_steps - phase_steps,
            phase_steps=phase_steps,
            metrics=self.metrics.as_dict(),
            marks_phases=True,
            record=self._record,
        )
        together(lambda: self._saves() and position.save(self.folder))

    def save_subspace(self, *, draft: bool = True) -> None:
        """Write the tree. A draft, while a task is in work, has no figures and no audit."""
        state = self.subspace.state
        together(lambda: self._saves() and self._write_tree(state, draft))

    def restore(self, resumed: Path, tasks: Mapping[str, TaskSplits]) -> StreamPosition | None:
        """Restore subspace, metrics and position of an interrupted stream, as the first process finds them.

        Args:
            resumed: Folder of the interrupted stream.
            tasks: Tasks of this stream, in order.

        Returns:
            The position, None if there is no stream in the folder.

        Raises:
            ValueError: If the stream in the folder is damaged, or has another base model, other settings or other
                tasks.
        """
        found, state, is_unchanged = on_first_process(
            lambda: read_stream(resumed, tasks, self.state, self._record), known=self.state
        )
        if found is None:
            return None
        self.state = state if state is not None else self.state
        if resumed.resolve() != self.folder.resolve():
            together(lambda: self._saves() and self._keep_earlier())
        if found.metrics is not None:
            training = self.metrics.training
            self.metrics = ContinualMetrics.from_dict(found.metrics)
            if found.record.arguments != self._record.arguments:
                self.metrics.training |= training
        self._record = replace(self._record, data=found.record.data)
        if found.task is not None and len(self.state.lineage) > found.steps:
            # The result of the stage was saved, but not the end of the stage.
            trained_steps = found.trained_steps + found.phase_steps
            stage = "finetune" if found.stage == "learn" else "evaluate"
            found = replace(found, stage=stage, trained_steps=trained_steps)
        self._begun = True
        self._interrupted = found
        self._resumed = (resumed, found.marks_phases) if found.task is not None and is_unchanged else None
        self.awaited = set(found.tasks) - set(tasks)
        return found

    def _clear(self) -> None:
        phases = self.folder / PHASES_FOLDER
        check_unclaimed(phases)
        self._keep_earlier()
        (self.folder / STREAM_STATE_FILE).unlink(missing_ok=True)
        for marker in list(phases.glob(f"*/{MARKER_FILE}")):
            empty_phase(marker.parent)

    def _keep_earlier(self) -> None:
        """Move aside what an earlier stream has learned here, unless this stream continues from it."""
        place = standing_at(self.folder / SUBSPACE_FOLDER)
        if not _has_more_than(place, self.state):
            return
        earlier = self.folder / EARLIER_FOLDER
        kept = next(folder for number in count(1) if not (folder := earlier / f"{number:04d}").exists())
        kept.mkdir(parents=True)
        if (self.folder / STREAM_STATE_FILE).exists():
            (self.folder / STREAM_STATE_FILE).rename(kept / STREAM_STATE_FILE)
        place.rename(kept / SUBSPACE_FOLDER)
        logger.warning(
            "%s: an earlier stream has learned tasks there; its subspace is kept in %s, and "
            "train(resume_from_checkpoint=%r) continues it.",
            *(self.folder, kept / SUBSPACE_FOLDER, str(kept)),
        )

    def _write_tree(self, state: SubspaceState, draft: bool) -> None:
        folder = self.folder / SUBSPACE_FOLDER
        known, self._on_disk = self._on_disk, {}
        self._on_disk = write_tree(state, folder, known=known, draft=draft)


def read_stream(
    folder: Path, tasks: Mapping[str, TaskSplits], state: SubspaceState, record: StreamRecord
) -> tuple[StreamPosition | None, SubspaceState | None, bool]:
    """
    Read what an interrupted stream has left in its folder, and log what is different now.

    Args:
        folder: Folder of the stream.
        tasks: Tasks of the stream that is to resume it, in order.
        state: Subspace that this stream would begin from.
        record: Record of what this stream is to be learned with.

    Returns:
        The position and the subspace, each None if there is none, and whether the interrupted phase would run as it
        did, so that it can resume from its checkpoints.

    Raises:
        ValueError: If the stream in the folder is damaged, or has another base model, other settings or other tasks.
    """
    begun = StreamPosition.load(folder)
    if begun is None:
        return None, None, False
    place = folder / SUBSPACE_FOLDER
    saved = read_tree(place) if standing_at(place).exists() else None
    in_subspace = list((saved or state).tasks)
    _check_order(folder, begun, [task for task in tasks if task in begun.tasks or task not in in_subspace])
    if saved is not None and saved.settings != state.settings:
        found, expected = vars(saved.settings), vars(state.settings)
        differing = [name for name in expected if found[name] != expected[name]]
        found, expected = (", ".join(f"{name}={of[name]!r}" for name in differing) for of in (found, expected))
        raise ValueError(f"{folder}: the stream has {found}, expected {expected}")
    learned = begun.tasks[: begun.position]
    if not set(learned) <= set(in_subspace):
        raise ValueError(f"{place}: has tasks {in_subspace}, expected {learned} as in {STREAM_STATE_FILE}")
    return begun, saved, not _is_changed_stream(folder, begun, tasks, record)


def _check_order(folder: Path, begun: StreamPosition, order: Sequence[str]) -> None:
    """Refuse an order in which tasks that the stream has begun would be out of place.

    Tasks that are missing at the end may still be learned one by one.
    """
    at_their_place = order[begun.position : begun.position + len(begun.in_work)]
    if at_their_place not in ([], begun.in_work):
        in_work = ", ".join(map(repr, begun.in_work))
        raise ValueError(
            f"{folder}: the stream was at task {in_work}, number {begun.position + 1}, but tasks is {order}"
        )
    learned = begun.tasks[: begun.position]
    if learned[: len(order)] != order[: begun.position]:
        raise ValueError(f"{folder}: the stream has learned {learned}, but tasks is {order}")


def _is_changed_stream(
    folder: Path, begun: StreamPosition, tasks: Mapping[str, TaskSplits], record: StreamRecord
) -> bool:
    """Return whether the interrupted phase would run differently, and log what has changed."""
    try:
        doubt = check_base_model(begun.record, record)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    if doubt is not None:
        logger.warning("%s: %s.", folder, doubt)
    arguments = changed_arguments(begun.record, record)
    if arguments:
        anew = "" if begun.task is None else f"; the interrupted phase of task {begun.task!r} starts over"
        logger.warning("%s: the stream continues with %s%s.", folder, ", ".join(arguments), anew)
    data = {
        task: _is_changed(folder, task, begun.record.data[task], splits)
        for task, splits in tasks.items()
        if task in begun.record.data
    }
    return bool(arguments) or any(data.get(task, False) for task in begun.in_work)


def _is_changed(folder: Path, task: str, found: Mapping[str, str | None], data: TaskSplits) -> bool:
    """Return whether a task has other training data than it was begun with, and log what has changed."""
    changed = dict(changed_data(found, data))
    for split, change in changed.items():
        logger.warning("%s: task %r has different %s data than when it was started: %s.", folder, task, split, change)
    return "train" in changed


def _has_more_than(place: Path, state: SubspaceState) -> bool:
    """Return whether a folder holds a tree with tasks that a state does not continue from, or an unreadable one."""
    if not place.is_dir():
        return False
    try:
        index = read_index(place)
    except ValueError:
        return any(place.iterdir())
    return bool(index.tasks) and not extends(state, index.lineage)
