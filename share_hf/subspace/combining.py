"""Weighted sums of the tasks of a layer, which stay in the subspace that the tasks share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .factors import LowRankUpdate, truncated_balanced_factors
from .layer import LayerSubspace


def summed_coefficients(
    coefficients: Mapping[str, tuple[Tensor, Tensor]], weights: Mapping[str, float], rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best coefficients of a given rank for ``Σ w_i ΔW_i`` (Eckart-Young), in float64.

    Args:
        coefficients: Coefficients (k_out, p_i) and (k_in, p_i) of each task, all in one basis.
        weights: Weights by task. They must cover at least the tasks of `coefficients`.
        rank: Number of columns of the result.

    Returns:
        The factors and the norm of what was cut off. See `truncated_balanced_factors`.
    """
    out = torch.cat([weights[task] * side.double() for task, (side, _) in coefficients.items()], dim=1)
    in_ = torch.cat([side.double() for _, side in coefficients.values()], dim=1)
    return truncated_balanced_factors(out, in_, rank)


def weighted_sum(
    layer: LayerSubspace, weights: Mapping[str, float], rank: int | None = None
) -> tuple[LowRankUpdate, float, float]:
    """Return the best update of a given rank for ``Σ w_i ΔW_i`` (Eckart-Young), computed in float64 on coefficients.

    Apart from the two products with the bases it costs O(tasks p k²), whatever n and d are.

    Args:
        layer: Layer that holds the tasks.
        weights: Weights by task. Tasks that the layer does not have count as zero.
        rank: Number of columns of the factors, at most ``min(k_out, k_in)``. If not given, it is the largest rank that
            the sum can have.

    Returns:
        The update in the dtype of the basis, ``‖Σ w_i ΔW_i‖``, and the norm of what the rank cut off.

    Raises:
        ValueError: If the layer has none of the tasks.
    """
    present = [task for task in weights if layer.has(task)]
    if not present:
        raise ValueError(f"none of the tasks {sorted(weights)} is in this layer, it has {list(layer.tasks)}")
    widest = min(*layer.num_components, len(present) * layer.pseudo_rank)
    coefficients = {task: layer.coefficients_of(task) for task in present}
    out, in_, lost = summed_coefficients(coefficients, weights, widest if rank is None else min(rank, widest))
    kept = out.square().sum(0)  # the kept singular values
    total = (kept.square().sum() + lost.square()).sqrt()
    dtype = layer.basis_out.dtype
    update = LowRankUpdate(
        (layer.basis_out.double() @ out).to(dtype),
        (layer.basis_in.double() @ in_).to(dtype),
    )
    return update, float(total), float(lost)
