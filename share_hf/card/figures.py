"""Figures of a tree: the accuracy matrix, the drift of its tasks and the spectra of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.utils import logging

from ..format.tree import FIGURES
from ..state import SubspaceState, row_names


if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


logger = logging.get_logger(__name__)

MATRIX_FIGURE, DRIFT_FIGURE, SPECTRA_FIGURE = FIGURES

# Figures stay readable for any number of tasks: above these numbers, values and some of the names are left out.
_INCHES_PER_TASK = {MATRIX_FIGURE: 0.8, DRIFT_FIGURE: 0.3}
_LARGEST_SIDE = 12.0  # inches
_VALUES_SHOWN = 16  # per side; above this, the numbers in the cells would touch
_NAMES_SHOWN = 40

CAPTIONS = {
    MATRIX_FIGURE: "Score on each task after each step",
    DRIFT_FIGURE: "Drift of each task since it was learned",
    SPECTRA_FIGURE: "Singular values of the stacked updates, one line per module",
}


def write_figures(state: SubspaceState, folder: Path) -> None:
    """Write the figures for which there is data, or none if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.info("No figures: matplotlib is not installed (`pip install share-hf[plots]`).")
        return
    drawings = {}
    if state.metrics.get("matrix"):
        drawings[MATRIX_FIGURE] = _draw_matrix
    if state.tasks:
        drawings[DRIFT_FIGURE] = _draw_drift
    if any(len(layer.spectrum_out) for layer in state.layers.values()):
        drawings[SPECTRA_FIGURE] = _draw_spectra
    for name, draw in drawings.items():
        folder.mkdir(exist_ok=True)
        figure = Figure(figsize=(6.4, 4.8), layout="constrained")
        draw(state, figure)
        figure.savefig(folder / name, dpi=120, metadata={"Software": None})


def _draw_matrix(state: SubspaceState, figure: Figure) -> None:
    tasks, matrix = state.metrics["tasks"], state.metrics["matrix"]
    side = _inches(MATRIX_FIGURE, len(tasks), margin=1.6, least=4.0)
    figure.set_size_inches(side + 0.8, side)
    axes = figure.add_subplot()
    values = [[float("nan") if value is None else value for value in row] for row in matrix]
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1)
    if len(tasks) <= _VALUES_SHOWN:
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                if value is not None:
                    color = "black" if value > 0.6 else "white"
                    axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=color)
    _name_some(axes.xaxis, tasks, rotation=45, ha="right")
    _name_some(axes.yaxis, row_names(state.metrics))
    # Show text as it is: a dollar sign does not begin a formula.
    axes.set_xlabel(f"{state.metrics.get('score', 'score')} on task", parse_math=False)
    axes.set_ylabel("after learning")
    figure.colorbar(image, shrink=0.8)


def _draw_drift(state: SubspaceState, figure: Figure) -> None:
    drifts = state.drifts()
    figure.set_size_inches(6.4, _inches(DRIFT_FIGURE, len(drifts), margin=1.0, least=2.0))
    axes = figure.add_subplot()
    if len(drifts) <= _NAMES_SHOWN:
        axes.barh(range(len(drifts)), list(drifts.values()), height=0.8)
    else:  # a single shape, because drawing a thousand bars takes longer than writing a tree
        edges = [i - 0.5 for i in range(len(drifts) + 1)]
        axes.stairs(list(drifts.values()), edges, orientation="horizontal", fill=True)
    _name_some(axes.yaxis, list(drifts))
    axes.set_ylim(len(drifts) - 0.5, -0.5)
    axes.set_xlabel("estimated drift since learned, ‖ΔW' - ΔW‖ / ‖ΔW‖")


def _inches(figure: str, tasks: int, *, margin: float, least: float) -> float:
    return min(_LARGEST_SIDE, max(least, _INCHES_PER_TASK[figure] * tasks + margin))


def _name_some(axis: Axis, tasks: Sequence[str], **style: object) -> None:
    """Name tasks on an axis, evenly spaced if there are too many to name all."""
    shown = range(0, len(tasks), max(1, -(-len(tasks) // _NAMES_SHOWN)))
    axis.set_ticks(shown, [tasks[i] for i in shown], **style)


def _draw_spectra(state: SubspaceState, figure: Figure) -> None:
    axes = figure.add_subplot()
    for layer in state.layers.values():
        spectrum = layer.spectrum_out.float()  # as stored, so that a loaded subspace has the same figure
        if len(spectrum) and spectrum[0] > 0:
            axes.plot(range(1, len(spectrum) + 1), (spectrum / spectrum[0]).tolist(), color="C0", alpha=0.3)
    axes.set_yscale("log")
    axes.set_xlabel("direction of the output basis")
    axes.set_ylabel("singular value / largest")
