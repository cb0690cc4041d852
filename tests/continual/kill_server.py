"""Streams that die at a chosen moment, in one process or in several.

Importing the libraries takes longer than the stream. So one process imports them, and runs each stream in forks of
itself: processes that no other has trained in, and that SIGKILL ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from share_hf import SharedSubspace, ShareTrainer
from share_hf.card import tree as card_tree
from share_hf.continual import checkpoints, phase_trainer, task_trainer
from share_hf.continual import phases as phases_module
from share_hf.continual import stream as stream_module
from share_hf.continual import trainer as trainer_module
from share_hf.format import files as files_module
from share_hf.format import tree as tree_module
from tests.conftest import _tiny_bert
from tests.distributed import fsdp_on_cpu
from tests.forking import answer_requests, answering_server, be_rank, free_port

from .cases import LABELS, At, classification_tasks, classifier_trainer


SECONDS_A_RUN = 120
TASKS = list(LABELS)[:3]

# What a random moment is counted in: time, lines of these modules, or operations on files in the output folder.
CLOCKS = ("seconds", "lines", "operations")
WATCHED = {
    module.__file__
    for module in (
        *(files_module, tree_module, card_tree, checkpoints),
        *(trainer_module, task_trainer, phase_trainer, stream_module),
    )
}
SIGKILL = getattr(signal, "SIGKILL", 9)  # not on Windows, where these tests are skipped
OPERATIONS = {"open", "os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}

# Further things that a moment may be counted in: events of the Trainer, and merges that were started.
EVENTS = {"steps": "on_step_end", "predictions": "on_prediction_step"}

Ask = Callable[..., dict[str, Any]]


def stream(folder: Path, dropout: float = 0.1, **overrides: Any) -> ShareTrainer:
    """Three tasks with four steps each and two of finetuning, and two checkpoints per phase, of which one is kept."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if overrides.get("fsdp"):
        fsdp_on_cpu.allow()
    if world > 1:
        overrides = {"ddp_backend": "gloo", **overrides}
    torch.manual_seed(0)
    model = _tiny_bert()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    values = dict(
        max_steps=-1,
        num_train_epochs=1,
        finetune_num_train_epochs=0.5,
        per_device_train_batch_size=8 // world,
        save_strategy="steps",
        save_steps=2,
        lr_scheduler_type="constant",
        save_total_limit=1,
        evaluate_before=True,
    )
    return classifier_trainer(model, folder, classification_tasks(*TASKS), **{**values, **overrides})


def run_stream(
    folder: Path,
    clock: str = "seconds",
    moment: float = float("inf"),
    rank: int = 0,
    alone: bool = True,
    fails: bool = False,
    number: int = SIGKILL,
    begun: Callable[[], object] = lambda: None,
    **overrides: Any,
) -> dict[str, float]:
    """Train the stream, resuming it if possible, and return its length by each clock.

    Args:
        folder: Folder in which it is saved.
        clock: What the moment is counted in, except for time, which the caller measures.
        moment: Moment at which the rank dies.
        rank: Rank that dies.
        alone: Whether the other processes of its group live on.
        fails: Whether it raises an error instead of being killed.
        number: Signal with which it is killed.
        begun: Function that is called when the training begins.
        overrides: Same as in `stream`.
    """
    trainer = stream(folder, **overrides)
    counts = dict.fromkeys(("lines", "operations", "merges", *EVENTS), 0)

    def count(name: str) -> None:
        counts[name] += 1
        is_over = counts[name] - 1 >= moment  # unlike SIGKILL, other signals leave time for this
        if name != clock or counts[name] < moment or is_over or trainer.args.process_index != rank:
            return
        if fails:
            raise KeyError("a row that cannot be read")
        if alone:
            os.kill(os.getpid(), number)
            return
        os.killpg(0, number)

    if clock == "lines":
        _trace_lines(lambda: count("lines"))
    if clock == "operations":
        _hook_operations(folder, lambda: count("operations"))
    if clock == "merges":
        _hook_merges(lambda: count("merges"))
    if clock in EVENTS:
        trainer.add_callback(At(EVENTS[clock], lambda *_, **__: count(clock)))
    begun()
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=True)
    seconds = time.monotonic() - started
    sys.settrace(None)
    return {"seconds": seconds, **counts}


def _trace_lines(tick: Callable[[], None]) -> None:
    def line(frame: Any, event: str, argument: Any) -> Any:
        if event == "line":
            tick()
        return line

    sys.settrace(lambda frame, event, argument: line if frame.f_code.co_filename in WATCHED else None)


