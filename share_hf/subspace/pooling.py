"""One vector of features for an input, from the hidden states of a model: the mean over its tokens in some layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pooled(hidden_states: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Features of each input: of each layer the mean over its tokens, scaled to a mean square of one.

    The scale makes layers comparable, and keeps the features of any model in the range that float32 is made for.

    Args:
        hidden_states: Of each layer, (b, t, d).
        mask: (b, t), nonzero at the tokens that count; all of them if not given.

    Returns:
        (b, layers * d) float32. An input without tokens has features of zero.
    """
    if mask is None:
        mask = torch.ones(hidden_states[0].shape[:2], device=hidden_states[0].device)
    weights = (mask != 0).float()[:, :, None]
    tokens = weights.sum(1).clamp_min(1)
    blocks = []
    for states in hidden_states:
        # Not a product with the weights: what is padded may be NaN, as attention without a key gives.
        kept = states.float().masked_fill(weights.to(states.device) == 0, 0)
        mean = kept.sum(1) / tokens.to(states.device)
        scale = mean.square().mean(1, keepdim=True).sqrt()
        blocks.append((mean / scale.clamp_min(torch.finfo(torch.float32).tiny)).to(hidden_states[0].device))
    return torch.cat(blocks, dim=1)


def to_the_left(values: Tensor, mask: Tensor) -> Tensor:
    """Rows whose tokens come first, in their order, and whose padding comes last, wherever it was.

    Args:
        values: (b, t, …), such as token ids.
        mask: (b, t), nonzero at tokens.
    """
    order = (mask == 0).to(torch.uint8).sort(dim=1, stable=True).indices
    return values.gather(1, order.reshape(*order.shape, *[1] * (values.ndim - 2)).expand_as(values))
