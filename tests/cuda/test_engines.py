"""Engines of several processes, with one process on the device: NCCL on a card, gloo on the CPU."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from share_hf import SharedSubspace
from tests.continual.kill_server import TASKS, end_of
from tests.distributed.forked import running
from tests.distributed.launching import HERE as SCRIPTS
from tests.distributed.launching import command, options_of_script, run
from tests.distributed.test_deaths import STAGES
from tests.distributed.test_streams import RECIPES, assert_close
from tests.trees import distance


pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SECONDS = 100  # for one process, including its imports
STEPS_LEFT = 10  # of 18, from the checkpoint before the moment at which the stream is killed

Launch = Callable[..., SharedSubspace]
RunStream = Callable[..., tuple[list[int], str]]


def needs(library: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(library) is None, reason=f"{library} is not installed")


ZERO = [pytest.param(engine, marks=needs("deepspeed")) for engine in ("zero2", "zero3")]


@pytest.fixture(scope="module")
def run_stream(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunStream]:
    """Run a stream in one process of an engine: with its launcher on a card, and faster in a fork on the CPU."""
    if device.type == "cuda":

        def start(engine: str, folder: Path, **options: Any) -> tuple[list[int], str]:
            done = run(command(engine, "stream", folder, 1, device.type, **options), SECONDS, device=device.type)
            return [done.returncode], done.stdout

        yield start
        return
    with running(tmp_path_factory.mktemp("forks") / "log.txt") as run_in_forks:
        yield lambda engine, folder, **options: run_in_forks(
            "stream", options_of_script(engine, folder, **options), None if engine == "one" else 1
        )


@pytest.fixture(scope="module")
def launch(run_stream: RunStream, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """The subspace that a stream leaves under an engine. Each stream is run once."""
    known: dict[str, SharedSubspace] = {}

    def start(engine: str, model: str = "llama", **options: Any) -> SharedSubspace:
        key = json.dumps([engine, model, options])
        if key not in known:
            folder = tmp_path_factory.mktemp(engine) / "out"
            codes, output = run_stream(engine, folder, **{"tasks": 2, "model": model, **options})
            assert codes == [0], output[-6000:]
            known[key] = SharedSubspace.from_pretrained(folder / "subspace")
        return known[key]

    return start


@pytest.mark.parametrize("engine", ["ddp", *ZERO])
def test_one_process_of_an_engine_learns_what_a_plain_one_does(engine: str, launch: Launch) -> None:
    assert_close(launch(engine), launch("one"), 1e-3)


@pytest.mark.parametrize("engine", ZERO)
def test_an_engine_in_bfloat16_keeps_float32_coefficients(engine: str, launch: Launch) -> None:
    subspace = launch(engine, bf16=True)
    for layer in subspace.state.layers.values():
        assert layer.basis_out.dtype == layer.coefficients_out.dtype == torch.float32
        assert not torch.equal(layer.coefficients_out, layer.coefficients_out.bfloat16().float())
    assert subspace.tasks == ("a", "b")
    # Rounding may flip a direction of the basis, and with it the start of the second task.
    assert distance(subspace, launch("one"), "a") < 0.2


@needs("bitsandbytes")
@needs("deepspeed")
def test_a_4bit_backbone_is_partitioned(launch: Launch) -> None:
    assert_close(launch("zero3", quantized="nf4"), launch("one", quantized="nf4"), 1e-2)


def test_accelerate_shards_a_backbone_by_fsdp(cuda: torch.device, launch: Launch, tmp_path: Path) -> None:
    """The settings are those of recipes/configs/fsdp.yaml. On the CPU, other tests run FSDP in two processes."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    accelerate += [str(RECIPES / "configs" / "fsdp.yaml"), "--num_processes", "1", "--mixed_precision", "no"]
    options = {"folder": str(tmp_path / "out"), "model": "llama", "tasks": 2, "use_cpu": False}
    done = run([*accelerate, str(SCRIPTS / "stream.py"), json.dumps(options)], SECONDS, device=cuda.type)
    assert done.returncode == 0, done.stdout[-6000:]
    assert_close(SharedSubspace.from_pretrained(tmp_path / "out" / "subspace"), launch("one"), 1e-3)


def test_a_stream_that_is_killed_resumes_to_the_same_end(device: torch.device, tmp_path: Path) -> None:
    """The two are equal bit by bit on the CPU; CUDA may add in another order."""

    def train(folder: Path, clock: str = "steps", moment: float = 1e9) -> tuple[int, str]:
        options = {"folder": str(folder), "clock": clock, "moment": moment, "use_cpu": device.type == "cpu"}
        done = run([sys.executable, str(SCRIPTS / "killed.py"), json.dumps(options)], SECONDS, device=device.type)
        return done.returncode, done.stdout

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, output = train(whole)
    assert code == 0, output[-6000:]
    code, output = train(killed, *STAGES["adapt"])
    assert code == -signal.SIGKILL, output[-6000:]
    code, output = train(killed)
    assert code == 0, output[-6000:]
    assert json.loads(output.splitlines()[-1])["steps"] == STEPS_LEFT
    found, expected = (SharedSubspace.from_pretrained(folder / "subspace") for folder in (killed, whole))
    assert found.tasks == expected.tasks == tuple(TASKS)
    for task in TASKS:
        assert distance(found, expected, task) < 1e-3
    if device.type == "cpu":
        assert end_of(killed) == end_of(whole)
