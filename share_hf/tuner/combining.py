"""Weighted sums of tasks, which stay in the subspace that the tasks share."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..format.experts import EXPERT
from ..state import Phase
from ..subspace.combining import summed_coefficients
from .config import ShareConfig
from .layer import ShareLayer


COMBINATIONS = ("linear", "svd", "cat")


def combined_config(
    configs: Mapping[str, ShareConfig],
    layers: Mapping[str, ShareLayer],
    adapters: Sequence[str],
    weights: Sequence[float],
    combination_type: str,
) -> ShareConfig:
    """Build the configuration of a weighted sum of adapters.

    Args:
        configs: Configurations of a model's adapters, by name.
        layers: Layers of the model, by name.
        adapters: Names of the adapters to sum.
        weights: Weights, one for each adapter.
        combination_type: Type of combination, named as in LoRA. The types accepted here all mean the sum of the
            updates, which the subspace contains.

    Raises:
        ValueError: If these adapters cannot be summed.
    """
    if combination_type not in COMBINATIONS:
        raise ValueError(
            f"combination_type is {combination_type!r}, expected one of {list(COMBINATIONS)}: for other types, export "
            "the tasks as LoRAs with SharedSubspace.export_lora and combine those"
        )
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"{len(adapters)} adapters and {len(weights)} weights, expected one weight for each of one or more "
            "adapters"
        )
    for name in adapters:
        if name not in configs:
            raise ValueError(f"adapter {name!r} is not there, expected names among {list(configs)}")
        if configs[name].phase != Phase.COEFFICIENTS:
            raise ValueError(f"adapter {name!r} is in phase {configs[name].phase.value!r}, expected a merged task")
        if configs[name].modules_to_save:
            raise ValueError(
                f"adapter {name!r} has modules_to_save = {configs[name].modules_to_save}, expected tasks without "
                "heads of their own, which have no sum"
            )
    config = copy.deepcopy(configs[adapters[0]])
    config.origin = None
    config.target_modules = {
        name
        for name, layer in layers.items()
        if layer.layout != EXPERT and any(map(layer.has_task, adapters))  # target_parameters names the experts
    }
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    return config


def combined_coefficients(layer: ShareLayer, weights: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """The best coefficients (k_out, p), (k_in, p) of ``Σ w_i ΔW_i`` in the subspace: exact, then cut to rank p."""
    present = [task for task in weights if layer.has_task(task)]
    sides = layer.share_coefficients_out, layer.share_coefficients_in
    coefficients = {task: tuple(side[task].detach() for side in sides) for task in present}
    _, rank = layer.share_ranks[present[0]]
    combined_out, combined_in, _ = summed_coefficients(coefficients, weights, rank)
    return combined_out.float(), combined_in.float()
