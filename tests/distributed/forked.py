"""The scripts in this folder, run in several processes without a launcher: forks of one that has the libraries.

A launcher starts them anew for each process, which takes longer than what they do.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from tests.forking import answer_requests, answering_server, be_rank, free_port


SECONDS_A_RUN = 570  # DeepSpeed may compile an operator, which takes minutes if the cores are shared


class Run(Protocol):
    """Run a script with options in several processes of an engine. Returns the exit codes, and what was printed."""

    def __call__(self, script: str, options: dict[str, Any], processes: int | None) -> tuple[list[int], str]: ...


def serve() -> None:
    torch.set_num_threads(1)
    answer_requests(_run_in_forks)


def _run_in_forks(script: str, options: dict[str, Any], processes: int | None) -> dict[str, Any]:
    """Run a script. Without a number of processes, run it in a single process that knows of no others."""
    port = free_port()
    pids, reports = [], []
    for index in range(processes or 1):
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            if processes is not None:
                be_rank(index, processes, port)
            _run(script, options, writing)
        pids.append(pid)
        os.close(writing)
        reports.append(os.fdopen(reading))
    modules = {module for report in reports for module in report.read().split()}
    for report in reports:
        report.close()
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return {"codes": codes, "modules": sorted(modules)}


def _run(script: str, options: dict[str, Any], writing: int) -> None:
    """Act as the script until it ends."""
    code = 1
    try:
        signal.alarm(SECONDS_A_RUN)
        faulthandler.dump_traceback_later(SECONDS_A_RUN - 5)  # a run that hangs then shows where
        imported = set(sys.modules)
        sys.argv = [script, json.dumps(options)]
        importlib.import_module(f"tests.distributed.{script}").main()
        with os.fdopen(writing, "w") as report:
            report.write(" ".join(sorted(set(sys.modules) - imported)))
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextmanager
def running(log: Path) -> Iterator[Run]:
    """Run scripts on request until the block ends."""
    with answering_server(__name__, log, HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu") as ask:

        def run(script: str, options: dict[str, Any], processes: int | None) -> tuple[list[int], str]:
            answer = ask(script=script, options=options, processes=processes)
            return answer["codes"], answer["output"]

        yield run
