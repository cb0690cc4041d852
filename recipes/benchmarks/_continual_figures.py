"""Figures of the benchmark of continual learning."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure


if TYPE_CHECKING:
    from _continual_report import Loss


def draw_averages(averages: Mapping[str, Sequence[float]], path: Path, *, ours: str, against: str) -> None:
    """Draw the average score at the end of a stream for each method or setting, one point per run.

    Args:
        averages: Averages of all runs, by method or setting.
        path: File to write.
        ours: Name of the bar to highlight.
        against: Name whose mean is drawn as a line.
    """
    ordered = sorted(averages, key=lambda name: statistics.mean(averages[name]))
    figure = Figure(figsize=(6.4, 0.7 + 0.34 * len(ordered)), layout="constrained")
    axes = figure.add_subplot()
    for place, name in enumerate(ordered):
        scores = [100 * average for average in averages[name]]
        axes.barh(place, statistics.mean(scores), color="tab:blue" if name == ours else "lightgray")
        axes.plot(scores, [place] * len(scores), "o", color="black", markersize=3)
    if against in averages:
        axes.axvline(100 * statistics.mean(averages[against]), color="gray", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(ordered)), ordered)
    axes.set_xlabel("average score at the end (points; one dot per seed)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def draw_certificate(losses: Sequence[Loss], path: Path) -> None:
    """Draw the loss of each task's score against the drift of its update.

    Args:
        losses: Losses of the tasks of all runs.
        path: File to write.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for stream in dict.fromkeys(loss.stream for loss in losses):
        of_stream = [loss for loss in losses if loss.stream == stream]
        axes.scatter(
            [loss.drift for loss in of_stream], [100 * loss.loss for loss in of_stream], s=14, alpha=0.6, label=stream
        )
    axes.axhline(1, color="gray", linewidth=0.8, linestyle="--")
    axes.set_xlabel("estimated relative drift of the task's update")
    axes.set_ylabel("points lost since it was learned")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def draw_fifty(curves: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """Draw the mean score of the first tasks while others arrive.

    Args:
        curves: Score by number of learned tasks, by name of the curve.
        path: File to write.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, curve in curves.items():
        if len(curve) > 1:
            axes.plot(list(curve), [100 * score for score in curve.values()], marker="o", label=name)
        else:
            axes.axhline(100 * next(iter(curve.values())), color="gray", linestyle="--", label=name)
    axes.set_xlabel("tasks learned")
    axes.set_ylabel("mean score of the first ten (%)")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
