"""All of a shared subspace as one immutable value: what the tree on disk holds, and what the library works on."""

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
    """What is known of a task beside its coefficients.

    Args:
        learned_by: The phase that trained it.
        target: Which modules it adapts: the fields of its PEFT configuration in `format.lora.TARGET_FIELDS`, and
            `auto_mapping` where it has no `task_type`.
        head: Weights of its classification head and of whatever else `modules_to_save` has, by name in the base model.
        scores: Its score when learned, by metric.
        labels: Names of its labels, for a classification task.
        problem_type: What its labels are, in the words of transformers; None if that is not known.
        dataset: Hub id of the data set it was learned from.
        initialization: Sketch of the A it was trained from, see `subspace.sketch`; None where it is not known.
        route: What is kept of the features of its texts, by which inputs find it; None where it was not learned.
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
        settings: k, p and how merges work.
        layers: By module of the base model.
        tasks: By name, in the order they were learned. A task need not be in every layer.
        base_model_name_or_path: The model the subspace belongs to.
        default_task: The task that the root of the tree stands for; the newest if not chosen.
        metrics: What the trainer measured over the stream, as JSON.
        lineage: One entry for each step that changed the subspace.
        layouts: By module, how its matrix lies in its weight; without those that are dense layers.
        router: What tasks share by which inputs find them; None before the first route is learned.
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
        """The default task, or the newest."""
        return self.default_task or next(reversed(self.tasks), None)

    def with_step(self, *, changed: Iterable[str] = (), **facts: Any) -> SubspaceState:
        """The state with one more entry in its lineage, about these tasks of it."""
        coefficients = (
            side for task in changed for layer in self.layers_of(task).values() for side in layer.coefficients_of(task)
        )
        return replace(self, lineage=extended(self.lineage, coefficients, facts))

    def layers_of(self, task: str) -> dict[str, LayerSubspace]:
        """The layers that a task adapts."""
        return {module: layer for module, layer in self.layers.items() if layer.has(task)}

    def updates_of(self, task: str, dtype: torch.dtype | None = None) -> dict[str, LowRankUpdate]:
        """The task's updates by module, each as factors of rank p, or of the task's own rank where it has one.

        Args:
            task: One of the tasks.
            dtype: As for `LayerSubspace.update_of`.
        """
        trimmed = self.settings.has_ranks
        return {
            module: layer.update_of(task, dtype, trimmed=trimmed) for module, layer in self.layers_of(task).items()
        }

    def drifts(self) -> dict[str, float]:
        """By task, its estimated drift since it was learned, over all layers: ``‖ΔW' - ΔW‖ / ‖ΔW‖``."""
        drifted, total = dict.fromkeys(self.tasks, 0.0), dict.fromkeys(self.tasks, 0.0)
        for layer in self.layers.values():
            energies = layer.records.norms.square().tolist()
            estimates = layer.records.drift_estimates.square().tolist()
            for task, energy, estimate in zip(layer.tasks, energies, estimates, strict=True):
                drifted[task] += energy * estimate
                total[task] += energy
        return {task: (drifted[task] / total[task]) ** 0.5 if total[task] else 0.0 for task in self.tasks}

    def scores(self) -> dict[str, TaskScore]:
        """By task, what its score was when it was learned, and is now."""
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
    """A state with new tasks merged into it; the given one is not changed.

    Args:
        state: Not changed.
        updates: Updates by task and module.
        infos: What is known of each task.
        layouts: By task and module, how its matrix lies in its weight, where it is no dense layer.
        origins: By task, the ids of the steps that it had in another lineage, if it comes from one.
        originals: By task, where on the hub its adapter is, as the lineage notes it.
        tolerance: As for `merge_into_layer`.
        uncut: Likewise.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If a task has NaN or infinite weights, the tasks cannot belong to one model, or a module has
            another shape or is of another kind; naming it.
        DriftToleranceError: If the tolerated drift cannot be met.
    """
    for task, info in infos.items():
        _check_head(task, info)
    check_one_model(state.layers, updates)
    joined = joined_layouts(state.layouts, state.layers, layouts or {}, updates)
    layers, report = merge_into_layers(
        state.layers, updates, state.settings, tolerance=tolerance, uncut=uncut, progress=progress
    )
    # In the order that a tree is read back, so that sums over layers round as they would for a loaded subspace.
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
    """A state with tasks that were learned, or learned further, inside the bases there are.

    Args:
        state: Not changed.
        coefficients: By task, a new one or one whose coefficients were trained, and by module, (k_out, p), (k_in, p).
        infos: What is known of each task.

    Raises:
        ValueError: If a task has NaN or infinite weights; naming it.
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
    """A state without one of its tasks. The basis and the other tasks stay as they are."""
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
    """What was noted with a task of a stream whose metrics are not there."""
    return next((TaskScore(metric, score) for metric, score in info.scores.items()), TaskScore())


def rounded(number: float) -> float:
    """Three significant digits, for what is told but not computed with."""
    return float(f"{number:.3g}")


def initialization_of(updates: Mapping[str, LowRankUpdate]) -> str:
    """A sketch of the A that an adapter was trained from, as text: one signed byte an entry, the largest 127."""
    return initializations_of({"": updates})[""]


def initializations_of(adapters: Mapping[str, Mapping[str, LowRankUpdate]]) -> dict[str, str]:
    """`initialization_of` for each of many adapters, one module after another."""
    texts = {}
    for task, sketch in initialization_sketches(adapters).items():
        scaled = sketch * (127 / sketch.abs().max().clamp_min(torch.finfo(sketch.dtype).tiny))
        texts[task] = base64.b64encode(scaled.round().to(torch.int8).numpy().tobytes()).decode()
    return texts


def sketch_of(info: TaskInfo) -> Tensor | None:
    """The sketch of a task's A, None where it is not known.

    Raises:
        ValueError: If it is not one.
    """
    if info.initialization is None:
        return None
    content = base64.b64decode(info.initialization, validate=True)
    if len(content) != SKETCH_BUCKETS:
        raise ValueError(f"initialization has {len(content)} entries, expected {SKETCH_BUCKETS}")
    return torch.frombuffer(bytearray(content), dtype=torch.int8).float()
