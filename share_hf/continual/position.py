"""The file that records how far a stream has come."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ..format.files import read_json, write_atomically
from ..state import ContinualMetrics
from .record import StreamRecord


STREAM_STATE_FILE = "stream_state.json"

Stage = Literal["learn", "finetune", "evaluate"]


@dataclass(frozen=True)
class StreamPosition:
    """Position in a stream: the content of `stream_state.json`.

    Args:
        position: Number of finished tasks.
        task: Current task, or the first of several; None between tasks.
        together: Current tasks if several are learned together.
        stage: Stage of the current task.
        steps: Length of the subspace's lineage when the stage began. A longer lineage of the saved subspace means that
            it contains the result of the stage.
        trained_steps: Number of optimizer steps in the finished phases.
        phase_steps: Number of steps of the stage's own phase, if it is trained and only its result is yet to be taken.
        metrics: `ContinualMetrics` so far.
        marks_phases: Whether the folders of the stream's phases are marked. Earlier versions did not mark them.
        record: Record of what the stream is learned with. Earlier versions did not write it.
    """

    position: int = 0
    task: str | None = None
    together: list[str] = field(default_factory=list)
    stage: Stage = "learn"
    steps: int = 0
    trained_steps: int = 0
    phase_steps: int = 0
    metrics: dict[str, Any] | None = None
    marks_phases: bool = False
    record: StreamRecord = field(default_factory=StreamRecord)

    def _check(self) -> None:
        """Refuse values that no stream has.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: If a value is unusable, or as in
                `ContinualMetrics.from_dict`. The message of a `ValueError` names the value.
        """
        for name in ("position", "steps", "trained_steps", "phase_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} is {value!r}, expected a number of 0 or more")
        if self.task is not None and not isinstance(self.task, str):
            raise ValueError(f"task is {self.task!r}, expected a name or null")
        if self.stage not in get_args(Stage):
            raise ValueError(f"stage is {self.stage!r}, expected one of {get_args(Stage)}")
        if not isinstance(self.marks_phases, bool):
            raise ValueError(f"marks_phases is {self.marks_phases!r}, expected true or false")
        metrics = ContinualMetrics() if self.metrics is None else ContinualMetrics.from_dict(self.metrics)
        if metrics.learned != self.position:
            raise ValueError(
                f"position is {self.position}, but metrics has rows of {metrics.learned} tasks, expected as many"
            )
        if not isinstance(self.together, list) or not all(isinstance(task, str) for task in self.together):
            raise ValueError(f"together is {self.together!r}, expected a list of names")
        if self.together and self.task != self.together[0]:
            raise ValueError(f"together is {self.together}, expected {self.task!r} as the first of them")
        if self.task is not None and self.metrics is not None and metrics.tasks[self.position :] != self.in_work:
            raise ValueError(
                f"metrics has tasks {metrics.tasks}, expected {self.in_work} after {self.position} of them"
            )

    @property
    def tasks(self) -> list[str]:
        """The learned tasks, followed by those in work."""
        learned = list((self.metrics or {}).get("tasks", ()))[: self.position]
        return [*learned, *self.in_work]

    @property
    def in_work(self) -> list[str]:
        """The current task, or the tasks that are learned together; empty between tasks."""
        return self.together or ([] if self.task is None else [self.task])

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / STREAM_STATE_FILE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> StreamPosition | None:
        """Read the position in a folder, None if no stream was begun there.

        Raises:
            ValueError: If the file is damaged.
        """
        path = folder / STREAM_STATE_FILE
        if not path.is_file():
            return None
        values = read_json(path)
        try:
            record = StreamRecord.from_dict(values.pop("record", {}))
            position = cls(**values, record=record)
            position._check()
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise ValueError(f"{path}: not a stream state ({error})") from error
        return position
