"""Figures of a tree: the accuracy matrix, the drift of its tasks, the spectra of its layers."""

from __future__ import annotations

from pathlib import Path

from transformers.utils import logging

from .state import SubspaceState


logger = logging.get_logger(__name__)

MATRIX_FIGURE = "accuracy_matrix.png"
DRIFT_FIGURE = "drift.png"
SPECTRA_FIGURE = "spectra.png"

CAPTIONS = {
    MATRIX_FIGURE: "Score on each task after each step",
    DRIFT_FIGURE: "Drift of each task since it was learned",
    SPECTRA_FIGURE: "Singular values of the stacked updates, one line a module",
}


def write_figures(state: SubspaceState, folder: Path) -> None:
    """Write what figures there is data for; none without matplotlib."""
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


def _draw_matrix(state: SubspaceState, figure) -> None:
    tasks, matrix = state.metrics["tasks"], state.metrics["matrix"]
    side = max(4.0, 0.8 * len(tasks) + 1.6)
    figure.set_size_inches(side + 0.8, side)
    axes = figure.add_subplot()
    values = [[float("nan") if value is None else value for value in row] for row in matrix]
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            if value is not None:
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.6 else "white")
    axes.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
    axes.set_yticks(range(len(matrix)), tasks[: len(matrix)])
    axes.set_xlabel(f"{state.metrics.get('score', 'score')} on task")
    axes.set_ylabel("after learning")
    figure.colorbar(image, shrink=0.8)


def _draw_drift(state: SubspaceState, figure) -> None:
    figure.set_size_inches(6.4, max(2.0, 0.3 * len(state.tasks) + 1.0))
    axes = figure.add_subplot()
    drift = [state.drift_of(task) for task in state.tasks]
    axes.barh(range(len(drift)), drift)
    axes.set_yticks(range(len(drift)), list(state.tasks))
    axes.invert_yaxis()
    axes.set_xlabel("estimated drift since learned, ‖ΔW' - ΔW‖ / ‖ΔW‖")


def _draw_spectra(state: SubspaceState, figure) -> None:
    axes = figure.add_subplot()
    for layer in state.layers.values():
        spectrum = layer.spectrum_out.float()  # as it is stored: a loaded subspace has the same figure
        if len(spectrum) and spectrum[0] > 0:
            axes.plot(range(1, len(spectrum) + 1), (spectrum / spectrum[0]).tolist(), color="C0", alpha=0.3)
    axes.set_yscale("log")
    axes.set_xlabel("direction of the output basis")
    axes.set_ylabel("singular value / largest")
