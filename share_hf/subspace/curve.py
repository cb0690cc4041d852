"""How much of some updates a subspace of k directions would explain, and what rank p costs, for many k at once.

Where the updates of a layer span few directions, each k is solved as in a merge. Where they span many, all k are
solved from the largest down with products of the thin factors alone: each half-step of the alternation is a step of a
power iteration. Updates and their null are treated in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .basis import JOINT_ITERATIONS
from .leading import rough_product, rough_sum


# Half-steps on each side at the largest k, and at each smaller one, which starts inside the directions of the last.
_FIRST_STEPS, _STEPS = 8, 3

# From this many adapters on, a survey computes its curve over k from a small sample of adapters and modules.
SAMPLE_FROM = 200

# Up to this many coordinates a full eigendecomposition costs no more than power steps.
_EXACT_COORDINATES = 256


@dataclass(frozen=True)
class Served:
    """Parts of updates that k directions on each side keep.

    Args:
        num_components: Number of directions k on each side.
        explained: Mean over updates of ``‖C_i‖² / ‖ΔW_i‖²``, ``C_i = β^T ΔW_i α``.
        errors: (r,), mean over updates of ``‖ΔW_i' - ΔW_i‖ / ‖ΔW_i‖`` for each p from 1 on, with each update kept at
            its best rank p. The last is the error without a cut of the rank.
    """

    num_components: int
    explained: float
    errors: tuple[float, ...]

    @property
    def error(self) -> float:
        """Mean error without a cut of the rank."""
        return self.errors[-1]


def curve_sizes(largest: int) -> list[int]:
    """Return the k of a curve: 1, 2, 3, 4, 6, 8, 12, 16, … up to and including `largest`."""
    powers = [2**power for power in range(largest.bit_length())]
    return sorted({k for power in powers for k in (power, 3 * power // 2) if k <= largest} | {largest})


def served_by(out: Tensor, in_: Tensor, sizes: Sequence[int]) -> list[Served]:
    """Return how much a joint basis of each size keeps of updates ``ΔW_i = X_i^T Y_i`` scaled by ``1 / ‖ΔW_i‖``.

    Args:
        out: (tasks, r, n) float64, factors X, balanced with `in_`.
        in_: (tasks, r, d), factors Y.
        sizes: Values of k, ascending.
    """
    if not len(out):
        return [Served(k, 1.0, (0.0,)) for k in sizes]
    out, in_ = in_coordinates(out), in_coordinates(in_)
    exact = max(out.shape[2], in_.shape[2]) <= _EXACT_COORDINATES
    return [
        Served(k, *_explained_and_errors(_energies(_seen(out, basis_out), _seen(in_, basis_in))))
        for k, basis_out, basis_in in (_exact_bases if exact else _power_bases)(out, in_, sizes)
    ]


def _exact_bases(out: Tensor, in_: Tensor, sizes: Sequence[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each k with output and input directions from exact half-steps."""
    start = torch.linalg.eigh(_moment(in_, out @ out.mT)).eigenvectors
    for k in sizes:
        basis_in = start[:, -k:]
        for _ in range(JOINT_ITERATIONS):
            basis_out = torch.linalg.eigh(_moment(out, _seen(in_, basis_in))).eigenvectors[:, -k:]
            basis_in = torch.linalg.eigh(_moment(in_, _seen(out, basis_out))).eigenvectors[:, -k:]
        yield k, basis_out, basis_in


def _power_bases(out: Tensor, in_: Tensor, sizes: Sequence[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each k with directions from power steps in low precision, which is enough to find directions."""
    single_out, single_in = out.float(), in_.float()
    generator = torch.Generator().manual_seed(0)
    basis_out, basis_in = (
        torch.linalg.qr(torch.randn(rows.shape[2], sizes[-1], generator=generator)).Q.to(rows.device)
        for rows in (out, in_)
    )
    gram_out = single_out @ single_out.mT
    basis_in = _power_step(single_in, gram_out, _power_step(single_in, gram_out, basis_in))
    found = []
    for k in reversed(sizes):
        basis_out, basis_in = basis_out[:, -k:], basis_in[:, -k:]
        for _ in range(_STEPS if found else _FIRST_STEPS):
            basis_out = _power_step(single_out, _roughly_seen(single_in, basis_in), basis_out)
            basis_in = _power_step(single_in, _roughly_seen(single_out, basis_out), basis_in)
        found.append((k, basis_out.double(), basis_in.double()))
    yield from reversed(found)


def _power_step(rows: Tensor, weights: Tensor, basis: Tensor) -> Tensor:
    """Take a step towards the leading directions (q, k) of ``Σ X_i^T G_i X_i``, with the leading one last."""
    times = rough_sum(rows, weights @ rough_product(rows, basis))
    inside = torch.linalg.eigh(basis.T @ times).eigenvectors
    return torch.linalg.qr((times @ inside).flip(1)).Q.flip(1)


def _explained_and_errors(kept: Tensor) -> tuple[float, tuple[float, ...]]:
    """Return the mean energy kept and the mean error by rank, for descending energies (tasks, r) and norms of 1."""
    left = (1 - kept.cumsum(1)).clamp_min(0).sqrt().mean(0)
    return float(kept.sum(1).mean()), tuple(left.tolist())


def _energies(gram_out: Tensor, gram_in: Tensor) -> Tensor:
    """Return squared singular values (tasks, r), descending, for updates with these Gram matrices (tasks, r, r)."""
    values, vectors = torch.linalg.eigh(gram_out)
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
    return torch.linalg.eigvalsh(root.mT @ gram_in @ root).clamp_min(0).flip(-1)


def in_coordinates(rows: Tensor) -> Tensor:
    """Return factors (tasks, r, n) in coordinates of their span: (tasks, r, q), q = min(n, tasks r)."""
    tasks, rank, features = rows.shape
    flat = rows.reshape(tasks * rank, features)
    return rows if len(flat) >= features else torch.linalg.qr(flat.T, mode="r").R.T.reshape(tasks, rank, -1)


def _seen(rows: Tensor, directions: Tensor) -> Tensor:
    """Return ``X_i P P^T X_i^T`` (tasks, r, r)."""
    seen = rows @ directions
    return seen @ seen.mT


def _roughly_seen(rows: Tensor, directions: Tensor) -> Tensor:
    """Return `_seen` in the low precision that is enough for a power step."""
    seen = rough_product(rows, directions)
    return seen @ seen.mT


def _moment(rows: Tensor, weights: Tensor) -> Tensor:
    """Return ``Σ X_i^T G_i X_i`` (q, q) for factors (tasks, r, q) and G (tasks, r, r)."""
    return rows.flatten(0, 1).T @ (weights @ rows).flatten(0, 1)
