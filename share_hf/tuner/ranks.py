"""Tasks of different ranks in one layer: each has coefficients (k, p_i)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..format.lora import PEFT_PREFIX


if TYPE_CHECKING:
    from .layer import ShareLayer


def stacked(coefficients: Sequence[Tensor]) -> Tensor:
    """Stack coefficients to (tasks, k, p), for tasks of any rank up to p; smaller ranks are padded with zeros."""
    most = max(each.shape[1] for each in coefficients)
    return torch.stack([F.pad(each, (0, most - each.shape[1])) for each in coefficients])


def ranks_of(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the rank of the coefficients in a state dict, by module."""
    found = {}
    for name, tensor in weights.items():
        module, is_coefficients, _ = name.partition(".share_coefficients_out")
        if is_coefficients and tensor.ndim == 2:
            found[module.removeprefix(PEFT_PREFIX)] = tensor.shape[1]
    return found


def make_room_in(layer: ShareLayer, task: str, rank: int | None) -> None:
    """Give a task room for stored coefficients of a rank, because some loaders compare the two shapes.

    Args:
        layer: Layer that has the task.
        task: Name of the task.
        rank: Rank of the stored coefficients. None means that nothing is stored.
    """
    if rank is not None and task in layer.share_fingerprint:
        for parameters in (layer.share_coefficients_out, layer.share_coefficients_in):
            resize(parameters, task, rank, layer.share_ranks[task])


def make_room(
    parameters: nn.ParameterDict,
    ranks: Mapping[str, tuple[int, int]],
    state_dict: Mapping[str, Tensor],
    prefix: str,
) -> None:
    """Give tasks room for coefficients (k, p_i) that are about to be loaded, if their rank may differ.

    Args:
        parameters: Coefficients of one side, by task.
        ranks: Smallest and largest rank that a task may have, by task.
        state_dict: State dict that is about to be loaded. A rank outside the limits is left for torch to refuse.
        prefix: Prefix of the tasks' names in it.
    """
    for task, limits in ranks.items():
        given = state_dict.get(f"{prefix}{task}")
        if task in parameters and given is not None and given.ndim == 2:
            resize(parameters, task, given.shape[1], limits)


def resize(parameters: nn.ParameterDict, task: str, rank: int, limits: tuple[int, int]) -> None:
    """Give a task room for coefficients of another rank, within limits, before they are loaded."""
    kept, (least, most) = parameters[task], limits
    if rank != kept.shape[1] and least <= rank <= most:
        room = kept.data.new_zeros(kept.shape[0], rank)
        parameters[task] = nn.Parameter(room, requires_grad=kept.requires_grad)
