"""Merging of tasks into the weights of their layers, undone by subtraction or from a copy of the weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge, onload_layer
from peft.utils.quantization_utils import Bnb4bitBackend, Bnb8bitBackend, HqqBackend
from torch import Tensor, nn

from ..format.module_names import without_wrappers
from .placement import check_held_once


# Whether a merge keeps a copy of the weight: no; yes, on the weight's device; or yes, in CPU memory.
KeepBase: TypeAlias = bool | Literal["cpu"]


@dataclass(frozen=True)
class KeptBase:
    """The weight of a layer before tasks were merged into it, packed as it was if it is quantized.

    It is neither a tensor nor a module itself, so the layer that holds it does not save, move or cast it.

    Args:
        content: Weight, with its scales if quantized; for HQQ the layer itself, which a merge replaces.
    """

    content: Tensor | nn.Module

    @classmethod
    def of(cls, layer: MergingLayer, keep: KeepBase) -> KeptBase:
        """Copy the weight that a layer has now.

        The weight of an offloaded layer is copied to CPU memory, so that the copy does not fill the device.
        """
        base, backend = layer.get_base_layer(), layer.quantization_backend
        if isinstance(backend, HqqBackend):
            return cls(base)
        if isinstance(backend, (Bnb4bitBackend, Bnb8bitBackend)):
            weight = copy.deepcopy(base.weight)
            if isinstance(backend, Bnb8bitBackend) and weight.SCB is None:  # a forward has moved the scales
                weight.SCB = base.state.SCB.clone()
        else:
            weight = base.weight.detach().clone()
        in_memory = keep == "cpu" or offload_hook_of(base) is not None
        return cls(weight.to("cpu") if in_memory else weight)

    def put_back(self, layer: MergingLayer) -> None:
        """Restore this as the layer's weight, on the current device and, unless quantized, in the current dtype."""
        base, backend = layer.get_base_layer(), layer.quantization_backend
        if isinstance(backend, HqqBackend):
            layer.base_layer = self.content
            return
        weight = self.content.to(base.weight.device)
        if isinstance(backend, Bnb4bitBackend):
            weight.module, base.quant_state = base, weight.quant_state
            base.weight = weight
        elif isinstance(backend, Bnb8bitBackend):
            weight.CB = weight.data
            base.weight = weight
            base.state.reset_grads()  # makes the next forward take weight and scales from the parameter
        elif backend is not None:
            base.weight = nn.Parameter(weight, requires_grad=False)
        else:
            layer.set_base_weight(weight.to(base.weight.dtype))


