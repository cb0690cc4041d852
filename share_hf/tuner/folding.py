"""Factors that a forward folded, kept for as long as they are right, and their product."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


# How many tasks' folded factors a layer keeps. At rank 8 and 4096 x 4096 they take 128 kB each in bfloat16.
FOLDED_TASKS = 8


class _Held:
    """A tensor as it was, without a copy.

    It and its storage are held, so that no other tensor can take their identity or address.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._storage, self._version = tensor, tensor.detach(), tensor._version

    def is_as(self, tensor: Tensor) -> bool:
        """Whether this is the tensor and nothing has changed it; in-place changes count up its version."""
        return (
            tensor is self._tensor
            and tensor.data_ptr() == self._storage.data_ptr()
            and tensor.stride() == self._storage.stride()
            and tensor._version == self._version
        )


class _Copied:
    """A tensor as it was, by its content."""

    def __init__(self, tensor: Tensor) -> None:
        self._content = tensor.detach().clone()

    def is_as(self, tensor: Tensor) -> bool:
        return tensor.device == self._content.device and torch.equal(tensor, self._content)


class _Row:
    """A task's row in a stack of coefficients, as it was."""

    def __init__(self, stack: Tensor, row: Tensor) -> None:
        self._stack = stack
        self._compared = row if row.device.type == "cpu" else stack
        self._was = _Copied(row) if row.device.type == "cpu" else _Held(stack)

    def is_as(self, stack: Tensor) -> bool:
        """Whether this is the stack, and the row there is the same."""
        return stack is self._stack and self._was.is_as(self._compared)


class FoldedFactors:
    """A task's folded factors, and what they were formed from.

    Fused optimizers, writes through `.data` and averages that are swapped in change parameters behind autograd's
    back. On a CPU, contents are compared, which are small. Elsewhere that would wait for the device in each layer, so
    nothing that may be trained is kept.
    """

    def __init__(
        self,
        factors: tuple[Tensor, Tensor],
        dtype: torch.dtype,
        parameters: list[Tensor],
        bases: list[Tensor],
        rows: Mapping[int, Tensor],
    ) -> None:
        """Remember what the factors were formed from.

        Args:
            factors: A (p, d) and B (n, p).
            dtype: Theirs.
            parameters: What the task has, with whole stacks where it has a row in one.
            bases: The bases.
            rows: Its rows, by the place of their stack among the parameters.
        """
        self.factors = factors
        self._dtype = dtype
        self._sources = [
            _Row(p, rows[place]) if place in rows else _Copied(p) if p.device.type == "cpu" else _Held(p)
            for place, p in enumerate(parameters)
        ]
        self._sources += [_Held(basis) for basis in bases]

    @staticmethod
    def may_keep(parameters: list[Tensor], bases: list[Tensor]) -> bool:
        """Whether a change of these would be noticed: the tensors of an inference mode count no versions."""
        return not any(basis.is_inference() for basis in bases) and all(
            p.device.type == "cpu" or not (p.requires_grad or p.is_inference()) for p in parameters
        )

    def is_of(self, parameters: list[Tensor], bases: list[Tensor], dtype: torch.dtype) -> bool:
        """Whether these are the parameters and bases as they were then."""
        sources = [*parameters, *bases]
        return (
            dtype == self._dtype
            and len(sources) == len(self._sources)
            and all(held.is_as(source) for source, held in zip(sources, self._sources, strict=True))
        )


def with_product(result: Tensor, z: Tensor, up: Tensor) -> Tensor:
    """``result + z up^T``, if dtypes allow in one product, without the update as a tensor of its own."""
    if z.dtype != result.dtype:
        return result + F.linear(z, up).to(result.dtype)
    n = result.shape[-1]
    rows = torch.addmm(result.reshape(-1, n), z.reshape(result.numel() // n, z.shape[-1]), up.T)
    return rows.view(result.shape)
