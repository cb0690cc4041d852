"""An embedding whose update lies in a shared subspace."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..subspace.factors import without_autocast
from .linear import Linear
from .rows import MixedBatch


class Embedding(Linear):
    """
    Share on `nn.Embedding`, whose update is a matrix (n, d) = (size of a vector, number of vectors), as PEFT's is.

    Rows of A^T, or of the basis α, are looked up instead of multiplied: what a forward costs does not depend on the
    number of vectors, so nothing is folded and kept. As in PEFT's LoRA, inputs are not dropped, for ids have no zero,
    and `embed_scale` of an embedding that scales its output scales that of the update too.
    """

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # PEFT makes a `lora_A` of any layer, which an embedding does not have

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The task's update in the layout and device of the base weight (d, n), float32."""
        return self.factors(adapter).dense().T

    def _initial_factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """B (n, r) at random and A^T (d, r) zero, as PEFT begins: a row of A^T is trained where its id is seen."""
        return torch.randn(self.out_features, rank), torch.zeros(self.in_features, rank)

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
