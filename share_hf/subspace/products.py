"""Products of many float32 factors with a few directions, with a rounding error that is known beforehand.

A sum of K products in float32 is off by at most ``γ_K Σ |x_j| |y_j|`` with ``γ_K = K u / (1 - K u)``, ``u = 2^-24``,
in whatever order it is summed (Higham 2002, Sec. 3.1). Over all features of a layer this bound would be large, so
sums over a few features each are computed first and then added up.
"""

from __future__ import annotations

import torch
from torch import Tensor


_FEATURES_AT_ONCE = 128
_UNIT_ROUNDOFF = 2.0**-24


def product(rows: Tensor, side: Tensor) -> Tensor:
    """Return ``X_i^T Q`` (updates, r, q) float32 for float32 factors (updates, r, n) and Q (n, q).

    The error is within `product_rounding`.

    Args:
        rows: Factors X, transposed.
        side: Directions Q, float64, with entries below 1.
    """
    flat, single = rows.flatten(0, 1), side.float()
    seen = flat.new_zeros(len(flat), side.shape[1])
    for part, of in zip(flat.split(_FEATURES_AT_ONCE, 1), single.split(_FEATURES_AT_ONCE), strict=True):
        seen.addmm_(part, of)
    return seen.view(*rows.shape[:2], -1)


def product_rounding(features: int) -> float:
    """Return a bound on the error of each entry of a `product`, relative to ``‖x‖ ‖q‖`` of its row and column."""
    # Errors of each sum, of adding up the sums, and of rounding Q, and two more for numbers that vanish in float32.
    count = min(features, _FEATURES_AT_ONCE) + -(-features // _FEATURES_AT_ONCE) + 1 + 2
    return count * _UNIT_ROUNDOFF / (1 - count * _UNIT_ROUNDOFF)


def rounding_is_known(device: torch.device) -> bool:
    """Return whether float32 products keep float32 precision: on a CPU, unless the user allows lower precision."""
    return device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
