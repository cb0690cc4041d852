"""What every benchmark needs: the command line, interleaved timing, and a report for people and programs."""

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
        name: What was measured, sizes included.
        value: The number; None where it was not run, or came to no number.
        unit: Its unit: "ms", "s", "MiB", "x" for a ratio …
        goal: What it should be, such as "<= 4"; None for a number that stands for itself.
        ok: Whether it is.
        reason: Why it was not run, or what failed. Left out of the JSON of rows that have none.
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
    """A parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, versions and machine to FILE")
    parser.add_argument("--quick", action="store_true", help="the same rows in under a minute, at smaller sizes")
    parser.add_argument(
        "--repeats", type=int, default=repeats, help="timed runs of each variant (default: %(default)s)"
    )
    return parser


def interleaved(
    variants: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each timed run of each variant, one run of every variant after the other.

    What else the machine does meanwhile then falls on all of them alike.
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
    """Wall-clock seconds of one run, with what it leaves on an accelerator finished."""
    finish_pending_work()
    start = time.perf_counter()
    run()
    finish_pending_work()
    return time.perf_counter() - start


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(title: str, rows: Iterable[Row], path: Path | None = None) -> None:
    """Print the rows as a table and, with `path`, write them there as JSON.

    Args:
        title: What stands above the table.
        rows: Measured already, or as they are asked for: the file always has those that there are.
        path: The file.
    """
    measured = []
    for row in rows:
        measured.append(row)
        if path is not None:
            write(measured, path)
    print(f"\n{title}\n\n{table(measured)}\n")


def write(rows: Iterable[Row], path: Path) -> None:
    """Write rows, versions and machine as JSON. Whoever reads the file meanwhile finds the old one or the new one."""
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
    # Read as text: what share_hf imports may be missing where a report is still wanted.
    source = (ROOT / "share_hf" / "version.py").read_text(encoding="utf-8")
    found["share-hf"] = source.split('__version__ = "')[1].split('"')[0]
    return found


@cache
def machine() -> dict[str, Any]:
    """Processor, cores, memory and accelerator this ran on."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def table(rows: Iterable[Row]) -> str:
    """The rows for a person to read."""
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
    """Wait until an accelerator has done what it was given."""
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
