"""The shared subspace of one layer, and the coefficients of its tasks."""

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


# Relative size below which a singular value of float32 coefficients may be nothing but rounding error.
_ROUNDING_OF_COEFFICIENTS = 1e-6
_SIZE_OF_EMPTY_COLUMNS = 0.2

# Largest factor by which rounding two bases to float32 can make products with them larger than with exact bases.
_ROUNDED_BASIS = 1 + 1e-5


@dataclass(frozen=True)
class TaskRecords:
    """Norms and errors that a layer records of its tasks besides their coefficients, each (tasks,) float64.

    Args:
        norms: Norms ``‖ΔW_i‖`` as learned. They fix the weights of the tasks, and the drift is relative to them.
        rank_errors: Relative errors that no basis can remove: what a rank above p lost when the task was added.
        drift_bounds: Sums of the relative drifts since the tasks were learned, including their own compression errors.
            They are rigorous bounds on ``‖ΔW_i' - ΔW_i‖ / ‖ΔW_i‖``.
        drift_estimates: Roots of the sums of the squared drifts. They are close to the true drift, but not bounds.
    """

    norms: Tensor
    rank_errors: Tensor
    drift_bounds: Tensor
    drift_estimates: Tensor

    @cached_property
    def rows(self) -> list[list[float]]:
        """Norm, rank error, drift bound and drift estimate of each task, as numbers."""
        return torch.stack([getattr(self, field.name) for field in fields(self)], dim=1).tolist()

    @classmethod
    def undrifted(cls, norms: Tensor) -> TaskRecords:
        """Return records of tasks that are stored exactly as learned."""
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
    """Basis of one layer and the tasks in it: ``ΔW_i = (basis_out ε_out,i)(basis_in ε_in,i)^T``.

    The value is immutable: a merge returns a new one. A merge writes everything in the dtype of the basis (float32 as
    stored), and computes in float64 whatever that dtype is. All tensors are contiguous, because BLAS rounds
    differently for other memory layouts, and a subspace must compute the same whether it was merged or loaded.

    Args:
        tasks: Names of the tasks that adapt this layer, in the order in which they were added.
        basis_out: (n, k_out), orthonormal columns (β in the paper).
        basis_in: (d, k_in), orthonormal columns (α in the paper).
        coefficients_out: (tasks, k_out, p), coefficients on the output side.
        coefficients_in: (tasks, k_in, p), coefficients on the input side.
        records: Norms and drift of the tasks.
        spectrum_out: (k_out,) float64, singular values of the weighted stack of updates along `basis_out` when the
            basis last changed.
        spectrum_in: (k_in,) float64, the same along `basis_in`.
        explained_by_basis: Explained variance when the basis last changed.
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
        """Return a layer without directions and tasks. Merging into it is the paper's initialization (Sec. 3.2.1)."""
        return cls.from_basis(
            torch.zeros(out_features, 0, dtype=dtype, device=device),
            torch.zeros(in_features, 0, dtype=dtype, device=device),
            pseudo_rank,
        )

    @classmethod
    def from_basis(cls, basis_out: Tensor, basis_in: Tensor, pseudo_rank: int) -> LayerSubspace:
        """Return a layer with an orthonormal basis, (n, k_out) and (d, k_in), an unknown spectrum and no tasks.

        Its tasks have rank `pseudo_rank`, or as many as the layer has outputs or inputs if that is fewer.
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
        """Outputs and inputs (n, d) of the layer."""
        return self.basis_out.shape[0], self.basis_in.shape[0]

    @property
    def num_components(self) -> tuple[int, int]:
        """Numbers of output and input directions (k_out, k_in)."""
        return self.basis_out.shape[1], self.basis_in.shape[1]

    @property
    def pseudo_rank(self) -> int:
        return self.coefficients_out.shape[2]

    @cached_property
    def _positions(self) -> Mapping[str, int]:
        return {task: i for i, task in enumerate(self.tasks)}

    def has(self, task: str) -> bool:
        """Return whether the task adapts this layer."""
        return task in self._positions

    def index(self, task: str) -> int:
        """Return the position of `task` in this layer.

        Raises:
            ValueError: If the layer has no such task.
        """
        if task not in self._positions:
            raise ValueError(f"no task {task!r} in this layer, it has {list(self.tasks)}")
        return self._positions[task]

    def coefficients_of(self, task: str, *, trimmed: bool = False) -> tuple[Tensor, Tensor]:
        """Return the coefficients (k_out, p) and (k_in, p) of a task, without the zero padding if `trimmed`."""
        i = self.index(task)
        rank = int(self.ranks[i]) if trimmed else self.pseudo_rank
        return self.coefficients_out[i, :, :rank], self.coefficients_in[i, :, :rank]

    @cached_property
    def ranks(self) -> Tensor:
        """Number of columns of the coefficients of each task (tasks,) int64 without zero padding; at least 1."""
        given = self.coefficients_out.any(1) | self.coefficients_in.any(1)
        places = torch.arange(1, self.pseudo_rank + 1, device=given.device)
        return (given * places).amax(1).clamp_min(1)

    @cached_property
    def packed(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Codes in 4 bits (tasks, p, ⌈k / 2⌉) and scales (tasks, p, ⌈k / 32⌉) of both sides, for all tasks at once.

        Raises:
            ValueError: If 4 bits do not represent the coefficients exactly.
        """
        return packed(self.coefficients_out.mT), packed(self.coefficients_in.mT)

    def update_of(self, task: str, dtype: torch.dtype | None = None, *, trimmed: bool = False) -> LowRankUpdate:
        """Return a task's update as rank-p factors ``(β ε_out, α ε_in)``, a LoRA ``B = out_factor, A = in_factor^T``.

        Args:
            task: Name of a task of the layer.
            dtype: Dtype of the products. If not given, it is the dtype of the basis, which may round them.
            trimmed: Whether to leave out the zero padding of a smaller rank.
        """
        dtype = dtype or self.basis_out.dtype
        out, in_ = (side.to(dtype) for side in self.coefficients_of(task, trimmed=trimmed))
        with without_autocast(out.device):
            return LowRankUpdate(self.basis_out.to(dtype) @ out, self.basis_in.to(dtype) @ in_)

    def explained_variance(self) -> float:
        """Return the mean over tasks of ``‖C_i‖² / ‖ΔW_i‖²`` with ``C_i = ε_out ε_in^T``, 1 where nothing was lost.

        The fraction of a task is at most 1 up to rounding, which does not count.
        """
        weights = inverse_norms(self.records.norms)
        if not weights.any():
            return 1.0
        energy = update_norms(self.coefficients_out, self.coefficients_in).square() * weights.square()
        return min(1.0, float(energy.sum() / (weights > 0).sum()))

    def with_task(
        self, task: str, coefficients_out: Tensor, coefficients_in: Tensor, *, dtype: CoefficientDtype = "float32"
    ) -> LayerSubspace:
        """Return the layer with one task that was learned inside its basis. See `with_tasks`.

        Args:
            task: Name of the task.
            coefficients_out: (k_out, p), or with a smaller rank.
            coefficients_in: (k_in, p), or with the same smaller rank.
            dtype: Type that the coefficients are stored in.
        """
        return self.with_tasks({task: (coefficients_out, coefficients_in)}, dtype=dtype)

    def with_tasks(
        self, learned: Mapping[str, tuple[Tensor, Tensor]], *, dtype: CoefficientDtype = "float32"
    ) -> LayerSubspace:
        """Return the layer with tasks that were learned inside its basis, replacing tasks of the same names.

        The basis stays as it is. The coefficients count as learned: the norm is taken from them, and there is no drift
        except the change made by storing them in fewer bits.

        Args:
            learned: Coefficients (k_out, p) and (k_in, p) of each task, or with a smaller rank.
            dtype: Type that the coefficients are stored in.

        Raises:
            ValueError: If coefficients are not finite, the norm of their update is out of range, or `dtype` cannot
                hold them. The error names the task.
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
        """Return ``‖ΔW‖`` (0-d float64) of coefficients as they would be stored, in the current basis."""
        stored = coefficients_out.to(self.coefficients_out), coefficients_in.to(self.coefficients_in)
        if not all(torch.isfinite(side).all() for side in stored):
            raise ValueError(f"task {task!r}: its coefficients have NaN or infinite entries, expected finite numbers")
        bases = self.basis_out.double(), self.basis_in.double()
        norm = product_norm(*(basis @ side.double() for basis, side in zip(bases, stored, strict=True)))
        if norm != 0:
            check_norm(norm, task)
        return norm

    def without_task(self, task: str) -> LayerSubspace:
        """Return the layer without `task`. The basis and the other tasks stay as they are."""
        gone = self.index(task)
        return self.select([i for i in range(len(self.tasks)) if i != gone])

    def select(self, order: list[int]) -> LayerSubspace:
        """Return the layer with the tasks at these positions, in this order."""
        index = torch.tensor(order, dtype=torch.long, device=self.basis_out.device)
        return replace(
            self,
            tasks=tuple(self.tasks[i] for i in order),
            coefficients_out=self.coefficients_out[index],
            coefficients_in=self.coefficients_in[index],
            records=self.records.select(index),
        )

    def balanced(self, task: str) -> tuple[Tensor, Tensor]:
        """Return a task's coefficients rebalanced by the SVD of ``C = ε_out ε_in^T``: the same update, evenly split.

        Where C has a smaller rank than p, the other columns hold only rounding error. They are replaced by zeros on
        the output side and the leading directions on the input side, so that they can be trained like a LoRA at its
        start, and from the same point on every machine.

        Returns:
            (k_out, p) and (k_in, p) in the dtype of the basis, the starting point of training on the coefficients.
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
        """Return the layer on another device."""
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
    """Return ``‖ε_out ε_in^T‖`` (tasks,) float64 of stacked coefficients (tasks, k, p) in an orthonormal basis."""
    squared = torch.zeros(len(coefficients_out), dtype=torch.float64, device=coefficients_out.device)
    for start in range(0, len(squared), TASKS_PER_CHUNK):
        span = slice(start, start + TASKS_PER_CHUNK)
        out, in_ = coefficients_out[span].double(), coefficients_in[span].double()
        squared[span] = ((out.mT @ out) * (in_.mT @ in_)).sum((-2, -1))
    return squared.clamp_min(0).sqrt()
