"""Updates of norm 1, and random ones of the same singular values: the two sides of every comparison with chance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .factors import CompactUpdate, LowRankUpdate, inverse_norms, thin_svd_of_update
from .layer import LayerSubspace


# Relative to the largest: a float32 singular value, or a rank error, that is rounding.
NEGLIGIBLE = 1e-6


def normalized_updates(updates: Iterable[LowRankUpdate]) -> list[CompactUpdate]:
    """The updates that count, each of norm 1."""
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
    """Singular values (tasks, 2p) that the updates of a layer may have had when learned, the flattest possible.

    Compression makes every singular value smaller, and as a rule the small ones most. So the energy that the
    coefficients lack goes to the smallest, raised to one level; to p further ones as well where a rank over p was cut.
    """
    cores = [torch.linalg.qr(side.double(), mode="r").R for side in (layer.coefficients_out, layer.coefficients_in)]
    energies = torch.linalg.svdvals(cores[0] @ cores[1].mT).square().cpu()
    energies = torch.nn.functional.pad(energies, (0, 2 * layer.pseudo_rank - energies.shape[1]))
    places = torch.arange(energies.shape[1])
    cut = layer.records.rank_errors.cpu().unsqueeze(1) > NEGLIGIBLE
    raisable = cut | (energies > NEGLIGIBLE**2 * energies[:, :1])
    ranks = raisable.sum(1, keepdim=True)
    # A level for all from the j-th on spends what the first j leave; the lowest of these levels fits.
    missing = layer.records.norms.cpu().square().unsqueeze(1) - (energies.cumsum(1) - energies)
    levels = torch.where(raisable, missing / (ranks - places).clamp_min(1), torch.inf)
    return torch.where(raisable, torch.maximum(energies, levels.amin(1, keepdim=True)), 0.0).sqrt()


def padded(values: Sequence[Tensor]) -> Tensor:
    """Tensors of different lengths, filled up with zeros."""
    return torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True)


def random_orthonormal(count: int, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Uniformly random orthonormal columns (count, rows, columns) float64."""
    normal = torch.randn(count, rows, columns, dtype=torch.float64, generator=generator)
    directions, triangle = torch.linalg.qr(normal)
    # Householder's signs are not random; Gram-Schmidt's, with a positive diagonal, leave the uniform distribution.
    return directions * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
