"""A process that imports the libraries once and then works in forks of itself, which may be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


ROOT = Path(__file__).parents[1]


@contextmanager
def forking_server(module: str, log: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run `serve()` of a module of the tests, a line in and a line out, until the block ends.

    Args:
        module: Its name.
        log: Where to write what it and its forks print.
        environment: What to change in the environment of now.
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
