"""Mixed batches, as requested by calls with `adapter_names`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..format.names import listing
from .experts import Expert
from .rows import BASE, MixedBatch
from .together import check_trained


if TYPE_CHECKING:
    from .model import ShareModel


@torch.compiler.disable  # other names would make it compile anew
def mixed_batch(tuner: ShareModel, adapter_names: Sequence[str], arguments: Mapping[str, Any]) -> MixedBatch:
    """Build the mixed batch of a call of `forward` or `generate`, and prepare the layers' stacks for it.

    Args:
        tuner: Tuner that has the adapters.
        adapter_names: Names of adapters, one for each sample, or `__base__`.
        arguments: All keyword arguments of the call.

    Raises:
        ValueError: If the tuner is in training mode and tasks are not trained, if a layer holds experts, or if there
            are no adapters of some names, all of which the message names.
    """
    check_trained(adapter_names, tuner)
    if any(isinstance(layer, Expert) for layer in tuner.layers()):
        raise ValueError("adapter_names cannot mix tasks of experts in one parameter, and neither can PEFT's LoRA")
    if isinstance(adapter_names, str):
        raise ValueError(f"adapter_names is {adapter_names!r}, expected a list with a name for each sample")
    if unknown := sorted(set(adapter_names) - tuner.peft_config.keys() - {BASE}, key=str):
        near = [match for name in unknown for match in get_close_matches(str(name), tuner.peft_config, n=1)]
        expected = listing(dict.fromkeys(near) or sorted(tuner.peft_config))
        raise ValueError(f"adapter_names has {listing(unknown)}, expected names among {expected}")
    repeats = _repeats(arguments, tuner.model)
    for layer in tuner.layers():
        layer.write_own()  # first, because it assigns rows to the tasks
    batch = MixedBatch(adapter_names, tuner.rows, repeats)
    for layer in tuner.layers():
        for samples in (len(adapter_names), len(adapter_names) * repeats):
            batch.indices(samples, layer.share_basis_out.device)
    return batch


def _repeats(arguments: Mapping[str, Any], model: nn.Module) -> int:
    """Return how often `generate` repeats each sample; 1 for a forward."""
    given = arguments.get("generation_config") or getattr(model, "generation_config", None)
    names = ("num_beams", "num_return_sequences")
    return max(1, *(arguments.get(name, getattr(given, name, None)) or 1 for name in names))
