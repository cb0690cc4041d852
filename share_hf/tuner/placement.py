"""Where a layer is in its model, and what that rules out: some modules read the weights of their layers themselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..format.module_names import without_wrappers


# By class of the module around it, layers whose weight is read past their forward, at least in training or with fused
# kernels. An update would be without effect there.
READ_BY_THEIR_MODULE: dict[str, frozenset[str]] = {
    "MultiheadAttention": frozenset({"out_proj"}),
    "MambaMixer": frozenset({"x_proj", "dt_proj", "out_proj"}),
    "FalconMambaMixer": frozenset({"x_proj", "dt_proj", "out_proj"}),
    "JambaMambaMixer": frozenset({"dt_proj"}),
    "Mamba2Mixer": frozenset({"out_proj"}),
    "BambaMixer": frozenset({"out_proj"}),
    "FalconH1Mixer": frozenset({"out_proj"}),
    "GraniteMoeHybridMambaLayer": frozenset({"out_proj"}),
    "NemotronHMamba2Mixer": frozenset({"out_proj"}),
    "Zamba2MambaMixer": frozenset({"out_proj"}),
    "DetrMHAttentionMap": frozenset({"k_proj"}),
    "ConditionalDetrMHAttentionMap": frozenset({"k_proj"}),
    "MaskFormerDetrMHAttentionMap": frozenset({"k_proj"}),
    "DabDetrMHAttentionMap": frozenset({"k_linear"}),
    "LayoutLMv2Encoder": frozenset({"rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"}),
    "LayoutLMv3Encoder": frozenset({"rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"}),
    "PPDocLayoutV2ReadingOrderEncoder": frozenset({"rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"}),
    "TDNNLayer": frozenset({"kernel"}),
    "WavLMAttention": frozenset({"q_proj", "k_proj", "v_proj", "out_proj"}),
    "MobileBertLMPredictionHead": frozenset({"dense", "decoder"}),
    "LSHSelfAttention": frozenset({"query_key", "value"}),
    "LongcatFlashTopkRouter": frozenset({"classifier"}),
    "NeoMMEForMaskedLM": frozenset({"unembedding_projection"}),
}


def check_reached(parent: nn.Module, child_name: str, module_name: str) -> None:
    """Refuse a layer whose forward the module around it does not always call.

    Raises:
        ValueError: Naming the layer, and the class of the module around it.
    """
    for base in type(parent).__mro__:
        if child_name in READ_BY_THEIR_MODULE.get(base.__name__, ()):
            raise ValueError(
                f"{module_name!r} is in a {base.__name__}, which reads its weight itself, so that an update would "
                "have no effect; expected layers that are called: leave it out by exclude_modules, or train it whole "
                "by modules_to_save"
            )


def call_layers_of(parent: nn.Module, layer: nn.Module) -> None:
    """Keep torch's encoder layers from computing in one kernel, which reads the weights: where there are hooks, they
    call their layers. Unloaded, the layer takes the hook along."""
    if isinstance(parent, nn.TransformerEncoderLayer):
        layer.register_forward_pre_hook(_no_change)


def _no_change(layer: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that is there, and no more."""


def check_held_once(model: nn.Module, layers: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse to merge into a weight that others in the model use too, which would be changed with it.

    Args:
        model: The model.
        layers: Names and layers that adapters are wrapped around.

    Raises:
        ValueError: Naming the layer and where else its weight is.
    """
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for child_name, child in [*module.named_children(), *module.named_parameters(recurse=False)]:
            holders.setdefault(id(child), []).append(without_wrappers(f"{name}.{child_name}".strip(".")))
    for name, layer in layers:
        base = layer.get_base_layer()
        for shared in (base, getattr(base, "weight", None)):
            if len(places := holders.get(id(shared), [])) > 1:
                raise ValueError(
                    f"{name!r} cannot be merged into: the model has its weight more than once, at {places}, and all "
                    "would change. Untie them first, or use the task unmerged or, by SharedSubspace.export_lora, as a "
                    "LoRA"
                )
