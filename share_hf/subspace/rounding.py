"""Coefficients in fewer bits: rounding them, measuring what that changes, and packing them.

In memory, coefficients have the dtype of the basis, with values that their storage type holds exactly. A merge thus
works on the values in the file, and computes in float64 how much storing them changed.

A 4-bit code stands for a small whole number, positive or negative, times the scale of its block of 32 directions in
one column. The numbers lie closer together near zero, because coefficients of later directions are small. The scale is
a bfloat16 number: its products with the numbers are exact, and the codes can be recovered from them to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor


CoefficientDtype = Literal["float32", "bfloat16", "4bit"]
COEFFICIENT_DTYPES: tuple[str, ...] = get_args(CoefficientDtype)

BLOCK = 32  # directions that share a scale
_LEVELS = (0.0, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0)  # numbers by absolute value of the code
_OFFSET = 8  # offset of a code in its four bits; a nibble of 0 is no code, and pads the last byte of an odd column
_NO_CODE = 0

# A scale below that of the largest number clips it but suits the others better, so the best of these factors is used.
_SCALES_TRIED = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)

# bfloat16 does not hold smaller scales at full precision.
_SMALLEST_SCALE = 1e-37

# Largest relative change of an update by storing it in each type. Beyond it the type cannot hold the update: it is too
# large or too small, or its factors cancel each other.
MOST_ROUNDING: dict[str, float] = {"float32": 1e-2, "bfloat16": 5e-2, "4bit": 0.8}


@dataclass(frozen=True)
class Rounding:
    """Changes made by storing coefficients.

    Args:
        sizes: (tasks, 2), norms of the coefficients on the output and input side. For coefficients in fewer bits, they
            are the norms after rounding.
        roundings: (tasks, 2), norms of the rounding errors of float32 coefficients; 0 for coefficients in fewer bits.
        changes: (tasks,), ``‖ε̂_out ε̂_in^T - ε_out ε_in^T‖`` of coefficients in fewer bits; 0 for float32.
    """

    sizes: Tensor
    roundings: Tensor
    changes: Tensor

    def append(self, other: Rounding) -> Rounding:
        """Return the changes of these tasks, followed by the changes of the tasks in `other`."""
        return Rounding(
            torch.cat([self.sizes, other.sizes]),
            torch.cat([self.roundings, other.roundings]),
            torch.cat([self.changes, other.changes]),
        )


def store(
    exact: tuple[Tensor, Tensor], stored: tuple[Tensor, Tensor], dtype: CoefficientDtype, *, dim: int
) -> Rounding:
    """Write rounded coefficients to their destination, and return how much that changed them.

    Args:
        exact: Coefficients of the output and input side, float64, (tasks, k, p) or transposed.
        stored: Destination of both sides, in the same shapes and the dtype of the basis.
        dtype: Type that a file stores them in.
        dim: Dimension of the directions, -2, or -1 if transposed.
    """
    if dtype == "float32":
        for side, into in zip(exact, stored, strict=True):
            into.copy_(side)
        roundings = coefficient_norms(stored[0] - exact[0], stored[1] - exact[1])
        return Rounding(coefficient_norms(*exact), roundings, torch.zeros_like(roundings[:, 0]))
    of_rows = tuple(side.transpose(dim, -2) for side in exact)
    found = _rounded_pair(*of_rows, dtype)
    for side, into in zip(found, stored, strict=True):
        into.copy_(side.transpose(dim, -2))
    sizes = coefficient_norms(*found)
    return Rounding(sizes, torch.zeros_like(sizes), _changes(found, of_rows))


def _rounded_pair(out: Tensor, in_: Tensor, dtype: CoefficientDtype) -> tuple[Tensor, Tensor]:
    """Round the coefficients (tasks, k, p) of both sides to fewer bits, as float64.

    With 4 bits, each side is then fitted to the rounded values of the other, which usually removes part of the error.
    It does not where columns are nearly dependent, as happens if p is about k, so each task takes the better result.
    """
    apart = rounded(out.mT, dtype).mT.double(), rounded(in_.mT, dtype).mT.double()
    if dtype == "bfloat16":
        return apart
    found_in = rounded(_fitted(in_, out, apart[0]).mT, dtype).mT.double()
    fitted = rounded(_fitted(out, in_, found_in).mT, dtype).mT.double(), found_in
    better = (_changes(fitted, (out, in_)) < _changes(apart, (out, in_)))[:, None, None]
    return torch.where(better, fitted[0], apart[0]), torch.where(better, fitted[1], apart[1])


def _changes(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> Tensor:
    """Return ``‖ε̂_out ε̂_in^T - ε_out ε_in^T‖`` (tasks,) of coefficients (tasks, k, p)."""
    left, right = torch.cat([found[0], exact[0]], -1), torch.cat([found[1], -exact[1]], -1)
    return torch.linalg.matrix_norm(left @ right.mT)


def _fitted(side: Tensor, other: Tensor, found: Tensor) -> Tensor:
    """Return the X (tasks, k, p) for which ``X found^T`` is nearest to ``side other^T``; zero columns stay zero."""
    fitted = side @ (other.mT @ found) @ torch.linalg.pinv(found.mT @ found, hermitian=True)
    return fitted * side.any(-2, keepdim=True)


def coefficient_norms(coefficients_out: Tensor, coefficients_in: Tensor) -> Tensor:
    """Return the Frobenius norms (tasks, 2) of the coefficients of both sides."""
    norm = torch.linalg.vector_norm
    return torch.stack([norm(coefficients_out, dim=(-2, -1)), norm(coefficients_in, dim=(-2, -1))], dim=-1)


def rounded(rows: Tensor, dtype: CoefficientDtype) -> Tensor:
    """Round coefficients (..., k) to a type of fewer bits, as float32."""
    if dtype == "bfloat16":
        return rows.to(torch.bfloat16).float()
    codes, scales = _codes_and_scales(rows)
    numbers = _numbers(codes) * scales.unsqueeze(-1) + 0.0  # avoid -0.0, which has no code
    return numbers.flatten(-2)[..., : rows.shape[-1]].float()


def packed(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Pack coefficients (..., p, k) as 4-bit codes (..., p, ⌈k / 2⌉) uint8 and scales (..., p, ⌈k / 32⌉) bfloat16.

    The first of the two codes in a byte is in the lower four bits.

    Raises:
        ValueError: If 4 bits do not represent the coefficients exactly.
    """
    k = rows.shape[-1]
    codes, scales = _codes_and_scales(rows, factors=(1.0,))
    if not torch.equal((_numbers(codes) * scales.unsqueeze(-1)).flatten(-2)[..., :k], rows.double()):
        raise ValueError("coefficients are not 4-bit numbers, expected those that a merge rounded")
    nibbles = (codes.flatten(-2)[..., :k] + _OFFSET).to(torch.uint8)
    nibbles = torch.nn.functional.pad(nibbles, (0, k % 2), value=_NO_CODE)
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4, scales.to(torch.bfloat16)