def _hook_operations(folder: Path, tick: Callable[[], None]) -> None:
    """Count a tick before anything in the folder is created, renamed or deleted, whoever does it."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in OPERATIONS or not isinstance(arguments[0], (str, Path)):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        # The function that deletes a folder names files relative to that folder.
        if str(arguments[0]).startswith(str(folder)) or event in ("os.remove", "os.rmdir"):
            tick()

    sys.addaudithook(hook)


def _hook_merges(tick: Callable[[], None]) -> None:
    """Count a tick when the first process begins to merge, and when the others begin to wait for the result."""
    on_first_process = phases_module.on_first_process

    def ticking(compute: Callable[[], Any], **options: Any) -> Any:
        if "known" in options:  # not where the first process tells the others what it has loaded
            tick()
        return on_first_process(compute, **options)

    phases_module.on_first_process = ticking


def end_of(folder: Path) -> dict[str, bytes]:
    """Return everything that a stream leaves, except for the checkpoints of its phases."""
    paths = [path for path in folder.rglob("*") if path.is_file() and folder / "phases" not in path.parents]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# ---- In the process that forks --------------------------------------------------------------------------------------


def serve() -> None:
    """Run the stream in forks for each request, and answer how it ended."""
    torch.set_num_threads(1)
    sys.modules["matplotlib.figure"] = None  # type: ignore[assignment]
    answer_requests(_run_in_forks)


def _run_in_forks(
    processes: int,
    clock: str,
    moment: float,
    rank: int,
    alone: bool,
    number: int = SIGKILL,
    **run: Any,
) -> dict[str, Any]:
    run |= {"clock": clock, "moment": moment, "rank": rank, "alone": alone, "number": number}
    port = free_port()
    pids: list[int] = []
    reports = []
    for index in range(processes):
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            _run_as(index, processes, port, run, writing)
        pids.append(pid)
        os.setpgid(pid, pids[0])  # in one process group, to be killed at the same moment
        os.close(writing)
        reports.append(os.fdopen(reading))
    begun = [report.readline() for report in reports]
    if all(begun) and clock == "seconds" and moment < SECONDS_A_RUN:
        time.sleep(moment)
        os.kill(pids[rank], number) if alone else os.killpg(pids[0], number)
    answers = [json.loads(report.read() or "{}") for report in reports]
    for report in reports:
        report.close()
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    modules = {module for answer in answers for module in answer.pop("modules", ())}
    return {"codes": codes, "lengths": answers, "modules": sorted(modules)}


def _run_as(index: int, processes: int, port: int, run: dict[str, Any], writing: int) -> None:
    """Act as one process of a run until it ends."""
    code = 1
    try:
        signal.alarm(SECONDS_A_RUN)
        if processes > 1 or "deepspeed" in run:
            be_rank(index, processes, port)
        imported = set(sys.modules)
        with os.fdopen(writing, "w") as reports:
            lengths = run_stream(
                Path(run.pop("folder")), **run, begun=lambda: print("begun", file=reports, flush=True)
            )
            reports.write(json.dumps({**lengths, "modules": sorted(set(sys.modules) - imported)}))
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


# ---- In the process of the test -------------------------------------------------------------------------------------


@contextmanager
def kill_server(log: Path) -> Iterator[Ask]:
    """Run streams on request, and return how each process ended with its lengths, and what was printed."""
    with answering_server(__name__, log, HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu") as ask_server:

        def ask(
            folder: Path,
            clock: str = "seconds",
            moment: float = 2 * SECONDS_A_RUN,
            *,
            processes: int = 1,
            rank: int = 0,
            alone: bool = True,
            **run: Any,
        ) -> dict[str, Any]:
            run |= {"folder": str(folder), "clock": clock, "moment": moment, "processes": processes}
            return ask_server(**run, rank=rank, alone=alone)

        yield ask


def whole_stream(run: Ask, folder: Path) -> tuple[dict[str, bytes], dict[str, float]]:
    """What an uninterrupted stream leaves, which does not depend on the clock, and its length by each clock."""
    lengths = {}
    for clock in reversed(CLOCKS):  # time comes last, when everything is imported
        lengths[clock] = run(folder / clock, clock, 1e9)["lengths"][0][clock]
    ends = [end_of(folder / clock) for clock in CLOCKS]
    assert ends[0] == ends[1] == ends[2]
    assert SharedSubspace.from_pretrained(folder / "seconds" / "subspace").tasks == tuple(TASKS)
    return ends[0], lengths
