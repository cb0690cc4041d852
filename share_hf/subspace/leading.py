"""Randomized range finder for the leading directions of many updates, from a few products with their thin factors.

Directions start as random combinations of the columns and turn towards the leading directions of ``Σ X_i G_i X_i^T``
with each step of a power iteration (Halko, Martinsson & Tropp 2011, Sec. 4.5), without ever forming a matrix as large
as the layer. Only the result of the last step must lie in the span of the factors to full precision. The steps before
it only show where to look. bfloat16 is enough for that, and takes a third of the time on processors that multiply it
in hardware.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .products import product


# Number of power steps before the last one.
ROUGH_STEPS = 1
_TASKS_AT_ONCE = 64  # at rank 16 and 1024 features, this many in bfloat16 fit the cache of a processor


class Side:
    """One side of many updates along directions that turn towards the leading ones of ``Σ X_i G_i X_i^T``.

    Args:
        rows: (updates, r, n) float32, the factors X, transposed.
        basis: (n, k), basis that the directions are added to.
        room: Number of directions to find. If the layer has no more than that, all of them are taken.

    Attributes:
        seen: (updates, r, q) float32, ``X_i^T Q`` with Q (n, q) the basis and the directions added to it.
        coordinates: (n, q) float64, orthonormal, set by `settle`. The first ones span the basis.
        rotation: (q, k) float64, the basis in these coordinates, set by `settle`.
    """

    seen: Tensor
    coordinates: Tensor
    rotation: Tensor

    def __init__(self, rows: Tensor, basis: Tensor, room: int) -> None:
        self._rows, self._basis, self._room = rows, basis, room
        self._is_whole = basis.shape[1] + room >= rows.shape[2]
        if self._is_whole:
            self.seen = rows

    @property
    def gram(self) -> Tensor:
        """Gram matrices ``X_i^T Q Q^T X_i`` (updates, r, r) float64."""
        return (self.seen @ self.seen.mT).double()

    def start(self, weights: Tensor) -> None:
        """Start from random combinations of the columns, scaled for each update to the size of G (updates, r, r)."""
        if self._is_whole:
            return
        updates, rank, _ = self._rows.shape
        mixing = _random(updates * rank, self._room).view(updates, rank, self._room).to(self._rows.device)
        sizes = weights.diagonal(dim1=1, dim2=2).sum(1).sqrt().float()
        self._look_along(rough_sum(self._rows, mixing * sizes[:, None, None]))

    def turn(self, weights: Tensor) -> None:
        """Take one step of the power iteration with G (updates, r, r), in low precision."""
        if not self._is_whole:
            self._look_along(rough_sum(self._rows, self._weighted(weights)))

    def settle(self, weights: Tensor) -> None:
        """Take the last step at full precision, and set `coordinates`, `rotation` and `seen`."""
        if self._is_whole:
            block = torch.eye(self._rows.shape[2], dtype=torch.float64, device=self._rows.device)
        else:
            block = (self._weighted(weights).flatten(0, 1).T @ self._rows.flatten(0, 1)).T
        # This assumes no orthogonality, and linearly dependent columns need no special case.
        both = torch.cat([self._basis.double(), block.double()], dim=1)
        self.coordinates, triangle = torch.linalg.qr(both)
        self.rotation = triangle[:, : self._basis.shape[1]]
        self.seen = product(self._rows, self.coordinates)

    def _weighted(self, weights: Tensor) -> Tensor:
        """Return ``G_i X_i^T`` along the directions added to the basis, (updates, r, room) float32."""
        return weights.float() @ self.seen[..., self._basis.shape[1] :]

    def _look_along(self, block: Tensor) -> None:
        directions = torch.linalg.qr(torch.cat([self._basis.float(), block], dim=1)).Q
        self.seen = rough_product(self._rows, directions)


def rough_sum(rows: Tensor, weights: Tensor) -> Tensor:
    """Return ``Σ X_i W_i`` (n, q) float32 for W (updates, r, q), in low precision."""
    dtype = _rough_dtype(rows.device)
    total = rows.new_zeros(weights.shape[2], rows.shape[2])
    for part, of in zip(rows.split(_TASKS_AT_ONCE), weights.split(_TASKS_AT_ONCE), strict=True):
        total += of.to(dtype).flatten(0, 1).T @ part.to(dtype).flatten(0, 1)
    return total.T


def rough_product(rows: Tensor, directions: Tensor) -> Tensor:
    """Return ``X_i^T Q`` (updates, r, q) float32 for Q (n, q), in low precision."""
    dtype = _rough_dtype(rows.device)
    seen, directions = rows.new_empty(*rows.shape[:2], directions.shape[1]), directions.to(dtype)
    for part, into in zip(rows.split(_TASKS_AT_ONCE), seen.split(_TASKS_AT_ONCE), strict=True):
        into.copy_(part.to(dtype) @ directions)
    return seen


def _rough_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where it is faster than float32; on other processors it may take many times as long."""
    return torch.bfloat16 if device.type == "cpu" and _multiplies_bfloat16() else torch.float32


@lru_cache(maxsize=1)
def _multiplies_bfloat16() -> bool:
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16")) and torch.backends.mkldnn.is_available()


@lru_cache(maxsize=2)  # all modules of a collection take the same numbers
def _random(rows: int, columns: int) -> Tensor:
    """Return normal random numbers (rows, columns) float32 that are the same on every device."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
