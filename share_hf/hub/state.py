"""All of a shared subspace as one immutable value: what the tree on disk holds, and what the library works on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from ..subspace import LayerSubspace, LowRankUpdate, MergeReport, SubspaceSettings, merge_into_layers
from .basis_file import StoredBasis


LearnedBy = Literal["init", "adapt", "coefficients", "adapter"]


@dataclass(frozen=True)
class TaskInfo:
    """What is known of a task beside its coefficients.

    Args:
        learned_by: The phase that trained it, or `"adapter"` if it arrived as a LoRA.
        target: Which modules it adapts: the fields of its PEFT configuration in `adapters.TARGET_FIELDS`.
        head: Weights of its `modules_to_save` by name in the base model.
        scores: Its score when learned and since, and whatever else its trainer noted.
        labels: Names of its labels, for a classification task.
    """

    learned_by: LearnedBy = "adapter"
    target: Mapping[str, Any] = field(default_factory=dict)
    head: Mapping[str, Tensor] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None


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
        lineage: One entry for each step that changed the subspace, as JSON.
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

    def with_step(self, **facts: Any) -> SubspaceState:
        """The state with one more entry in its lineage."""
        return replace(self, lineage=(*self.lineage, {"step": len(self.lineage) + 1, **facts}))

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
                explained_variance=layer.explained_variance(),
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
    return merged.with_step(merged=list(updates), max_drift=report.max_drift), report


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
    return replace(state, layers=layers, tasks={**state.tasks, task: info}).with_step(learned=task)
