"""Low-rank updates and their compact singular value decomposition.

An update of a linear layer with n outputs and d inputs is kept as its factors, ``ΔW = out_factor @ in_factor.T``; the
(n, d) matrix itself is never formed. For a LoRA adapter, ``out_factor = s B`` and ``in_factor = A^T`` with the scale
``s`` folded in, so that adapters of different alpha, rank or scaling rule mix correctly.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


# Far above any norm of a weight, and its square is a number still. No file holds a larger one.
LARGEST_NORM = 1e30
# Balanced coefficients of an update this quiet are float32 numbers of full precision, as is the root of its weight.
SMALLEST_NORM = 1e-70


@dataclass(frozen=True)
class LowRankUpdate:
    """``ΔW = out_factor @ in_factor.T``.

    Args:
        out_factor: (n, r), any floating dtype.
        in_factor: (d, r).
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
        """(n, d) of the update."""
        return self.out_factor.shape[0], self.in_factor.shape[0]

    def dense(self) -> Tensor:
        """The (n, d) matrix, for tests and for merging into a weight."""
        with without_autocast(self.out_factor.device):
            return self.out_factor @ self.in_factor.T


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products in the type of their factors, in the middle of a training in a smaller one too."""
    if not _has_autocast(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


# torch.compile looks into it from torch 2.12 on only; it is the same for a type of device at any time.
@torch.compiler.assume_constant_result
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


@dataclass(frozen=True)
class CompactUpdate:
    """``ΔW = left @ diag(singular_values) @ right.T``, float64, cut to numerical rank ρ.

    Args:
        left: (n, ρ), orthonormal columns.
        singular_values: (ρ,), descending.
        right: (d, ρ), orthonormal columns.
        noise: 0-d, bound on ``‖·‖`` of what was cut and of the rounding error.
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
        """``(U √S, V √S)``: the same update with its weight shared evenly by both factors."""
        root = self.singular_values.sqrt()
        return LowRankUpdate(self.left * root, self.right * root)


def thin_svd_of_update(update: LowRankUpdate) -> CompactUpdate:
    """Compact SVD of an update from the QR of its factors, without forming the (n, d) matrix.

    The result does not depend on how the update was factored: ``(B M)(M^-1 A)`` gives the same one. Everything is in
    float64. An update below the rounding error of its own factors, ``‖ΔW‖ <= max(n, d) eps ‖B‖ ‖A‖``, has rank 0 (a
    fresh LoRA, whose B is zero).

    Raises:
        ValueError: If a factor has NaN or infinite entries.
    """
    out_factor, in_factor = update.out_factor.double(), update.in_factor.double()
    for name, factor in (("out_factor", out_factor), ("in_factor", in_factor)):
        if not torch.isfinite(factor).all():
            raise ValueError(f"{name} has NaN or infinite entries, expected finite numbers")
    # In a common scale, at which neither squares nor products overflow or vanish.
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
    """The size of a factor's largest entry, to divide by without rounding; 1 for zeros."""
    largest = float(factor.abs().max()) if factor.numel() else 0.0
    return 2.0 ** min(max(math.frexp(largest)[1], -1000), 1000)


def product_norm(out_factor: Tensor, in_factor: Tensor) -> Tensor:
    """``‖X Y^T‖`` (0-d float64) of factors (n, r) and (d, r), without forming the product.

    Of their triangles, as columns that cancel each other would spoil a product of Gram matrices.
    """
    out, in_ = (torch.linalg.qr(factor.double(), mode="r").R for factor in (out_factor, in_factor))
    return (out @ in_.T).norm()


def check_norm(norm: Tensor, task: str) -> None:
    """Refuse a task whose update no file holds, or no coefficients in float32 with full precision.

    Args:
        norm: 0-d, ``‖ΔW‖`` of an update that is not zero.
        task: Its name.

    Raises:
        ValueError: If it is out of range.
    """
    if not SMALLEST_NORM < norm < LARGEST_NORM:
        raise ValueError(
            f"task {task!r}: its update has norm {float(norm):.3g}, expected {SMALLEST_NORM:g} to {LARGEST_NORM:g}"
        )


def orienting_signs(columns: Tensor) -> Tensor:
    """Signs (..., 1, r) that make the largest entry of each column (..., n, r) positive.

    A singular vector is only known up to its sign. Where random numbers meet a basis, as temporary factors do, the
    sign must not hang on rounding, or runs that differ by rounding drift apart.
    """
    if not columns.shape[-2]:
        return columns.new_ones(*columns.shape[:-2], 1, columns.shape[-1])
    largest = columns.gather(-2, columns.abs().argmax(-2, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(columns.dtype)


def truncated_balanced_factors(out_factor: Tensor, in_factor: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Best rank-`rank` factors of ``out_factor @ in_factor.T`` (Eckart-Young), split evenly.

    Args:
        out_factor: (..., k_out, r) float64.
        in_factor: (..., k_in, r) float64.
        rank: Columns of the result; zero columns fill up where the product has a smaller rank.

    Returns:
        ``U √S`` (..., k_out, rank), ``V √S`` (..., k_in, rank), and the Frobenius norm (...) of what was cut off.
    """
    # The factors' triangles are smaller than their product, which has no more singular values.
    basis_out, core_out = torch.linalg.qr(out_factor)
    basis_in, core_in = torch.linalg.qr(in_factor)
    left, singular_values, right_t = torch.linalg.svd(core_out @ core_in.mT, full_matrices=False)
    # The root of a singular value that is rounding error would be a column of notable size.
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
    """Weights ``w_i = 1 / ‖ΔW_i‖`` (tasks,), 0 for an update that is zero, or smaller than any that is taken.

    The weights keep a loud task from buying the basis. What is zero is decided by an update's own factors, in
    `thin_svd_of_update`, never because another is louder: a quiet task counts as much as any.
    """
    return torch.where(norms > SMALLEST_NORM, 1 / norms, torch.zeros_like(norms))
