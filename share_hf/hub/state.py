"""All of a shared subspace as one immutable value: what the tree on disk holds, and what the library works on."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..subspace import (
    SKETCH_BUCKETS,
    LayerSubspace,
    LowRankUpdate,
    MergeReport,
    SubspaceSettings,
    initialization_sketch,
    merge_into_layers,
)
from .basis_file import StoredBasis


LearnedBy = Literal["init", "adapt", "coefficients", "adapter"]


@dataclass(frozen=True)
class TaskInfo:
    """What is known of a task beside its coefficients.

    Args:
        learned_by: The phase that trained it, or `"adapter"` if it arrived as a LoRA.
        target: Which modules it adapts: the fields of its PEFT configuration in `adapters.TARGET_FIELDS`.
        head: Weights of its `modules_to_save` by name in the base model.
        scores: Its score when learned, by metric.
        labels: Names of its labels, for a classification task.
        dataset: Hub id of the data set it was learned from.
        initialization: Sketch of the A it was trained from, see `subspace.audit`; None where it is not known.
    """

    learned_by: LearnedBy = "adapter"
    target: Mapping[str, Any] = field(default_factory=dict)
    head: Mapping[str, Tensor] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    dataset: str | None = None
    initialization: str | None = None


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
        lineage: One entry for each step that changed the subspace, as JSON. Its `id` stands for the step and all
            before it, so that two subspaces have in common what the entries they share made.
    """

    settings: SubspaceSettings
    layers: Mapping[str, LayerSubspace] = field(default_factory=dict)
    tasks: Mapping[str, TaskInfo] = field(default_factory=dict)
    base_model_name_or_path: str | None = None
    default_task: str | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    lineage: tuple[Mapping[str, Any], ...] = ()

    @property
    def root_task(self) -> str | None:
        """The default task, or the newest."""
        return self.default_task or next(reversed(self.tasks), None)

    def with_step(self, *, changed: Iterable[str] = (), **facts: Any) -> SubspaceState:
        """The state with one more entry in its lineage, about these tasks of it."""
        before = self.lineage[-1]["id"] if self.lineage else ""
        digest = hashlib.sha256(json.dumps([before, facts], sort_keys=True).encode())
        for task in changed:
            for layer in self.layers_of(task).values():
                i = layer.index(task)
                for side in (layer.coefficients_out[i], layer.coefficients_in[i]):
                    digest.update(side.float().cpu().contiguous().numpy().tobytes())
        return replace(self, lineage=(*self.lineage, {**facts, "id": digest.hexdigest()[:16]}))

    def layers_of(self, task: str) -> dict[str, LayerSubspace]:
        """The layers that a task adapts."""
        return {module: layer for module, layer in self.layers.items() if task in layer.tasks}

    def drift_of(self, task: str) -> float:
        """Estimated drift of a task since it was learned, over all layers: ``‖ΔW' - ΔW‖ / ‖ΔW‖``."""
        drifted = total = 0.0
        for layer in self.layers_of(task).values():
            i = layer.index(task)
            energy = float(layer.records.norms[i]) ** 2
            drifted += energy * float(layer.records.drift_estimates[i]) ** 2
            total += energy
        return (drifted / total) ** 0.5 if total else 0.0

    def bases(self) -> dict[str, StoredBasis]:
        """The bases of all layers, as `subspace.safetensors` holds them."""
        return {
            module: StoredBasis(
                beta=layer.basis_out,
                alpha=layer.basis_in,
                spectrum_out=layer.spectrum_out.float(),
                spectrum_in=layer.spectrum_in.float(),
                explained_variance=layer.explained_by_basis,
            )
            for module, layer in self.layers.items()
        }


def merge_tasks(
    state: SubspaceState,
    updates: Mapping[str, Mapping[str, LowRankUpdate]],
    infos: Mapping[str, TaskInfo],
    *,
    progress: bool = False,
) -> tuple[SubspaceState, MergeReport]:
    """A state with new tasks merged into it; the given one is not changed."""
    layers, report = merge_into_layers(state.layers, updates, state.settings, progress=progress)
    # In the order that a tree is read back, so that sums over layers round as they would for a loaded subspace.
    merged = replace(state, layers=dict(sorted(layers.items())), tasks={**state.tasks, **infos})
    return merged.with_step(changed=updates, merged=list(updates), max_drift=rounded(report.max_drift)), report


def rounded(number: float) -> float:
    """Three significant digits, for what is told but not computed with."""
    return float(f"{number:.3g}")


def with_learned_coefficients(
    state: SubspaceState, task: str, coefficients: Mapping[str, tuple[Tensor, Tensor]], info: TaskInfo
) -> SubspaceState:
    """A state with a task that was learned, or learned further, inside the bases there are.

    Args:
        state: Not changed.
        task: A new task, or one whose coefficients were trained.
        coefficients: By module, (k_out, p) and (k_in, p).
        info: Of the task.
    """
    layers = {
        module: layer.with_task(task, *coefficients[module]) if module in coefficients else layer
        for module, layer in state.layers.items()
    }
    return replace(state, layers=layers, tasks={**state.tasks, task: info}).with_step(changed=[task], learned=task)


def added_by(entry: Mapping[str, Any]) -> list[str]:
    """The tasks that a step of a lineage added, or trained further."""
    return list(entry.get("merged", [])) + ([entry["learned"]] if "learned" in entry else [])


def scores_of(state: SubspaceState, task: str) -> tuple[str, float | None, float | None]:
    """What a task's score is, when it was learned, and now; None where it was not measured."""
    names, matrix = state.metrics.get("tasks", []), state.metrics.get("matrix", [])
    if task in names:
        j = names.index(task)
        column = [row[j] for row in matrix[j:] if j < len(row) and row[j] is not None]
        if column:
            return state.metrics.get("score", "score"), column[0], column[-1]
    for name, score in state.tasks[task].scores.items():
        return name, score, None
    return "score", None, None


def step_tags(lineage: Iterable[Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, str]:
    """By task, the tag that stands for the state right after it was learned.

    Its number is how many tasks had been learned with it, those counted that were removed since.
    """
    count, numbers = 0, {}
    for entry in (*lineage, {"merged": tasks}):
        for name in added_by(entry):
            if name not in numbers:
                count += 1
                numbers[name] = count
        numbers.pop(entry.get("removed"), None)
    return {task: f"step-{numbers[task]:04d}-{task}" for task in tasks}


def initialization_of(updates: Mapping[str, LowRankUpdate]) -> str:
    """A sketch of the A that an adapter was trained from, as text: one signed byte an entry, the largest 127."""
    sketch = initialization_sketch(updates)
    scaled = sketch * (127 / sketch.abs().max().clamp_min(torch.finfo(sketch.dtype).tiny))
    return base64.b64encode(scaled.round().to(torch.int8).numpy().tobytes()).decode()


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
