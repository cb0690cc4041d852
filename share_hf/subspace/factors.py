"""Low-rank updates and their compact singular value decomposition.

An update of a linear layer with n outputs and d inputs is kept as its factors, ``ΔW = out_factor @ in_factor.T``; the
(n, d) matrix itself is never formed. For a LoRA, ``out_factor = s B`` and ``in_factor = A^T`` with the scale ``s``
folded in, so that adapters with different alpha, rank or scaling rules mix correctly.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


# Far above the norm of any weight, and small enough that its square does not overflow. No file holds a larger norm.
LARGEST_NORM = 1e30
# Down to this norm, float32 holds the balanced coefficients of an update, and the root of its weight, at full
# precision.
SMALLEST_NORM = 1e-70


@dataclass(frozen=True)
class LowRankUpdate:
    """Update ``ΔW = out_factor @ in_factor.T`` of a layer, as its factors.

    Args:
        out_factor: (n, r), any floating dtype.
        in_factor: (d, r), any floating dtype.
    """

    out_factor: Tensor
    in_factor: Tensor

    def __post_init__(self) -> None:
        if self.out_factor.ndim != 2 or self.in_factor.ndim != 2:
            raise ValueError(
                f"factors are {tuple(self.out_factor.shape)} and {tuple(self.in_factor.shape)}, expected matrices"
            )
        if self.out_factor.shape[1] != self.in_factor.shape[1]:
            raise ValueError(
                f"out_factor has {self.out_factor.shape[1]} columns and in_factor {self.in_factor.shape[1]}, expected "
                "as many"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (n, d) of the update."""
        return self.out_factor.shape[0], self.in_factor.shape[0]

    def dense(self) -> Tensor:
        """Return the (n, d) matrix, for tests and for merging into a weight."""
        with without_autocast(self.out_factor.device):
            return self.out_factor @ self.in_factor.T


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which products keep the dtype of their factors, even under mixed-precision training."""
    if not _has_autocast(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


# torch.compile looks into it from torch 2.12 on only; it is the same for a type of device at any time.
@torch.compiler.assume_constant_result
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


@dataclass(frozen=True)
class CompactUpdate:
    """Update ``ΔW = left @ diag(singular_values) @ right.T`` in float64, cut to numerical rank ρ.

    Args:
        left: (n, ρ), orthonormal columns.
        singular_values: (ρ,), descending.
        right: (d, ρ), orthonormal columns.
        noise: 0-d, bound on the norm ``‖·‖`` of what was cut and of the rounding error.
    """

    left: Tensor
    singular_values: Tensor
    right: Tensor
    noise: Tensor

    @property
    def norm(self) -> Tensor:
        """Frobenius norm ``‖ΔW‖`` as a 0-d tensor."""
        return self.singular_values.square().sum().sqrt()

    def balanced_factors(self) -> LowRankUpdate:
        """Return ``(U √S, V √S)``, the same update with its norm shared evenly between both factors."""
        root = self.singular_values.sqrt()
        return LowRankUpdate(self.left * root, self.right * root)


def thin_svd_of_update(update: LowRankUpdate) -> CompactUpdate:
    """Compute the compact SVD of an update from the QR of its factors, without forming the (n, d) matrix.

    The result does not depend on how the update was factored: ``(B M)(M^-1 A)`` gives the same one. All computations
    are in float64. An update below the rounding error of its own factors, ``‖ΔW‖ <= max(n, d) eps ‖B‖ ‖A‖``, has rank
    0 (such as a fresh LoRA, whose B is zero).

    Raises:
        ValueError: If a factor has NaN or infinite entries.
    """
    out_factor, in_factor = update.out_factor.double(), update.in_factor.double()
    for name, factor in (("out_factor", out_factor), ("in_factor", in_factor)):
        if not torch.isfinite(factor).all():
            raise ValueError(f"{name} has NaN or infinite entries, expected finite numbers")
    # Bring both factors to a common scale, at which neither squares nor products overflow or vanish.
    scale_out, scale_in = _power_of_two_near(out_factor), _power_of_two_near(in_factor)
    basis_out, core_out = torch.linalg.qr(out_factor / scale_out)
    basis_in, core_in = torch.linalg.qr(in_factor / scale_in)
    left, singular_values, right_t = torch.linalg.svd(core_out @ core_in.T, full_matrices=False)
    noise = max(update.shape) * torch.finfo(torch.float64).eps * core_out.norm() * core_in.norm()
    rank = int((singular_values > noise).sum())
    left, right = basis_out @ left[:, :rank], basis_in @ right_t[:rank].T
    signs = orienting_signs(left)
    noise = noise * len(singular_values) ** 0.5
    scale = scale_out * scale_in
    return CompactUpdate(left * signs, singular_values[:rank] * scale, right * signs, noise * scale)


def _power_of_two_near(factor: Tensor) -> float:
    """Return a power of two near the largest entry of a factor, to divide by without rounding; 1 for zeros."""
    largest = float(factor.abs().max()) if factor.numel() else 0.0
    return 2.0 ** min(max(math.frexp(largest)[1], -1000), 1000)


def product_norm(out_factor: Tensor, in_factor: Tensor) -> Tensor:
    """Return ``‖X Y^T‖`` (0-d float64) of factors (n, r) and (d, r), without forming the product.

    It is computed from the triangular factors of their QR, because columns that cancel each other would spoil a
    product of Gram matrices.
    """
    out, in_ = (torch.linalg.qr(factor.double(), mode="r").R for factor in (out_factor, in_factor))
    return (out @ in_.T).norm()


def check_norm(norm: Tensor, task: str) -> None:
    """Check that a file can hold the update of a task, and that float32 coefficients hold it at full precision.

    Args:
        norm: 0-d, ``‖ΔW‖`` of an update that is not zero.
        task: Name of the task.

    Raises:
        ValueError: If the norm is out of range.
    """
    if not SMALLEST_NORM < norm < LARGEST_NORM:
        raise ValueError(
            f"task {task!r}: its update has norm {float(norm):.3g}, expected {SMALLEST_NORM:g} to {LARGEST_NORM:g}"
        )


def orienting_signs(columns: Tensor) -> Tensor:
    """Return signs (..., 1, r) that make the largest entry of each column (..., n, r) positive.

    A singular vector is only known up to its sign. Where random numbers meet a basis, as in temporary factors, the
    sign must not depend on rounding, or runs that differ only by rounding drift apart.
    """
    if not columns.shape[-2]:
        return columns.new_ones(*columns.shape[:-2], 1, columns.shape[-1])
    largest = columns.gather(-2, columns.abs().argmax(-2, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(columns.dtype)


def truncated_balanced_factors(out_factor: Tensor, in_factor: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best rank-`rank` factors of ``out_factor @ in_factor.T`` (Eckart-Young), evenly balanced.

    Args:
        out_factor: (..., k_out, r) float64.
        in_factor: (..., k_in, r) float64.
        rank: Number of columns of the result, padded with zero columns where the product has a smaller rank.

    Returns:
        ``U √S`` (..., k_out, rank), ``V √S`` (..., k_in, rank), and the Frobenius norm (...) of what was cut off.
    """
    # The triangular factors are smaller than the product, and have all of its singular values.
    basis_out, core_out = torch.linalg.qr(out_factor)
    basis_in, core_in = torch.linalg.qr(in_factor)
    left, singular_values, right_t = torch.linalg.svd(core_out @ core_in.mT, full_matrices=False)
    # A singular value that is only rounding error has a large root, so its column would be of notable size.
    sizes = torch.linalg.matrix_norm(out_factor) * torch.linalg.matrix_norm(in_factor)
    noise = max(out_factor.shape[-2], in_factor.shape[-2]) * torch.finfo(out_factor.dtype).eps * sizes.unsqueeze(-1)
    kept = torch.where(singular_values > noise, singular_values, 0.0)[..., :rank]
    left, right = basis_out @ left[..., :rank], basis_in @ right_t[..., :rank, :].mT
    root = kept.sqrt().unsqueeze(-2) * orienting_signs(left)
    padding = (0, rank - kept.shape[-1])
    return (
        torch.nn.functional.pad(left * root, padding),
        torch.nn.functional.pad(right * root, padding),
        singular_values[..., rank:].square().sum(-1).sqrt(),
    )


def inverse_norms(norms: Tensor) -> Tensor:
    """Return weights ``w_i = 1 / ‖ΔW_i‖`` (tasks,), 0 for an update that is zero or below the smallest norm accepted.

    The weights keep a task with a large update from dominating the basis. `thin_svd_of_update` decides from the
    factors of an update alone whether it is zero, never because another is larger: a small update counts as much as
    any.
    """
    return torch.where(norms > SMALLEST_NORM, 1 / norms, torch.zeros_like(norms))
