"""Whole streams in two real processes, under each engine, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from share_hf import SharedSubspace
from tests.hub.cases import distance


pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SCRIPT = Path(__file__).with_name("stream.py")
ROOT = SCRIPT.parents[2]
TIMEOUT = 240

Launch = Callable[..., SharedSubspace]


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
    }


def run(command: list[str], timeout: float = TIMEOUT) -> subprocess.CompletedProcess[str]:
    """Run a command, of which no process is left afterwards."""
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        for child in children_of(process.pid):  # launchers start them in sessions of their own
            child.kill()
    return subprocess.CompletedProcess(command, process.returncode, output)


def children_of(pid: int) -> list[psutil.Process]:
    """A process and all that it has started, as far as they are there."""
    if not psutil.pid_exists(pid):
        return []
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def launcher(engine: str) -> list[str]:
    """What starts the script under an engine; one process with none."""
    if engine == "one":
        return [sys.executable]
    if engine == "ddp":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--master_port", "29517"]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Runs a stream under an engine: the subspace it leaves."""

    def start(engine: str, model: str = "bert", **options: Any) -> SharedSubspace:
        folder = tmp_path_factory.mktemp(engine) / "out"
        options = {"folder": str(folder), "model": model, **options}
        if engine.startswith("zero"):
            options["deepspeed"] = zero_config(engine)
        elif engine == "ddp":
            options["ddp_backend"] = "gloo"
        done = run([*launcher(engine), str(SCRIPT), json.dumps(options)])
        assert done.returncode == 0, done.stdout[-6000:]
        return SharedSubspace.from_pretrained(folder / "subspace")

    return start


def zero_config(engine: str) -> dict[str, Any]:
    stage: dict[str, Any] = {"stage": int(engine[4])}
    if engine.endswith("offload"):
        stage["offload_optimizer"] = {"device": "cpu"}
        if engine.startswith("zero3"):
            stage["offload_param"] = {"device": "cpu"}
    return {
        "zero_optimization": stage,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def assert_close(found: SharedSubspace, expected: SharedSubspace, tolerance: float) -> None:
    assert found.tasks == expected.tasks
    for task in expected.tasks:
        assert distance(found, expected, task) < tolerance, task
        for name, tensor in expected.state.tasks[task].head.items():
            error = (found.state.tasks[task].head[name] - tensor).norm() / tensor.norm()
            assert error < tolerance, (task, name)


ENGINES = ["ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]


@pytest.fixture(scope="module")
def one_process(launch: Launch) -> SharedSubspace:
    return launch("one")


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_learn_what_one_does(engine: str, launch: Launch, one_process: SharedSubspace) -> None:
    assert_close(launch(engine), one_process, 1e-4)


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_every_phase_runs_in_two_processes(engine: str, launch: Launch) -> None:
    options = {
        "finetune_num_train_epochs": 1,
        "evaluate_before": True,
        "tasks": 2,
        "optim": "sgd",
        "learning_rate": 0.05,
    }
    assert_close(launch(engine, **options), launch("one", **options), 2e-3)


def test_coefficients_alone_are_learned_in_two_processes(launch: Launch) -> None:
    options = {"method": "coefficients", "tasks": 2}
    assert_close(launch("zero2", **options), launch("one", **options), 1e-3)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_accumulated_gradients_in_bfloat16_keep_float32_coefficients(engine: str, launch: Launch) -> None:
    subspace = launch(
        engine, "llama", bf16=True, gradient_accumulation_steps=2, per_device_train_batch_size=2, tasks=2
    )
    for layer in subspace.state.layers.values():
        assert layer.basis_out.dtype == layer.coefficients_out.dtype == torch.float32
        identity = torch.eye(layer.basis_out.shape[1])
        torch.testing.assert_close(layer.basis_out.T @ layer.basis_out, identity, rtol=0, atol=1e-5)
        rounded = layer.coefficients_out.bfloat16().float()
        assert not torch.equal(rounded, layer.coefficients_out)


@pytest.mark.parametrize("engine", ["one", "ddp"])
def test_a_quantized_backbone_learns(engine: str, launch: Launch) -> None:
    assert launch(engine, "llama", quantized=True, tasks=2).tasks == ("a", "b")


def test_a_quantized_backbone_is_refused_under_zero3(tmp_path: Path) -> None:
    options = {"folder": str(tmp_path / "out"), "model": "llama", "quantized": True, "deepspeed": zero_config("zero3")}
    done = run([*launcher("zero3"), str(SCRIPT), json.dumps(options)])
    assert done.returncode != 0
    assert not (tmp_path / "out" / "subspace").exists()
