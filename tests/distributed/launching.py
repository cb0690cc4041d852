"""Scripts under an engine, started by its launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from tests.forking import free_port


HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TIMEOUT = 570  # seconds; DeepSpeed may compile an operator, which takes minutes if the cores are shared


def environment(device: str = "cpu") -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": device,
    }


def run(
    command: list[str], timeout: float = TIMEOUT, cwd: Path | None = None, device: str = "cpu"
) -> subprocess.CompletedProcess[str]:
    """Run a command, and leave no process of it behind."""
    process = subprocess.Popen(
        command, cwd=cwd, env=environment(device), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        for child in children_of(process.pid):  # launchers start them in sessions of their own
            child.kill()
    return subprocess.CompletedProcess(command, process.returncode, output)


def children_of(pid: int) -> list[psutil.Process]:
    """Return a process and all processes that it has started, as far as they still exist."""
    if not psutil.pid_exists(pid):
        return []
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def launcher(engine: str, processes: int = 2) -> list[str]:
    """Return the launcher of an engine; without an engine, it starts one process."""
    if engine == "one":
        return [sys.executable]
    if engine in ("ddp", "fsdp"):
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        return [*torchrun, "--standalone", "--nproc-per-node", str(processes)]
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(processes)]
    return [*deepspeed, "--master_port", str(free_port())]


def command(
    engine: str, script: str, folder: Path, processes: int = 2, device: str = "cpu", **options: Any
) -> list[str]:
    """Return the command that runs a script of this folder under an engine."""
    options = options_of_script(engine, folder, device, **options)
    return [*launcher(engine, processes), str(HERE / f"{script}.py"), json.dumps(options)]


def options_of_script(engine: str, folder: Path, device: str = "cpu", **options: Any) -> dict[str, Any]:
    """Return the options with which a script of this folder trains under an engine."""
    options = {"folder": str(folder), "use_cpu": device == "cpu", **options}
    if engine.startswith("zero"):
        options["deepspeed"] = zero_config(engine)
    elif engine != "one":
        options["ddp_backend"] = "gloo" if device == "cpu" else "nccl"
        options["fsdp"] = engine == "fsdp"
    return options


def zero_config(engine: str) -> dict[str, Any]:
    # No parameter of the tiny models is so small that every process keeps it whole.
    stage: dict[str, Any] = {"stage": int(engine[4]), "stage3_param_persistence_threshold": 0}
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
