"""Linear discriminants that decide which task an input belongs to, from features with one covariance for all tasks.

A task is learned once, from sums over its own inputs, and never seen again: its folder keeps the mean of their
features, and their scatter about the mean is added to one that all tasks share. Sums do not depend on an order, so the
result is the same for every order of the tasks. With one covariance for all, the boundary between two tasks is linear
(Fisher's discriminant, used for continual learning by "streaming LDA", Hayes & Kanan 2020, and RanPAC, McDonnell et
al. 2023). A separate mean for each label of a task was tried, and did not tell tasks apart any better.

Whether an input belongs to none of the tasks depends on its distance from the mean of its task, in units of the task's
own variances. The distances of the task's own inputs, each left out in turn, show how far is too far. This limit
depends on that task alone, and so never changes. Inputs that resemble a known task are mostly attributed to it. The
distance in units of the shared covariance was tried as well, and at the same rate of falsely rejected inputs it
rejects no more of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


LEAST_INPUTS = 3
# Largest number of inputs of a task whose distances are measured, and of distances that are kept.
MOST_MEASURED = 4096
MOST_DISTANCES = 256
_MEASURED_AT_ONCE = 256
# Part of the mean variance of a task that is added to each variance, so that a feature that never varied does not
# dominate.
_LEAST_VARIANCE = 1e-2
_LEAST_SHRINKAGE = 1e-3
# Bits of the largest entry of a scatter. With these, float64 holds sums exactly in any order, and float32 one scatter.
_SCATTER_BITS = 23


@dataclass(frozen=True)
class FeatureScatter:
    """Sum of products of features minus the mean of their task: ``Σ_t Σ_{x in t} (x - μ_t)(x - μ_t)^T``.

    Args:
        products: (m, m) float64, symmetric. The entries of a single task are whole multiples of a power of two.
        degrees: Number of inputs minus number of tasks, which `products` is divided by to get the covariance.
    """

    products: Tensor
    degrees: int

    def __add__(self, other: FeatureScatter) -> FeatureScatter:
        return FeatureScatter(self.products + other.products, self.degrees + other.degrees)

    @property
    def identity(self) -> str:
        """Digest that identifies the scatter of a task. The same data always has the same digest."""
        digest = hashlib.sha256(f"{tuple(self.products.shape)} {self.degrees}".encode())
        digest.update(self.products.cpu().contiguous().numpy())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class TaskFeatures:
    """Statistics that are kept of the features of a task's inputs.

    Args:
        mean: (m,) float32, mean of the features.
        variances: (m,) float32, variances of the features.
        distances: (d,) float32, ascending squared distances of `measured` inputs from the mean, in units of the
            variances and per feature, with mean and variances computed without the input itself. At most 256 are
            kept, evenly spaced and including the largest.
        measured: Number of inputs that were measured.
    """

    mean: Tensor
    variances: Tensor
    distances: Tensor
    measured: int

    def threshold(self, false_rejects: float) -> float:
        """Return the distance beyond which an input does not belong to this task.

        Args:
            false_rejects: Largest fraction of the task's own inputs that may lie beyond it, in (0, 1). A new input is
                as likely to be the farthest as each of the measured ones, so the threshold takes
                ``1 / false_rejects - 1`` of them.

        Returns:
            The threshold, or infinity if too few inputs were measured.
        """
        rank = math.ceil((self.measured + 1) * (1 - false_rejects))
        if rank > self.measured:
            return math.inf
        # The distance at `i` has rank ceil((i + 1) n / kept). This takes the first whose rank is not smaller.
        return float(self.distances[(rank - 1) * len(self.distances) // self.measured])


class FeatureSums:
    """Running sums over the inputs of one task. The sums of several processes add up.

    Attributes:
        count: Number of inputs.
        total: (m,) float64, ``Σ x``; None before the first input.
        products: (m, m) float64, ``Σ x x^T``; None before the first input.
        kept: Features (n, m) float32 of some inputs, evenly spaced and in a few pieces, whose distances are measured.
    """

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | None = None
        self.products: Tensor | None = None
        self.kept: list[Tensor] = []
        self._stride = 1

    def add(self, features: Tensor) -> None:
        """Add inputs with these features (n, m), in any float dtype.

        Raises:
            ValueError: If features are not finite, or differ in width from the ones before.
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
        """Return the sums over the inputs of all parts."""
        whole = cls()
        for part in parts:
            if part.total is not None:
                whole._add_sums(part.count, part.total, part.products)
                whole.kept += part.kept
        step = math.ceil(sum(map(len, whole.kept)) / MOST_MEASURED)
        whole.kept = [torch.cat(whole.kept)[::step]] if whole.kept else []
        return whole

    def learned(self) -> tuple[TaskFeatures, FeatureScatter]:
        """Return the statistics that are kept of the task, and its part of the scatter that all tasks share.

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
        tasks: Features of the tasks; at least one.
        scatter: Sum of the scatter of all tasks.
    """

    def __init__(self, tasks: Iterable[TaskFeatures], scatter: FeatureScatter) -> None:
        self._tasks = list(tasks)
        covariance = shrunk_covariance(scatter)
        means = torch.stack([of.mean for of in self._tasks]).double()
        weights = torch.cholesky_solve(means.T, torch.linalg.cholesky(covariance))  # (m, tasks)
        self._weights = weights.float()
        self._offsets = -((means * weights.T).sum(1) / 2).float()

    def log_likelihoods(self, features: Tensor) -> Tensor:
        """Return the log-likelihood of the features of each input under each task.

        Args:
            features: (n, m), features of the inputs.

        Returns:
            (n, tasks) float32, up to a constant for each input.
        """
        return torch.addmm(self._offsets, features.float().cpu(), self._weights)

    def is_beyond(self, features: Tensor, chosen: Sequence[int], false_rejects: float) -> list[bool]:
        """Return whether each input is farther from its task than the task's own inputs are.

        Args:
            features: (n, m), features of the inputs.
            chosen: Position of the chosen task for each input.
            false_rejects: Same as in `TaskFeatures.threshold`.
        """
        tasks = [self._tasks[place] for place in chosen]
        off = features.float().cpu() - torch.stack([of.mean for of in tasks])
        distances = (off.square() / _floored(torch.stack([of.variances for of in tasks]))).mean(1)
        thresholds = {place: self._tasks[place].threshold(false_rejects) for place in set(chosen)}
        return [distance > thresholds[place] for distance, place in zip(distances.tolist(), chosen, strict=True)]


