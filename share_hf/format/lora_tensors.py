"""Convert the tensors that PEFT's LoRA has for each kind of layer to matrices and back."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from ..state import Layout
from ..subspace import LowRankUpdate


# A layer stores its factors as weights of modules of their own, an embedding as parameters.
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?(embedding)|\.weight)")


def factor_of(name: str) -> tuple[str, str] | None:
    """Return the module and factor of a LoRA tensor: "A" or "B", or "embedding_A" or "embedding_B" of an embedding."""
    match = _FACTOR.fullmatch(name)
    return None if match is None else (match["module"], (match["embedding"] or "") + match["side"])


def as_matrices(path: Path, module: str, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Layout | None]:
    """Return A (r, d) and B (n, r) of a module, and its layout if it is not a dense layer.

    A convolution's A has a kernel, (r, channels, *kernel), and its B a kernel of size one, (n, r, 1, …).

    Args:
        path: Path of the file, for messages.
        module: Name of the module.
        tensors: Tensors by factor, as `factor_of` calls it.

    Raises:
        ValueError: If one of the two is missing, or no layer has such factors.
    """
    prefix = "embedding_" if any(name.startswith("embedding_") for name in tensors) else ""
    if set(tensors) != {f"{prefix}A", f"{prefix}B"}:
        missing = next((side for side in (f"{prefix}A", f"{prefix}B") if side not in tensors), None)
        found = f"no lora_{missing}" if missing else f"{sorted(f'lora_{name}' for name in tensors)}"
        raise ValueError(f"{path}: {module!r} has {found}, expected both lora_{prefix}A and lora_{prefix}B")
    a, b = tensors[f"{prefix}A"], tensors[f"{prefix}B"]
    kernel = tuple(a.shape[2:])
    expected = "(r, d) and (n, r)"
    if kernel and not prefix:
        expected = "(r, channels, *kernel) and (n, r, 1, …), of a convolution without groups in up to three dimensions"
    fits = 2 <= a.ndim <= (2 if prefix else 5) and a.ndim == b.ndim and set(b.shape[2:]) <= {1}
    if not fits or a.shape[0] != b.shape[1] or not a.shape[0] or 0 in kernel:
        raise ValueError(
            f"{path}: lora_{prefix}A and lora_{prefix}B of {module!r} are {tuple(a.shape)} and {tuple(b.shape)}, "
            f"expected {expected}"
        )
    if prefix:
        return a, b, Layout("embedding")
    return a.flatten(1), b.flatten(1), Layout("convolution", kernel) if kernel else None


def as_tensors(module: str, update: LowRankUpdate, layout: Layout | None, rank: int) -> dict[str, Tensor]:
    """Return the tensors of a module's update, by name, in a LoRA of this rank, padded with zeros."""
    missing = (0, rank - update.out_factor.shape[1])
    a = torch.nn.functional.pad(update.in_factor, missing).T
    b = torch.nn.functional.pad(update.out_factor, missing)
    if layout is None:
        return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    if layout.kind == "embedding":
        return {f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": b}
    ones = (1,) * len(layout.kernel)
    return {
        f"{module}.lora_A.weight": a.reshape(rank, -1, *layout.kernel),
        f"{module}.lora_B.weight": b.reshape(-1, rank, *ones),
    }
