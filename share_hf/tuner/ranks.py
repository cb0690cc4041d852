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
    """Coefficients (tasks, k, p) of tasks of any rank up to p; zeros fill up smaller ones."""
    most = max(each.shape[1] for each in coefficients)
    return torch.stack([F.pad(each, (0, most - each.shape[1])) for each in coefficients])


def ranks_of(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """The rank of coefficients in a state dict, by module."""
    found = {}
    for name, tensor in weights.items():
        module, is_coefficients, _ = name.partition(".share_coefficients_out")
        if is_coefficients and tensor.ndim == 2:
            found[module.removeprefix(PEFT_PREFIX)] = tensor.shape[1]
    return found


def make_room_in(layer: ShareLayer, task: str, rank: int | None) -> None:
    """Give a task room for stored coefficients of a rank, which some loaders compare with it.

    Args:
        layer: Has the task.
        task: Its name.
        rank: None where nothing is stored.
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
    """Give tasks room for coefficients (k, p_i) that are about to be loaded, where their rank may be another.

    Args:
        parameters: One side's coefficients by task.
        ranks: By task, the smallest and the largest rank that it may have.
        state_dict: What is about to be loaded; a rank that a task may not have is left for torch to refuse.
        prefix: What precedes a task's name there.
    """
    for task, limits in ranks.items():
        given = state_dict.get(f"{prefix}{task}")
        if task in parameters and given is not None and given.ndim == 2:
            resize(parameters, task, given.shape[1], limits)


def resize(parameters: nn.ParameterDict, task: str, rank: int, limits: tuple[int, int]) -> None:
    """Give a task room for coefficients of another rank, within limits, that are about to be loaded."""
    kept, (least, most) = parameters[task], limits
    if rank != kept.shape[1] and least <= rank <= most:
        room = kept.data.new_zeros(kept.shape[0], rank)
        parameters[task] = nn.Parameter(room, requires_grad=kept.requires_grad)
