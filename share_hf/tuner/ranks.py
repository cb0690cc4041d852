"""Tasks of different ranks in one layer: each has coefficients (k, p_i)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def stacked(coefficients: Sequence[Tensor]) -> Tensor:
    """Coefficients (tasks, k, p) of tasks of any rank up to p; zeros fill up smaller ones."""
    most = max(each.shape[1] for each in coefficients)
    return torch.stack([F.pad(each, (0, most - each.shape[1])) for each in coefficients])


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
    for task, (least, most) in ranks.items():
        kept, given = parameters.get(task), state_dict.get(f"{prefix}{task}")
        if kept is None or given is None or given.ndim != 2 or given.shape[1] == kept.shape[1]:
            continue
        if least <= given.shape[1] <= most:
            room = kept.data.new_empty(kept.shape[0], given.shape[1])
            parameters[task] = nn.Parameter(room, requires_grad=kept.requires_grad)
