"""A stream that is killed at any moment, and resumed, ends as one that is not: to the byte.

Importing the libraries takes longer than the stream. So one process imports them, and runs each stream in a fork of
itself: a process that no other has trained in, and that SIGKILL ends.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from share_hf import SharedSubspace, ShareTrainer
from share_hf.continual import trainer as trainer_module
from share_hf.hub import files as files_module
from share_hf.hub import tree as tree_module
from tests.conftest import _tiny_bert

from .cases import LABELS, classification_tasks, classifier_trainer


ROOT = Path(__file__).parents[2]
MOMENTS = 50
SECONDS_A_RUN = 120
TASKS = list(LABELS)[:3]

# What a moment is counted in: time, or lines of these modules, or operations on files in the output folder.
CLOCKS = ("seconds", "lines", "operations")
WATCHED = {module.__file__ for module in (files_module, tree_module, trainer_module)}
OPERATIONS = {"open", "os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="runs streams in forked processes"),
]


# ---- In the process that forks --------------------------------------------------------------------------------------


def serve() -> None:
    """Run the stream in a fork for each request, a line of JSON, and answer how it ended with another."""
    torch.set_num_threads(1)
    sys.modules["matplotlib.figure"] = None  # type: ignore[assignment]
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        answer = _run_in_fork(**json.loads(line))
        for module in answer.pop("modules", ()):  # imported once, not in every fork again
            with suppress(Exception):
                importlib.import_module(module)
        gc.collect()
        gc.freeze()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _run_in_fork(folder: str, clock: str, moment: float) -> dict[str, Any]:
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        code = 1
        try:
            _run(Path(folder), clock, moment, os.fdopen(writing, "w"))
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as reports:
        begun = reports.readline()
        if begun and clock == "seconds" and moment < SECONDS_A_RUN:
            time.sleep(moment)
            os.kill(pid, signal.SIGKILL)
        report = reports.read()
    _, status = os.waitpid(pid, 0)
    return {"code": os.waitstatus_to_exitcode(status), **json.loads(report or "{}")}


def _run(folder: Path, clock: str, moment: float, reports: Any) -> None:
    signal.alarm(SECONDS_A_RUN)
    imported = set(sys.modules)
    trainer = _trainer(folder)
    reports.write("begun\n")
    reports.flush()
    counts = {"lines": 0, "operations": 0}

    def count(name: str) -> None:
        counts[name] += 1
        if name == clock and counts[name] >= moment:
            os.kill(os.getpid(), signal.SIGKILL)

    if clock == "lines":
        _trace_lines(lambda: count("lines"))
    if clock == "operations":
        _hook_operations(folder, lambda: count("operations"))
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=True)
    seconds = time.monotonic() - started
    sys.settrace(None)
    new = sorted(set(sys.modules) - imported)
    reports.write(json.dumps({"seconds": seconds, "modules": new, **counts}))
    reports.close()


def _trainer(folder: Path) -> ShareTrainer:
    """Three tasks of four steps and two of finetuning, with dropout; two checkpoints a phase, of which one is kept."""
    torch.manual_seed(0)
    model = _tiny_bert()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return classifier_trainer(
        model,
        folder,
        classification_tasks(*TASKS),
        max_steps=-1,
        num_train_epochs=1,
        finetune_num_train_epochs=0.5,
        save_strategy="steps",
        save_steps=2,
        lr_scheduler_type="constant",
        save_total_limit=1,
        evaluate_before=True,
    )


def _trace_lines(tick: Callable[[], None]) -> None:
    def line(frame: Any, event: str, argument: Any) -> Any:
        if event == "line":
            tick()
        return line

    sys.settrace(lambda frame, event, argument: line if frame.f_code.co_filename in WATCHED else None)


def _hook_operations(folder: Path, tick: Callable[[], None]) -> None:
    """Tick before anything in the folder is created, renamed or deleted, whoever does it."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in OPERATIONS or not isinstance(arguments[0], (str, Path)):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        # What a folder is deleted with names files relative to it.
        if str(arguments[0]).startswith(str(folder)) or event in ("os.remove", "os.rmdir"):
            tick()

    sys.addaudithook(hook)


# ---- In the process of the test -------------------------------------------------------------------------------------


Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs the stream in a folder, resumed where there is something to resume, up to a moment; tells how it ended."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("wb") as errors:
        server = subprocess.Popen(
            [sys.executable, "-c", "from tests.continual.test_kills import serve; serve()"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            text=True,
        )

    def ask(folder: Path, clock: str = "seconds", moment: float = 2 * SECONDS_A_RUN) -> dict[str, Any]:
        server.stdin.write(json.dumps({"folder": str(folder), "clock": clock, "moment": moment}) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, log.read_text()[-4000:]
        answer = json.loads(answer)
        assert answer["code"] in (0, -signal.SIGKILL), log.read_text()[-4000:]
        return answer

    try:
        yield ask
        server.stdin.close()
        assert server.wait(timeout=30) == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        server.stdin.close()
        server.stdout.close()


@pytest.fixture(scope="module")
def whole(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], dict[str, float]]:
    """What the stream that is not killed leaves, and its length by each clock."""
    folder = tmp_path_factory.mktemp("whole")
    lengths = {}
    for clock in reversed(CLOCKS):  # time last, when all is imported
        lengths[clock] = run(folder / clock, clock, 1e9)[clock]
    ends = [end_of(folder / clock) for clock in CLOCKS]
    assert ends[0] == ends[1] == ends[2]
    assert SharedSubspace.from_pretrained(folder / "seconds" / "subspace").tasks == tuple(TASKS)
    return ends[0], lengths


def end_of(folder: Path) -> dict[str, bytes]:
    """All that a stream leaves, but for the checkpoints of its phases."""
    paths = [path for path in folder.rglob("*") if path.is_file() and folder / "phases" not in path.parents]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("number", range(MOMENTS))
def test_a_stream_that_is_killed_at_a_random_moment_ends_as_one_that_is_not(
    number: int, run: Run, whole: tuple[dict[str, bytes], dict[str, float]], tmp_path: Path
) -> None:
    expected, lengths = whole
    clock, chance = CLOCKS[number % len(CLOCKS)], random.Random(number)
    folder, moment = tmp_path / "stream-0", lengths[clock] * chance.random()
    while run(folder, clock, moment)["code"] == 0:  # faster than the one that was timed
        moment *= 0.8
        folder = folder.with_name(f"{folder.name}0")
    if chance.random() < 0.4:
        clock = chance.choice(CLOCKS)
        run(folder, clock, lengths[clock] * chance.random())
    assert run(folder)["code"] == 0
    found = end_of(folder)
    assert found.keys() == expected.keys()
    assert not [name for name in expected if found[name] != expected[name]]
