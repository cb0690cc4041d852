"""A complete shared subspace as one immutable value: the content of a tree on disk, and what the library works on."""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..subspace import (
    SKETCH_BUCKETS,
    LayerSubspace,
    LowRankUpdate,
    MergeReport,
    SubspaceSettings,
    initialization_sketches,
    merge_into_layers,
)
from ..subspace.discriminants import TaskFeatures
from .belonging import check_one_model
from .layout import Layout, joined_layouts
from .lineage import Lineage, extended
from .phase import Phase
from .routing import Router
from .scores import TaskScore, scores_in


@dataclass(frozen=True)
class TaskInfo:
    """Information on a task besides its coefficients.

    Args:
        learned_by: Phase that trained the task.
        target: Description of the modules that the task adapts: the fields of its PEFT configuration in
            `format.lora.TARGET_FIELDS`, and `auto_mapping` if it has no `task_type`.
        head: Weights of the classification head and of everything else in `modules_to_save`, by name in the base
            model.
        scores: Score when the task was learned, by metric.
        labels: Names of the labels of a classification task.
        problem_type: Kind of labels, as `problem_type` in transformers; None if unknown.
        dataset: Hub id of the dataset that the task was learned from.
        initialization: Sketch of the A that the task was trained from (see `subspace.sketch`); None if unknown.
        route: Statistics of the features of its inputs, which route inputs to the task; None if not learned.
    """

    learned_by: Phase = Phase.ADAPTER
    target: Mapping[str, Any] = field(default_factory=dict)
    head: Mapping[str, Tensor] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    problem_type: str | None = None
    dataset: str | None = None
    initialization: str | None = None
    route: TaskFeatures | None = None


@dataclass(frozen=True)
class SubspaceState:
    """A subspace with its tasks.

    Args:
        settings: Settings such as k, p and how merges work.
        layers: Layers by module of the base model.
        tasks: Information on the tasks by name, in the order in which they were learned. A task need not be in every
            layer.
        base_model_name_or_path: Model that the subspace belongs to.
        default_task: Task that the root of the tree stands for. None means the newest task.
        metrics: Metrics that the trainer measured over the stream, as JSON.
        lineage: Lineage, with one entry for each step that changed the subspace.
        layouts: Layouts of the matrices by module, for modules that are not dense layers.
        router: Data that the tasks share for routing inputs; None before the first route is learned.
    """

    settings: SubspaceSettings
    layers: Mapping[str, LayerSubspace] = field(default_factory=dict)
    tasks: Mapping[str, TaskInfo] = field(default_factory=dict)
    base_model_name_or_path: str | None = None
    default_task: str | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    lineage: Lineage = ()
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    router: Router | None = None

    @property
    def root_task(self) -> str | None:
        """Default task, or the newest task if none was chosen."""
        return self.default_task or next(reversed(self.tasks), None)

    def with_step(self, *, changed: Iterable[str] = (), **facts: Any) -> SubspaceState:
        """Return the state with one more entry in its lineage, which covers the coefficients of `changed` tasks."""
        coefficients = (
            side for task in changed for layer in self.layers_of(task).values() for side in layer.coefficients_of(task)
        )
        return replace(self, lineage=extended(self.lineage, coefficients, facts))

    def layers_of(self, task: str) -> dict[str, LayerSubspace]:
        """Return the layers that a task adapts, by module."""
        return {module: layer for module, layer in self.layers.items() if layer.has(task)}

    def updates_of(self, task: str, dtype: torch.dtype | None = None) -> dict[str, LowRankUpdate]:
        """Return the updates of a task by module, as factors of rank p or of the task's own rank if it has one.

        Args:
            task: Name of the task.
            dtype: Same as in `LayerSubspace.update_of`.
        """
        trimmed = self.settings.has_ranks
        return {
            module: layer.update_of(task, dtype, trimmed=trimmed) for module, layer in self.layers_of(task).items()
        }

    def drifts(self) -> dict[str, float]:
        """Return the estimated drift ``‖ΔW' - ΔW‖ / ‖ΔW‖`` of each task since it was learned, over all layers."""
        drifted, total = dict.fromkeys(self.tasks, 0.0), dict.fromkeys(self.tasks, 0.0)
        for layer in self.layers.values():
            energies = layer.records.norms.square().tolist()
            estimates = layer.records.drift_estimates.square().tolist()
            for task, energy, estimate in zip(layer.tasks, energies, estimates, strict=True):
                drifted[task] += energy * estimate
                total[task] += energy
        return {task: (drifted[task] / total[task]) ** 0.5 if total[task] else 0.0 for task in self.tasks}

    def scores(self) -> dict[str, TaskScore]:
        """Return the score of each task when it was learned, and now."""
        measured = scores_in(self.metrics)
        return {task: measured.get(task) or _recorded_score(info) for task, info in self.tasks.items()}


