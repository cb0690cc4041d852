"""Subspaces from many adapters: read one module at a time, and checked before any work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from share_hf import SharedSubspace
from share_hf.format.collection import read_loras


COUNT, RANK, MODULES, FEATURES = 40, 16, 20, 512
MEGABYTE = 2**20

MEASURED = """
import sys, threading, time
import torch
from share_hf import SharedSubspace

torch.set_num_threads(2)
folder, count = sys.argv[1], int(sys.argv[2])
peak, done = 0, threading.Event()

def anonymous():
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) * 1024

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)

torch.linalg.svd(torch.randn(64, 64))  # what the libraries allocate once
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
adapters = {f"task{i}": f"{folder}/{i}" for i in range(count)}
subspace = SharedSubspace.from_adapters(adapters, num_components=8, pseudo_rank=4, progress=False)
done.set()
thread.join()
print(peak - before)
"""


def write_adapters(folder: Path, count: int = COUNT, modules: int = MODULES) -> Path:
    generator = torch.Generator().manual_seed(0)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"]}
    config["base_model_name_or_path"] = "org/base"
    for i in range(count):
        tensors = {}
        for layer in range(modules):
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora"
            tensors[f"{name}_A.weight"] = torch.randn(RANK, FEATURES, generator=generator)
            tensors[f"{name}_B.weight"] = torch.randn(FEATURES, RANK, generator=generator)
        (folder / str(i)).mkdir()
        save_file(tensors, folder / str(i) / "adapter_model.safetensors", {"format": "pt"})
        (folder / str(i) / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_build_holds_no_more_than_the_stacks_of_the_modules_it_works_on(tmp_path: Path) -> None:
    folder = write_adapters(tmp_path)
    command = [sys.executable, "-c", MEASURED, str(folder), str(COUNT)]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    stack = COUNT * RANK * 2 * FEATURES * 8  # of a module, in float64
    everything = MODULES * stack
    # Two modules are in work at a time, each with its factors in float64 and in float32, and some temporaries.
    assert peak < 2 * 4 * stack + 16 * MEGABYTE < 0.6 * everything, (peak / MEGABYTE, stack / MEGABYTE)


def test_the_updates_of_adapters_that_are_read_are_made_when_they_are_asked_for(tmp_path: Path) -> None:
    folder = write_adapters(tmp_path, count=1, modules=2)
    updates = read_loras({"a": folder / "0"}, progress=False)["a"].updates
    assert len(updates) == 2
    for module in updates:
        assert updates[module] is not updates[module]
        assert torch.equal(updates[module].out_factor, updates[module].out_factor)


def test_all_broken_adapters_are_named_before_any_work(tmp_path: Path) -> None:
    folder = write_adapters(tmp_path, count=8, modules=1)
    weights = "adapter_model.safetensors"
    content = (folder / "2" / weights).read_bytes()
    (folder / "2" / weights).write_bytes(content[: len(content) // 2])
    tensors = load_file(folder / "4" / weights)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, folder / "4" / weights)
    (folder / "7" / "adapter_config.json").unlink()
    subspace = SharedSubspace.from_adapters({"first": folder / "0"}, num_components=8, pseudo_rank=4, progress=False)
    before = subspace.state

    with pytest.raises(ValueError, match="3 of 7 adapters cannot be used") as caught:
        subspace.add_adapters({f"task{i}": folder / str(i) for i in range(1, 8)}, progress=False)

    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["task2", "task4", "task7"]
    assert "not a readable safetensors file" in lines[1]
    assert "has NaN or infinite entries" in lines[2]
    assert "no adapter_config.json in it" in lines[3]
    assert subspace.state is before
