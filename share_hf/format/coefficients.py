"""Coefficients of a task in one layer as tensors of a file, in any type in which a subspace stores them.

float32, bfloat16   `share_coefficients_out` (k_out, p) and `share_coefficients_in` (k_in, p)
4bit                for each side, its name with `_codes`: (p, ⌈k / 2⌉) uint8, column by column, two codes of 1 to 15
                    in a byte, the first in the lower four bits, and a final 0 where k is odd; and with `_scales`:
                    (p, ⌈k / 32⌉) bfloat16. A number is the scale of its block of 32 directions times the value of
                    code - 8, whose size of 0 to 7 stands for 0, 1, 2, 3, 5, 7, 10 or 15 and whose sign is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..subspace import CoefficientDtype, LayerSubspace, SubspaceSettings, unpacked


SIDES = ("share_coefficients_out", "share_coefficients_in")
_CODES, _SCALES = "_codes", "_scales"


def coefficient_tensors(prefix: str, layer: LayerSubspace, task: str, settings: SubspaceSettings) -> dict[str, Tensor]:
    """Return the tensors of a task's coefficients in one layer, by their names in a file.

    Args:
        prefix: Text that precedes the names of the layer's tensors.
        layer: Layer that has the task.
        task: Name of the task.
        settings: Settings of the subspace, which determine how coefficients are stored.

    Raises:
        ValueError: If the coefficients are not numbers of the type that stores them, as those that a merge writes
            are. The message names the layer and the task.
    """
    sides = layer.coefficients_of(task, trimmed=settings.has_ranks)
    try:
        if settings.coefficient_dtype == "4bit":
            return _packed(prefix, layer, task, sides[0].shape[1])
        if settings.coefficient_dtype == "bfloat16":
            sides = _to_bfloat16(sides[0]), _to_bfloat16(sides[1])
    except ValueError as error:
        raise ValueError(f"{prefix!r}: task {task!r}: {error}") from error
    return {f"{prefix}.{name}": side for name, side in zip(SIDES, sides, strict=True)}


def _packed(prefix: str, layer: LayerSubspace, task: str, rank: int) -> dict[str, Tensor]:
    i, tensors = layer.index(task), {}
    for name, (codes, scales) in zip(SIDES, layer.packed, strict=True):
        tensors[f"{prefix}.{name}{_CODES}"] = codes[i, :rank]
        tensors[f"{prefix}.{name}{_SCALES}"] = scales[i, :rank]
    return tensors


def _to_bfloat16(coefficients: Tensor) -> Tensor:
    rounded = coefficients.to(torch.bfloat16)
    if not torch.equal(rounded.float(), coefficients.float()):
        raise ValueError("coefficients are not bfloat16 numbers, expected those that a merge rounded")
    return rounded


def with_plain_coefficients(path: Path, tensors: Mapping[str, Tensor], dtype: CoefficientDtype) -> dict[str, Tensor]:
    """Return the tensors of a task's file with its coefficients as float32 (k, p).

    Args:
        path: Path of the file.
        tensors: Tensors in the file, by name.
        dtype: Type in which the file should store coefficients. Only bfloat16 is enforced here: for the two others,
            tensors of another type are left as they are.

    Raises:
        ValueError: If coefficients are of another type or damaged. The message names the file and the tensor.
    """
    if dtype == "float32":
        return dict(tensors)
    return with_unpacked(path, tensors) if dtype == "4bit" else _from_bfloat16(path, tensors)


def with_unpacked(path: Path | str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file with 4-bit coefficients unpacked to float32 (k, p).

    Raises:
        ValueError: If codes or scales are missing or damaged. The message names the file and the tensor.
    """
    plain = {}
    for name, tensor in tensors.items():
        side, is_part, part = name.partition(_CODES if name.endswith(_CODES) else _SCALES)
        if not is_part or part or not side.endswith(SIDES):
            plain[name] = tensor
            continue
        codes, scales = tensors.get(f"{side}{_CODES}"), tensors.get(f"{side}{_SCALES}")
        if codes is None or scales is None:
            missing = _CODES if codes is None else _SCALES
            raise ValueError(f"{path}: {side + missing!r} is missing, expected codes and scales")
        if side not in plain:
            try:
                plain[side] = unpacked(codes, scales).mT.contiguous()
            except ValueError as error:
                raise ValueError(f"{path}: {side!r}: {error}") from error
    return plain


def _from_bfloat16(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(SIDES):
            if tensor.dtype != torch.bfloat16:
                raise ValueError(f"{path}: {name!r} is {tensor.dtype}, expected torch.bfloat16")
            plain[name] = tensor.float()
    return plain


def rank_of_coefficients(path: Path | str, tensors: Mapping[str, Tensor], prefix: str, most: int) -> int:
    """Return the rank of a task in one layer, where it may be smaller than p.

    Args:
        path: Path of the file.
        tensors: Tensors in the file, with coefficients as float32 (k, p_i).
        prefix: Name of the coefficients in the file, without the final `_out`.
        most: The pseudo-rank p, the largest possible rank.

    Raises:
        ValueError: If it is not a rank of 1 to p. The message names the file and the tensor.
    """
    name = f"{prefix}_out"
    shape = tuple(tensors[name].shape) if name in tensors else None
    if shape is None or len(shape) != 2 or not 1 <= shape[1] <= most:
        raise ValueError(f"{path}: {name!r} is {shape or 'missing'}, expected a matrix of 1 to {most} columns")
    return shape[1]
