"""Quantized layers: those that PEFT supports, and handling of those that it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft.utils import resolve_quantization_backend
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, QuantizationBackend
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from .kinds import CONVOLUTIONS, check_computes_as_known


def quantization_backend_of(
    layer: nn.Module, get_apply_tensor_subclass: Callable[[], Any] | None = None
) -> QuantizationBackend | None:
    """Return the backend that reads and writes a quantized layer's weight; None if the layer is not quantized.

    Layers that can be adapted but not merged into get a backend that says so: layers of quantizers unknown to PEFT,
    whose weight PEFT's LoRA would take for a plain one, and torchao's layers if no `TorchAoConfig` made them.
    """
    try:
        backend = resolve_quantization_backend(layer, get_apply_tensor_subclass=get_apply_tensor_subclass)
    except ValueError:  # it is unknown how to quantize a merged weight again
        return ForwardOnlyQuantizationBackend("torchao (quantized without a TorchAoConfig)")
    if backend is None and isinstance(layer, nn.Linear) and not _computes_with_its_weight(layer):
        return ForwardOnlyQuantizationBackend(type(layer).__name__)
    return backend


def check_supported(layer: nn.Module, module_name: str, model: nn.Module) -> None:
    """Refuse a layer of an unsupported kind; the message gives its name, its class and the model's quantizer."""
    found = type(layer).__name__
    if isinstance(layer, nn.Linear) and not hasattr(layer, "weight"):
        found += " without a weight (one that is still compressed may have it after a forward)"
    else:
        backend = quantization_backend_of(layer)
        if backend is None and isinstance(layer, (*CONVOLUTIONS, nn.Embedding)) and _computes_with_its_weight(layer):
            check_computes_as_known(layer, module_name)
            return
        is_dense = isinstance(layer, (nn.Linear, Conv1D)) if backend is None else backend.layer_type == "linear"
        if is_dense:
            return
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    quantizer = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    if quantizer is not None:
        found += f" of the quantizer {getattr(quantizer, 'value', quantizer)!r}"
    raise TypeError(
        f"{module_name!r} is a {found}, expected torch.nn.Linear, transformers.pytorch_utils.Conv1D, a convolution or "
        "an embedding of torch.nn, or a linear layer of a quantizer that PEFT knows and whose library is installed; "
        "train others whole with modules_to_save"
    )


def keep_4bit_weights_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights, both of adapted layers and of others.

    On a CPU with AVX512-BF16, a forward in eval mode repacks them in place. Afterwards, gradients through them are
    wrong or missing, and merges into them give garbage.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            quant_state = getattr(module.weight, "quant_state", None)
            if getattr(quant_state, "packing_format_for_cpu", False):
                module.state_dict()  # reading it unpacks a weight that was repacked already
                if quant_state.absmax.ndim == 2:  # unpacking leaves the scales transposed
                    quant_state.absmax = quant_state.absmax.T.reshape(-1).float()


def _computes_with_its_weight(layer: nn.Module) -> bool:
    """Return whether the forward multiplies with `weight` as it is: not packed, scaled, rounded or computed."""
    weight = layer.weight
    return (
        weight.is_floating_point()
        and weight.element_size() > 1
        and (not is_traceable_wrapper_subclass(weight) or type(weight).__module__.startswith("torch."))  # or a DTensor
        and not is_parametrized(layer)
        and not type(layer).__module__.startswith("transformers.integrations.")
    )
