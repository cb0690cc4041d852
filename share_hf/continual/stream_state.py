"""`stream_state.json`: how far a stream of tasks has come, so that it can be continued after any interruption."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from zipfile import is_zipfile

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..hub.files import read_json, restore_folder, write_atomically
from ..hub.state import SubspaceState
from ..hub.tree import read_tree


STREAM_STATE_FILE = "stream_state.json"
SUBSPACE_FOLDER = "subspace"

Stage = Literal["learn", "finetune", "evaluate"]


@dataclass(frozen=True)
class StreamState:
    """Position in a stream.

    Args:
        position: How many tasks are done.
        task: The task in work, None between tasks.
        stage: What is being done with it.
        steps: Length of the subspace's lineage when the stage began. A saved subspace that is one step longer has the
            result of the stage in it.
        trained_steps: Steps of the optimizer in the phases that are done.
        phase_steps: Of the stage's own phase, where it is trained and only its result has to be taken.
        metrics: `ContinualMetrics` so far.
    """

    position: int = 0
    task: str | None = None
    stage: Stage = "learn"
    steps: int = 0
    trained_steps: int = 0
    phase_steps: int = 0
    metrics: dict[str, Any] | None = None

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / STREAM_STATE_FILE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> StreamState | None:
        """The state in a folder, None if no stream was begun there.

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


def read_stream(
    folder: Path, tasks: Sequence[str], state: SubspaceState
) -> tuple[StreamState | None, SubspaceState | None]:
    """
    What an interrupted stream has left in its folder.

    Args:
        folder: Of the stream.
        tasks: The tasks of the stream that is to go on, in their order.
        state: The subspace that it would begin from.

    Returns:
        Its position and its subspace, each None if there is none.

    Raises:
        ValueError: If what is there is damaged, or belongs to a stream with other settings or tasks.
    """
    begun = StreamState.load(folder)
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
    restore_folder(place)
    saved = read_tree(place) if place.exists() else None
    if saved is not None and saved.settings != state.settings:
        found, expected = vars(saved.settings), vars(state.settings)
        differing = [name for name in expected if found[name] != expected[name]]
        found, expected = (", ".join(f"{name}={of[name]!r}" for name in differing) for of in (found, expected))
        raise ValueError(f"{folder}: the stream has {found}, expected {expected}")
    in_subspace = list((saved or state).tasks)
    if not set(learned) <= set(in_subspace):
        raise ValueError(f"{place}: has tasks {in_subspace}, expected {learned} as in {STREAM_STATE_FILE}")
    return begun, saved


def newest_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a Trainer run that was written to its end; a killed run may leave a torn one.

    `trainer_state.json` is written last, when all processes have written theirs. A machine that fails may still lose
    what was written before it.
    """
    checkpoints = [
        path
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rpartition("-")[2].isdigit()
        and _is_json(path / "trainer_state.json")
        and (any(path.glob("optimizer*")) or (path / "latest").is_file())  # with save_only_model there is none
        and not any(_is_torn(file) for file in path.rglob("*.pt*"))
    ]
    return max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_torn(file: Path) -> bool:
    """Whether what torch saved lacks its end, the table of a zip archive. DeepSpeed may be told to write pickles."""
    with file.open("rb") as opened:
        return opened.read(2) in (b"", b"PK") and not is_zipfile(file)


def delete_checkpoints_before(phase: Path, limit: int) -> None:
    """Delete the oldest checkpoints of earlier phases until all phases together have no more than `limit`.

    None of them is resumed from any more; those of the phase itself are the Trainer's own business.
    """
    own = list(phase.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    earlier = set(phase.parent.glob(f"*/{PREFIX_CHECKPOINT_DIR}-*")) - set(own)
    oldest_first = sorted(earlier, key=lambda path: path.stat().st_mtime)
    for checkpoint in oldest_first[: max(0, len(own) + len(earlier) - limit)]:
        shutil.rmtree(checkpoint, ignore_errors=True)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))  # the Trainer's own may hold NaN
    except (OSError, ValueError):
        return False
    return True
