"""Reports of the sizes, directions and drift of a subspace."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..subspace import stored_bytes
from .phase import Phase
from .state import SubspaceState


@dataclass(frozen=True)
class TaskReport:
    """Size and drift of a task.

    Args:
        name: Name of the task.
        learned_by: Phase that trained the task, or `"adapter"`.
        parameters: Number of coefficients.
        bytes: Size of the stored coefficients and the head, in bytes.
        drift: Estimated drift since the task was learned, over all layers.
        drift_bound: Certified bound on the drift in any one layer.
    """

    name: str
    learned_by: Phase
    parameters: int
    bytes: int
    drift: float
    drift_bound: float


@dataclass(frozen=True)
class SubspaceReport:
    """Sizes, directions and drift of a subspace.

    Args:
        tasks: Reports of the tasks, in the order in which they were learned.
        modules: Number of adapted modules.
        num_components: Smallest and largest number of directions of a layer, over both sides.
        pseudo_rank: Rank p of the update of a task.
        basis_bytes: Size of all bases in float32, in bytes.
        explained_variance: Explained variance as a mean over modules.
        lora_bytes: Size of the tasks as float32 LoRAs of rank p, in bytes, for comparison.
    """

    tasks: tuple[TaskReport, ...]
    modules: int
    num_components: tuple[int, int]
    pseudo_rank: int
    basis_bytes: int
    explained_variance: float
    lora_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the report as values that JSON can represent."""
        return asdict(self)


def report_of(state: SubspaceState) -> SubspaceReport:
    """Report sizes, k, explained variance and drift of a subspace."""
    layers = state.layers.values()
    parameters, bounds = dict.fromkeys(state.tasks, 0), dict.fromkeys(state.tasks, 0.0)
    sizes = dict.fromkeys(state.tasks, 0)
    for layer in layers:
        ranks = layer.ranks.tolist() if state.settings.has_ranks else [layer.pseudo_rank] * len(layer.tasks)
        for task, rank, bound in zip(layer.tasks, ranks, layer.records.drift_bounds.tolist(), strict=True):
            parameters[task] += rank * sum(layer.num_components)
            sizes[task] += sum(stored_bytes(k, rank, state.settings.coefficient_dtype) for k in layer.num_components)
            bounds[task] = max(bounds[task], bound)
    drifts = state.drifts()
    tasks = tuple(
        TaskReport(
            name=task,
            learned_by=info.learned_by,
            parameters=parameters[task],
            bytes=sizes[task] + sum(tensor.nbytes for tensor in info.head.values()),
            drift=drifts[task],
            drift_bound=bounds[task],
        )
        for task, info in state.tasks.items()
    )
    components = [k for layer in layers for k in layer.num_components] or [0]
    return SubspaceReport(
        tasks=tasks,
        modules=len(layers),
        num_components=(min(components), max(components)),
        pseudo_rank=state.settings.pseudo_rank,
        basis_bytes=sum(layer.basis_out.nbytes + layer.basis_in.nbytes for layer in layers),
        explained_variance=sum(layer.explained_variance() for layer in layers) / max(1, len(layers)),
        lora_bytes=4 * sum(len(layer.tasks) * layer.pseudo_rank * sum(layer.shape) for layer in layers),
    )
