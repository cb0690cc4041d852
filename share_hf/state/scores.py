"""Scores over a stream of tasks, with the definitions of GEM (Lopez-Paz & Ranzato 2017, Sec. 2)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class TaskScore(NamedTuple):
    """A task's score when it was learned, and now; None where it was not measured."""

    metric: str = "score"
    learned: float | None = None
    now: float | None = None


def measured(score: float | None) -> float | None:
    """A score as it counts: NaN or an infinite one, as of a loss that overflows, was not measured."""
    return score if score is not None and math.isfinite(score) else None


def scores_in(metrics: Mapping[str, Any]) -> dict[str, TaskScore]:
    """The scores of the tasks that a stream measured.

    Args:
        metrics: Those of the stream, as `ContinualMetrics.as_dict` has them; may be empty.
    """
    matrix, scores = metrics.get("matrix", []), {}
    for j, task in enumerate(metrics.get("tasks", [])):
        column = [row[j] for row in matrix[j:] if j < len(row) and row[j] is not None]
        if column:
            scores[task] = TaskScore(metrics.get("score", "score"), column[0], column[-1])
    return scores


@dataclass
class ContinualMetrics:
    """The matrix ``R[i][j]``, score on task j after learning task i, and what follows from it. Higher is better.

    Args:
        score: What the scores are, such as `"accuracy"`.
        tasks: In the order they were learned.
        matrix: One row a learned task; an entry is None where it was not measured.
        baseline: Score ``b_j`` of the model before any task was learned, None where it was not measured.
        drift: By task, its estimated drift after the last step.
        parameters: By phase, how many numbers were trained.
        training: What the tasks were trained with, as JSON.
    """

    score: str = "accuracy"
    tasks: list[str] = field(default_factory=list)
    matrix: list[list[float | None]] = field(default_factory=list)
    baseline: list[float | None] = field(default_factory=list)
    drift: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def average(self) -> float | None:
        """Mean score over the tasks learned so far, after the last of them."""
        return _mean(self.matrix[-1][: len(self.matrix)]) if self.matrix else None

    @property
    def backward_transfer(self) -> float | None:
        """``BWT = mean_j<T (R[T][j] - R[j][j])``: negative where tasks got worse after they were learned."""
        last = len(self.matrix) - 1
        return _mean([_difference(self.matrix[last][j], self.matrix[j][j]) for j in range(last)])

    @property
    def forgetting(self) -> float | None:
        """Mean over old tasks of the best score they ever had before the last step, minus the score after it."""
        last = len(self.matrix) - 1
        losses = []
        for j in range(last):
            earlier = [row[j] for row in self.matrix[j:last] if row[j] is not None]
            losses.append(_difference(max(earlier, default=None), self.matrix[last][j]))
        return _mean(losses)

    @property
    def forward_transfer(self) -> float | None:
        """``FWT = mean_j>1 (R[j-1][j] - b_j)``: what the newest task's adapter does for the next task, unseen."""
        seen = range(1, len(self.matrix))
        return _mean([_difference(self.matrix[j - 1][j], self.baseline[j]) for j in seen])

    def add_task(self, name: str) -> None:
        """A column for the task that is learned next, in place of one that was begun and has not come to its row."""
        done = len(self.matrix)
        if name in self.tasks[: done + 1]:
            return
        for columns in (self.tasks, self.baseline, *self.matrix):
            del columns[done:]
        self.tasks.append(name)
        for row in (self.baseline, *self.matrix):
            row.append(None)

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON."""
        return {
            "score": self.score,
            "tasks": list(self.tasks),
            "matrix": [list(row) for row in self.matrix],
            "baseline": list(self.baseline),
            "average": self.average,
            "forgetting": self.forgetting,
            "backward_transfer": self.backward_transfer,
            "forward_transfer": self.forward_transfer,
            "drift": dict(self.drift),
            "parameters": dict(self.parameters),
            "training": dict(self.training),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ContinualMetrics:
        """Metrics from JSON.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: If it is no JSON of `as_dict`.
        """
        score, tasks, matrix = values["score"], values["tasks"], values["matrix"]
        baseline = values.get("baseline") or []
        if not isinstance(score, str) or not score:
            raise ValueError(f"score is {score!r}, expected the name of a metric")
        if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
            raise ValueError(f"tasks is {tasks!r}, expected a list of names")
        if len(set(tasks)) != len(tasks):
            raise ValueError(f"tasks is {tasks!r}, expected different names")
        if not isinstance(matrix, list) or len(matrix) > len(tasks):
            raise ValueError(f"matrix is {matrix!r}, expected a list of at most one row for each of {tasks}")
        for row in (*matrix, baseline):
            if not isinstance(row, list) or not all(_is_score(score) for score in row) or len(row) > len(tasks):
                raise ValueError(f"matrix or baseline has {row!r}, expected a score or null for each of {tasks}")
        *matrix, baseline = (
            [measured(score) for score in row] + [None] * (len(tasks) - len(row)) for row in (*matrix, baseline)
        )
        return cls(
            score=score,
            tasks=list(tasks),
            matrix=matrix,
            baseline=baseline,
            drift={task: _drift(task, drift) for task, drift in values.get("drift", {}).items()},
            parameters={phase: int(count) for phase, count in values.get("parameters", {}).items()},
            training=dict(values.get("training", {})),
        )

    def joined_by(self, later: ContinualMetrics, tasks: Collection[str]) -> ContinualMetrics:
        """The metrics of two streams over one subspace: rows and columns of both matrices, by task.

        Args:
            later: Wins where both know something.
            tasks: Those that are still there; rows and columns of others are left out.
        """
        rows: dict[str, dict[str, float | None]] = {}
        baseline: dict[str, float | None] = {}
        for metrics in (self, later):
            for learned, row in zip(metrics.tasks, metrics.matrix, strict=False):
                known = {task: score for task, score in zip(metrics.tasks, row, strict=False) if score is not None}
                rows[learned] = {**rows.get(learned, {}), **known}
            baseline |= zip(metrics.tasks, metrics.baseline, strict=False)
        names = [task for task in dict.fromkeys([*self.tasks, *later.tasks]) if task in tasks]
        return ContinualMetrics(
            score=later.score,
            tasks=names,
            matrix=[[rows[learned].get(task) for task in names] for learned in names if learned in rows],
            baseline=[baseline.get(task) for task in names],
            drift={**self.drift, **later.drift},
            parameters={**self.parameters, **later.parameters},
            training={**self.training, **later.training},
        )

    def table(self) -> str:
        """The matrix and the summary as text."""
        width = max([len(task) for task in self.tasks] + [6]) + 2
        lines = ["after".ljust(width) + "".join(task.rjust(width) for task in self.tasks)]
        if any(value is not None for value in self.baseline):
            lines.append("(before)".ljust(width) + "".join(_cell(value, width) for value in self.baseline))
        for task, row in zip(self.tasks, self.matrix, strict=False):
            lines.append(task.ljust(width) + "".join(_cell(value, width) for value in row))
        summary = [
            f"{name.replace('_', ' ')} {value:.3f}"
            for name in ("average", "forgetting", "backward_transfer", "forward_transfer")
            if (value := getattr(self, name)) is not None
        ]
        return "\n".join([*lines, f"{self.score}: " + ", ".join(summary)])


def combined_metrics(
    earlier: Mapping[str, Any], later: Mapping[str, Any], tasks: Collection[str]
) -> Mapping[str, Any]:
    """What two streams over one subspace measured, of these tasks."""
    if not earlier.get("matrix") or not later.get("matrix"):
        return later if later.get("matrix") else earlier
    return ContinualMetrics.from_dict(earlier).joined_by(ContinualMetrics.from_dict(later), tasks).as_dict()


def _is_score(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _drift(task: str, value: Any) -> float:
    if value is None or not _is_score(value):  # text such as "nan" would become a number that JSON does not have
        raise ValueError(f"drift of {task!r} is {value!r}, expected a number")
    return float(value)


def _cell(value: float | None, width: int) -> str:
    return ("-" if value is None else f"{value:.3f}").rjust(width)


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return measured(sum(known) / len(known)) if known else None
