"""Helpers of every benchmark: the command line, interleaved timing, and reports for people and programs."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "huggingface_hub",
    "safetensors",
    "datasets",
    "bitsandbytes",
    "deepspeed",
    "numpy",
)


@dataclass(frozen=True)
class Row:
    """One number of a report.

    Args:
        name: Description of the measurement, including sizes.
        value: Measured number. None if the measurement was not run or gave no number.
        unit: Unit of the number: "ms", "s", "MiB", "x" for a ratio …
        goal: Condition that the number should meet, such as "<= 4". None for a number without a goal.
        ok: Whether the goal is met. None without a goal.
        reason: Reason why the measurement was not run, or why it failed. The JSON of a row without a reason has no
            such field.
    """

    name: str
    value: float | None
    unit: str
    goal: str | None = None
    ok: bool | None = None
    reason: str | None = None

    @classmethod
    def at_most(cls, name: str, value: float, unit: str, limit: float) -> Row:
        return cls(name, value, unit, f"<= {limit:g}", value <= limit)

    @classmethod
    def at_least(cls, name: str, value: float, unit: str, limit: float) -> Row:
        return cls(name, value, unit, f">= {limit:g}", value >= limit)

    @classmethod
    def not_run(cls, name: str, reason: str) -> Row:
        return cls(name, None, "", reason=f"not run: {reason}")


def argument_parser(description: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, versions and machine to FILE")
    parser.add_argument(
        "--quick", action="store_true", help="produce the same rows in under a minute, at smaller sizes"
    )
    parser.add_argument(
        "--repeats", type=int, default=repeats, help="number of timed runs per variant (default: %(default)s)"
    )
    return parser


def interleaved(
    variants: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Return the seconds of each timed run of each variant, with the variants taking turns.

    Other load on the machine then affects all variants alike.
    """
    for _ in range(warmup):
        for run in variants.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            seconds[name].append(seconds_of(run))
    return seconds


def seconds_of(run: Callable[[], object]) -> float:
    """Return the wall-clock seconds of one run, including the work that it leaves pending on an accelerator."""
    finish_pending_work()
    start = time.perf_counter()
    run()
    finish_pending_work()
    return time.perf_counter() - start


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(title: str, rows: Iterable[Row], path: Path | None = None) -> None:
    """Print the rows as a table and, with `path`, write them to a JSON file.

    Args:
        title: Title above the table.
        rows: Rows, or an iterator that measures them one by one. The file always has all rows measured so far.
        path: Path of the JSON file.
    """
    measured = []
    for row in rows:
        measured.append(row)
        if path is not None:
            write(measured, path)
    print(f"\n{title}\n\n{table(measured)}\n")


def write(rows: Iterable[Row], path: Path) -> None:
    """Write rows, versions and machine as JSON, atomically: readers find either the old or the new file."""
    content = {"rows": [_as_json(row) for row in rows], "versions": versions(), "machine": machine()}
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    draft.replace(path)


def _as_json(row: Row) -> dict[str, Any]:
    fields = asdict(row)
    if row.reason is None:
        del fields["reason"]
    return fields


@cache
def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    # Read as text, because a report must be possible even if packages that share_hf imports are missing.
    source = (ROOT / "share_hf" / "version.py").read_text(encoding="utf-8")
    found["share-hf"] = source.split('__version__ = "')[1].split('"')[0]
    return found


@cache
def machine() -> dict[str, Any]:
    """Return the processor, cores, memory and accelerator of this machine."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def table(rows: Iterable[Row]) -> str:
    """Format the rows as a table for people to read."""
    cells = [("", "", "", "goal", "")]
    cells += [(row.name, _readable(row.value), row.unit, row.goal or "", _verdict(row)) for row in rows]
    name, value, unit, goal, _ = (max(len(line[i]) for line in cells) for i in range(5))
    lines = (f"{a:<{name}}  {b:>{value}} {c:<{unit}}  {d:<{goal}}  {e}".rstrip() for a, b, c, d, e in cells)
    return "\n".join(lines)


def _verdict(row: Row) -> str:
    verdict = "" if row.ok is None else "ok" if row.ok else "MISSED"
    return " ".join(filter(None, (verdict, row.reason)))


def _readable(value: float | None) -> str:
    if value is None:
        return "-"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def finish_pending_work() -> None:
    """Wait until the accelerator, if there is one, has finished its pending work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None
