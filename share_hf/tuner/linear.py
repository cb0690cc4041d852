"""A dense layer whose update lies in a shared subspace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils import quantization_extra_repr
from peft.utils.other import transpose
from torch import Tensor, nn

from .config import ShareConfig
from .folding import with_product
from .layer import ShareLayer
from .merging import MergingLayer
from .ranks import make_room
from .rows import MixedBatch
from .together import dropped_inputs


class Linear(nn.Module, MergingLayer, ShareLayer):
    """Share on a dense layer: `nn.Linear`, `Conv1D`, or a quantized layer that PEFT supports."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: ShareConfig,
        basis_out: Tensor,
        basis_in: Tensor,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        ShareLayer.__init__(self, base_layer, basis_out, basis_in, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, inference_mode=config.inference_mode)

    def train(self, mode: bool = True) -> Linear:
        # Writes behind autograd's back are not always noticed, so nothing folded outlives a change of mode.
        self._folded.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        """Move the layer. A cast of the model, by `model.bfloat16()` or a trainer's full-precision flag, does not
        round the basis."""
        self._folded.clear()
        basis = self.share_basis_out, self.share_basis_in
        super()._apply(fn, recurse)
        self.share_basis_out, self.share_basis_in = (
            moved if kept.is_meta else kept.to(moved.device)
            for kept, moved in zip(basis, (self.share_basis_out, self.share_basis_in), strict=True)
        )
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        self.check_fingerprints(state_dict, prefix)
        for name in ("share_coefficients_out", "share_coefficients_in"):
            make_room(getattr(self, name), self.share_ranks, state_dict, f"{prefix}{name}.")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The task's update in the layout of the base weight and on its device, float32."""
        return transpose(self.factors(adapter).dense(), self.fan_in_fan_out)

    def set_base_weight(self, weight_data: Tensor) -> None:
        bias = getattr(self.get_base_layer(), "bias", None)
        super().set_base_weight(weight_data)
        if bias is not None and self.get_base_layer().bias is None:  # PEFT's new layer of HQQ lacks the bias
            self.get_base_layer().bias = bias

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        batch = self._mixed_batch(kwargs.pop("adapter_names", None))
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        if self.quantization_backend is not None:
            if self.training and torch.is_grad_enabled() and x.requires_grad and not result.requires_grad:
                raise RuntimeError(
                    f"no gradient flows through {self.get_base_layer()}, so what lies before it would not be trained, "
                    "or trained wrongly; expected a quantization that supports training"
                )
            result = self.quantization_backend.maybe_clone_base_result(result)
        if batch is not None:
            return self._with_updates(result, x, batch)
        for adapter in self.active_adapters:
            if self.has_task(adapter):
                result = self._with_update(result, x, adapter)
        return result

    def _with_update(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        """Add the output of a task's update to the output of the layer."""
        down, up = self.folded_factors(adapter, x.dtype)
        inputs = F.dropout(x, self.share_dropout[adapter]) if self.training else x
        return with_product(result, F.linear(inputs, down), up)

    def _with_updates(self, result: Tensor, x: Tensor, batch: MixedBatch) -> Tensor:
        """Add the output of each sample's task to the output of the layer."""
        if not torch.compiler.is_compiling():  # a compiled graph would be compiled anew for other names
            batch.indices(len(x), x.device)
            if not self.check_mixed(batch):
                return result
            if batch.only_task is not None and not self.training:
                return self._with_update(result, x, batch.only_task)
            if self.training and any(map(self.share_dropout.get, batch.tasks)):
                x = dropped_inputs(self, x, batch.names_of(len(x)))
        return self._with_mixed(result, x, batch)

    def _with_mixed(self, result: Tensor, x: Tensor, batch: MixedBatch) -> Tensor:
        """Add the updates of a batch with arbitrary tasks to the output.

        Only the (k, p) coefficients differ between samples, so the bases can be applied once to all of them, ``z = x
        α``, ``y = (z ε_in) ε_out^T``, ``y β^T``, whatever the number of tasks. If each task has many tokens, as in a
        prefill, it is cheaper to form the factors of every task first, ``α ε_in`` and ``β ε_out``.
        """
        tokens = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)
        coefficients = self.coefficients_of_batch(batch, len(x), x)
        if coefficients.fold_pays(tokens.shape[1]):
            down, up = coefficients.folded(self.share_basis_in.to(x.dtype), self.share_basis_out.to(x.dtype))
            z = tokens @ down.mT
            if z.dtype != result.dtype:
                return result + (z @ up).to(result.dtype).view(result.shape)
            return torch.baddbmm(result.reshape(len(x), -1, result.shape[-1]), z, up).view(result.shape)
        of_samples_out, of_samples_in = coefficients.of_samples()
        y = (tokens @ self.share_basis_in.to(x.dtype)) @ of_samples_in @ of_samples_out.mT
        return with_product(result, y, self.share_basis_out.to(x.dtype))

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "share." + super().__repr__()
