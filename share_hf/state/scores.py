"""Scores over a stream of tasks, as defined by GEM (Lopez-Paz & Ranzato 2017, Sec. 2)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, NamedTuple


# Name of the score if tasks are measured by different metrics.
MIXED_SCORE = "score"


class TaskScore(NamedTuple):
    """Score of a task when it was learned, and now; None where it was not measured."""

    metric: str = "score"
    learned: float | None = None
    now: float | None = None


def measured(score: float | None) -> float | None:
    """Return a score, or None if it is NaN or infinite (such as a loss that overflows), which counts as unmeasured."""
    return score if score is not None and math.isfinite(score) else None


def mean_score(values: Sequence[float | None]) -> float | None:
    """Return the mean of the measured values, or None if there are none."""
    known = [value for value in values if value is not None]
    return measured(sum(known) / len(known)) if known else None


def scores_in(metrics: Mapping[str, Any]) -> dict[str, TaskScore]:
    """Return the scores of the tasks that a stream measured.

    Args:
        metrics: Metrics of the stream, as returned by `ContinualMetrics.as_dict`; may be empty.
    """
    matrix, scores = metrics.get("matrix", []), {}
    rows, names = rows_of_tasks(metrics), metrics.get("score_names") or {}
    for j, task in enumerate(metrics.get("tasks", [])):
        learned = rows[j] if j < len(rows) else len(matrix)
        column = [row[j] for row in matrix[learned:] if j < len(row) and row[j] is not None]
        if column:
            scores[task] = TaskScore(names.get(task, metrics.get("score", "score")), column[0], column[-1])
    return scores


def rows_of_tasks(metrics: Mapping[str, Any]) -> list[int]:
    """Return the row of the matrix that was measured after each learned task, in the order of the tasks.

    Args:
        metrics: Same as in `scores_in`.
    """
    sizes = metrics.get("row_sizes") or [1] * len(metrics.get("matrix", []))
    return [i for i, size in enumerate(sizes) for _ in range(size)]


def row_names(metrics: Mapping[str, Any]) -> list[str]:
    """Return a name for each row of the matrix: the task learned then, or the first task and how many more there are.

    Args:
        metrics: Same as in `scores_in`.
    """
    of_rows: dict[int, list[str]] = {}
    for task, row in zip(metrics.get("tasks", []), rows_of_tasks(metrics), strict=False):
        of_rows.setdefault(row, []).append(task)
    return [tasks[0] if len(tasks) == 1 else f"{tasks[0]} +{len(tasks) - 1}" for tasks in of_rows.values()]


@dataclass
class ContinualMetrics:
    """The matrix ``R[i][j]`` of scores on task j after learning task i, and metrics derived from it. Higher is better.

    Tasks that were learned together share a row.

    Args:
        score: Name of the scores, such as `"accuracy"`.
        score_names: Names of the scores of tasks that differ from `score`.
        tasks: Names of the tasks, in the order in which they were learned.
        matrix: One row for each learned task, or for several that were learned together. An entry is None where it was
            not measured.
        row_sizes: Number of tasks that were learned between each row and the row before it; empty if it is one for
            every row.
        baseline: Scores ``b_j`` of the model before any task was learned; None where they were not measured.
        drift: Estimated drift of each task after the last step.
        parameters: Number of trained parameters by phase.
        training: Settings that the tasks were trained with, as JSON.
    """

    score: str = "accuracy"
    score_names: dict[str, str] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)
    matrix: list[list[float | None]] = field(default_factory=list)
    row_sizes: list[int] = field(default_factory=list)
    baseline: list[float | None] = field(default_factory=list)
    drift: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def common_score(self) -> str:
        """Name of the scores of all tasks; `"score"` if tasks have different ones."""
        names = {self.score_of(task) for task in self._scored_tasks} or {self.score}
        return names.pop() if len(names) == 1 else MIXED_SCORE

    def score_of(self, task: str) -> str:
        """Return the name of the scores of a task, such as `"accuracy"`."""
        return self.score_names.get(task, self.score)

    @property
    def learned(self) -> int:
        """Number of learned tasks."""
        return len(self._rows)

    @property
    def average(self) -> float | None:
        """Mean score over the tasks learned so far, after the last of them."""
        return mean_score(self.matrix[-1][: self.learned]) if self.matrix else None

    @property
    def backward_transfer(self) -> float | None:
        """Backward transfer ``BWT = mean_j<T (R[T][j] - R[j][j])``, negative if tasks got worse after learning."""
        return mean_score([_difference(self.matrix[-1][j], self.matrix[row][j]) for j, row in self._earlier])

    @property
    def forgetting(self) -> float | None:
        """Mean over old tasks of the best score they ever had before the last step, minus the score after it."""
        losses = []
        for j, learned in self._earlier:
            earlier = [row[j] for row in self.matrix[learned:-1] if row[j] is not None]
            losses.append(_difference(max(earlier, default=None), self.matrix[-1][j]))
        return mean_score(losses)

    @property
    def forward_transfer(self) -> float | None:
        """Forward transfer ``FWT = mean_j>1 (R[j-1][j] - b_j)``, the effect of the newest adapter on the next task."""
        later = [(j, row) for j, row in enumerate(self._rows) if row]
        return mean_score([_difference(self.matrix[row - 1][j], self.baseline[j]) for j, row in later])

    @property
    def _scored_tasks(self) -> list[str]:
        """Tasks that have a score, or whose kind of score is known in advance."""
        columns = zip(self.tasks, *(self._padded(row) for row in (self.baseline, *self.matrix)), strict=True)
        measured_tasks = {task for task, *column in columns if any(score is not None for score in column)}
        return [task for task in self.tasks if task in measured_tasks or task in self.score_names]

    def _padded(self, row: list[float | None]) -> list[float | None]:
        return row + [None] * (len(self.tasks) - len(row))

    @property
    def _rows(self) -> list[int]:
        """Row of each learned task."""
        return rows_of_tasks({"matrix": self.matrix, "row_sizes": self.row_sizes})

    @property
    def _earlier(self) -> list[tuple[int, int]]:
        """Column and row of each task that was learned before the last row."""
        return [(j, row) for j, row in enumerate(self._rows) if row < len(self.matrix) - 1]

    def add_tasks(self, names: Sequence[str]) -> None:
        """Add columns for the tasks that are learned next, in place of columns that were begun but never got a row."""
        done = self.learned
        if self.tasks[done : done + len(names)] == list(names):
            return
        for columns in (self.tasks, self.baseline, *self.matrix):
            del columns[done:]
        self.tasks += names
        for row in (self.baseline, *self.matrix):
            row += [None] * len(names)

    def add_row(self, scores: list[float | None], tasks: int) -> None:
        """Add a row of scores that were measured after `tasks` tasks were learned, one or several together."""
        self.row_sizes = _unless_single([*(self.row_sizes or [1] * len(self.matrix)), tasks])
        self.matrix.append(scores)

    def as_dict(self) -> dict[str, Any]:
        """Return the metrics as values that JSON can represent."""
        score = self.common_score
        names = {task: self.score_of(task) for task in self._scored_tasks} if score == MIXED_SCORE else {}
        return {
            "score": score,
            **({"score_names": names} if names else {}),
            "tasks": list(self.tasks),
            "matrix": [list(row) for row in self.matrix],
            **({"row_sizes": list(self.row_sizes)} if self.row_sizes else {}),
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
        """Create metrics from JSON.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: If the values do not have the form of `as_dict`.
        """
        score, tasks, matrix = values["score"], values["tasks"], values["matrix"]
        names = values.get("score_names") or {}
        baseline = values.get("baseline") or []
        if not isinstance(score, str) or not score:
            raise ValueError(f"score is {score!r}, expected the name of a metric")
        if not isinstance(names, dict) or not all(isinstance(name, str) and name for name in names.values()):
            raise ValueError(f"score_names is {names!r}, expected the name of a metric for each task")
        if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
            raise ValueError(f"tasks is {tasks!r}, expected a list of names")
        if len(set(tasks)) != len(tasks):
            raise ValueError(f"tasks is {tasks!r}, expected different names")
        if not isinstance(matrix, list) or len(matrix) > len(tasks):
            raise ValueError(f"matrix is {matrix!r}, expected a list of at most one row for each of {tasks}")
        sizes = _row_sizes(values.get("row_sizes"), len(matrix), len(tasks))
        for row in (*matrix, baseline):
            if not isinstance(row, list) or not all(_is_score(score) for score in row) or len(row) > len(tasks):
                raise ValueError(f"matrix or baseline has {row!r}, expected a score or null for each of {tasks}")
        *matrix, baseline = (
            [measured(score) for score in row] + [None] * (len(tasks) - len(row)) for row in (*matrix, baseline)
        )
        return cls(
            score=score,
            score_names=dict(names),
            tasks=list(tasks),
            matrix=matrix,
            row_sizes=sizes,
            baseline=baseline,
            drift={task: _drift(task, drift) for task, drift in values.get("drift", {}).items()},
            parameters={phase: int(count) for phase, count in values.get("parameters", {}).items()},
            training=dict(values.get("training", {})),
        )

    def joined_by(self, later: ContinualMetrics, tasks: Collection[str]) -> ContinualMetrics:
        """Join the metrics of two streams over one subspace, with the rows and columns of both matrices, by task.

        Args:
            later: Metrics that take precedence where both have a value.
            tasks: Tasks that still exist. Rows and columns of others are left out.
        """
        rows: dict[tuple[str, ...], dict[str, float | None]] = {}
        row_of: dict[str, tuple[str, ...]] = {}
        baseline: dict[str, float | None] = {}
        for metrics in (self, later):
            for learned, row in zip(metrics._learned_together(), metrics.matrix, strict=True):
                known = {task: score for task, score in zip(metrics.tasks, row, strict=False) if score is not None}
                rows[learned] = {**rows.get(learned, {}), **known}
                row_of |= dict.fromkeys(learned, learned)
            baseline |= zip(metrics.tasks, metrics.baseline, strict=False)
        score_names = {task: metrics.score_of(task) for metrics in (self, later) for task in metrics._scored_tasks}
        there = [task for task in dict.fromkeys([*self.tasks, *later.tasks]) if task in tasks]
        together: dict[tuple[str, ...], list[str]] = {}
        for task in there:
            if task in row_of:
                together.setdefault(row_of[task], []).append(task)
        names = [task for learned in together.values() for task in learned]
        names += [task for task in there if task not in row_of]
        return ContinualMetrics(
            score=later.score,
            score_names={task: name for task, name in score_names.items() if task in tasks},
            tasks=names,
            matrix=[[rows[learned].get(task) for task in names] for learned in together],
            row_sizes=_unless_single([len(learned) for learned in together.values()]),
            baseline=[baseline.get(task) for task in names],
            drift={**self.drift, **later.drift},
            parameters={**self.parameters, **later.parameters},
            training={**self.training, **later.training},
        )

    def _learned_together(self) -> list[tuple[str, ...]]:
        """Return the tasks that were learned for each row."""
        of_rows: list[list[str]] = [[] for _ in self.matrix]
        for task, row in zip(self.tasks, self._rows, strict=False):
            of_rows[row].append(task)
        return [tuple(tasks) for tasks in of_rows]

    def table(self) -> str:
        """Return the matrix and a summary as text."""
        names = row_names(self.as_dict())
        score = self.common_score
        scores = [self.score_of(task) for task in self.tasks] if score == MIXED_SCORE else []
        width = max([len(name) for name in names] + [8]) + 2
        widths = [max(len(task), len(name), 6) + 2 for task, name in zip_longest(self.tasks, scores, fillvalue="")]

        def line(name: str, cells: Iterable[str]) -> str:
            return name.ljust(width) + "".join(cell.rjust(own) for cell, own in zip(cells, widths, strict=True))

        lines = [line("after", self.tasks)]
        if scores:
            lines.append(line("(score)", scores))
        if any(value is not None for value in self.baseline):
            lines.append(line("(before)", map(_cell, self._padded(self.baseline))))
        for name, row in zip(names, self.matrix, strict=True):
            lines.append(line(name, map(_cell, self._padded(row))))
        summary = [
            f"{name.replace('_', ' ')} {decimals(value)}"
            for name in ("average", "forgetting", "backward_transfer", "forward_transfer")
            if (value := getattr(self, name)) is not None
        ]
        return "\n".join([*lines, f"{score}: " + ", ".join(summary)])


def combined_metrics(
    earlier: Mapping[str, Any], later: Mapping[str, Any], tasks: Collection[str]
) -> Mapping[str, Any]:
    """Combine the metrics that two streams over one subspace measured for these tasks."""
    if not earlier.get("matrix") or not later.get("matrix"):
        return later if later.get("matrix") else earlier
    return ContinualMetrics.from_dict(earlier).joined_by(ContinualMetrics.from_dict(later), tasks).as_dict()


def _row_sizes(sizes: Any, rows: int, tasks: int) -> list[int]:
    """Return the number of tasks of each row, one by default, or an empty list if it is one for all rows.

    Raises:
        ValueError: If `sizes` does not fit the rows and tasks.
    """
    sizes = [1] * rows if sizes is None else sizes
    if not isinstance(sizes, list) or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"row_sizes is {sizes!r}, expected a list of numbers over 0")
    if len(sizes) != rows or sum(sizes) > tasks:
        raise ValueError(f"row_sizes is {sizes}, expected one of each of {rows} rows, and no more than {tasks} tasks")
    return _unless_single(sizes)


def _unless_single(sizes: list[int]) -> list[int]:
    return list(sizes) if any(size > 1 for size in sizes) else []


def _is_score(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _drift(task: str, value: Any) -> float:
    if value is None or not _is_score(value):  # a string such as "nan" would become a number that JSON lacks
        raise ValueError(f"drift of {task!r} is {value!r}, expected a number")
    return float(value)


def _cell(value: float | None) -> str:
    return "-" if value is None else decimals(value)


def decimals(value: float) -> str:
    """Format a score to three decimals. A negative number that rounds to zero has no sign."""
    return f"{round(value, 3) + 0.0:.3f}"


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
