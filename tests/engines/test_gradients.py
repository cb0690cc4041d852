"""Gradients that processes average, although some of them have none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from share_hf.engines.fsdp import average_gradients


pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def train_one_side(rank: int, store: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = nn.ModuleDict({"one": nn.Linear(3, 2), "two": nn.Linear(3, 2), "both": nn.Linear(3, 2)})
    model["both"].bias.requires_grad_(False)
    reached = [model["one"], model["both"]] if rank == 0 else [model["two"], model["both"]]
    sum(layer(torch.full((1, 3), 1.0 + rank)).sum() for layer in reached).backward()
    average_gradients(model)
    torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_what_one_process_did_not_reach_has_half_the_gradient_of_the_other(tmp_path: Path) -> None:
    context = mp.start_processes(
        train_one_side, (str(tmp_path / "store"), str(tmp_path)), nprocs=2, join=False, start_method="spawn"
    )
    while not context.join(timeout=60):
        pass
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first.pop("both.bias") is second.pop("both.bias") is None
    for name, expected in (("one.weight", 0.5), ("two.weight", 1.0), ("both.weight", 1.5)):
        for found in (first, second):
            torch.testing.assert_close(found[name], torch.full((2, 3), expected))
