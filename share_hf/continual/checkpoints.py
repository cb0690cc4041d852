"""The folders of phases and the Trainer's checkpoints in them: which are whole, and whose they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from zipfile import is_zipfile

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


# Says that a folder is that of a phase, and its checkpoints a stream's. Nothing is removed from a folder without it.
MARKER_FILE = ".share_hf_phase"


def claim_phase(phase: Path) -> None:
    """Mark a folder as that of a phase."""
    phase.mkdir(parents=True, exist_ok=True)
    (phase / MARKER_FILE).touch()


def is_claimed(phase: Path) -> bool:
    """Whether a folder is marked as that of a phase."""
    return (phase / MARKER_FILE).is_file()


def empty_phase(phase: Path) -> None:
    """Remove what a stream wrote into the folder of a phase, and the folder if nothing else is in it."""
    if not is_claimed(phase):
        return
    for checkpoint in phase.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    if {path.name for path in phase.iterdir()} == {MARKER_FILE}:
        shutil.rmtree(phase, ignore_errors=True)


def check_unclaimed(phases: Path) -> None:
    """Refuse a folder with checkpoints that no stream wrote: they must be neither removed nor taken for a phase's.

    Raises:
        ValueError: Naming one of them.
    """
    for checkpoint in phases.glob(f"*/{PREFIX_CHECKPOINT_DIR}-*"):
        if not is_claimed(checkpoint.parent):
            raise ValueError(
                f"{checkpoint}: not a checkpoint of a stream, or of an earlier version of share_hf; expected another "
                "output_dir, or none there"
            )


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
    marked = [folder.parent for folder in phase.parent.glob(f"*/{MARKER_FILE}") if folder.parent != phase]
    earlier = [checkpoint for folder in marked for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    oldest_first = sorted(earlier, key=lambda path: path.stat().st_mtime)
    for checkpoint in oldest_first[: max(0, len(own) + len(earlier) - limit)]:
        shutil.rmtree(checkpoint, ignore_errors=True)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))  # the Trainer's own may hold NaN
    except (OSError, ValueError):
        return False
    return True
