"""Products of many float32 factors with a few directions, whose rounding error is known beforehand.

A sum of K products in float32 is off by at most ``γ_K Σ |x_j| |y_j|`` with ``γ_K = K u / (1 - K u)``, ``u = 2^-24``,
in whichever order it is added up (Higham 2002, Sec. 3.1). Over all features of a layer that would be much, so sums
over a few features each are added up.
"""

from __future__ import annotations

import torch
from torch import Tensor


_FEATURES_AT_ONCE = 128
_UNIT_ROUNDOFF = 2.0**-24


def product(rows: Tensor, side: Tensor) -> Tensor:
    """``X_i^T Q`` (updates, r, q) float32 of factors (updates, r, n) float32 and Q (n, q), within `product_rounding`.

    Args:
        rows: The factors X, transposed.
        side: Q, float64, with entries below 1.
    """
    flat, single = rows.flatten(0, 1), side.float()
    seen = flat.new_zeros(len(flat), side.shape[1])
    for part, of in zip(flat.split(_FEATURES_AT_ONCE, 1), single.split(_FEATURES_AT_ONCE), strict=True):
        seen.addmm_(part, of)
    return seen.view(*rows.shape[:2], -1)


def product_rounding(features: int) -> float:
    """Bound on the rounding error of each entry of a `product`, relative to ``‖x‖ ‖q‖`` of its row and column."""
    # Of each sum, of adding it to the others, and of Q; two more for what vanishes in float32.
    count = min(features, _FEATURES_AT_ONCE) + -(-features // _FEATURES_AT_ONCE) + 1 + 2
    return count * _UNIT_ROUNDOFF / (1 - count * _UNIT_ROUNDOFF)


def rounding_is_known(device: torch.device) -> bool:
    """Whether float32 products are of float32: not where a user allows them to be of fewer digits."""
    return device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
