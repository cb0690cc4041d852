"""The kinds of layers that are adapted, and the matrix that an update of each is."""

from __future__ import annotations

import math

from peft.tuners.tuners_utils import _get_in_out_features
from torch import nn

from ..state import Layout


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """(n, d) of an update of a layer: outputs and inputs, of a convolution channels and what a kernel sees."""
    in_features, out_features = _get_in_out_features(layer)
    if isinstance(layer, CONVOLUTIONS):
        in_features *= math.prod(layer.kernel_size)
    return out_features, in_features


def layout_of(layer: nn.Module) -> Layout | None:
    """How the matrix of an update lies in the weight of a layer; None for dense layers."""
    if isinstance(layer, CONVOLUTIONS):
        return Layout("convolution", tuple(layer.kernel_size))
    return Layout("embedding") if isinstance(layer, nn.Embedding) else None


def check_computes_as_known(layer: nn.Module, module_name: str) -> None:
    """Refuse a convolution or an embedding whose update PEFT's LoRA would compute in another way than its weight.

    Args:
        layer: A convolution or an embedding.
        module_name: For the message.

    Raises:
        ValueError: Naming the layer, and what it does.
    """
    what = _done_otherwise_than_by_lora(layer)
    if what is not None:
        raise ValueError(
            f"{module_name!r} is a {type(layer).__name__} {what}; leave it out by exclude_modules, or train it whole "
            "by modules_to_save"
        )


def _done_otherwise_than_by_lora(layer: nn.Module) -> str | None:
    if isinstance(layer, CONVOLUTIONS):
        kind = next(kind for kind in CONVOLUTIONS if isinstance(layer, kind))
        if type(layer).forward is not kind.forward or type(layer)._conv_forward is not kind._conv_forward:
            return f"with a forward of its own, expected that of torch.nn.{kind.__name__}"
        if layer.groups != 1:
            return f"with groups={layer.groups}, expected 1: an update of low rank would join the groups"
        if layer.padding_mode != "zeros":
            return f"with padding_mode={layer.padding_mode!r}, expected 'zeros', with which PEFT's LoRA pads"
        if any(d != 1 for d, size in zip(layer.dilation, layer.kernel_size, strict=True) if size > 1):
            return f"with dilation={layer.dilation}, expected 1: PEFT's LoRA has no dilation"
        return None
    if layer.max_norm is not None:
        return f"with max_norm={layer.max_norm}, expected None: an update cannot be told from what is cut off"
    if type(layer).forward is not nn.Embedding.forward and not hasattr(layer, "embed_scale"):
        return "with a forward of its own, expected that of torch.nn.Embedding or one that scales by embed_scale"
    return None
