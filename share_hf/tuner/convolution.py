"""A convolution whose update lies in a shared subspace."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .linear import Linear
from .rows import MixedBatch


class Convolution(Linear):
    """
    Share on `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`, whose update is a matrix (n, d) of low rank.

    The matrix has a row for each output channel and a column for each number under the kernel, ``d = channels ·
    kernel``. Like PEFT's LoRA, the layer first convolves with A to p channels (or with the basis α of a mixed batch to
    k channels), using its own stride and padding, and then maps these to n channels at each place.
    """

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # PEFT converts any layer's update to a matrix, which has no kernel

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The task's update in the layout and device of the base weight (n, channels, *kernel), float32."""
        return self._as_kernels(self.factors(adapter).dense())

    @property
    def _places(self) -> int:
        """Number of dimensions in which the kernel moves."""
        return len(self.get_base_layer().kernel_size)

    def _as_kernels(self, rows: Tensor) -> Tensor:
        layer = self.get_base_layer()
        return rows.reshape(len(rows), layer.in_channels, *layer.kernel_size)

    def _convolved(self, x: Tensor, rows: Tensor) -> Tensor:
        """Compute the layer with kernels (j, d) and without a bias, (…, j, *places)."""
        return self.get_base_layer()._conv_forward(x, self._as_kernels(rows), None)

    def _with_update(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        down, up = self.folded_factors(adapter, x.dtype)
        inputs = F.dropout(x, self.share_dropout[adapter], self.training)
        return result + _at_each_place(self._convolved(inputs, down), up, self._places).to(result.dtype)

    def _with_mixed(self, result: Tensor, x: Tensor, batch: MixedBatch) -> Tensor:
        coefficients_out, coefficients_in = self.coefficients_of_batch(batch, len(x), x).of_samples()
        z = self._convolved(x, self.share_basis_in.T.to(x.dtype))
        y = (coefficients_out @ (coefficients_in.mT @ z.flatten(2))).view(*z.shape)
        return result + _at_each_place(y, self.share_basis_out.to(x.dtype), self._places).to(result.dtype)


def _at_each_place(z: Tensor, up: Tensor, places: int) -> Tensor:
    """Compute ``up z`` on the channels of z (…, j, *places) at each place."""
    return F.linear(z.movedim(-1 - places, -1), up).movedim(-1, -1 - places)
