"""A full disk during a save: the error names it, the old state is unchanged, and the stream can continue."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from share_hf import SharedSubspace, ShareTrainer
from share_hf.continual.folder_lock import LOCK_FILE
from share_hf.continual.stream import Stream

from .conftest import MakeTrainer, assert_same_to_the_bit, coefficients


resource = pytest.importorskip("resource", reason="limits the length of files as Unix can")


DISK_BYTES = 8 * 2**20
ARGUMENTS = {"save_strategy": "steps", "save_steps": 2, "finetune_num_train_epochs": 1}


class SmallDisk:
    """A tmpfs that a file fills up."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
        try:
            mounted = subprocess.run(mount, capture_output=True, text=True)
        except OSError as error:
            pytest.skip(f"cannot mount a tmpfs: {error}")
        if mounted.returncode:
            pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
        self.folder = folder
        self.ballast = folder / "ballast"

    def fill(self, sizes: list[int], share: float) -> None:
        """Leave room for this fraction of files of these sizes."""
        space = os.statvfs(self.folder)
        with self.ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_frsize - int(share * sum(sizes)))

    def make_space(self) -> None:
        self.ballast.unlink(missing_ok=True)

    def take_away(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


class LimitedFiles:
    """A quota: no file may be longer. Python ignores the signal, so writing fails."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, sizes: list[int], share: float) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * max(sizes)), self.limits[1]))

    def make_space(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)

    take_away = make_space


Disk = SmallDisk | LimitedFiles


@pytest.fixture(params=[SmallDisk, LimitedFiles], ids=["tmpfs", "quota"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    disk = request.param(tmp_path / "disk")
    try:
        yield disk
    finally:
        disk.take_away()


@pytest.fixture(params=[0.0, 0.5], ids=["at-once", "halfway"])
def share(request: pytest.FixtureRequest) -> float:
    """Fraction of what is saved for which there is room."""
    return request.param


_WHOLE: list[ShareTrainer] = []


@pytest.fixture
def whole(make_trainer: MakeTrainer) -> ShareTrainer:
    """The stream that always has room. It is trained once."""
    if not _WHOLE:
        trainer = make_trainer(folder="whole", **ARGUMENTS)
        trainer.train()
        _WHOLE.append(trainer)
    return _WHOLE[0]


def files_of(*places: Path) -> dict[Path, bytes]:
    """Return every file at or below these places."""
    paths = [path for place in places for path in (place, *place.rglob("*"))]
    return {path: path.read_bytes() for path in paths if path.is_file()}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"ballast"}


def raises_clearly(disk: Disk) -> Any:
    """Expect an error of the system that names what could not be written."""
    return pytest.raises(OSError, match=re.escape(str(disk.folder)))


def test_a_tree_that_finds_no_room_leaves_the_one_before_it(whole: ShareTrainer, disk: Disk, share: float) -> None:
    tree = disk.folder / "tree"
    newer, older = whole.subspace, whole.subspace
    older.remove_task("c")
    older.save_pretrained(tree)
    before = files_of(tree)
    # The bases stay, so they need no room again.
    disk.fill([len(content) for path, content in before.items() if path.name != "subspace.safetensors"], share)
    with raises_clearly(disk):
        newer.save_pretrained(tree)
    disk.make_space()
    assert files_of(tree) == before
    assert names_in(disk.folder) == {"tree"}
    assert SharedSubspace.from_pretrained(tree).tasks == ("a", "b")
    newer.save_pretrained(tree)
    assert SharedSubspace.from_pretrained(tree).tasks == ("a", "b", "c")


def test_an_export_that_finds_no_room_leaves_the_one_before_it(whole: ShareTrainer, disk: Disk, share: float) -> None:
    folder = disk.folder / "lora"
    whole.subspace.export_lora("a", folder)
    before = files_of(folder)
    disk.fill([len(content) for content in before.values()], share)
    with raises_clearly(disk):
        whole.subspace.export_lora("b", folder)
    disk.make_space()
    assert files_of(folder) == before
    assert names_in(disk.folder) == {"lora"}
    whole.subspace.export_lora("b", folder)
    assert files_of(folder) != before


@pytest.mark.slow
# Of the checkpoints: the first, and one of the second task. Of the subspace: after the merges of both tasks, and when
# the first is done. Of the stream's position: within the first task, and after it.
@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("_save_checkpoint", 1),
        ("_save_checkpoint", 7),
        ("save_subspace", 2),
        ("save_subspace", 4),
        ("save_subspace", 5),
        ("save_position", 2),
        ("save_position", 4),
    ],
)
def test_a_stream_whose_disk_is_full_continues_to_the_bit_when_there_is_room(
    method: str,
    call: int,
    make_trainer: MakeTrainer,
    whole: ShareTrainer,
    disk: Disk,
    share: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = disk.folder / "out"
    kept = (folder / "subspace", folder / "stream_state.json")
    before: dict[Path, bytes] = {}

    def fill() -> None:
        before.update(files_of(*kept))
        disk.fill(sizes_of_last(folder, method), share)

    with monkeypatch.context() as patch:
        owner = ShareTrainer if method == "_save_checkpoint" else Stream
        patch.setattr(owner, method, filling(getattr(owner, method), call, fill))
        with raises_clearly(disk):
            make_trainer(folder="disk/out", **ARGUMENTS).train()
    disk.make_space()
    assert before
    assert files_of(*kept) == before
    assert names_in(folder) <= {"subspace", "stream_state.json", "phases", LOCK_FILE}
    SharedSubspace.from_pretrained(folder / "subspace")
    resumed = make_trainer(folder="disk/out", **ARGUMENTS)
    resumed.train(resume_from_checkpoint=True)
    assert_same_to_the_bit(coefficients(resumed), coefficients(whole))


def filling(original: Callable[..., Any], call: int, fill: Callable[[], None]) -> Callable[..., Any]:
    """Fill the disk before the n-th call of a method."""
    calls = [0]

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            fill()
        return original(*args, **kwargs)

    return wrapper


def sizes_of_last(folder: Path, method: str) -> list[int]:
    """Return the sizes that the method wrote before, or a guess if there are none."""
    places = {
        "save_subspace": [folder / "subspace"],
        "save_position": [folder / "stream_state.json"],
        "_save_checkpoint": sorted(folder.glob("phases/*/checkpoint-*"))[-1:],
    }
    return [len(content) for content in files_of(*places[method]).values()] or [30_000, 15_000]