class MergingLayer(BaseTunerLayer):
    """A layer whose weight tasks can be merged into and taken out of again.

    Nothing here is differentiated: a newly quantized weight would otherwise hold on to the task's parameters.
    """

    _kept_base: KeptBase | None = None

    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None, keep_base: KeepBase = False
    ) -> None:
        """
        Merge the active adapter weights into the base weights.

        Args:
            safe_merge (`bool`, *optional*):
                Whether to check the merged weights for NaN and infinity first, and leave the layer unchanged if there
                are any.
            adapter_names (`list[str]`, *optional*):
                Names of the adapters to merge. None means the active ones.
            keep_base (`bool` or `"cpu"`, *optional*):
                Whether to keep a copy of the weight. See [`ShareModel.merge_adapter`]. A copy that an earlier merge
                kept stays in any case.

        Raises:
            ValueError: If a merged weight is not finite, or a copy is requested of a weight that has tasks merged in.
        """
        adapters = self._adapters_in(check_adapters_to_merge(self, adapter_names))
        if not adapters:
            return
        if keep_base:
            self.check_may_keep()
        merged = self.merged_weight(adapters, safe=safe_merge)
        kept = KeptBase.of(self, keep_base) if keep_base and self._kept_base is None else self._kept_base
        self.set_base_weight(merged)
        self._kept_base = kept
        self.merged_adapters.extend(adapters)

    def _adapters_in(self, names: list[str]) -> list[str]:
        """The adapters among these that adapt the layer and are not merged into it yet, each once."""
        return [name for name in dict.fromkeys(names) if self.has_task(name) and name not in self.merged_adapters]

    def check_may_keep(self) -> None:
        """Refuse to keep a copy of a weight that has tasks merged in and was not kept before the first of them.

        Raises:
            ValueError: If there is no earlier copy. Names the tasks.
        """
        if self.merged and self._kept_base is None:
            raise ValueError(
                f"keep_base is set, but {self.merged_adapters} are merged already, without a copy of the weights as "
                "they were; call unmerge_adapter() first"
            )

    def check_finite(self, adapter_names: list[str] | None) -> None:
        """Refuse a merge after which the weight would hold NaN or infinity.

        Args:
            adapter_names: Names of the adapters to merge. None means the active ones.

        Raises:
            ValueError: If the weight would not be finite. Names the adapter.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        self.merged_weight(self._adapters_in(names), safe=True)

    @torch.no_grad()
    def merged_weight(self, adapters: list[str], *, safe: bool) -> Tensor:
        """Return the dequantized base weight plus the updates of adapters, rounded once to its dtype.

        Args:
            adapters: Names of adapters that adapt this layer.
            safe: Whether to raise a `ValueError` if NaN or infinity occurs.
        """
        weight = self.get_base_weight()
        merged = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for adapter in adapters:
            merged = merged + self.get_delta_weight(adapter).to(merged)
            if safe and not torch.isfinite(merged.to(weight.dtype)).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
        return merged.to(weight.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again.

        If a copy of the weight was kept, the weight is bit-identical to the one before the first merge. Otherwise the
        updates are subtracted, which leaves rounding errors, and errors of a new quantization if it is quantized.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        with self._loaded():
            if self._kept_base is not None:
                self._kept_base.put_back(self)
            else:
                weight = self.get_base_weight()
                unmerged = weight.to(torch.promote_types(weight.dtype, torch.float32))
                for adapter in reversed(self.merged_adapters):
                    unmerged = unmerged - self.get_delta_weight(adapter).to(unmerged)
                self.set_base_weight(unmerged.to(weight.dtype))
        self._kept_base = None
        self.merged_adapters.clear()

    def _loaded(self) -> AbstractContextManager[None]:
        """Load the weight of an offloaded layer, which is missing when a forward or a change of task unmerges."""
        weight = getattr(self.get_base_layer(), "weight", None)
        return onload_layer(self) if isinstance(weight, Tensor) and weight.is_meta else nullcontext()


class MergingTuner(BaseTuner):
    """A tuner that merges tasks into all layers of a model, or into none."""

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, keep_base: KeepBase = False
    ) -> None:
        """
        Merge adapters into the base weights, so that a forward costs the same as without adapters.

        `unmerge_adapter()` takes all merged adapters out, whatever the number of calls that merged them. So do
        `set_adapter` and a forward within `disable_adapter()`. `unload()` does not: as in other tuners of PEFT, the
        model that it returns has the merged adapters in its weights.

        Args:
            adapter_names (`list[str]`, *optional*):
                Names of the adapters to merge. None means the active ones.
            safe_merge (`bool`, *optional*):
                Whether to check the merged weights of all layers for NaN and infinity first. Each layer's merge is
                then computed twice.
            keep_base (`bool` or `"cpu"`, *optional*):
                Whether to keep a copy of each weight that is merged into. If so, unmerging restores all base weights
                bit for bit, including the packed weights of a quantized model. The copies take as much memory as the
                weights, on the same device, or in CPU memory for `"cpu"` and for layers that accelerate has offloaded;
                those of HQQ stay where they are. Copies of the model carry them along, state dicts do not. They are
                dropped once they are put back, which undoes any change made to the base weights in the meantime. If
                not, unmerging subtracts the updates: base weights come back up to rounding in their dtype, and
                quantized ones up to another quantization, which can be far more. A copy that an earlier call kept
                stays, and also serves what later calls merge.

        Raises:
            ValueError: If an adapter is unknown, a merged weight would not be finite, a copy is requested of weights
                that have tasks merged in, or the model uses a weight twice. No weight has changed then.
            TypeError: If a layer cannot be merged into.
        """
        if keep_base not in (False, True, "cpu"):
            raise ValueError(f"keep_base is {keep_base!r}, expected False, True or 'cpu'")
        self._check_merge(adapter_names, safe_merge)
        if keep_base:
            for _, layer in self._merging_layers():
                layer.check_may_keep()
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer):
                options = {"keep_base": keep_base} if isinstance(module, MergingLayer) else {}
                with onload_layer(module):
                    module.merge(adapter_names=adapter_names, **options)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        return super()._unload_and_optionally_merge(merge=merge, progressbar=progressbar, adapter_names=adapter_names)

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Refuse adapters that cannot be merged or, if `safe_merge`, are not finite, before any layer is changed."""
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
        unknown = [name for name in adapter_names or () if name not in self.peft_config]
        if unknown:
            raise ValueError(f"adapter_names has {unknown}, expected names among {sorted(self.peft_config)}")
        self._check_merge_allowed()
        if not safe_merge:
            return
        for name, layer in self._merging_layers():
            try:
                with onload_layer(layer):
                    layer.check_finite(adapter_names)
            except ValueError as error:
                raise ValueError(f"{name!r}: {error}") from error

    def _check_merge_allowed(self) -> None:
        """Refuse to merge into layers that cannot be dequantized or are tied, before any layer is changed."""
        super()._check_merge_allowed()
        check_held_once(self.model, self._merging_layers())
        tried = set()
        for name, layer in self._merging_layers():
            base_layer = layer.get_base_layer()
            kind = type(base_layer), type(getattr(base_layer, "weight", None))
            if layer.quantization_backend is None or kind in tried:
                continue
            try:
                with onload_layer(layer):
                    layer.get_base_weight()
            except (TypeError, NotImplementedError) as error:
                raise TypeError(f"{name!r} cannot be merged into: {error}") from error
            tried.add(kind)

    def _merging_layers(self) -> Iterator[tuple[str, MergingLayer]]:
        """Yield the layers that tasks can be merged into, with their names in the base model."""
        for name, module in self.model.named_modules():
            if isinstance(module, MergingLayer):
                yield without_wrappers(name), module


def offload_hook_of(layer: Any) -> AlignDevicesHook | None:
    """The hook that fetches a layer's weights for each forward if accelerate keeps them in memory or on disk."""
    hook = getattr(layer, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return next((each for each in hooks if isinstance(each, AlignDevicesHook) and each.offload), None)
