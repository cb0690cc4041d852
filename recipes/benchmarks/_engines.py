"""Time training steps of two processes under DDP, ZeRO-2 and ZeRO-3, for the benchmark of training steps.

Both processes hold a copy of one model for each adapter and engine, and take a step of each in turn. One process can
hold several DeepSpeed engines.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from _report import interleaved
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from share_hf.engines import leave_to_gloo


PROCESSES = 2
ENGINES = ("DDP", "ZeRO-2", "ZeRO-3")

Seconds = dict[tuple[str, str], list[float]]  # by adapter and engine, one value for each round
LINEAR = F.linear  # torch's own; a ZeRO-3 engine replaces it by a slower one for every model in the process

MakeModel = Callable[[], PreTrainedModel]  # makes the model on the current device


def reason_against() -> str | None:
    """Return why the engines cannot be measured on this machine, or None if they can."""
    if importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed"
    if torch.cuda.device_count() == 1:
        return f"{PROCESSES} processes need a GPU each, found 1"
    return None


def seconds_in_two_processes(
    make_base: MakeModel, adapters: Mapping[str, PeftConfig], batch: tuple[int, int], repeats: int
) -> Seconds:
    """Time each step of each adapter under each engine. An error in one process ends both and is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_take_steps, (make_base, dict(adapters), batch, repeats, folder), nprocs=PROCESSES, daemon=True)
        measured = json.loads((Path(folder) / "seconds.json").read_text())
    return {(adapter, engine): seconds for adapter, engine, seconds in measured}


def _take_steps(
    rank: int, make_base: MakeModel, adapters: dict[str, PeftConfig], batch: tuple[int, int], repeats: int, folder: str
) -> None:
    """Run one process: take steps of each adapter under each engine in turn, in the same order in both processes."""
    warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed's calls of torch raise them at every step
    _join(rank, Path(folder))
    torch.manual_seed(0)
    base = make_base()
    torch.manual_seed(rank)
    input_ids = torch.randint(base.config.vocab_size, batch, device=base.device)
    steps = {
        (adapter, engine): _step(engine, base, config, input_ids)
        for adapter, config in adapters.items()
        for engine in ENGINES
    }
    seconds = interleaved(steps, repeats=repeats, warmup=2)
    if rank == 0:
        measured = [(adapter, engine, values) for (adapter, engine), values in seconds.items()]
        (Path(folder) / "seconds.json").write_text(json.dumps(measured))
    leave_to_gloo()
    dist.destroy_process_group()


def _join(rank: int, folder: Path) -> None:
    cuda = torch.cuda.is_available()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    os.environ["DS_ACCELERATOR"] = "cuda" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // PROCESSES))
    store = f"file://{folder / 'store'}"
    dist.init_process_group("nccl" if cuda else "gloo", init_method=store, rank=rank, world_size=PROCESSES)


def _step(engine: str, base: PreTrainedModel, config: PeftConfig, input_ids: Tensor) -> Callable[[], None]:
    """Make a function that takes a step and returns when both processes have taken it."""
    model = get_peft_model(copy.deepcopy(base), copy.deepcopy(config), adapter_name="task").train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    if engine == "DDP":
        take = _ddp_step(model, optimizer, input_ids)
    else:
        take = _zero_step(int(engine[-1]), base.dtype, model, optimizer, input_ids)
    linear = F.linear if engine == "ZeRO-3" else LINEAR

    def step() -> None:
        F.linear = linear
        take()
        dist.barrier()

    return step


def _ddp_step(model: nn.Module, optimizer: torch.optim.Optimizer, input_ids: Tensor) -> Callable[[], None]:
    # As in `ShareTrainingArguments`: otherwise DDP would send the bases at every step and make ZeRO look cheap.
    parallel = DistributedDataParallel(model, broadcast_buffers=False)

    def step() -> None:
        optimizer.zero_grad()
        parallel(input_ids=input_ids, labels=input_ids).loss.backward()
        optimizer.step()

    return step


def _zero_step(
    stage: int, dtype: torch.dtype, model: nn.Module, optimizer: torch.optim.Optimizer, input_ids: Tensor
) -> Callable[[], None]:
    import deepspeed

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": len(input_ids),
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_allow_untested_optimizer": True,
    }
    parallel = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    def step() -> None:
        parallel.backward(parallel(input_ids=input_ids, labels=input_ids).loss)
        parallel.step()

    return step
