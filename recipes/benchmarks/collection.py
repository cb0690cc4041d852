"""How fast, small and exact is one subspace of hundreds of adapters, compared with two other packages?

    python recipes/benchmarks/collection.py --folder /tmp/collection --json collection.json
    python recipes/benchmarks/collection.py --quick --json collection.json
    python recipes/benchmarks/collection.py --real ../shared/adapters/minilm-own-seed --folder /tmp/collection

The benchmark compares `SharedSubspace.from_adapters` with `vlora-dev==1.0.0` and `lorashare==0.1.3`. To install them,
run `pip install vlora-dev==1.0.0 lorashare==0.1.3`. A package that is missing is left out, and the table says so.
The benchmark makes rank-16 adapters of 24 modules of 1024 x 1024 on disk, with a shared part and a decaying spectrum,
and builds subspaces of k = 32 and p = 8 from them, including the drift certificate.

Every measurement runs in a separate process with `--threads` threads. The packages take turns, so that other load on
the machine affects all of them alike. Most values are medians of `--repeats` runs. Memory is the rise of anonymous
memory over the interpreter with the package imported; pages of mapped files do not count. With `--real`, the benchmark
also measures errors on trained adapters.

`--folder` keeps the adapters (8 GB for all sizes) and all measurements, so that a run that was stopped can continue.
With an empty folder, everything is measured anew. Without the option, everything goes to a temporary folder.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _adapters import Sizes, factors_of, make_adapters
from _report import Row, argument_parser, report
from torch import Tensor

from share_hf.subspace import LowRankUpdate, SubspaceSettings, merge_into_layer
from share_hf.subspace.layer import LayerSubspace


HERE = Path(__file__).resolve().parent
OURS = "share_hf"
PEERS = {"vlora": ("vlora-dev", "1.0.0"), "lorashare": ("lorashare", "0.1.3")}
K, P = 32, 8
BYTES_OF_NUMBER = 4
PAPER_TASKS = ("agnews", "sst2", "amazon", "imdb", "mnli", "yelp")
JOINT_STEPS = 20  # iterations for the exact joint basis, which is stationary long before

Measured = dict[str, float]


@dataclass(frozen=True)
class Scale:
    """Sizes of everything that is measured.

    Args:
        sizes: Sizes of the adapters.
        compared: Numbers of adapters that all packages build from, with the speed-up that share_hf should reach.
        grown: Numbers of adapters that only share_hf builds from. The first and the last are compared.
        added: Number of tasks in a small and in a large subspace to which an adapter is added.
        loaded: Number of tasks in the tree that is loaded.
        loaded_modules: Number of modules in the adapters of these tasks.
        audited: Number of adapters that are audited.
    """

    sizes: Sizes
    compared: Mapping[int, float]
    grown: Sequence[int]
    added: tuple[int, int]
    loaded: int
    loaded_modules: int
    audited: int


FULL = Scale(Sizes(), {100: 4, 200: 5}, (50, 100, 200, 400, 800, 1600), (100, 1000), 1000, 4, 200)
QUICK = Scale(Sizes(modules=2, features=128), {24: 4}, (24, 48), (24, 48), 24, 2, 24)


class Bench:
    """Runs jobs in separate processes and keeps their measurements."""

    def __init__(self, folder: Path, scale: Scale, threads: int, repeats: int) -> None:
        self.folder, self.scale, self.repeats = folder, scale, repeats
        self._threads = threads
        self._results = folder / "results"
        self._results.mkdir(parents=True, exist_ok=True)

    def places(self, count: int, sizes: Sizes | None = None) -> list[Path]:
        """Return the folders of adapters, which are made if they do not exist."""
        sizes = sizes or self.scale.sizes
        name = f"adapters-{sizes.modules}x{sizes.features}-r{sizes.rank}"
        return make_adapters(self.folder / name, count, sizes)

    def measured(self, do: str, places: Sequence[Path], *, repeat: int = 0, **job: Any) -> Measured:
        """Return the measurements of one run of a job, which is only run if there are none yet."""
        job |= {
            "do": do,
            "adapters": str(places[0].parent),
            "tasks": [place.name for place in places],
            "threads": self._threads,
            "scratch": str(self.folder),
        }
        text = json.dumps(job, sort_keys=True)
        kept = self._results / f"{hashlib.sha256(f'{text} {repeat}'.encode()).hexdigest()[:16]}.json"
        if not kept.is_file():
            draft = kept.with_suffix(".tmp")
            draft.write_text(self._run(text))
            draft.replace(kept)
        return json.loads(kept.read_text())

    def _run(self, job: str) -> str:
        threads = str(self._threads)
        paths = os.pathsep.join(filter(None, (str(HERE.parents[1]), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONPATH": paths}
        command = [sys.executable, str(HERE / "_measured.py"), job]
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        if run.returncode:
            raise RuntimeError(f"{job[:200]}… failed:\n{run.stderr[-3000:]}")
        return run.stdout.strip().splitlines()[-1]

    def interleaved(self, do: str, tools: Sequence[str], places: Sequence[Path], **job: Any) -> dict[str, Measured]:
        """Run a job with the tools in turn, and return the median of each number that it measures, by tool."""
        runs: dict[str, list[Measured]] = {tool: [] for tool in tools}
        for repeat in range(self.repeats):
            for tool in tools:
                runs[tool].append(self.measured(do, places, repeat=repeat, tool=tool, k=K, **job))
        return {tool: {key: median(run[key] for run in of) for key in of[0]} for tool, of in runs.items()}


def main() -> None:
    parser = argument_parser(__doc__, repeats=3)
    parser.add_argument("--folder", type=Path, help="folder in which to keep adapters and measurements")
    parser.add_argument("--threads", type=int, default=2, help="number of threads per process (default: %(default)s)")
    parser.add_argument(
        "--real", type=Path, action="append", default=[], help="folder of trained adapters; may be repeated"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        repeats = 1 if options.quick else options.repeats
        bench = Bench(folder, QUICK if options.quick else FULL, options.threads, repeats)
        title = f"Collections of adapters (k = {K}, p = {P}), {options.threads} threads"
        report(title, all_rows(bench, options), options.json)


def all_rows(bench: Bench, options: argparse.Namespace) -> Iterator[Row]:
    peers, missing = [], {}
    for peer in PEERS:
        if (reason := reason_against(peer)) is None:
            peers.append(peer)
        else:
            missing[peer] = reason
    yield from (Row.not_run(peer, reason) for peer, reason in missing.items())
    yield from build_rows(bench, peers)
    yield from memory_rows(bench, peers)
    yield from error_rows(bench, peers)
    yield from real_rows(options.real)
    yield from growth_rows(bench)
    yield from adding_rows(bench, peers)
    yield from tree_rows(bench)
    yield from audit_rows(bench)


def reason_against(peer: str) -> str | None:
    """Return why a package cannot be measured, or None if it can."""
    package, expected = PEERS[peer]
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{package} is not installed"
    return None if found == expected else f"{package} {found} is installed, expected {expected}"


def build_rows(bench: Bench, peers: Sequence[str]) -> Iterator[Row]:
    """Measure the time of a build, and the speed-up over the faster of the other packages."""
    for count, goal in bench.scale.compared.items():
        measured = bench.interleaved("build", [OURS, *peers], bench.places(count))
        for tool, values in measured.items():
            yield Row(f"build, {count} adapters, {tool}", values["seconds"], "s")
            yield Row(f"build, {count} adapters, {tool}, processor time", values["cpu"], "s")
        if peers:
            fastest = min(measured[peer]["seconds"] for peer in peers)
            name = f"build, {count} adapters, faster than the faster of the others"
            yield Row.at_least(name, fastest / measured[OURS]["seconds"], "x", goal)


def memory_rows(bench: Bench, peers: Sequence[str]) -> Iterator[Row]:
    """Measure the anonymous memory of a build, compared with the other packages."""
    count = min(bench.scale.compared)
    places = bench.places(count)
    measured = bench.interleaved("build", [OURS, *peers], places)
    if "lorashare" in peers:
        by_layer = "lorashare layer_by_layer"
        measured[by_layer] = bench.measured("build", places, tool=by_layer, k=K)
    for tool, values in measured.items():
        yield Row(f"memory, {count} adapters, {tool}", values["memory"] / 2**20, "MiB")
    goals = {"lorashare": 2, "vlora": 6, "lorashare layer_by_layer": 1}
    for tool, goal in goals.items():
        if tool in measured:
            smaller = measured[tool]["memory"] / max(1, measured[OURS]["memory"])
            yield Row.at_least(f"memory, {count} adapters, below {tool}", smaller, "x", goal)


def error_rows(bench: Bench, peers: Sequence[str]) -> Iterator[Row]:
    """Measure the error of ΔW, compared with other packages at equal stored bytes and with the exact joint basis."""
    count = min(bench.scale.compared)
    places = bench.places(count)
    ours = bench.interleaved("build", [OURS], places)[OURS]
    yield Row(f"stored, {count} adapters, {OURS}", ours["stored"], "bytes")
    yield Row(f"error of ΔW, {count} adapters, {OURS}", ours["error"], "")
    errors = []
    for peer in peers:
        k = components_that_fit(peer, ours["stored"], bench.scale.sizes, count)
        values = bench.measured("build", places, tool=peer, k=k)
        yield Row(f"stored, {count} adapters, {peer} with k = {k}", values["stored"], "bytes")
        yield Row(f"error of ΔW, {count} adapters, {peer} with k = {k}", values["error"], "")
        errors.append(values["error"])
    if errors:
        name = f"error of ΔW, {count} adapters, over the better of the others at equal bytes"
        yield Row.at_most(name, ours["error"] / min(errors), "x", 0.9)
    name = f"error of ΔW, {count} adapters, one module, over the exact joint basis'"
    yield Row.at_most(name, error_over_exact(places), "x", 1.01)


def components_that_fit(peer: str, stored: float, sizes: Sizes, count: int) -> int:
    """Return the largest number of components with which a package stores no more bytes than this, at least one."""
    sides = 2 * sizes.modules * BYTES_OF_NUMBER
    if peer == "lorashare":
        each = sides * (sizes.features + count * sizes.rank)
        fixed = 0
    else:  # vlora stores a vector as large as a factor for each component, and one for the mean
        each = sides * (sizes.features * sizes.rank + count)
        fixed = sides * sizes.features * sizes.rank
    return max(1, int((stored - fixed) / each))


def error_over_exact(places: Sequence[Path]) -> float:
    """Return the mean error in the first module, relative to the joint basis from the full second moments."""
    factors = [next(iter(factors_of(place).values())) for place in places]
    updates = {
        place.name: LowRankUpdate(b.float(), a.T.float()) for place, (b, a) in zip(places, factors, strict=True)
    }
    settings = SubspaceSettings(num_components=K, pseudo_rank=P)
    n, d = len(factors[0][0]), factors[0][1].shape[1]
    layer, _ = merge_into_layer(LayerSubspace.empty(n, d, P), updates, settings)
    out, in_ = exact_joint_basis(factors)

    def stored(b: Tensor, a: Tensor) -> float:
        core = (out.T @ b) @ (a @ in_)
        kept = torch.linalg.svdvals(core)[:P]
        norm = (b.T @ b * (a @ a.T)).sum()
        return float(((norm - kept.square().sum()) / norm).clamp_min(0).sqrt())

    exact = sum(stored(b, a) for b, a in factors)
    ours = sum(_error_in(layer, place.name, pair) for place, pair in zip(places, factors, strict=True))
    return ours / exact


def _error_in(layer: LayerSubspace, task: str, learned: tuple[Tensor, Tensor]) -> float:
    update = layer.update_of(task, torch.float64)
    return float((update.dense() - learned[0] @ learned[1]).norm() / (learned[0] @ learned[1]).norm())


def exact_joint_basis(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return output and input directions (n, k), (d, k) that explain most of the updates, each scaled to norm 1."""

    def leading(moment_factors: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        moment: Tensor | float = 0.0
        for b, a in factors:
            outer, inner = moment_factors(b, a)
            moment = moment + outer @ (inner @ inner.T) @ outer.T / (b.T @ b * (a @ a.T)).sum()
        return torch.linalg.eigh(moment).eigenvectors[:, -K:]

    in_ = leading(lambda b, a: (a.T, b.T))
    for _ in range(JOINT_STEPS):
        out = leading(lambda b, a: (b, a @ in_))  # noqa: B023
        in_ = leading(lambda b, a: (a.T, b.T @ out))  # noqa: B023
    return out, in_


def real_rows(folders: Sequence[Path]) -> Iterator[Row]:
    """Measure errors on trained adapters, relative to the paper's construction: the basis of the stacked factors."""
    for folder in folders:
        found = {path.parent.name: path.parent for path in sorted(folder.glob("*/adapter_config.json"))}
        if not found:
            yield Row.not_run(f"trained adapters, {folder.name}", "the folder holds no adapters")
            continue
        choices = {"all": (list(found), 0.75)}
        if set(PAPER_TASKS) <= set(found):
            choices[", ".join(PAPER_TASKS)] = (list(PAPER_TASKS), 0.6)
        for name, (tasks, goal) in choices.items():
            errors = {basis: _error_of_real([found[task] for task in tasks], basis) for basis in ("joint", "factor")}
            ratio = errors["joint"] / errors["factor"]
            yield Row.at_most(f"error of ΔW, {folder.name}, {name}, over the paper's basis", ratio, "x", goal)


def _error_of_real(places: Sequence[Path], basis: Any) -> float:
    from share_hf import SharedSubspace

    subspace = SharedSubspace.from_adapters(
        list(places), num_components=K, pseudo_rank=P, basis=basis, center=basis == "factor", progress=False
    )
    layers = subspace.state.layers
    errors = [
        _error_in(layers[module], place.name, pair)
        for place in places
        for module, pair in factors_of(place).items()
        if module in layers
    ]
    return sum(errors) / len(errors)


def growth_rows(bench: Bench) -> Iterator[Row]:
    """Measure how the time and memory of a build grow with the number of adapters."""
    measured = {}
    for count in bench.scale.grown:
        measured[count] = bench.interleaved("build", [OURS], bench.places(count))[OURS]
        yield Row(f"build, {count} adapters, {OURS}", measured[count]["seconds"], "s")
        yield Row(f"memory, {count} adapters, {OURS}", measured[count]["memory"] / 2**20, "MiB")
    least, most = bench.scale.grown[0], bench.scale.grown[-1]
    growth = measured[most]["seconds"] / measured[least]["seconds"]
    yield Row.at_most(f"build, {most} adapters over {least}", growth, "x", most / least)


def adding_rows(bench: Bench, peers: Sequence[str]) -> Iterator[Row]:
    """Measure the time of adding one adapter to many."""
    few, many = bench.scale.added
    measured = bench.interleaved("add", [OURS, *peers], bench.places(few + 1))
    for tool, values in measured.items():
        yield Row(f"adding adapter {few + 1}, {tool}", values["seconds"], "s")
    if "vlora" in measured:
        faster = measured["vlora"]["seconds"] / measured[OURS]["seconds"]
        yield Row.at_least(f"adding adapter {few + 1}, faster than vlora's absorb", faster, "x", 20)
    large = bench.interleaved("add", [OURS], bench.places(many + 1))[OURS]["seconds"]
    yield Row(f"adding adapter {many + 1}, {OURS}", large, "s")
    name = f"adding adapter {many + 1} over {few + 1}"
    yield Row.at_most(name, large / measured[OURS]["seconds"], "x", 4)


def tree_rows(bench: Bench) -> Iterator[Row]:
    """Measure loading a tree of many tasks, and saving it after one task was added."""
    scale = bench.scale
    sizes = Sizes(scale.loaded_modules, scale.sizes.features, scale.sizes.rank)
    places = bench.places(scale.loaded, sizes)
    tree = bench.folder / f"tree-{scale.loaded}"
    loaded = bench.interleaved("load", [OURS], places, tree=str(tree))[OURS]
    yield Row(f"loading, {scale.loaded} tasks", loaded["seconds"], "s")
    yield Row(f"reading and hashing the files, {scale.loaded} tasks", loaded["plain"], "s")
    name = f"loading, {scale.loaded} tasks, over reading and hashing"
    yield Row.at_most(name, loaded["seconds"] / loaded["plain"], "x", 3)
    allowed = 1.5 * loaded["stored"] + 5 * 2**20
    yield Row.at_most(f"memory of loading, {scale.loaded} tasks", loaded["memory"] / 2**20, "MiB", allowed / 2**20)
    saved = bench.measured("save_again", places, k=K)
    yield Row(f"saving after one task was added, {scale.loaded} tasks", saved["seconds"], "s")
    name = f"files of {saved['files']:.0f} that it writes, {scale.loaded} tasks"
    yield Row.at_most(name, saved["written"], "", OWN_FILES)


# The files written when one task is added: three of the task, the index, two of the root LoRA, the metrics, the card
# and three figures.
OWN_FILES = 11


def audit_rows(bench: Bench) -> Iterator[Row]:
    """Measure the time of an audit, compared with a build."""
    count = bench.scale.audited
    places = bench.places(count)
    build = bench.interleaved("build", [OURS], places)[OURS]["seconds"]
    audit = bench.measured("audit", places, k=K)["seconds"]
    yield Row(f"audit, {count} adapters", audit, "s")
    yield Row.at_most(f"audit, {count} adapters, over building", audit / build, "x", 2)


if __name__ == "__main__":
    main()
