"""Figure of an audit: explained variance and error against k, and how well each adapter is served."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..subspace.collection import CollectionReport


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAMED = 8  # badly served adapters that are labeled with their names
_TICKED = 12  # adapters up to which every bar has a name under it


def check_figure(path: Path) -> None:
    """Refuse a path to which no figure can be written, before the work that the figure is to show.

    Raises:
        ValueError: If matplotlib is not installed or does not support the file extension, or the folder does not exist
            or is not writable.
    """
    known = _figure().canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in known:
        raise ValueError(
            f"{path}: expected a file name that ends in one of {', '.join(f'.{ending}' for ending in known)}"
        )
    if not os.access(path.parent, os.W_OK) and path.parent.is_dir():
        raise ValueError(f"{path}: the folder is not writable, expected another place for the figure")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(
            f"{path}: {'is a folder' if path.is_dir() else 'no such folder'}, expected the name of a file to write"
        )


def write_audit_figure(report: CollectionReport, path: Path) -> None:
    """Draw a survey into a PNG file, or a file with another extension that matplotlib supports.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    figure = _figure()
    left, right = figure.subplots(1, 2)
    _draw_curve(left, report)
    _draw_errors(right, report)
    figure.savefig(path, dpi=120, metadata={"Software": None} if path.suffix.lower() == ".png" else None)


def _figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a figure needs matplotlib, which is not installed: `pip install share-hf[plots]`") from error
    return Figure(figsize=(11, 4.6), layout="constrained")


def _draw_curve(axes: Axes, report: CollectionReport) -> None:
    sizes = [point.num_components for point in report.curve]
    lines = (
        ("explained", "explained variance, adapters", "C0", "-"),
        ("null_explained", "explained variance, random directions", "C0", ":"),
        ("error", "mean error of ΔW, adapters", "C3", "-"),
        ("null_error", "mean error of ΔW, random directions", "C3", ":"),
    )
    for name, label, color, style in lines:
        axes.plot(sizes, [getattr(point, name) for point in report.curve], style, color=color, label=label)
    axes.axvline(report.num_components, color="0.7", linewidth=1, zorder=0, label=f"k = {report.num_components}")
    if sizes:
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks := [k for k in sizes if k & (k - 1) == 0], [str(k) for k in ticks])
        axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("directions per layer (k), on each side")
    axes.set_title(
        f"{report.curve_tasks} of {report.tasks} adapters, {len(report.curve_modules)} of {report.modules} modules"
        if report.sampled
        else f"{report.tasks} adapters, {report.modules} modules",
        fontsize="medium",
    )
    axes.legend(fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _draw_errors(axes: Axes, report: CollectionReport) -> None:
    order = sorted(report.errors, key=lambda task: report.errors[task])
    badly = frozenset(report.badly_served)
    values = [report.errors[task] for task in order]
    axes.bar(range(len(order)), values, width=1.0, color=["C3" if task in badly else "C0" for task in order])
    named = [task for task in order if task in badly][-_NAMED:] if len(order) > _TICKED else []
    top = len(named)
    for rank, task in enumerate(named):
        place = order.index(task)
        axes.annotate(
            task,
            (place, report.errors[task]),
            xytext=(0.04, 0.95 - 0.07 * (top - 1 - rank)),
            textcoords="axes fraction",
            color="C3",
            fontsize="small",
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": "C3", "linewidth": 0.5, "alpha": 0.6},
        )
    axes.set_ylim(0, 1.02)
    if len(order) <= _TICKED:
        ticks = axes.set_xticks(range(len(order)), order, rotation=30, ha="right", fontsize="small")
        for tick in ticks:
            tick.label1.set_parse_math(False)
    axes.set_xlabel("adapters, best served first")
    axes.set_ylabel(f"relative error of ΔW at k = {report.num_components}")
    axes.set_title(
        f"served badly: {len(badly)}, better stored separately" if badly else "none is served badly", fontsize="medium"
    )
