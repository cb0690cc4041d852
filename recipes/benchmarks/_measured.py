"""Take one measurement of one package in a separate process: `python _measured.py JOB`, with the job as JSON.

The process imports the package, notes its anonymous memory, does the job, and prints the measurements as the last line
of its output. Memory that is mapped from files does not count.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from _adapters import factors_of, relative_error
from torch import Tensor


SAMPLED_ERRORS = 20  # approximate number of tasks whose error is computed
SECONDS_BETWEEN_SAMPLES = 0.002

Factors = Mapping[str, tuple[Tensor, Tensor]]  # by module, (n, r) and (r, d)


class Tool(ABC):
    """A package that holds many adapters in one subspace. Creating an instance imports the package."""

    @abstractmethod
    def build(self, places: list[Path], k: int) -> None:
        """Build a subspace with k components from adapters."""

    @abstractmethod
    def add(self, place: Path) -> None:
        """Add one more adapter to the subspace without approximation."""

    @abstractmethod
    def factors(self, task: str) -> Factors:
        """Return the factors that are stored for a task."""

    @abstractmethod
    def save(self, folder: Path) -> list[Path]:
        """Save the subspace and return the files of the basis and the coefficients."""


class ShareHf(Tool):
    def __init__(self) -> None:
        import share_hf.shared_subspace

        self.package = share_hf.shared_subspace

    def build(self, places: list[Path], k: int) -> None:
        self.subspace = self.package.SharedSubspace.from_adapters(places, num_components=k, progress=False)

    def add(self, place: Path) -> None:
        self.subspace.add_adapters([place], progress=False)

    def factors(self, task: str) -> Factors:
        updates = {
            module: layer.update_of(task, torch.float64)
            for module, layer in self.subspace.state.layers.items()
            if layer.has(task)
        }
        return {module: (update.out_factor, update.in_factor.T) for module, update in updates.items()}

    def save(self, folder: Path) -> list[Path]:
        self.subspace.save_pretrained(folder)
        return [folder / "subspace.safetensors", *folder.glob("tasks/*/adapter_model.safetensors")]


class Vlora(Tool):
    def __init__(self) -> None:
        import vlora

        self.package = vlora

    def build(self, places: list[Path], k: int) -> None:
        self.subspace = self.package.init_subspace(places, [place.name for place in places], num_components=k)

    def add(self, place: Path) -> None:
        self.package.absorb_task(self.subspace, place, place.name)

    def factors(self, task: str) -> Factors:
        weights = self.subspace.reconstruct(task)
        return {module: (weights.lora_b[module], weights.lora_a[module]) for module in weights.layer_names}

    def save(self, folder: Path) -> list[Path]:
        self.subspace.save(folder)
        return list(folder.glob("*.safetensors"))


class LoraShare(Tool):
    layer_by_layer = False

    def __init__(self) -> None:
        import lorashare

        self.package = lorashare
        logging.getLogger("lorashare").setLevel(logging.ERROR)

    def build(self, places: list[Path], k: int) -> None:
        named = {place.name: str(place) for place in places}
        self.model = self.package.SHAREModel.from_adapters(
            named, num_components=k, device="cpu", layer_by_layer=self.layer_by_layer
        )

    def add(self, place: Path) -> None:
        self.model.add_adapter(str(place), device="cpu", force_recompute=True)

    def factors(self, task: str) -> Factors:
        tensors = self.model.reconstruct(task)
        found = {}
        for name, tensor in tensors.items():
            if name.endswith(".lora_B.weight"):
                module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
                found[module] = tensor, tensors[name.replace("lora_B", "lora_A")]
        return found

    def save(self, folder: Path) -> list[Path]:
        self.model.save_pretrained(folder)
        return list(folder.rglob("*.safetensors"))


class LoraShareByLayer(LoraShare):
    layer_by_layer = True


TOOLS: dict[str, type[Tool]] = {
    "share_hf": ShareHf,
    "vlora": Vlora,
    "lorashare": LoraShare,
    "lorashare layer_by_layer": LoraShareByLayer,
}


def build(job: Mapping[str, Any]) -> dict[str, float]:
    """Measure the seconds and memory of a build, and the mean error and bytes of its result."""
    tool, places = TOOLS[job["tool"]](), _places(job)
    measured = _measure(lambda: tool.build(places, job["k"]))
    step = max(1, len(places) // SAMPLED_ERRORS)
    with tempfile.TemporaryDirectory(dir=job["scratch"]) as folder:
        stored = sum(path.stat().st_size for path in tool.save(Path(folder) / "saved"))
    return {**measured, "error": _mean_error(tool, places[::step]), "stored": stored}


def _mean_error(tool: Tool, places: list[Path]) -> float:
    errors = []
    for place in places:
        stored = tool.factors(place.name)
        errors += [relative_error(learned, stored[module]) for module, learned in factors_of(place).items()]
    return statistics.mean(errors)


def add(job: Mapping[str, Any]) -> dict[str, float]:
    """Measure adding one adapter to a subspace of all others."""
    tool, places = TOOLS[job["tool"]](), _places(job)
    tool.build(places[:-1], job["k"])
    return _measure(lambda: tool.add(places[-1]))


def audit(job: Mapping[str, Any]) -> dict[str, float]:
    """Measure an audit by the command line."""
    from share_hf.cli import main

    ShareHf()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return _measure(lambda: main(["audit", *map(str, _places(job)), "--num-components", str(job["k"])]))


def load(job: Mapping[str, Any]) -> dict[str, float]:
    """Measure the time and memory of loading a tree, the time of reading and hashing its files, and its size."""
    tool, tree = ShareHf(), Path(job["tree"])
    if not tree.exists():
        tool.build(_places(job), job["k"])
        tool.save(tree)
        return load_in_fresh_process(job)
    files = [path for path in sorted(tree.rglob("*")) if path.is_file()]
    loaded, plain = [], []
    for _ in range(3):  # in turn, so that other load on the machine affects both
        plain.append(_measure(lambda: _read_and_hash(files))["seconds"])
        loaded.append(_measure(lambda: tool.package.SharedSubspace.from_pretrained(tree)))
    return {
        **loaded[0],  # the memory of the first run, which cannot reuse memory that another run has left
        "seconds": min(run["seconds"] for run in loaded[1:]),
        "cpu": min(run["cpu"] for run in loaded[1:]),
        "plain": min(plain[1:]),
        "stored": sum(path.stat().st_size for path in files),
    }


def load_in_fresh_process(job: Mapping[str, Any]) -> dict[str, float]:
    """Start `load` again in a fresh process, which has no memory left behind by a build."""
    os.execv(sys.executable, [sys.executable, __file__, json.dumps(job)])


def _read_and_hash(files: list[Path]) -> None:
    for path in files:
        hashlib.sha256(path.read_bytes()).hexdigest()


def save_again(job: Mapping[str, Any]) -> dict[str, float]:
    """Measure saving a tree again after adding a task inside its basis, and count the files that are written anew."""
    tool, places = ShareHf(), _places(job)
    with tempfile.TemporaryDirectory(dir=job["scratch"]) as folder:
        tree = Path(folder) / "tree"
        tool.build(places, job["k"])
        tool.save(tree)
        before = {path.stat().st_ino for path in tree.rglob("*") if path.is_file()}
        inside = Path(folder) / "inside"
        tool.subspace.export_lora(places[0].name, inside)
        tool.add(inside)
        measured = _measure(lambda: tool.subspace.save_pretrained(tree))
        files = [path for path in tree.rglob("*") if path.is_file()]
        written = [path for path in files if path.stat().st_ino not in before]
        shutil.rmtree(tree)
    return {**measured, "written": len(written), "files": len(files)}


def _places(job: Mapping[str, Any]) -> list[Path]:
    return [Path(job["adapters"]) / name for name in job["tasks"]]


def _measure(work: Callable[[], object]) -> dict[str, float]:
    """Measure the wall-clock and processor seconds of work, and the largest rise of anonymous memory in bytes."""
    before = anonymous_bytes()
    with highest_of(anonymous_bytes) as highest:
        start, cpu = time.perf_counter(), time.process_time()
        work()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"seconds": seconds, "cpu": cpu, "memory": max(0, highest[0] - before)}


@contextlib.contextmanager
def highest_of(read: Callable[[], int]) -> Iterator[list[int]]:
    """Sample a value in the background and keep the largest one, in a list of length one."""
    highest, over = [read()], threading.Event()

    def watch() -> None:
        while not over.wait(SECONDS_BETWEEN_SAMPLES):
            highest[0] = max(highest[0], read())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield highest
    finally:
        over.set()
        thread.join()
        highest[0] = max(highest[0], read())


def anonymous_bytes() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("RssAnon:"))
    return 1024 * int(line.split()[1])


JOBS = {"build": build, "add": add, "audit": audit, "load": load, "save_again": save_again}


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    print(json.dumps(JOBS[job["do"]](job)))


if __name__ == "__main__":
    main()
