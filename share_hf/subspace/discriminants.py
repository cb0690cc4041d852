"""Which task an input belongs to: linear discriminants of features, with one covariance shared by all tasks.

A task is learned once, from sums over its own inputs, and never seen again: its folder keeps their mean features, and
their scatter about it is added to one that all tasks share. Sums know no order, so the result is the same whatever the
order of the tasks. With one covariance for all, the boundary between two tasks is linear (Fisher's discriminant, as
"streaming LDA", Hayes & Kanan 2020, and RanPAC, McDonnell et al. 2023, use it for continual learning). A mean of its
own for each label of a task was tried, and told tasks apart no better.

Whether an input belongs to none of the tasks is told by its distance from the mean of its task, in units of the task's
own variances: what the task's own inputs had, left out one by one, says how far is too far. It depends on that task
alone, and so never changes. Inputs that look like those of a known task are mostly taken for it: the distance in units
of the covariance that all share was tried, and refuses no more of them for as many of the task's own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


LEAST_INPUTS = 3
# Inputs of a task whose distances are measured, and how many of these are kept.
MOST_MEASURED = 4096
MOST_DISTANCES = 256
_MEASURED_AT_ONCE = 256
# Part of a task's mean variance that is added to each: a feature that never varied must not rule.
_LEAST_VARIANCE = 1e-2
_LEAST_SHRINKAGE = 1e-3
# Bits of a scatter's largest entry: what is added up is exact in float64, in any order, and one of them in float32.
_SCATTER_BITS = 23


@dataclass(frozen=True)
class FeatureScatter:
    """A sum of products of features less their task's mean: ``Σ_t Σ_{x in t} (x - μ_t)(x - μ_t)^T``.

    Args:
        products: (m, m) float64, symmetric. Entries of one task are whole multiples of a power of two.
        degrees: Inputs less tasks, over which the covariance is the mean.
    """

    products: Tensor
    degrees: int

    def __add__(self, other: FeatureScatter) -> FeatureScatter:
        return FeatureScatter(self.products + other.products, self.degrees + other.degrees)

    @property
    def identity(self) -> str:
        """What tells the scatter of a task from any other's: the same data has the same."""
        digest = hashlib.sha256(f"{tuple(self.products.shape)} {self.degrees}".encode())
        digest.update(self.products.cpu().contiguous().numpy())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class TaskFeatures:
    """What is kept of the features of a task's inputs.

    Args:
        mean: (m,) float32.
        variances: (m,) float32.
        distances: (d,) float32, in ascending order: of `measured` inputs, each without itself, the squared distance
            from the mean in units of the variances, per feature. At most 256 of them, evenly spaced, the largest among
            them.
        measured: How many inputs were measured.
    """

    mean: Tensor
    variances: Tensor
    distances: Tensor
    measured: int

    def threshold(self, false_rejects: float) -> float:
        """The distance past which an input is none of this task's.

        Args:
            false_rejects: Largest fraction of the task's own inputs that are to be past it, in (0, 1). A new input is
                as likely as each of those measured to be the farthest, so it takes ``1 / false_rejects - 1`` of them
                to know.

        Returns:
            Infinity where they are too few.
        """
        rank = math.ceil((self.measured + 1) * (1 - false_rejects))
        if rank > self.measured:
            return math.inf
        # The distance at `i` is that of rank ceil((i + 1) n / kept): the first whose rank is no smaller.
        return float(self.distances[(rank - 1) * len(self.distances) // self.measured])


class FeatureSums:
    """Running sums over the inputs of one task; those of several processes add up.

    Attributes:
        count: How many inputs.
        total: (m,) float64, ``Σ x``; None before the first input.
        products: (m, m) float64, ``Σ x x^T``; likewise.
        kept: Features (n, m) float32 of some of the inputs, evenly spaced, to measure; in a few pieces.
    """

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | None = None
        self.products: Tensor | None = None
        self.kept: list[Tensor] = []
        self._stride = 1

    def add(self, features: Tensor) -> None:
        """Add inputs of these features (n, m), of any float dtype.

        Raises:
            ValueError: If features are not finite, or of another width than the ones before.
        """
        rows = features.detach().double().cpu()
        if not torch.isfinite(rows).all():
            raise ValueError("the features of an input have NaN or infinite entries, expected finite numbers")
        if self.total is not None and rows.shape[1] != len(self.total):
            raise ValueError(f"features are {tuple(rows.shape)}, expected {len(self.total)} columns as before")
        first = -self.count % self._stride
        self._add_sums(len(rows), rows.sum(0), rows.T @ rows)
        self.kept.append(rows[first :: self._stride].float())
        while sum(map(len, self.kept)) > MOST_MEASURED:
            self.kept, self._stride = [torch.cat(self.kept)[::2]], 2 * self._stride

    def _add_sums(self, count: int, total: Tensor, products: Tensor) -> None:
        self.count += count
        self.total = total if self.total is None else self.total + total
        self.products = products if self.products is None else self.products + products

    @classmethod
    def together(cls, parts: Iterable[FeatureSums]) -> FeatureSums:
        """The sums over the inputs of all parts."""
        whole = cls()
        for part in parts:
            if part.total is not None:
                whole._add_sums(part.count, part.total, part.products)
                whole.kept += part.kept
        step = math.ceil(sum(map(len, whole.kept)) / MOST_MEASURED)
        whole.kept = [torch.cat(whole.kept)[::step]] if whole.kept else []
        return whole

    def learned(self) -> tuple[TaskFeatures, FeatureScatter]:
        """What is kept of a task, and its part of the scatter that all tasks share.

        Raises:
            ValueError: If there are fewer than three inputs.
        """
        if self.count < LEAST_INPUTS:
            raise ValueError(f"{self.count} inputs to learn a route from, expected at least {LEAST_INPUTS}")
        mean, degrees = self.total / self.count, self.count - 1
        products = self.products - torch.outer(self.total, mean)
        squares = products.diagonal().clamp_min(0)
        distances = torch.cat(
            [
                _left_out_distances(rows.double(), mean, squares, self.count)
                for rows in torch.cat(self.kept).split(_MEASURED_AT_ONCE)
            ]
        )
        found = TaskFeatures(
            mean=mean.float(),
            variances=(squares / degrees).float(),
            distances=_evenly_spaced(distances.sort().values.float()),
            measured=len(distances),
        )
        return found, FeatureScatter(_on_grid((products + products.T) / 2), degrees)


class Discriminants:
    """Scores inputs for any number of tasks by one product with their features.

    Args:
        tasks: What is known of the tasks; at least one.
        scatter: The sum of all tasks' scatter.
    """

    def __init__(self, tasks: Iterable[TaskFeatures], scatter: FeatureScatter) -> None:
        self._tasks = list(tasks)
        covariance = shrunk_covariance(scatter)
        means = torch.stack([of.mean for of in self._tasks]).double()
        weights = torch.cholesky_solve(means.T, torch.linalg.cholesky(covariance))  # (m, tasks)
        self._weights = weights.float()
        self._offsets = -((means * weights.T).sum(1) / 2).float()

    def log_likelihoods(self, features: Tensor) -> Tensor:
        """By input and task, the logarithm of how likely inputs of the task have such features.

        Args:
            features: (n, m).

        Returns:
            (n, tasks) float32; a constant for each input is left out.
        """
        return torch.addmm(self._offsets, features.float().cpu(), self._weights)

    def is_beyond(self, features: Tensor, chosen: Sequence[int], false_rejects: float) -> list[bool]:
        """Whether each input is farther from its task than that task's own inputs are.

        Args:
            features: (n, m).
            chosen: Place of a task, for each input.
            false_rejects: As for `TaskFeatures.threshold`.
        """
        tasks = [self._tasks[place] for place in chosen]
        off = features.float().cpu() - torch.stack([of.mean for of in tasks])
        distances = (off.square() / _floored(torch.stack([of.variances for of in tasks]))).mean(1)
        thresholds = {place: self._tasks[place].threshold(false_rejects) for place in set(chosen)}
        return [distance > thresholds[place] for distance, place in zip(distances.tolist(), chosen, strict=True)]


def shrunk_covariance(scatter: FeatureScatter) -> Tensor:
    """The covariance (m, m), part of it replaced by a multiple of the identity of the same trace.

    The part is that of the oracle approximating shrinkage (Chen, Wiesel, Eldar & Hero 2010, Eq. 23): all of it where
    there is next to nothing to estimate from, little where there is much. It is at least 0.001, so that there is an
    inverse.
    """
    covariance = scatter.products / max(scatter.degrees, 1)
    width = len(covariance)
    trace, squares = float(covariance.trace()), float(covariance.square().sum())
    above = (1 - 2 / width) * squares + trace**2
    below = (max(scatter.degrees, 1) + 1 - 2 / width) * (squares - trace**2 / width)
    part = min(1.0, max(_LEAST_SHRINKAGE, above / below)) if below > 0 else 1.0
    level = trace / width or 1.0
    return (1 - part) * covariance + part * level * torch.eye(width, dtype=covariance.dtype)


def _floored(variances: Tensor) -> Tensor:
    """Variances (…, m), none of them next to nothing."""
    mean = variances.mean(-1, keepdim=True)
    return variances + _LEAST_VARIANCE * torch.where(mean > 0, mean, 1.0)


def _left_out_distances(rows: Tensor, mean: Tensor, squares: Tensor, count: int) -> Tensor:
    """The distance that each input would have, had mean and variances been found without it: in closed form.

    Args:
        rows: (n, m) float64.
        mean: (m,).
        squares: (m,), ``Σ (x - μ)²`` over all inputs.
        count: How many inputs.
    """
    off = rows - mean
    without = (squares - off.square() * (count / (count - 1))).clamp_min(0) / (count - 2)
    return ((off * (count / (count - 1))).square() / _floored(without)).mean(1)


def _evenly_spaced(ascending: Tensor) -> Tensor:
    """At most 256 of these, the last among them: those of rank ceil((i + 1) n / 256)."""
    count, kept = len(ascending), min(len(ascending), MOST_DISTANCES)
    return ascending[[-(-(i + 1) * count // kept) - 1 for i in range(kept)]]


def _on_grid(products: Tensor) -> Tensor:
    """The nearest whole multiples of a power of two, of which sums in float64 are exact."""
    largest = float(products.abs().max())
    if not largest:
        return products
    step = 2.0 ** (math.ceil(math.log2(largest)) - _SCATTER_BITS)
    return (products / step).round() * step
