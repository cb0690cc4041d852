"""An embedding whose update lies in a shared subspace."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..subspace.factors import without_autocast
from .linear import Linear
from .rows import MixedBatch


class Embedding(Linear):
    """
    Share on `nn.Embedding`, whose update is a matrix (n, d) = (size of a vector, number of vectors), as in PEFT.

    Rows of A^T, or of the basis α, are looked up rather than multiplied. The cost of a forward therefore does not
    depend on the number of vectors, and no folded factors are kept. As in PEFT's LoRA, inputs are not dropped, because
    ids have no zero, and the `embed_scale` of an embedding that scales its output also scales the update.
    """

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # PEFT converts any layer to a `lora_A`, which an embedding does not have

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The task's update in the layout of the base weight (d, n) and on its device, float32."""
        return self.factors(adapter).dense().T

    def _initial_factors(self, rank: int, in_span: bool) -> tuple[Tensor, Tensor]:
        """Return random B (n, r) and zero A^T (d, r), as in PEFT: a row of A^T is trained where its id occurs."""
        factor_out = torch.randn(self.out_features, rank)
        if in_span:
            leading = self.share_basis_out[:, :rank]
            factor_out[:, : leading.shape[1]] = math.sqrt(self.out_features) * leading
        return factor_out, torch.zeros(self.in_features, rank)

    def _looked_up(self, ids: Tensor, rows: Tensor) -> Tensor:
        return F.embedding(ids, rows, padding_idx=self.get_base_layer().padding_idx)

    def _scaled(self, update: Tensor, result: Tensor) -> Tensor:
        scale = self._get_embed_scale()
        return (update if scale is None else update * scale.to(update.dtype)).to(result.dtype)

    def _with_update(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        with without_autocast(result.device):
            z, up = self._looked_up(x, self._columns(adapter, "in")).float(), self._columns(adapter, "out").float()
            if (of_in := self._coefficients(adapter, "in")) is not None:
                z = z @ of_in.float()
                up = up @ self._coefficients(adapter, "out").float()
            return result + self._scaled(z.to(result.dtype) @ up.T.to(result.dtype), result)

    def _with_mixed(self, result: Tensor, x: Tensor, batch: MixedBatch) -> Tensor:
        coefficients_out, coefficients_in = self.coefficients_of_batch(batch, len(x), self.share_basis_in).of_samples()
        looked_up = self._looked_up(x, self.share_basis_in)
        z = looked_up.flatten(1, -2) if x.ndim > 1 else looked_up.unsqueeze(1)
        y = z @ coefficients_in @ coefficients_out.mT
        return result + self._scaled(F.linear(y, self.share_basis_out).reshape(result.shape), result)
