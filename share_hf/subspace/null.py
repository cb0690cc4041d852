"""Updates of norm 1, and random ones with the same singular values: the two sides of every comparison with chance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .factors import CompactUpdate, LowRankUpdate, inverse_norms, thin_svd_of_update
from .layer import LayerSubspace


# Relative size below which a float32 singular value, or a rank error, is only rounding error.
NEGLIGIBLE = 1e-6


def normalized_updates(updates: Iterable[LowRankUpdate]) -> list[CompactUpdate]:
    """Return the updates that are not zero, scaled to norm 1."""
    compact = [thin_svd_of_update(update) for update in updates]
    if not compact:
        return []
    weights = inverse_norms(torch.stack([update.norm for update in compact]))
    return [
        replace(update, singular_values=update.singular_values * weight)
        for update, weight in zip(compact, weights, strict=True)
        if weight > 0
    ]


def flattest_singular_values(layer: LayerSubspace) -> Tensor:
    """Return the flattest singular values (tasks, 2p) that the updates of a layer may have had when learned.

    Compression reduces every singular value, and as a rule the small ones most. The energy that the coefficients lack
    therefore goes to the smallest values, which are raised to one level, and also to p further ones where a rank above
    p was cut.
    """
    cores = [torch.linalg.qr(side.double(), mode="r").R for side in (layer.coefficients_out, layer.coefficients_in)]
    energies = torch.linalg.svdvals(cores[0] @ cores[1].mT).square().cpu()
    energies = torch.nn.functional.pad(energies, (0, 2 * layer.pseudo_rank - energies.shape[1]))
    places = torch.arange(energies.shape[1])
    cut = layer.records.rank_errors.cpu().unsqueeze(1) > NEGLIGIBLE
    raisable = cut | (energies > NEGLIGIBLE**2 * energies[:, :1])
    ranks = raisable.sum(1, keepdim=True)
    # Raising all values from the j-th on to one level spends the energy that the first j leave. The lowest level fits.
    missing = layer.records.norms.cpu().square().unsqueeze(1) - (energies.cumsum(1) - energies)
    levels = torch.where(raisable, missing / (ranks - places).clamp_min(1), torch.inf)
    return torch.where(raisable, torch.maximum(energies, levels.amin(1, keepdim=True)), 0.0).sqrt()


def padded(values: Sequence[Tensor]) -> Tensor:
    """Stack tensors of different lengths, padded with zeros."""
    return torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True)


def random_orthonormal(count: int, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return uniformly random orthonormal columns (count, rows, columns) float64."""
    normal = torch.randn(count, rows, columns, dtype=torch.float64, generator=generator)
    directions, triangle = torch.linalg.qr(normal)
    # The signs of a Householder QR are not random. The signs of Gram-Schmidt, with a positive diagonal, keep the
    # distribution uniform.
    return directions * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
