"""Coefficients in fewer bits: what is rounded to, what that changes, and how it is packed.

In memory, coefficients are numbers of the basis' dtype that the type they are stored in holds exactly, so that a merge
works on what the file has, and knows in float64 what storing it changed.

A 4-bit code stands for a small whole number, positive or negative, times a scale of its block, 32 directions of one
column. The numbers lie closer together near zero, as coefficients of later directions are small. The scale is a
bfloat16 number: products with the numbers are exact, and the codes follow from the products again, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor


CoefficientDtype = Literal["float32", "bfloat16", "4bit"]
COEFFICIENT_DTYPES: tuple[str, ...] = get_args(CoefficientDtype)

BLOCK = 32  # directions that share a scale
_LEVELS = (0.0, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0)  # by size of a code
_OFFSET = 8  # of a code in its four bits; a nibble of 0 is no code, and fills up the last byte of an odd column
_NO_CODE = 0

# A scale under that of the largest number cuts it off, and serves the others better: the best of these is taken.
_SCALES_TRIED = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)

# A smaller one would not be a bfloat16 number of full precision.
_SMALLEST_SCALE = 1e-37

# Relative change of an update by storing it from which on the type does not hold it: it is too large or too small, or
# its factors cancel each other.
MOST_ROUNDING: dict[str, float] = {"float32": 1e-2, "bfloat16": 5e-2, "4bit": 0.8}


@dataclass(frozen=True)
class Rounding:
    """What storing coefficients changed.

    Args:
        sizes: (tasks, 2), norms of the coefficients, output and input side.
        roundings: (tasks, 2), norms of their rounding errors, where those are small.
        changes: (tasks,), ``‖ε̂_out ε̂_in^T - ε_out ε_in^T‖`` of coefficients in fewer bits, of which `sizes` are the
            rounded ones'; 0 for others.
    """

    sizes: Tensor
    roundings: Tensor
    changes: Tensor

    def append(self, other: Rounding) -> Rounding:
        """That of these tasks and of others behind them."""
        return Rounding(
            torch.cat([self.sizes, other.sizes]),
            torch.cat([self.roundings, other.roundings]),
            torch.cat([self.changes, other.changes]),
        )


def store(
    exact: tuple[Tensor, Tensor], stored: tuple[Tensor, Tensor], dtype: CoefficientDtype, *, dim: int
) -> Rounding:
    """Write rounded coefficients where they are kept, and tell what that changed.

    Args:
        exact: Output and input side, float64, (tasks, k, p) or transposed.
        stored: Likewise, in the dtype of the basis; written to.
        dtype: What a file has them in.
        dim: The dimension of the directions, -2 or transposed -1.
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
    """Both sides' coefficients (tasks, k, p) in fewer bits, float64.

    Of 4 bits, each side is then fitted to what rounding made of the other, which takes off a part of the error; not so
    where columns nearly depend on each other, as happens where p is about k: of each task, the better is taken.
    """
    apart = rounded(out.mT, dtype).mT.double(), rounded(in_.mT, dtype).mT.double()
    if dtype == "bfloat16":
        return apart
    found_in = rounded(_fitted(in_, out, apart[0]).mT, dtype).mT.double()
    fitted = rounded(_fitted(out, in_, found_in).mT, dtype).mT.double(), found_in
    better = (_changes(fitted, (out, in_)) < _changes(apart, (out, in_)))[:, None, None]
    return torch.where(better, fitted[0], apart[0]), torch.where(better, fitted[1], apart[1])


def _changes(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> Tensor:
    """``‖ε̂_out ε̂_in^T - ε_out ε_in^T‖`` (tasks,) of coefficients (tasks, k, p)."""
    left, right = torch.cat([found[0], exact[0]], -1), torch.cat([found[1], -exact[1]], -1)
    return torch.linalg.matrix_norm(left @ right.mT)


def _fitted(side: Tensor, other: Tensor, found: Tensor) -> Tensor:
    """The X (tasks, k, p) for which ``X found^T`` is nearest to ``side other^T``; columns of zeros stay zeros."""
    fitted = side @ (other.mT @ found) @ torch.linalg.pinv(found.mT @ found, hermitian=True)
    return fitted * side.any(-2, keepdim=True)


def coefficient_norms(coefficients_out: Tensor, coefficients_in: Tensor) -> Tensor:
    """Frobenius norms of both sides' coefficients, (tasks, 2)."""
    norm = torch.linalg.vector_norm
    return torch.stack([norm(coefficients_out, dim=(-2, -1)), norm(coefficients_in, dim=(-2, -1))], dim=-1)


def rounded(rows: Tensor, dtype: CoefficientDtype) -> Tensor:
    """Coefficients (..., k) as a type of fewer bits has them, float32."""
    if dtype == "bfloat16":
        return rows.to(torch.bfloat16).float()
    codes, scales = _codes_and_scales(rows)
    numbers = _numbers(codes) * scales.unsqueeze(-1) + 0.0  # no -0.0, which has no code
    return numbers.flatten(-2)[..., : rows.shape[-1]].float()


def packed(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rounded coefficients (..., p, k) as 4-bit codes (..., p, ⌈k / 2⌉) uint8, scales (..., p, ⌈k / 32⌉) bfloat16.

    Of two codes in a byte, the first has the lower four bits.

    Raises:
        ValueError: If 4 bits do not hold them exactly.
    """
    k = rows.shape[-1]
    codes, scales = _codes_and_scales(rows, factors=(1.0,))
    if not torch.equal((_numbers(codes) * scales.unsqueeze(-1)).flatten(-2)[..., :k], rows.double()):
        raise ValueError("coefficients are not numbers of 4 bits, expected those of a merge")
    nibbles = (codes.flatten(-2)[..., :k] + _OFFSET).to(torch.uint8)
    nibbles = torch.nn.functional.pad(nibbles, (0, k % 2), value=_NO_CODE)
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4, scales.to(torch.bfloat16)


def unpacked(pairs: Tensor, scales: Tensor) -> Tensor:
    """The coefficients (p, k) float32 of 4-bit codes and scales.

    Raises:
        ValueError: If they are no codes and scales; saying what was found.
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
    """Bytes of coefficients (k, p) in a file, element by element."""
    if dtype == "4bit":
        return p * ((k + 1) // 2 + 2 * ((k + BLOCK - 1) // BLOCK))
    return p * k * (2 if dtype == "bfloat16" else 4)


def _codes_and_scales(rows: Tensor, factors: tuple[float, ...] = _SCALES_TRIED) -> tuple[Tensor, Tensor]:
    """Codes (..., blocks, 32) from -7 to 7 and scales (..., blocks), both float64, of coefficients (..., k)."""
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
    """What codes from -7 to 7 stand for."""
    return codes.new_tensor(_LEVELS)[codes.abs().long()] * codes.sign()
