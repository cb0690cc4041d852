"""One vector of features for an input, from the hidden states of a model: the mean over its tokens in some layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .sketch import entry_hashes


# More features than these are folded into as many: the covariance of all tasks has 4 MB then, whatever the model.
MOST_FEATURES = 1024


def pooled(hidden_states: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Features of each input: of each layer the mean over its tokens, scaled to a mean square of one.

    The scale makes layers comparable, and keeps the features of any model in the range that float32 is made for.

    Args:
        hidden_states: Those of each layer, (b, t, d).
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


def folded(features: Tensor, width: int = MOST_FEATURES) -> Tensor:
    """At most so many features (b, width): each is added to, or taken off, one of them that hashing chose.

    Such a count-sketch keeps products of any two inputs, up to an error of about ``1 / sqrt(width)``. It is integer
    arithmetic, so that every machine has the same.
    """
    count = features.shape[1]
    if count <= width:
        return features
    hashes = entry_hashes("router", count).to(features.device)
    signs = 1.0 - 2.0 * (hashes >> 32 & 1)
    return features.new_zeros(len(features), width).index_add_(1, hashes % width, features * signs.to(features.dtype))
