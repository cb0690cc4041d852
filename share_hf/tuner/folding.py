"""Factors folded by a forward and kept for as long as they are valid, and the product with them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


# Number of tasks whose folded factors a layer keeps. At rank 8 and 4096 x 4096 they take 128 kB each in bfloat16.
FOLDED_TASKS = 8


class _Held:
    """The state of a tensor at a point in time, without a copy.

    The tensor and its storage are kept alive, so that no other tensor can take over their identity or address.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._storage, self._version = tensor, tensor.detach(), tensor._version

    def is_as(self, tensor: Tensor) -> bool:
        """Return whether this is the same tensor, unchanged; in-place changes increment its version."""
        return (
            tensor is self._tensor
            and tensor.data_ptr() == self._storage.data_ptr()
            and tensor.stride() == self._storage.stride()
            and tensor._version == self._version
        )


class _Copied:
    """The state of a tensor at a point in time, as a copy of its content."""

    def __init__(self, tensor: Tensor) -> None:
        self._content = tensor.detach().clone()

    def is_as(self, tensor: Tensor) -> bool:
        return tensor.device == self._content.device and torch.equal(tensor, self._content)


class _Row:
    """The state of a task's row in a stack of coefficients at a point in time."""

    def __init__(self, stack: Tensor, row: Tensor) -> None:
        self._stack = stack
        self._compared = row if row.device.type == "cpu" else stack
        self._was = _Copied(row) if row.device.type == "cpu" else _Held(stack)

    def is_as(self, stack: Tensor) -> bool:
        """Return whether this is the same stack and the row in it is unchanged."""
        return stack is self._stack and self._was.is_as(self._compared)


class FoldedFactors:
    """A task's folded factors, and the tensors that they were formed from.

    Fused optimizers, writes through `.data`, and averages that are swapped in change parameters without autograd
    noticing. On a CPU, the contents are compared, which are small. Elsewhere a comparison would wait for the device in
    each layer, so factors of anything that may be trained are not kept.
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
            factors: Factors A (p, d) and B (n, p).
            dtype: Data type of the factors.
            parameters: Parameters of the task, with the whole stack where the task has a row in one.
            bases: Bases of the layer.
            rows: Rows of the task, by the position of their stack among the parameters.
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
        """Return whether a change of these would be noticed: inference tensors do not count versions."""
        return not any(basis.is_inference() for basis in bases) and all(
            p.device.type == "cpu" or not (p.requires_grad or p.is_inference()) for p in parameters
        )

    def is_of(self, parameters: list[Tensor], bases: list[Tensor], dtype: torch.dtype) -> bool:
        """Return whether these are the same parameters and bases, unchanged since then."""
        sources = [*parameters, *bases]
        return (
            dtype == self._dtype
            and len(sources) == len(self._sources)
            and all(held.is_as(source) for source, held in zip(sources, self._sources, strict=True))
        )


def with_product(result: Tensor, z: Tensor, up: Tensor) -> Tensor:
    """Compute ``result + z up^T``, in one product if the dtypes allow it, without a tensor for the update's output."""
    if z.dtype != result.dtype:
        return result + F.linear(z, up).to(result.dtype)
    n = result.shape[-1]
    rows = torch.addmm(result.reshape(-1, n), z.reshape(result.numel() // n, z.shape[-1]), up.T)
    return rows.view(result.shape)
