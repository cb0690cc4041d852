"""Runs of a declared grid, each with its own result on disk, whose name includes a hash of all its settings.

A grid that was stopped continues where it left off, and results from several days and machines add up.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    """One stream, learned once.

    Args:
        stream: Name of the stream.
        method: Name of the method.
        seed: Seed of initializations and of the order of examples.
        order: Number of the task order. None if the result does not depend on the order.
        tasks: Names of the tasks, in order.
        settings: All settings of data and training, by name.
        label: Name that tells the run from others with different settings, such as "k=16" in an ablation.
    """

    stream: str
    method: str
    seed: int
    order: int | None
    tasks: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    @cached_property
    def name(self) -> str:
        """Name of the result's file, without its suffix. The label is not a setting, so it is not hashed."""
        content = {name: value for name, value in asdict(self).items() if name != "label"}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]
        order = "" if self.order is None else f"-order{self.order}"
        return f"{self.stream}-{self.method}{order}-seed{self.seed}-{digest}"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tasks": list(self.tasks), "settings": dict(self.settings)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Run:
        return cls(**{**values, "tasks": tuple(values["tasks"])})


class Results:
    """A folder of results, with one JSON file for each run.

    Args:
        folder: Path of the folder, which need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, run: Run) -> Path:
        return self.folder / f"{run.name}.json"

    def __contains__(self, run: Run) -> bool:
        return self.path(run).is_file()

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Return the runs without a result, each once, in their order."""
        return list({run.name: run for run in runs if run not in self}.values())

    def of(self, runs: Iterable[Run]) -> Iterator[tuple[Run, dict[str, Any]]]:
        """Yield the runs that have a result, together with the result."""
        for run in runs:
            if run in self:
                yield run, json.loads(self.path(run).read_text(encoding="utf-8"))

    def add(self, run: Run, result: Mapping[str, Any]) -> None:
        """Write a result atomically, so that readers of the folder find either all of it or nothing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.path(run).with_suffix(".tmp")
        draft.write_text(json.dumps({"run": run.as_dict(), **result}, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.path(run))
