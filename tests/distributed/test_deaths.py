"""Ranks that die at any moment end the run, are named, and the stream resumes."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from share_hf import SharedSubspace
from share_hf.continual.checkpoints import newest_whole_checkpoint
from tests.continual.kill_server import CLOCKS, TASKS, Ask, end_of, kill_server
from tests.forking import free_port

from .launching import run, zero_config
from .test_streams import assert_close


pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="forks processes that watch each other, as Linux can"),
]

SCRIPT = Path(__file__).with_name("killed.py")
MOMENTS = {"ddp": 20, "zero2": 4, "zero3": 2, "fsdp": 2}

# Moments by stage. Of 18 steps, 4 are in the first phase, 2 finetune it, and so on; each task has a merge.
STAGES = {
    "init": ("steps", 3),
    "finetune": ("steps", 5),
    "adapt": ("steps", 9),
    "merge": ("merges", 2),
    "evaluation": ("predictions", 4),
}

End = tuple[dict[str, bytes], dict[str, list[float]]]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    with kill_server(tmp_path_factory.mktemp("server") / "log.txt") as server:
        yield lambda *arguments, **run: server(*arguments, **{"processes": 2, **run})


def options_of(engine: str) -> dict[str, Any]:
    if engine == "fsdp":
        return {"fsdp": True}
    return {"deepspeed": zero_config(engine)} if engine.startswith("zero") else {}


@pytest.fixture(scope="module")
def whole(ask: Ask, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], End]:
    """What a stream that is not killed leaves in two processes of an engine, and its lengths by each clock."""
    ends: dict[str, End] = {}

    def end(engine: str) -> End:
        if engine not in ends:
            folder = tmp_path_factory.mktemp(engine)
            lengths = {}
            for clock in reversed(CLOCKS):
                done = ask(folder / clock, clock, 1e9, **options_of(engine))
                assert done["codes"] == [0, 0], done["output"][-4000:]
                lengths[clock] = [of_rank[clock] for of_rank in done["lengths"]]
            ends[engine] = end_of(folder / "seconds"), lengths
        return ends[engine]

    return end


def assert_resumes_to_the_byte(
    ask: Ask, folder: Path, engine: str, expected: dict[str, bytes], steps: int | None = None
) -> None:
    resumed = ask(folder, "steps", 1e9, **options_of(engine))
    assert resumed["codes"] == [0, 0], resumed["output"][-4000:]
    found = end_of(folder)
    assert found.keys() == expected.keys()
    assert not [name for name in expected if found[name] != expected[name]]
    if steps is not None:
        assert [of_rank["steps"] for of_rank in resumed["lengths"]] == [steps, steps]


@pytest.mark.parametrize(
    ("engine", "number"), [(engine, number) for engine, moments in MOMENTS.items() for number in range(moments)]
)
def test_a_stream_that_is_killed_at_a_random_moment_ends_as_one_that_is_not(
    engine: str, number: int, ask: Ask, whole: Callable[[str], End], tmp_path: Path
) -> None:
    expected, lengths = whole(engine)
    clock, chance = CLOCKS[number % len(CLOCKS)], random.Random(number)
    rank, alone = chance.choice([0, 1]), chance.random() < 0.5
    folder, moment = tmp_path / "stream-0", lengths[clock][rank] * chance.random()
    while (killed := ask(folder, clock, moment, rank=rank, alone=alone, **options_of(engine)))["codes"] == [0, 0]:
        moment *= 0.8
        folder = folder.with_name(f"{folder.name}0")
    assert killed["codes"][rank] == -signal.SIGKILL, killed["output"][-4000:]
    assert killed["codes"][1 - rank] == (1 if alone else -signal.SIGKILL), killed["output"][-4000:]
    assert_resumes_to_the_byte(ask, folder, engine, expected)


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp"])
def test_a_phase_that_was_killed_continues_from_its_checkpoint(
    engine: str, ask: Ask, whole: Callable[[str], End], tmp_path: Path
) -> None:
    ask(tmp_path, *STAGES["adapt"], alone=False, **options_of(engine))
    assert_resumes_to_the_byte(ask, tmp_path, engine, whole(engine)[0], steps=10)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_that_is_killed_is_named_in_every_stage(
    stage: str, rank: int, ask: Ask, whole: Callable[[str], End], tmp_path: Path
) -> None:
    killed = ask(tmp_path, *STAGES[stage], rank=rank)
    assert killed["codes"] == [-signal.SIGKILL if rank == i else 1 for i in range(2)], killed["output"][-4000:]
    assert f"RuntimeError: rank {rank} (process" in killed["output"]
    assert f"rank {1 - rank} (process" not in killed["output"]
    steps = 10 if stage == "adapt" else None
    assert_resumes_to_the_byte(ask, tmp_path, "ddp", whole("ddp")[0], steps)


def test_an_error_of_one_rank_ends_all_and_is_shown(ask: Ask, tmp_path: Path) -> None:
    failed = ask(tmp_path, "predictions", 3, rank=1, fails=True)
    assert failed["codes"] == [1, 1]
    assert "KeyError: 'a row that cannot be read'" in failed["output"]
    assert "RuntimeError: rank 1 (process" in failed["output"]
    assert "rank 0 (process" not in failed["output"]


def test_what_the_first_process_cannot_save_is_reported_by_every_process(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "subspace").write_text("in the way")
    failed = ask(tmp_path)
    assert failed["codes"] == [1, 1]
    assert failed["output"].count("ValueError: " + str(tmp_path / "subspace") + " is a file, expected a folder") == 2
    assert "ended during the run" not in failed["output"]


def test_a_checkpoint_with_a_torn_file_of_any_rank_is_not_continued_from(
    ask: Ask, whole: Callable[[str], End], tmp_path: Path
) -> None:
    ask(tmp_path, "steps", 9, alone=False)
    phase = tmp_path / "phases" / "0002-shapes-adapt"
    states = phase / "checkpoint-2" / "rng_state_1.pth"
    assert newest_whole_checkpoint(phase) == states.parent
    states.write_bytes(states.read_bytes()[:-100])
    assert newest_whole_checkpoint(phase) is None
    assert_resumes_to_the_byte(ask, tmp_path, "ddp", whole("ddp")[0], steps=12)


@pytest.mark.parametrize(
    ("first", "processes", "then", "others"),
    [("ddp", 2, "ddp", 1), ("ddp", 1, "ddp", 2), ("zero2", 2, "zero2", 1), ("zero2", 2, "ddp", 2)],
)
def test_a_stream_is_resumed_by_other_processes_than_began_it(
    first: str, processes: int, then: str, others: int, ask: Ask, tmp_path: Path
) -> None:
    ask(tmp_path / "killed", "steps", 9, alone=False, processes=processes, dropout=0.0, **options_of(first))
    resumed = ask(tmp_path / "killed", "steps", 1e9, processes=others, dropout=0.0, **options_of(then))
    assert resumed["codes"] == [0] * others, resumed["output"][-4000:]
    written = f"/0002-shapes-adapt/checkpoint-2: written with {'DeepSpeed' if first == 'zero2' else 'PyTorch'}"
    assert resumed["output"].count(written) == 1
    assert ("the phase starts over" in resumed["output"]) == (first == "zero2")
    assert resumed["lengths"][0]["steps"] == (12 if first == "zero2" else 10)
    ask(tmp_path / "whole", processes=1, dropout=0.0)
    found, expected = (SharedSubspace.from_pretrained(tmp_path / name / "subspace") for name in ("killed", "whole"))
    assert found.tasks == tuple(TASKS)
    assert_close(found, expected, 1e-3)


# ---- Under the launchers --------------------------------------------------------------------------------------------


def started_by(name: str) -> list[str]:
    port, programs = str(free_port()), Path(sys.executable).parent
    return {
        "torchrun": [str(programs / "torchrun"), "--nproc-per-node", "2", "--master-port", port],
        "accelerate": [
            *(
                str(programs / "accelerate"),
                "launch",
                "--multi_gpu",
                "--num_processes",
                "2",
                "--main_process_port",
                port,
            ),
            *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        ],
        "deepspeed": [str(programs / "deepspeed"), "--num_accelerators", "2", "--master_port", port],
    }[name]


def left_of(folder: Path) -> list[psutil.Process]:
    """Return the processes whose command names a folder."""
    processes = psutil.process_iter(["cmdline"])
    return [process for process in processes if str(folder) in " ".join(process.info["cmdline"] or ())]


@pytest.mark.parametrize(
    ("program", "engine", "stage", "rank"),
    [
        ("torchrun", "ddp", "adapt", 1),
        ("torchrun", "ddp", "merge", 0),
        ("accelerate", "ddp", "adapt", 0),
        ("accelerate", "ddp", "merge", 1),
        ("deepspeed", "zero2", "adapt", 0),
        ("deepspeed", "zero2", "merge", 1),
    ],
)
def test_a_launcher_ends_when_a_rank_is_killed_and_the_rank_is_named(
    program: str, engine: str, stage: str, rank: int, ask: Ask, whole: Callable[[str], End], tmp_path: Path
) -> None:
    clock, moment = STAGES[stage]
    options = {"folder": str(tmp_path / "out"), "clock": clock, "moment": moment, "rank": rank, **options_of(engine)}
    done = run([*started_by(program), str(SCRIPT), json.dumps(options)], timeout=90)
    assert done.returncode != 0
    # torchrun stops the other rank as soon as one ends, and names the one that did; deepspeed waits a second.
    named = "Root Cause.*rank +: {} " if engine == "ddp" else r"RuntimeError: rank {} \(process"
    assert re.search(named.format(rank), done.stdout, re.DOTALL), done.stdout[-6000:]
    assert f"rank {1 - rank} (process" not in done.stdout, done.stdout[-6000:]
    assert not left_of(tmp_path)
    assert_resumes_to_the_byte(ask, tmp_path / "out", engine, whole(engine)[0])


@pytest.mark.parametrize(("program", "engine"), [("torchrun", "ddp"), ("deepspeed", "zero3")])
def test_a_launcher_ends_when_a_rank_fails_and_its_error_is_shown(program: str, engine: str, tmp_path: Path) -> None:
    options = {"folder": str(tmp_path), "clock": "predictions", "moment": 3, "rank": 1, "fails": True}
    done = run([*started_by(program), str(SCRIPT), json.dumps({**options, **options_of(engine)})], timeout=120)
    assert done.returncode != 0
    assert "KeyError: 'a row that cannot be read'" in done.stdout, done.stdout[-6000:]
    assert not left_of(tmp_path)
