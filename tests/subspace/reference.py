"""A naive float64 counterpart of `share_hf.subspace.merge_into_layer`: dense updates and full decompositions.

Every ΔW is kept and stacked as an (n, d) matrix, every basis is the SVD of a whole stack, and every coefficient a
projection. Nothing is done in coordinates. `explained_variance` and `drift_tolerance` are not supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from share_hf.subspace import BasisKind, LayerSubspace, LowRankUpdate, SubspaceSettings


JOINT_ITERATIONS = 3
NEGLIGIBLE_RESIDUAL = 1e-6

# A singular value in between, relative to the largest one, may or may not count to the numerical rank. The joint basis
# is computed from second moments, which have half the digits.
SURELY_ZERO = {"joint": 1e-11, "factor": 1e-13}
SURELY_NONZERO = {"joint": 1e-3, "factor": 1e-11}


@dataclass(frozen=True)
class ReferenceTask:
    """Stored factors (n, p) and (d, p) of a task, and its update (n, d) as learned."""

    out_factor: Tensor
    in_factor: Tensor
    learned: Tensor

    @property
    def dense(self) -> Tensor:
        return self.out_factor @ self.in_factor.T


@dataclass(frozen=True)
class ReferenceLayer:
    """State of a layer.

    Args:
        tasks: Tasks by name, in the order in which they were added.
        basis_out: Output basis (n, k_out).
        basis_in: Input basis (d, k_in).
        gap: How well the result is determined, in (0, 1]: the smallest relative gap between squared singular values
            at which a spectrum was ever cut, or less if the alternation was unstable. Near 0, there is nothing to
            compare.
    """

    tasks: dict[str, ReferenceTask]
    basis_out: Tensor
    basis_in: Tensor
    gap: float = 1.0

    @classmethod
    def empty(cls, out_features: int, in_features: int) -> ReferenceLayer:
        return cls(
            {},
            torch.zeros(out_features, 0, dtype=torch.float64),
            torch.zeros(in_features, 0, dtype=torch.float64),
        )

    @classmethod
    def of(cls, layer: LayerSubspace) -> ReferenceLayer:
        """Return the state of a layer whose tasks count as learned just now."""
        basis_out, basis_in = layer.basis_out.double(), layer.basis_in.double()
        tasks = {}
        for i, task in enumerate(layer.tasks):
            out_factor = basis_out @ layer.coefficients_out[i].double()
            in_factor = basis_in @ layer.coefficients_in[i].double()
            tasks[task] = ReferenceTask(out_factor, in_factor, out_factor @ in_factor.T)
        return cls(tasks, basis_out, basis_in)


@dataclass(frozen=True)
class _Directions:
    vectors: Tensor
    rank: int
    gap: float


def reference_merge(
    layer: ReferenceLayer, updates: Mapping[str, LowRankUpdate], settings: SubspaceSettings
) -> tuple[ReferenceLayer, dict[str, float]]:
    """Return the layer after a merge, and the exact relative drift of every task caused by it."""
    new = {name: _as_learned(update, settings) for name, update in updates.items()}
    weights = reference_weights({name: task.learned for name, task in {**layer.tasks, **new}.items()})
    if all(weights[name] == 0 or _residual(layer, task) <= NEGLIGIBLE_RESIDUAL for name, task in new.items()):
        basis_out, basis_in, gap = layer.basis_out, layer.basis_in, layer.gap
    elif settings.basis == "factor":
        everything = [*layer.tasks.values(), *new.values()]
        out = _factor_directions(torch.cat([task.out_factor for task in everything], dim=1), settings)
        in_ = _factor_directions(torch.cat([task.in_factor for task in everything], dim=1), settings)
        basis_out, basis_in, gap = out.vectors, in_.vectors, min(layer.gap, out.gap, in_.gap)
    else:
        stack = [weights[name] * task.dense for name, task in {**layer.tasks, **new}.items()]
        basis_out, basis_in, gap = joint_basis(stack, settings.num_components)
        gap = min(gap, layer.gap)

    tasks, drift = {}, {}
    for name, task in layer.tasks.items():
        moved = ReferenceTask(
            basis_out @ (basis_out.T @ task.out_factor), basis_in @ (basis_in.T @ task.in_factor), task.learned
        )
        tasks[name] = moved
        drift[name] = _relative_change(task.dense, moved.dense, task.learned) if weights[name] > 0 else 0.0
    for name, task in new.items():
        compressed, rank_gap = _best_coefficients(task, basis_out, basis_in, settings)
        tasks[name], gap = compressed, min(gap, rank_gap)
        drift[name] = _relative_change(task.learned, compressed.dense, task.learned) if weights[name] > 0 else 0.0
    return ReferenceLayer(tasks, basis_out, basis_in, gap), drift


def reference_weights(learned: Mapping[str, Tensor]) -> dict[str, float]:
    """Return ``1 / ‖ΔW‖``, or 0 for an update that is zero."""
    return {name: 1 / float(update.norm()) if update.any() else 0.0 for name, update in learned.items()}


def joint_basis(stack: list[Tensor], cap: int) -> tuple[Tensor, Tensor, float]:
    """Return output and input bases of weighted dense updates, by alternating from the input side, and the gap."""
    wide, tall = torch.cat(stack, dim=1), torch.cat(stack, dim=0)
    out, in_ = _leading_directions(wide, cap), _leading_directions(tall.T, cap)
    gap = min(out.gap, in_.gap)
    rank_out, rank_in = out.vectors.shape[1], in_.vectors.shape[1]
    if out.rank <= cap and in_.rank <= cap:
        return out.vectors, in_.vectors, gap

    def alternate(start: Tensor) -> tuple[Tensor, Tensor, float]:
        directions_in, smallest = start, gap
        for _ in range(JOINT_ITERATIONS):
            out = _leading_directions(torch.cat([update @ directions_in for update in stack], dim=1), rank_out)
            in_ = _leading_directions(torch.cat([update.T @ out.vectors for update in stack], dim=1), rank_in)
            directions_in = in_.vectors
            smallest = min(smallest, out.gap if out.rank >= rank_out else 0.0, in_.gap if in_.rank >= rank_in else 0.0)
        return out.vectors, directions_in, smallest

    basis_out, basis_in, gap = alternate(in_.vectors)
    # If several optima are equally good, the alternation is unstable: this is what a small rotation of the start
    # changes.
    noise = torch.randn(in_.vectors.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned_out, turned_in, _ = alternate(torch.linalg.qr(in_.vectors + 1e-8 * noise).Q)
    turn = max(_angle(basis_out, turned_out), _angle(basis_in, turned_in))
    return basis_out, basis_in, min(gap, 1e-8 / max(turn, 1e-8))


def explained_fraction(stack: list[Tensor], basis_out: Tensor, basis_in: Tensor) -> float:
    """Return ``Σ ‖β^T ΔW α‖² / Σ ‖ΔW‖²`` of weighted dense updates."""
    inside = sum(float((basis_out.T @ update @ basis_in).square().sum()) for update in stack)
    return inside / sum(float(update.square().sum()) for update in stack)


def _angle(basis: Tensor, other: Tensor) -> float:
    """Return the sine of the largest principal angle between two subspaces."""
    return float(torch.linalg.matrix_norm(other - basis @ (basis.T @ other), ord=2)) if basis.shape[1] else 0.0


def _as_learned(update: LowRankUpdate, settings: SubspaceSettings) -> ReferenceTask:
    """Return a new task with the factors that enter the stack: none for zero, balanced ones for the joint basis."""
    out_factor, in_factor = update.out_factor.double(), update.in_factor.double()
    dense = out_factor @ in_factor.T
    floor = max(dense.shape) * torch.finfo(torch.float64).eps * out_factor.norm() * in_factor.norm()
    if dense.norm() <= floor:
        return ReferenceTask(out_factor[:, :0], in_factor[:, :0], torch.zeros_like(dense))
    if settings.basis == "factor":
        return ReferenceTask(out_factor, in_factor, dense)
    left, values, right_t = torch.linalg.svd(dense, full_matrices=False)
    rank = int((values > floor).sum())
    root = values[:rank].sqrt()
    return ReferenceTask(left[:, :rank] * root, right_t[:rank].T * root, dense)


def _residual(layer: ReferenceLayer, task: ReferenceTask) -> float:
    inside = layer.basis_out @ (layer.basis_out.T @ task.learned @ layer.basis_in) @ layer.basis_in.T
    return _relative_change(task.learned, inside, task.learned)


def _relative_change(before: Tensor, after: Tensor, learned: Tensor) -> float:
    return float((after - before).norm() / learned.norm())


def _factor_directions(columns: Tensor, settings: SubspaceSettings) -> _Directions:
    if settings.center:
        columns = columns - columns.mean(dim=1, keepdim=True)
    return _leading_directions(columns, settings.num_components, "factor")


def _leading_directions(matrix: Tensor, cap: int, kind: BasisKind = "joint") -> _Directions:
    """Return at most `cap` left singular vectors, truncated to the numerical rank."""
    vectors, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    if not values.any():
        return _Directions(vectors[:, :0], 0, 1.0)
    relative = torch.cat([values / values[0], values.new_zeros(1)])
    rank = int((relative > SURELY_NONZERO[kind]).sum())
    if ((relative > SURELY_ZERO[kind]) & (relative <= SURELY_NONZERO[kind])).any():
        return _Directions(vectors[:, : min(rank, cap)], rank, 0.0)
    kept = min(rank, cap)
    gap = relative[kept - 1].square() - relative[kept].square() if rank > cap else torch.ones(())
    return _Directions(vectors[:, :kept], rank, float(gap))


def _best_coefficients(
    task: ReferenceTask, basis_out: Tensor, basis_in: Tensor, settings: SubspaceSettings
) -> tuple[ReferenceTask, float]:
    """Return the new task inside the basis, at most `pseudo_rank` wide, and the gap where its spectrum was cut."""
    out_factor, in_factor = basis_out @ (basis_out.T @ task.out_factor), basis_in @ (basis_in.T @ task.in_factor)
    gap, pseudo_rank = 1.0, settings.pseudo_rank
    if out_factor.shape[1] > pseudo_rank:
        left, values, right_t = torch.linalg.svd(out_factor @ in_factor.T, full_matrices=False)
        rank = int((values > SURELY_ZERO["joint"] * values[0]).sum())
        root = values[: min(rank, pseudo_rank)].sqrt()
        out_factor, in_factor = left[:, : len(root)] * root, right_t[: len(root)].T * root
        if rank > pseudo_rank:
            gap = float((values[pseudo_rank - 1] - values[pseudo_rank]) / values[0])
        elif rank < pseudo_rank and settings.basis == "factor":
            gap = 0.0  # balanced factors whose singular values are rounding errors count in the stack
    padding = (0, pseudo_rank - out_factor.shape[1])
    padded = [torch.nn.functional.pad(factor, padding) for factor in (out_factor, in_factor)]
    return ReferenceTask(*padded, task.learned), gap