def merge_tasks(
    state: SubspaceState,
    updates: Mapping[str, Mapping[str, LowRankUpdate]],
    infos: Mapping[str, TaskInfo],
    *,
    layouts: Mapping[str, Mapping[str, Layout]] | None = None,
    origins: Mapping[str, list[str]] | None = None,
    originals: Mapping[str, Mapping[str, Any]] | None = None,
    tolerance: float | None = None,
    uncut: Collection[str] = (),
    progress: bool = False,
) -> tuple[SubspaceState, MergeReport]:
    """Return a state with new tasks merged into it, and the report of the merge.

    Args:
        state: State to merge into; not changed.
        updates: Updates by task and module.
        infos: Information on each new task.
        layouts: Layouts of the matrices by task and module, for modules that are not dense layers.
        origins: Ids of the steps that a task had in another lineage, for tasks that come from one.
        originals: Location on the Hub of the adapter of each task, as recorded in the lineage.
        tolerance: Same as in `merge_into_layer`.
        uncut: Same as in `merge_into_layer`.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If a task has NaN or infinite weights, the tasks cannot belong to one model, or a module has
            another shape or layout. The error names the task or the module.
        DriftToleranceError: If the tolerated drift cannot be met.
    """
    for task, info in infos.items():
        _check_head(task, info)
    check_one_model(state.layers, updates)
    joined = joined_layouts(state.layouts, state.layers, layouts or {}, updates)
    layers, report = merge_into_layers(
        state.layers, updates, state.settings, tolerance=tolerance, uncut=uncut, progress=progress
    )
    # Use the order in which a tree is read back, so that sums over layers round as they do for a loaded subspace.
    merged = replace(
        state,
        layers=dict(sorted(layers.items())),
        tasks={**state.tasks, **infos},
        layouts=dict(sorted(joined.items())),
    )
    facts = {"merged": list(updates), "max_drift": rounded(report.max_drift)}
    if known := {task: steps for task, steps in (origins or {}).items() if steps}:
        facts["origins"] = known
    if originals:
        facts["originals"] = {task: dict(original) for task, original in originals.items()}
    return merged.with_step(changed=updates, **facts), report


def with_learned_coefficients(
    state: SubspaceState,
    coefficients: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]],
    infos: Mapping[str, TaskInfo],
) -> SubspaceState:
    """Return a state with tasks that were learned, or trained further, inside the existing bases.

    Args:
        state: State that holds the bases; not changed.
        coefficients: Coefficients (k_out, p) and (k_in, p) by task and module. The tasks are new or existing ones.
        infos: Information on each of the tasks.

    Raises:
        ValueError: If a task has NaN or infinite weights, or coefficients that cannot be stored. The error names the
            task.
    """
    for task, info in infos.items():
        _check_head(task, info)
    layers = dict(state.layers)
    for module, layer in state.layers.items():
        learned = {task: modules[module] for task, modules in coefficients.items() if module in modules}
        if learned:
            try:
                layers[module] = layer.with_tasks(learned, dtype=state.settings.coefficient_dtype)
            except ValueError as error:
                raise ValueError(f"{module!r}: {error}") from error
    state = replace(state, layers=layers, tasks={**state.tasks, **infos})
    for task in infos:
        state = state.with_step(changed=[task], learned=task)
    return state


def without_task(state: SubspaceState, task: str) -> SubspaceState:
    """Return a state without one of its tasks. The bases and the other tasks stay as they are."""
    layers = {module: layer.without_task(task) if layer.has(task) else layer for module, layer in state.layers.items()}
    return replace(
        state,
        layers=layers,
        tasks={name: info for name, info in state.tasks.items() if name != task},
        default_task=None if state.default_task == task else state.default_task,
    ).with_step(removed=task)


def _check_head(task: str, info: TaskInfo) -> None:
    for name, weight in info.head.items():
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name!r}: task {task!r}: it has NaN or infinite entries, expected finite numbers")


def _recorded_score(info: TaskInfo) -> TaskScore:
    """Return the score recorded with a task, for a task without metrics of a stream."""
    return next((TaskScore(metric, score) for metric, score in info.scores.items()), TaskScore())


def rounded(number: float) -> float:
    """Round to three significant digits, for numbers that are reported but not computed with."""
    return float(f"{number:.3g}")


def initialization_of(updates: Mapping[str, LowRankUpdate]) -> str:
    """Return a sketch of the A that an adapter was trained from, as text with one signed byte per entry, up to 127."""
    return initializations_of({"": updates})[""]


def initializations_of(adapters: Mapping[str, Mapping[str, LowRankUpdate]]) -> dict[str, str]:
    """Return `initialization_of` for each of many adapters, computed for one module after another."""
    texts = {}
    for task, sketch in initialization_sketches(adapters).items():
        scaled = sketch * (127 / sketch.abs().max().clamp_min(torch.finfo(sketch.dtype).tiny))
        texts[task] = base64.b64encode(scaled.round().to(torch.int8).numpy().tobytes()).decode()
    return texts


def sketch_of(info: TaskInfo) -> Tensor | None:
    """Return the sketch of a task's A, or None if it is unknown.

    Raises:
        ValueError: If the text is not a sketch.
    """
    if info.initialization is None:
        return None
    content = base64.b64decode(info.initialization, validate=True)
    if len(content) != SKETCH_BUCKETS:
        raise ValueError(f"initialization has {len(content)} entries, expected {SKETCH_BUCKETS}")
    return torch.frombuffer(bytearray(content), dtype=torch.int8).float()