def shrunk_covariance(scatter: FeatureScatter) -> Tensor:
    """Return the covariance (m, m) with part of it replaced by a multiple of the identity of the same trace.

    The part follows the oracle approximating shrinkage (Chen, Wiesel, Eldar & Hero 2010, Eq. 23): all of it where
    there is next to nothing to estimate from, little where there is much. It is at least 0.001, so that the inverse
    exists.
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
    """Return variances (…, m) raised so that none is close to zero."""
    mean = variances.mean(-1, keepdim=True)
    return variances + _LEAST_VARIANCE * torch.where(mean > 0, mean, 1.0)


def _left_out_distances(rows: Tensor, mean: Tensor, squares: Tensor, count: int) -> Tensor:
    """Return the distance of each input from a mean and variances that were computed without it, in closed form.

    Args:
        rows: (n, m) float64, features of the inputs.
        mean: (m,), mean over all inputs.
        squares: (m,), ``Σ (x - μ)²`` over all inputs.
        count: Number of all inputs.
    """
    off = rows - mean
    without = (squares - off.square() * (count / (count - 1))).clamp_min(0) / (count - 2)
    return ((off * (count / (count - 1))).square() / _floored(without)).mean(1)


def _evenly_spaced(ascending: Tensor) -> Tensor:
    """Return at most 256 of the values, including the last, with ranks ceil((i + 1) n / 256)."""
    count, kept = len(ascending), min(len(ascending), MOST_DISTANCES)
    return ascending[[-(-(i + 1) * count // kept) - 1 for i in range(kept)]]


def _on_grid(products: Tensor) -> Tensor:
    """Round to the nearest whole multiples of a power of two, whose sums are exact in float64."""
    largest = float(products.abs().max())
    if not largest:
        return products
    step = 2.0 ** (math.ceil(math.log2(largest)) - _SCATTER_BITS)
    return (products / step).round() * step
