"""Runs of a declared grid: each has a result of its own on disk, named by a hash of all its settings.

A grid that was stopped goes on where it was, and results of several days and machines add up.
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
        order: Number of the order of the tasks; None where the result does not depend on it.
        tasks: Names of the tasks, in their order.
        settings: All settings of data and training, by name.
        label: What the run is called among those that differ in their settings, such as "k=16" of an ablation.
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
        """The name of the result's file, without its suffix. The label is no setting, and not hashed."""
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
    """A folder of results, one JSON a run.

    Args:
        folder: The folder; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, run: Run) -> Path:
        return self.folder / f"{run.name}.json"

    def __contains__(self, run: Run) -> bool:
        return self.path(run).is_file()

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """The runs without a result, each once, in their order."""
        return list({run.name: run for run in runs if run not in self}.values())

    def of(self, runs: Iterable[Run]) -> Iterator[tuple[Run, dict[str, Any]]]:
        """The runs that have a result, with it."""
        for run in runs:
            if run in self:
                yield run, json.loads(self.path(run).read_text(encoding="utf-8"))

    def add(self, run: Run, result: Mapping[str, Any]) -> None:
        """Write a result. Whoever reads the folder meanwhile finds all of it or nothing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.path(run).with_suffix(".tmp")
        draft.write_text(json.dumps({"run": run.as_dict(), **result}, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.path(run))
