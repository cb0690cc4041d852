"""The kinds of layers that can be adapted, and the shape of the update matrix of each."""

from __future__ import annotations

import math
from collections.abc import Mapping

from peft.tuners import tuners_utils
from torch import Tensor, nn

from ..state import Layout


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ExpertWeight:
    """The weight (n, d) of one of the experts that a module keeps in one parameter. An expert is not itself a module.

    Args:
        holder: Module that holds the parameter.
        parameter: Name of the parameter in the module, (experts, n, d), or (experts, d, n) if `holder.is_transposed`.
        number: Number of the expert.
    """

    def __init__(self, holder: nn.Module, parameter: str, number: int) -> None:
        self._holder, self._parameter, self._number = holder, parameter, number

    @property
    def weight(self) -> Tensor:
        """The weight (n, d), a view of the parameter."""
        weight = getattr(self._holder, self._parameter)[self._number]
        return weight.mT if getattr(self._holder, "is_transposed", False) else weight


def layer_named(name: str, modules: Mapping[str, nn.Module]) -> nn.Module | ExpertWeight | None:
    """Find the layer or expert of this name: `…experts.down_proj.3` is in the parameter `down_proj` of `…experts`.

    Args:
        name: Name as in a subspace.
        modules: Modules of a model, by name.
    """
    if name in modules:
        return modules[name]
    parameter_name, _, number = name.rpartition(".")
    holder_name, _, leaf = parameter_name.rpartition(".")
    holder = modules.get(holder_name)
    holder = getattr(holder, "base_layer", holder)
    parameter = None if holder is None else holder._parameters.get(leaf)
    if parameter is None or parameter.ndim != 3 or not number.isdecimal() or int(number) >= len(parameter):
        return None
    return ExpertWeight(holder, leaf, int(number))


def matrix_shape(layer: nn.Module | ExpertWeight) -> tuple[int, int]:
    """Return (n, d) of a layer's update: outputs and inputs; in a convolution, channels and what the kernel covers."""
    if isinstance(layer, ExpertWeight):
        return tuple(layer.weight.shape)
    in_features, out_features = tuners_utils._get_in_out_features(layer)
    if isinstance(layer, CONVOLUTIONS):
        in_features *= math.prod(layer.kernel_size)
    return out_features, in_features


def layout_of(layer: nn.Module | ExpertWeight) -> Layout | None:
    """Return how the matrix of an update lies in a layer's weight; None for dense layers."""
    if isinstance(layer, CONVOLUTIONS):
        return Layout("convolution", tuple(layer.kernel_size))
    if isinstance(layer, ExpertWeight):
        return Layout("expert")
    return Layout("embedding") if isinstance(layer, nn.Embedding) else None


def check_experts(holder: nn.Module, parameter: str, name: str) -> None:
    """Refuse a parameter that does not hold the plain weights of experts.

    Args:
        holder: Module that holds the parameter.
        parameter: Name of the parameter in the module.
        name: Name of the parameter in the model, for the message.

    Raises:
        TypeError: If it is something else. Names the parameter and describes it.
    """
    found = getattr(holder, parameter)
    plain = found.is_floating_point() and found.element_size() > 1 and not found.is_meta
    if found.ndim != 3 or not plain:
        raise TypeError(
            f"{name!r} is a {found.dtype} parameter {tuple(found.shape)} on {found.device}, expected the weights "
            "(experts, n, d) of experts, neither quantized nor offloaded nor partitioned; train others whole with "
            "modules_to_save"
        )


def check_computes_as_known(layer: nn.Module, module_name: str) -> None:
    """Refuse a convolution or embedding that PEFT's LoRA computes differently than the layer computes its own weight.

    Args:
        layer: Convolution or embedding to check.
        module_name: Name of the module, for the message.

    Raises:
        ValueError: If the computations differ. Names the layer and what it does.
    """
    what = _done_otherwise_than_by_lora(layer)
    if what is not None:
        raise ValueError(
            f"{module_name!r} is a {type(layer).__name__} {what}; leave it out with exclude_modules, or train it "
            "whole with modules_to_save"
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
