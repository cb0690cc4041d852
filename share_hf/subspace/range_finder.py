"""Leading directions of many updates from products with their thin factors, by block power iteration.

The second moment ``Σ X_i G_i X_i^T`` is never formed: it is as large as the layer, and the factors are thin. See
Halko, Martinsson & Tropp 2011, Sec. 4.5 (block power iteration).
"""

from __future__ import annotations

from torch import Tensor


def gram(rows: Tensor, directions: Tensor) -> Tensor:
    """``X_i^T P P^T X_i`` (updates, r, r) of factors (updates, r, n) and directions P (n, j)."""
    seen = rows @ directions
    return seen @ seen.mT


def moment_times(rows: Tensor, weights: Tensor, block: Tensor) -> Tensor:
    """``(Σ X_i G_i X_i^T) block`` (n, b) of factors (updates, r, n) and G (updates, r, r)."""
    return rows.flatten(0, 1).T @ (weights @ (rows @ block)).flatten(0, 1)
