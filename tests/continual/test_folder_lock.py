"""A folder is held by one trainer at a time, for as long as the trainer lives."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from share_hf.continual.folder_lock import LOCK_FILE, FolderInUseError, holding

from .cases import At, classification_tasks
from .conftest import Make
from .kill_server import kill_server


fcntl = pytest.importorskip("fcntl")

# Holds a folder, forks as a data loader does, and waits.
HOLDER = """
import os, sys, time
from pathlib import Path
from share_hf.continual.folder_lock import holding
with holding(Path(sys.argv[1])):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(600)
"""


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a folder and has forked a child that outlives it."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        yield holder
    finally:
        os.kill(child, 9)
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_a_second_trainer_is_told_who_is_at_work(make: Make, tmp_path: Path) -> None:
    tasks = classification_tasks("colors")
    trainer = make(tasks)
    with held(tmp_path / "out") as holder:
        for attempt in (trainer.train, lambda: trainer.learn_task("shapes", tasks["colors"]["train"])):
            with pytest.raises(FolderInUseError, match=rf"{tmp_path / 'out'}: process {holder.pid} trains a stream"):
                attempt()
        assert {path.name for path in (tmp_path / "out").iterdir()} == {LOCK_FILE}
        assert list(trainer.tasks) == ["colors"]
        holder.kill()  # and leaves its child behind
        holder.wait()
        trainer.train()
    assert trainer.subspace.tasks == ("colors",)
    assert (tmp_path / "out" / LOCK_FILE).read_bytes() == b""


def test_two_trainers_of_one_process_are_two(make: Make) -> None:
    tasks = classification_tasks("colors")
    first, second, said = make(tasks), make(tasks), []

    def attempt(args: object, state: object, **kwargs: object) -> None:
        with pytest.raises(FolderInUseError) as error:
            second.train(resume_from_checkpoint=True)
        said.append(str(error.value))

    first.add_callback(At("on_train_begin", attempt))
    first.train()
    assert f"process {os.getpid()} trains" in said[0]
    second.train(resume_from_checkpoint=True)
    assert second.subspace.tasks == ("colors",)


def test_a_folder_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), holding(tmp_path):
        raise KeyError
    with holding(tmp_path):
        pass


@pytest.mark.slow
@pytest.mark.distributed
def test_every_process_is_told(tmp_path: Path) -> None:
    started = time.monotonic()
    with kill_server(tmp_path / "log.txt") as ask, held(tmp_path / "out") as holder:
        refused = ask(tmp_path / "out", processes=2)
    assert refused["codes"] == [1, 1]
    assert refused["output"].count(f"FolderInUseError: {tmp_path / 'out'}: process {holder.pid} trains a stream") == 2
    assert time.monotonic() - started < 300
