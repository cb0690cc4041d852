"""The folders of phases and the Trainer's checkpoints in them: which ones are whole, and who wrote them."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Marks the folder of a phase, whose checkpoints belong to a stream. Nothing is removed from a folder without it.
MARKER_FILE = ".share_hf_phase"


def claim_phase(phase: Path) -> None:
    """Mark a folder as the folder of a phase."""
    phase.mkdir(parents=True, exist_ok=True)
    (phase / MARKER_FILE).touch()


def is_claimed(phase: Path) -> bool:
    """Return whether a folder is marked as the folder of a phase."""
    return (phase / MARKER_FILE).is_file()


def empty_phase(phase: Path) -> None:
    """Remove the checkpoints of a stream from the folder of a phase, and the folder if nothing else is in it."""
    if not is_claimed(phase):
        return
    for checkpoint in phase.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    if {path.name for path in phase.iterdir()} == {MARKER_FILE}:
        shutil.rmtree(phase, ignore_errors=True)


def check_unclaimed(phases: Path) -> None:
    """Refuse a folder with checkpoints that no stream wrote, which must be neither removed nor resumed from.

    Raises:
        ValueError: If there is one. The message names it.
    """
    for checkpoint in phases.glob(f"*/{PREFIX_CHECKPOINT_DIR}-*"):
        if not is_claimed(checkpoint.parent):
            raise ValueError(
                f"{checkpoint}: not a checkpoint of a stream, or of an earlier version of share_hf; expected another "
                "output_dir, or one without checkpoints"
            )


def newest_whole_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint of a Trainer run that can be read without running any code in it.

    A killed run may leave a torn checkpoint, a machine that fails may lose what was written, and a stranger may have
    written the checkpoint. Every checkpoint that is skipped is logged.
    """
    checkpoints = [
        path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()
    ]
    for checkpoint in sorted(checkpoints, key=_step_of, reverse=True):
        try:
            _check_whole(checkpoint)
        except (ValueError, OSError) as error:
            logger.warning(
                "%s: not resumed from; an earlier checkpoint is used if there is one: %s", checkpoint, error
            )
        else:
            return checkpoint
    return None


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _check_whole(checkpoint: Path) -> None:
    """Refuse a checkpoint that no phase can resume from.

    Raises:
        ValueError, OSError: If a file is missing or damaged. The message names it.
    """
    # This file is written last, when all processes have written theirs.
    path = checkpoint / TRAINER_STATE_NAME
    try:
        state = TrainerState.load_from_json(str(path))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not the state of a Trainer ({error})") from error
    if state.global_step != _step_of(checkpoint) or not isinstance(state.max_steps, int):
        raise ValueError(f"{path}: global_step is {state.global_step!r}, expected {_step_of(checkpoint)}")
    is_deepspeed = (checkpoint / "latest").is_file()
    if not is_deepspeed and not any(checkpoint.glob("optimizer*")):
        raise ValueError(f"{checkpoint}: no optimizer state, which save_only_model leaves out")
    if not any(checkpoint.rglob(SAFETENSORS_WEIGHTS_NAME)) and not any(checkpoint.rglob(WEIGHTS_NAME)):
        raise ValueError(f"{checkpoint}: no {SAFETENSORS_WEIGHTS_NAME}, expected the adapter that was trained")
    for file in sorted(checkpoint.rglob("*")):
        if file.suffix == ".json":
            _expect_json(file)
        elif file.suffix == ".safetensors":
            _expect_safetensors(file)
        elif file.suffix in (".pt", ".pth") or file.name == WEIGHTS_NAME:
            _expect_saved_by_torch(file, is_read_by_deepspeed=is_deepspeed and file.parent != checkpoint)


def _expect_json(path: Path) -> None:
    try:
        json.loads(path.read_text(encoding="utf-8"))  # files of the Trainer may hold NaN
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def _expect_safetensors(path: Path) -> None:
    try:
        with safe_open(path, "pt"):  # compares the length of the file with its header
            pass
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error


def _expect_saved_by_torch(path: Path, *, is_read_by_deepspeed: bool) -> None:
    """Refuse a file that is torn, whose bytes have changed, or that could not be unpickled without running code.

    DeepSpeed's own files hold objects of its classes, and may be pickles rather than archives.
    """
    with path.open("rb") as opened:
        is_archive = opened.read(2) == b"PK"
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: is empty")
    if is_archive:
        try:
            with ZipFile(path) as archive:
                damaged = archive.testzip() if torch.serialization.get_crc32_options() else None
        except (BadZipFile, EOFError, NotImplementedError, zlib.error) as error:
            raise ValueError(f"{path}: not a complete file of torch.save ({error})") from error
        if damaged is not None:
            raise ValueError(f"{path}: {damaged!r} in it does not match its checksum")
    if is_read_by_deepspeed:
        return
    try:
        with safe_globals():
            torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:  # garbage may be read as anything
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: cannot be read without running code in it ({reason})") from error


def delete_checkpoints_before(phase: Path, limit: int) -> None:
    """Delete the oldest checkpoints of earlier phases until all phases together have no more than `limit`.

    No run resumes from these any more. The Trainer itself manages the checkpoints of the phase.
    """
    own = list(phase.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    marked = [folder.parent for folder in phase.parent.glob(f"*/{MARKER_FILE}") if folder.parent != phase]
    earlier = [checkpoint for folder in marked for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    oldest_first = sorted(earlier, key=lambda path: path.stat().st_mtime)
    for checkpoint in oldest_first[: max(0, len(own) + len(earlier) - limit)]:
        shutil.rmtree(checkpoint, ignore_errors=True)