def unpacked(pairs: Tensor, scales: Tensor) -> Tensor:
    """Unpack the coefficients (p, k) float32 from 4-bit codes and scales.

    Raises:
        ValueError: If the tensors are not codes and scales. The error describes what was found.
    """
    if pairs.dtype != torch.uint8 or scales.dtype != torch.bfloat16 or pairs.ndim != 2 or scales.ndim != 2:
        raise ValueError(
            f"codes and scales are {pairs.dtype} {tuple(pairs.shape)} and {scales.dtype} {tuple(scales.shape)}, "
            "expected matrices of torch.uint8 and torch.bfloat16"
        )
    nibbles = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2)
    is_odd = nibbles.numel() > 0 and bool((nibbles[:, -1] == _NO_CODE).all())
    nibbles = nibbles[:, : nibbles.shape[1] - is_odd]
    if (nibbles == _NO_CODE).any():
        raise ValueError("codes have a 0, expected 1 to 15")
    k = nibbles.shape[1]
    if scales.shape != (len(pairs), -(-k // BLOCK)):
        raise ValueError(f"scales are {tuple(scales.shape)}, expected {(len(pairs), -(-k // BLOCK))} for k = {k}")
    each = scales.float().repeat_interleave(BLOCK, dim=1)[:, :k]
    return _numbers(nibbles.float() - _OFFSET) * each + 0.0


def stored_bytes(k: Tensor | int, p: Tensor | int, dtype: CoefficientDtype) -> Tensor | int:
    """Return the number of bytes that coefficients (k, p) take in a file, element by element."""
    if dtype == "4bit":
        return p * ((k + 1) // 2 + 2 * ((k + BLOCK - 1) // BLOCK))
    return p * k * (2 if dtype == "bfloat16" else 4)


def _codes_and_scales(rows: Tensor, factors: tuple[float, ...] = _SCALES_TRIED) -> tuple[Tensor, Tensor]:
    """Return codes (..., blocks, 32) from -7 to 7 and scales (..., blocks), both float64, of coefficients (..., k)."""
    count = -(-rows.shape[-1] // BLOCK)
    blocks = torch.nn.functional.pad(rows.double(), (0, count * BLOCK - rows.shape[-1])).unflatten(-1, (count, BLOCK))
    levels = blocks.new_tensor(_LEVELS)
    borders = (levels[1:] + levels[:-1]) / 2
    largest = blocks.abs().amax(-1)
    best_codes, best_scales = torch.zeros_like(blocks), torch.zeros_like(largest)
    least = torch.full_like(largest, torch.inf)
    for factor in factors:
        scales = (largest * (factor / _LEVELS[-1])).to(torch.bfloat16).double()
        scales = torch.where(scales < _SMALLEST_SCALE, 0.0, scales)
        steps = torch.where(scales > 0, scales, torch.inf).unsqueeze(-1)
        codes = torch.bucketize((blocks / steps).abs().contiguous(), borders) * blocks.sign()
        errors = (_numbers(codes) * scales.unsqueeze(-1) - blocks).square().sum(-1)
        better = errors < least
        least = torch.where(better, errors, least)
        best_codes = torch.where(better.unsqueeze(-1), codes, best_codes)
        best_scales = torch.where(better, scales, best_scales)
    return best_codes, best_scales


def _numbers(codes: Tensor) -> Tensor:
    """Return the numbers that codes from -7 to 7 stand for."""
    return codes.new_tensor(_LEVELS)[codes.abs().long()] * codes.sign()
