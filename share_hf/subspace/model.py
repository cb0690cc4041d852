"""Merging into all layers of a model at once."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from tqdm.auto import tqdm

from .batch import Scratch
from .factors import LowRankUpdate
from .layer import LayerSubspace
from .merge import DriftToleranceError, LayerMergeReport, merge_into_layer
from .settings import SubspaceSettings
from .threads import for_each_module, tasks_by_module


@dataclass(frozen=True)
class MergeReport:
    """Report of a merge into a model.

    Args:
        new_tasks: Names of the tasks that were added.
        layers: Reports of the layers by module.
        drift: Relative change ``‖ΔW' - ΔW‖ / ‖ΔW‖`` of each task by this merge over all layers. For a new task it is
            its own compression error.
    """

    new_tasks: tuple[str, ...]
    layers: Mapping[str, LayerMergeReport]
    drift: Mapping[str, float]

    @property
    def max_drift(self) -> float:
        """Largest drift of a task that was already there."""
        return max((drift for task, drift in self.drift.items() if task not in self.new_tasks), default=0.0)

    @property
    def max_drift_bound(self) -> float:
        """Largest drift bound since learning, over the tasks and the merged layers."""
        return max((bound for layer in self.layers.values() for bound in layer.drift_bound.values()), default=0.0)

    @property
    def projected_tasks(self) -> tuple[str, ...]:
        """New tasks that the bases already explained, so that the basis of none of their layers changed."""
        merged = {task for layer in self.layers.values() if layer.basis_changed for task in layer.new_tasks}
        return tuple(task for task in self.new_tasks if task not in merged)

    @property
    def changed_layers(self) -> int:
        """Number of layers whose basis changed."""
        return sum(layer.basis_changed for layer in self.layers.values())


def merge_into_layers(
    layers: Mapping[str, LayerSubspace],
    updates: Mapping[str, Mapping[str, LowRankUpdate]],
    settings: SubspaceSettings,
    *,
    tolerance: float | None = None,
    uncut: Collection[str] = (),
    progress: bool = False,
) -> tuple[dict[str, LayerSubspace], MergeReport]:
    """Merge new tasks into every layer they adapt, and initialize layers that are seen for the first time.

    Updates are read from their mappings one layer at a time and not kept afterwards, so mappings that read updates on
    demand never hold more than those of one layer. If many tasks come at once, as many layers are merged at a time as
    there are threads, with one thread each. The result does not depend on the number of threads.

    Args:
        layers: Layers by module; not changed.
        updates: Updates, as a mapping of task -> module -> update. A task need not be in every layer.
        settings: Settings of every layer.
        tolerance: Same as in `merge_into_layer`.
        uncut: Same as in `merge_into_layer`.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: See `merge_into_layer`. The error names the module.
        DriftToleranceError: See `merge_into_layer`. The error names the module.
    """
    by_module, scratch = tasks_by_module(updates), Scratch()

    def merge(module: str) -> tuple[LayerSubspace, LayerMergeReport]:
        new = {task: updates[task][module] for task in by_module[module]}
        return _merged(module, layers.get(module), new, settings, scratch, tolerance, uncut)

    merged, reports = dict(layers), {}
    with tqdm(total=len(by_module), desc="Merging", unit="layer", leave=False, disable=not progress) as bar:
        for module, (layer, report) in zip(by_module, for_each_module(merge, by_module, "merge"), strict=True):
            merged[module], reports[module] = layer, report
            bar.update()
    return merged, MergeReport(tuple(updates), reports, _drift_over_layers(merged, reports))


def _merged(
    module: str,
    layer: LayerSubspace | None,
    new: Mapping[str, LowRankUpdate],
    settings: SubspaceSettings,
    scratch: Scratch,
    tolerance: float | None,
    uncut: Collection[str],
) -> tuple[LayerSubspace, LayerMergeReport]:
    if layer is None:
        first = next(iter(new.values()))
        layer = LayerSubspace.empty(*first.shape, settings.pseudo_rank, device=first.out_factor.device)
    try:
        return merge_into_layer(layer, new, settings, scratch, tolerance=tolerance, uncut=uncut)
    except DriftToleranceError as error:
        raise DriftToleranceError(f"{module!r}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{module!r}: {error}") from error


def _drift_over_layers(
    layers: Mapping[str, LayerSubspace], reports: Mapping[str, LayerMergeReport]
) -> dict[str, float]:
    drifted: dict[str, float] = {}
    total: dict[str, float] = {}
    for module, layer in layers.items():
        drifts = reports[module].drift if module in reports else {}
        for task, energy in zip(layer.tasks, layer.records.norms.square().tolist(), strict=True):
            drifted[task] = drifted.get(task, 0.0) + energy * drifts.get(task, 0.0) ** 2
            total[task] = total.get(task, 0.0) + energy
    return {task: math.sqrt(drifted[task] / total[task]) if total[task] > 0 else 0.0 for task in total}
