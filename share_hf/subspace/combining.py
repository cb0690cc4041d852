"""Weighted sums of a layer's tasks, which stay in the subspace that the tasks share."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .factors import LowRankUpdate, truncated_balanced_factors
from .layer import LayerSubspace


def weighted_sum(
    layer: LayerSubspace, weights: Mapping[str, float], rank: int | None = None
) -> tuple[LowRankUpdate, float, float]:
    """The best update of a rank for ``Σ w_i ΔW_i`` (Eckart-Young), computed in float64 on the coefficients.

    Its cost beside the two products with the bases is O(tasks p k²), whatever n and d are.

    Args:
        layer: The layer.
        weights: By task; those that the layer does not have count as zero.
        rank: Columns of the factors, at most ``min(k_out, k_in)``; as many as the sum can need if not given.

    Returns:
        The update, in the dtype of the basis, ``‖Σ w_i ΔW_i‖``, and the norm of what the rank cut off.

    Raises:
        ValueError: If the layer has none of the tasks.
    """
    present = [task for task in weights if layer.has(task)]
    if not present:
        raise ValueError(f"none of the tasks {sorted(weights)} is in this layer, it has {list(layer.tasks)}")
    index = torch.tensor([layer.index(task) for task in present], device=layer.basis_out.device)
    scales = torch.tensor([weights[task] for task in present], dtype=torch.float64, device=index.device)
    out = (layer.coefficients_out[index].double() * scales[:, None, None]).transpose(0, 1).flatten(1)
    in_ = layer.coefficients_in[index].double().transpose(0, 1).flatten(1)
    widest = min(*layer.num_components, out.shape[1])
    out, in_, lost = truncated_balanced_factors(out, in_, widest if rank is None else min(rank, widest))
    kept = out.square().sum(0)  # the singular values that were kept
    total = (kept.square().sum() + lost.square()).sqrt()
    dtype = layer.basis_out.dtype
    update = LowRankUpdate(
        (layer.basis_out.double() @ out).to(dtype),
        (layer.basis_in.double() @ in_).to(dtype),
    )
    return update, float(total), float(lost)
