"""One layer's shared subspace and the coefficients of its tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .factors import (
    LowRankUpdate,
    check_norm,
    inverse_norms,
    product_norm,
    truncated_balanced_factors,
    without_autocast,
)
from .rounding import MOST_ROUNDING, CoefficientDtype, packed, store
from .settings import rank_in_layer
from .stack import TASKS_PER_CHUNK


# Relative size under which a singular value of float32 coefficients may be what rounding made of zero.
_ROUNDING_OF_COEFFICIENTS = 1e-6
_SIZE_OF_EMPTY_COLUMNS = 0.2

# What products with two bases in float32 may be larger than those with the orthonormal ones that they stand for.
_ROUNDED_BASIS = 1 + 1e-5


@dataclass(frozen=True)
class TaskRecords:
    """What a layer remembers of its tasks beside their coefficients, each (tasks,) float64.

    Args:
        norms: ``‖ΔW_i‖`` as learned. It fixes the task's weight and is the denominator of its drift.
        rank_errors: Relative error that no basis can remove: what a rank over p lost when the task was added.
        drift_bounds: Sum of the relative drifts since the task was learned, its own compression error included. A
            rigorous bound on ``‖ΔW_i' - ΔW_i‖ / ‖ΔW_i‖``.
        drift_estimates: Root of the sum of their squares. Close to the true drift, but no bound.
    """

    norms: Tensor
    rank_errors: Tensor
    drift_bounds: Tensor
    drift_estimates: Tensor

    @cached_property
    def rows(self) -> list[list[float]]:
        """By task, its norm, rank error, drift bound and drift estimate as numbers."""
        return torch.stack([getattr(self, field.name) for field in fields(self)], dim=1).tolist()

    @classmethod
    def undrifted(cls, norms: Tensor) -> TaskRecords:
        """Records of tasks that are stored exactly as learned."""
        zeros = torch.zeros_like(norms)
        return cls(norms, zeros, zeros, zeros)

    def select(self, index: Tensor) -> TaskRecords:
        return TaskRecords(
            self.norms[index], self.rank_errors[index], self.drift_bounds[index], self.drift_estimates[index]
        )

    def append(self, other: TaskRecords) -> TaskRecords:
        return TaskRecords(
            torch.cat([self.norms, other.norms]),
            torch.cat([self.rank_errors, other.rank_errors]),
            torch.cat([self.drift_bounds, other.drift_bounds]),
            torch.cat([self.drift_estimates, other.drift_estimates]),
        )


@dataclass(frozen=True)
class LayerSubspace:
    """Basis of one layer and its tasks in it: ``ΔW_i = (basis_out ε_out,i)(basis_in ε_in,i)^T``.

    An immutable value: a merge returns a new one. The dtype of the basis (float32 as stored) is that of everything
    a merge writes; a merge computes in float64 whatever it is. All tensors are contiguous: BLAS rounds differently
    for other memory layouts, and a subspace must compute the same whether it was merged or loaded.

    Args:
        tasks: Names of the tasks that adapt this layer, in the order they were added.
        basis_out: (n, k_out), orthonormal columns (β in the paper).
        basis_in: (d, k_in), orthonormal columns (α in the paper).
        coefficients_out: (tasks, k_out, p).
        coefficients_in: (tasks, k_in, p).
        records: Norms and drift of the tasks.
        spectrum_out: (k_out,) float64, singular values of the weighted stack of updates along `basis_out` when the
            basis was last changed.
        spectrum_in: (k_in,) float64, likewise for `basis_in`.
        explained_by_basis: The explained variance when the basis was last changed.
    """

    tasks: tuple[str, ...]
    basis_out: Tensor
    basis_in: Tensor
    coefficients_out: Tensor
    coefficients_in: Tensor
    records: TaskRecords
    spectrum_out: Tensor
    spectrum_in: Tensor
    explained_by_basis: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), Tensor):
                object.__setattr__(self, field.name, value.contiguous())

    @classmethod
    def empty(
        cls,
        out_features: int,
        in_features: int,
        pseudo_rank: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> LayerSubspace:
        """A layer without directions and tasks; merging into it is the paper's initialization (Sec. 3.2.1)."""
        return cls.from_basis(
            torch.zeros(out_features, 0, dtype=dtype, device=device),
            torch.zeros(in_features, 0, dtype=dtype, device=device),
            pseudo_rank,
        )

    @classmethod
    def from_basis(cls, basis_out: Tensor, basis_in: Tensor, pseudo_rank: int) -> LayerSubspace:
        """A layer with a basis, (n, k_out) and (d, k_in) orthonormal, of unknown spectrum and without tasks.

        Its tasks have rank `pseudo_rank`, or as much as the layer has outputs and inputs.
        """
        k_out, k_in = basis_out.shape[1], basis_in.shape[1]
        pseudo_rank = rank_in_layer(pseudo_rank, (basis_out.shape[0], basis_in.shape[0]))
        return cls(
            tasks=(),
            basis_out=basis_out,
            basis_in=basis_in,
            coefficients_out=basis_out.new_zeros(0, k_out, pseudo_rank),
            coefficients_in=basis_in.new_zeros(0, k_in, pseudo_rank),
            records=TaskRecords.undrifted(basis_out.new_zeros(0, dtype=torch.float64)),
            spectrum_out=basis_out.new_zeros(k_out, dtype=torch.float64),
            spectrum_in=basis_in.new_zeros(k_in, dtype=torch.float64),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d): outputs and inputs of the layer."""
        return self.basis_out.shape[0], self.basis_in.shape[0]

    @property
    def num_components(self) -> tuple[int, int]:
        """(k_out, k_in)."""
        return self.basis_out.shape[1], self.basis_in.shape[1]

    @property
    def pseudo_rank(self) -> int:
        return self.coefficients_out.shape[2]

    @cached_property
    def _positions(self) -> Mapping[str, int]:
        return {task: i for i, task in enumerate(self.tasks)}

    def has(self, task: str) -> bool:
        """Whether the task adapts this layer."""
        return task in self._positions

    def index(self, task: str) -> int:
        """Position of `task` in this layer.

        Raises:
            ValueError: If the layer has no such task.
        """
        if task not in self._positions:
            raise ValueError(f"no task {task!r} in this layer, it has {list(self.tasks)}")
        return self._positions[task]

    def coefficients_of(self, task: str, *, trimmed: bool = False) -> tuple[Tensor, Tensor]:
        """The task's coefficients (k_out, p), (k_in, p); `trimmed`, without zeros that fill up a smaller rank."""
        i = self.index(task)
        rank = int(self.ranks[i]) if trimmed else self.pseudo_rank
        return self.coefficients_out[i, :, :rank], self.coefficients_in[i, :, :rank]

    @cached_property
    def ranks(self) -> Tensor:
        """How many columns of each task's coefficients (tasks,) int64 are not there to fill up; at least 1."""
        given = self.coefficients_out.any(1) | self.coefficients_in.any(1)
        places = torch.arange(1, self.pseudo_rank + 1, device=given.device)
        return (given * places).amax(1).clamp_min(1)

    @cached_property
    def packed(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """4-bit codes (tasks, p, ⌈k / 2⌉) and scales (tasks, p, ⌈k / 32⌉) of both sides, all tasks at once.

        Raises:
            ValueError: If 4 bits do not hold the coefficients exactly.
        """
        return packed(self.coefficients_out.mT), packed(self.coefficients_in.mT)

    def update_of(self, task: str, dtype: torch.dtype | None = None, *, trimmed: bool = False) -> LowRankUpdate:
        """The task's update as rank-p factors ``(β ε_out, α ε_in)``: a LoRA of ``B = out_factor, A = in_factor^T``.

        Args:
            task: A task of the layer.
            dtype: Type of the products; that of the basis if not given, which may round them.
            trimmed: As for `coefficients_of`.
        """
        dtype = dtype or self.basis_out.dtype
        out, in_ = (side.to(dtype) for side in self.coefficients_of(task, trimmed=trimmed))
        with without_autocast(out.device):
            return LowRankUpdate(self.basis_out.to(dtype) @ out, self.basis_in.to(dtype) @ in_)

    def explained_variance(self) -> float:
        """Mean over tasks of ``‖C_i‖² / ‖ΔW_i‖²`` with ``C_i = ε_out ε_in^T``: 1 where nothing was lost."""
        weights = inverse_norms(self.records.norms)
        if not weights.any():
            return 1.0
        energy = update_norms(self.coefficients_out, self.coefficients_in).square() * weights.square()
        return float(energy.sum() / (weights > 0).sum())

    def with_task(
        self, task: str, coefficients_out: Tensor, coefficients_in: Tensor, *, dtype: CoefficientDtype = "float32"
    ) -> LayerSubspace:
        """The layer with a task learned inside its basis; as `with_tasks`, for one.

        Args:
            task: Its name.
            coefficients_out: (k_out, p), or of a smaller rank.
            coefficients_in: (k_in, p), likewise.
            dtype: What they are stored in.
        """
        return self.with_tasks({task: (coefficients_out, coefficients_in)}, dtype=dtype)

    def with_tasks(
        self, learned: Mapping[str, tuple[Tensor, Tensor]], *, dtype: CoefficientDtype = "float32"
    ) -> LayerSubspace:
        """The layer with tasks learned inside its basis, which stays as it is; existing ones are replaced.

        The coefficients count as learned: norm from now, and no drift but for what storing them in fewer bits changes.

        Args:
            learned: By task, its coefficients (k_out, p) and (k_in, p), or of a smaller rank.
            dtype: What they are stored in.

        Raises:
            ValueError: If they are not finite, or the norm of their update is out of range; naming the task.
        """
        norms = torch.stack([self._norm_of(task, *sides) for task, sides in learned.items()])
        kept = self.select([i for i, task in enumerate(self.tasks) if task not in learned])
        exact = [
            torch.stack([F.pad(each.to(side), (0, self.pseudo_rank - each.shape[1])) for each in given])
            for given, side in zip(
                zip(*learned.values(), strict=True), (self.coefficients_out, self.coefficients_in), strict=True
            )
        ]
        new_out, new_in = (torch.empty_like(side) for side in exact)
        rounding = store((exact[0].double(), exact[1].double()), (new_out, new_in), dtype, dim=-2)
        changes = _ROUNDED_BASIS * rounding.changes.to(kept.records.norms) * inverse_norms(norms)
        for task, norm, change in zip(learned, norms.tolist(), changes.tolist(), strict=True):
            if change > MOST_ROUNDING[dtype]:
                raise ValueError(f"task {task!r}: its update of norm {norm:.3g} cannot be stored in {dtype}")
        records = TaskRecords(norms.to(kept.records.norms), torch.zeros_like(changes), changes, changes)
        added = replace(
            kept,
            tasks=(*kept.tasks, *learned),
            coefficients_out=torch.cat([kept.coefficients_out, new_out]),
            coefficients_in=torch.cat([kept.coefficients_in, new_in]),
            records=kept.records.append(records),
        )
        place = {task: i for i, task in enumerate(added.tasks)}
        return added.select([place[task] for task in dict.fromkeys([*self.tasks, *learned])])

    def _norm_of(self, task: str, coefficients_out: Tensor, coefficients_in: Tensor) -> Tensor:
        """``‖ΔW‖`` (0-d float64) of coefficients as they would be stored, in the basis as it is."""
        stored = coefficients_out.to(self.coefficients_out), coefficients_in.to(self.coefficients_in)
        if not all(torch.isfinite(side).all() for side in stored):
            raise ValueError(f"task {task!r}: its coefficients have NaN or infinite entries, expected finite numbers")
        bases = self.basis_out.double(), self.basis_in.double()
        norm = product_norm(*(basis @ side.double() for basis, side in zip(bases, stored, strict=True)))
        if norm != 0:
            check_norm(norm, task)
        return norm

    def without_task(self, task: str) -> LayerSubspace:
        """The layer without `task`; the basis and the other tasks stay as they are."""
        gone = self.index(task)
        return self.select([i for i in range(len(self.tasks)) if i != gone])

    def select(self, order: list[int]) -> LayerSubspace:
        """The layer with the tasks at these positions, in this order."""
        index = torch.tensor(order, dtype=torch.long, device=self.basis_out.device)
        return replace(
            self,
            tasks=tuple(self.tasks[i] for i in order),
            coefficients_out=self.coefficients_out[index],
            coefficients_in=self.coefficients_in[index],
            records=self.records.select(index),
        )

    def balanced(self, task: str) -> tuple[Tensor, Tensor]:
        """The task's coefficients rebalanced by the SVD of ``C = ε_out ε_in^T``: the same update, evenly split.

        Where C has a smaller rank than p, what rounding left of the other columns is replaced by zeros on the output
        side and the leading directions on the input side: as a LoRA's at its start, they can be trained, and from the
        same place on every machine.

        Returns:
            (k_out, p) and (k_in, p) in the basis' dtype: where training on the coefficients starts from.
        """
        stored_out, stored_in = self.coefficients_of(task)
        out, in_, _ = truncated_balanced_factors(stored_out.double(), stored_in.double(), self.pseudo_rank)
        sizes = out.square().sum(0)  # the singular values of C
        empty = sizes <= _ROUNDING_OF_COEFFICIENTS * sizes.max()
        leading = torch.eye(len(in_), self.pseudo_rank, dtype=in_.dtype, device=in_.device).roll(
            int((~empty).sum()), 1
        )
        out = torch.where(empty, 0.0, out)
        in_ = torch.where(empty, _SIZE_OF_EMPTY_COLUMNS * leading, in_)
        return out.to(self.basis_out.dtype), in_.to(self.basis_in.dtype)

    def to(self, device: torch.device | str) -> LayerSubspace:
        """The layer on another device."""
        records = TaskRecords(
            self.records.norms.to(device),
            self.records.rank_errors.to(device),
            self.records.drift_bounds.to(device),
            self.records.drift_estimates.to(device),
        )
        return replace(
            self,
            basis_out=self.basis_out.to(device),
            basis_in=self.basis_in.to(device),
            coefficients_out=self.coefficients_out.to(device),
            coefficients_in=self.coefficients_in.to(device),
            records=records,
            spectrum_out=self.spectrum_out.to(device),
            spectrum_in=self.spectrum_in.to(device),
        )


def update_norms(coefficients_out: Tensor, coefficients_in: Tensor) -> Tensor:
    """``‖ε_out ε_in^T‖`` (tasks,) float64 of stacked coefficients (tasks, k, p), in an orthonormal basis."""
    squared = torch.zeros(len(coefficients_out), dtype=torch.float64, device=coefficients_out.device)
    for start in range(0, len(squared), TASKS_PER_CHUNK):
        span = slice(start, start + TASKS_PER_CHUNK)
        out, in_ = coefficients_out[span].double(), coefficients_in[span].double()
        squared[span] = ((out.mT @ out) * (in_.mT @ in_)).sum((-2, -1))
    return squared.clamp_min(0).sqrt()
