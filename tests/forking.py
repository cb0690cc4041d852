"""A process that imports the libraries once and then works in forks of itself, which may be killed."""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]


@contextmanager
def forking_server(module: str, log: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run `serve()` of a module of the tests, which answers each line with a line, until the block ends.

    Args:
        module: Name of the module.
        log: File for what it and its forks print.
        environment: Changes to the current environment.
    """
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", f"from {module} import serve; serve()"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            text=True,
        )
    try:
        yield process
        process.stdin.close()
        assert process.wait(timeout=30) == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()
        process.stdout.close()


@contextmanager
def answering_server(module: str, log: Path, **environment: str) -> Iterator[Callable[..., dict[str, Any]]]:
    """Make a function that sends a request to a module's `serve()` and returns the answers, and what was printed.

    Args:
        module: Name of the module.
        log: Same as in `forking_server`.
        environment: Same as in `forking_server`.
    """
    with forking_server(module, log, **environment) as server:

        def ask(**request: Any) -> dict[str, Any]:
            before = log.stat().st_size
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            answer = server.stdout.readline()
            with log.open("rb") as lines:
                lines.seek(before)
                output = lines.read().decode(errors="replace")
            assert answer, output[-4000:]
            return {**json.loads(answer), "output": output}

        yield ask


# ---- In the process that forks --------------------------------------------------------------------------------------


def answer_requests(answer: Callable[..., dict[str, Any]]) -> None:
    """Answer each request, a line of JSON, with another line. What is printed meanwhile goes to the log.

    Args:
        answer: Function from a request to an answer, which includes the `modules` that its forks have imported.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        told = answer(**json.loads(line))
        import_for_forks(told.pop("modules"))
        answers.write(json.dumps(told) + "\n")
        answers.flush()


def import_for_forks(modules: Iterable[str]) -> None:
    """Import what forks have imported, so that the next ones need not do so."""
    for module in modules:
        with suppress(Exception):
            importlib.import_module(module)
    gc.collect()
    gc.freeze()


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def be_rank(index: int, processes: int, port: int) -> None:
    """Set the environment that a launcher gives to one of its processes."""
    facts = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    facts |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in facts.items()})
