"""One feature vector per input from the hidden states of a model: the means over its tokens in some layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .sketch import entry_hashes


# More features than this are folded into this many, so that the float32 covariance takes 4 MB whatever the model.
MOST_FEATURES = 1024


def pooled(hidden_states: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Compute the features of each input: the mean over its tokens in each layer, scaled to a mean square of one.

    The scale makes layers comparable, and keeps the features of any model well within the range of float32.

    Args:
        hidden_states: Hidden states (b, t, d) of each layer.
        mask: (b, t), nonzero at the tokens that count; all tokens if not given.

    Returns:
        (b, layers * d) float32. The features of an input without tokens are zero.
    """
    if mask is None:
        mask = torch.ones(hidden_states[0].shape[:2], device=hidden_states[0].device)
    weights = (mask != 0).float()[:, :, None]
    tokens = weights.sum(1).clamp_min(1)
    blocks = []
    for states in hidden_states:
        # A product with the weights would not do: padding may be NaN, which attention without a key produces.
        kept = states.float().masked_fill(weights.to(states.device) == 0, 0)
        mean = kept.sum(1) / tokens.to(states.device)
        scale = mean.square().mean(1, keepdim=True).sqrt()
        blocks.append((mean / scale.clamp_min(torch.finfo(torch.float32).tiny)).to(hidden_states[0].device))
    return torch.cat(blocks, dim=1)


def to_the_left(values: Tensor, mask: Tensor) -> Tensor:
    """Move the tokens of each row to the front, in their order, and all padding to the end.

    Args:
        values: (b, t, …), such as token ids.
        mask: (b, t), nonzero at tokens.
    """
    order = (mask == 0).to(torch.uint8).sort(dim=1, stable=True).indices
    return values.gather(1, order.reshape(*order.shape, *[1] * (values.ndim - 2)).expand_as(values))


def folded(features: Tensor, width: int = MOST_FEATURES) -> Tensor:
    """Fold features to at most (b, width), by adding each to, or subtracting it from, a place chosen by a hash.

    Such a count-sketch preserves the inner product of any two inputs up to an error of about ``1 / sqrt(width)``. The
    hashes are integer arithmetic, so every machine chooses the same places.
    """
    count = features.shape[1]
    if count <= width:
        return features
    hashes = entry_hashes("router", count).to(features.device)
    signs = 1.0 - 2.0 * (hashes >> 32 & 1)
    return features.new_zeros(len(features), width).index_add_(1, hashes % width, features * signs.to(features.dtype))
