"""What a person does with a subspace, from folder to folder, in a process that may be killed at any moment.

Importing the libraries takes longer than a session. So one process imports them, and runs each session in a fork of
itself.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from share_hf import SharedSubspace
from tests.forking import forking_server


SECONDS_A_SESSION = 60
CHANGES = {"os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}

Session = dict[str, str]


# ---- Sessions -------------------------------------------------------------------------------------------------------


def add(folder: Path, task: str, adapter: str) -> None:
    """Merge a task that arrives as a LoRA."""
    subspace = SharedSubspace.from_pretrained(folder)
    subspace.add_adapters({task: adapter}, progress=False)
    subspace.save_pretrained(folder)


def remove(folder: Path, task: str) -> None:
    """Remove a task."""
    subspace = SharedSubspace.from_pretrained(folder)
    subspace.remove_task(task)
    subspace.save_pretrained(folder)


def rename(folder: Path, task: str, new_name: str) -> None:
    """Rename a task."""
    subspace = SharedSubspace.from_pretrained(folder)
    subspace.rename_task(task, new_name)
    subspace.save_pretrained(folder)


def save(folder: Path) -> None:
    """Load the subspace and save it unchanged."""
    SharedSubspace.from_pretrained(folder).save_pretrained(folder)


def push(folder: Path, repo_id: str) -> None:
    """Publish the subspace, and keep the result of the merge."""
    subspace = SharedSubspace.from_pretrained(folder)
    subspace.push_to_hub(repo_id)
    subspace.save_pretrained(folder)


def pull(folder: Path, repo_id: str) -> None:
    """Merge what others have published."""
    subspace = SharedSubspace.from_pretrained(folder)
    subspace.update_from(SharedSubspace.from_pretrained(repo_id))
    subspace.save_pretrained(folder)


SESSIONS: dict[str, Callable[..., None]] = {
    session.__name__: session for session in (add, remove, rename, save, push, pull)
}


def do(session: Session) -> None:
    """Run a session in this process."""
    arguments = {name: value for name, value in session.items() if name not in ("name", "folder")}
    SESSIONS[session["name"]](Path(session["folder"]), **arguments)


# ---- In the process that forks --------------------------------------------------------------------------------------


def serve() -> None:
    """Run the session of each line of JSON in a fork, which is killed before the change of files with this number."""
    torch.set_num_threads(1)
    sys.modules["matplotlib.figure"] = None  # type: ignore[assignment]
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            _end_as(request["session"], request["change"])
        answers.write(f"{pid}\n")
        answers.flush()
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        answers.flush()


def _end_as(session: Session, change: int | None) -> None:
    """Run a session and exit, or be killed during it."""
    code = 1
    try:
        signal.alarm(SECONDS_A_SESSION)
        if change is not None:
            sys.addaudithook(_killing_before(change))
        do(session)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def _killing_before(change: int) -> Callable[[str, tuple[object, ...]], None]:
    """Kill this process before its change of files with this number, wherever the files are."""
    left = change

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or writes:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


# ---- In the process of the test -------------------------------------------------------------------------------------


class Forks:
    """Runs sessions in forks of a process that has imported the libraries."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log

    def do(
        self, session: Session, change: int | None = None, begun: Callable[[int], object] = lambda pid: None
    ) -> bool:
        """Run a session that may be killed, and return whether it was completed.

        Args:
            session: Session to run.
            change: Number of the change of files before which it is killed.
            begun: Function that is called with the id of the process that runs it.
        """
        before = self._log.stat().st_size
        self._process.stdin.write(json.dumps({"session": session, "change": change}) + "\n")
        self._process.stdin.flush()
        begun(int(self._process.stdout.readline()))
        code = int(self._process.stdout.readline())
        if code not in (0, -signal.SIGKILL):
            with self._log.open("rb") as lines:
                lines.seek(before)
                raise AssertionError(f"{session} ended with {code}:\n{lines.read().decode(errors='replace')[-6000:]}")
        return code == 0


@contextmanager
def forks(log: Path) -> Iterator[Forks]:
    """A process that imports the libraries and forks, in the current environment."""
    with forking_server(__name__, log) as process:
        yield Forks(process, log)
