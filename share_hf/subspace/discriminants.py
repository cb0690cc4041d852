"""Which task an input belongs to: linear discriminants of features, with one covariance shared by all tasks.

A task is learned once, from sums over its own texts, and never seen again: its folder keeps the mean features of its
classes, and its scatter is added to one that all tasks share. Sums know no order, so the result is the same whatever
the order of the tasks. With one covariance for all, the boundary between two classes is linear (Fisher's discriminant,
as "streaming LDA", Hayes & Kanan 2020, and RanPAC, McDonnell et al. 2023, use it for continual learning).

Whether an input belongs to none of the tasks is told by its distance from the class means of its task, in units of the
task's own variances: what the task's own texts had, left out one by one, says how far is too far. It depends on that
task alone, and so never changes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


# Classes of a task that have a mean of their own; of more, such as the values of a regression, the task has one.
MOST_CLASSES = 32
# Texts of a task whose distances are measured, and how many of these are kept.
MOST_MEASURED = 4096
MOST_DISTANCES = 256
# Part of a task's mean variance that is added to each: a feature that never varied must not rule.
_LEAST_VARIANCE = 1e-2
# Bits of a scatter's largest entry: what is added up is exact in float64, in any order, and one of them in float32.
_SCATTER_BITS = 23


@dataclass(frozen=True)
class FeatureScatter:
    """A sum of products of features less the mean of their class: ``Σ_c Σ_{x in c} (x - μ_c)(x - μ_c)^T``.

    Args:
        products: (m, m) float64, symmetric. Entries of one task are whole multiples of a power of two.
        degrees: Texts less classes, over which the covariance is the mean.
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
    """What is kept of the features of a task's texts.

    Args:
        means: (classes, m) float32.
        counts: (classes,) int64, texts of each class.
        variances: (m,) float32, within the classes.
        distances: (d,) float32, in ascending order: of `measured` texts, each without itself, the squared distance
            from the nearest class mean, in units of the variances, and per feature. At most 256 of them, evenly
            spaced, the largest among them.
        measured: How many texts were measured.
    """

    means: Tensor
    counts: Tensor
    variances: Tensor
    distances: Tensor
    measured: int

    def threshold(self, false_rejects: float) -> float:
        """The distance past which an input is none of this task's.

        Args:
            false_rejects: Largest fraction of the task's own inputs that are to be past it, in (0, 1). An input is as
                likely as each text to be the farthest, so it takes ``1 / false_rejects - 1`` texts to know.

        Returns:
            Infinity where the texts are too few.
        """
        rank = math.ceil((self.measured + 1) * (1 - false_rejects))
        if rank > self.measured:
            return math.inf
        # The distance at `i` is that of rank ceil((i + 1) n / kept): the first whose rank is no smaller.
        return float(self.distances[(rank - 1) * len(self.distances) // self.measured])


@dataclass
class FeatureSums:
    """Running sums over the texts of one task; those of several processes add up.

    Attributes:
        products: (m, m) float64, ``Σ x x^T``; None before the first text.
        sums: By class, (m,) float64, ``Σ x``.
        counts: By class, its texts.
        kept: Features (n, m) float32 of some of the texts, evenly spaced, to measure.
    """

    products: Tensor | None = None
    sums: dict[int | None, Tensor] = field(default_factory=dict)
    counts: dict[int | None, int] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)
    kept_classes: list[int | None] = field(default_factory=list)
    _stride: int = 1
    _seen: int = 0

    def add(self, features: Tensor, classes: Sequence[int] | None = None) -> None:
        """Add texts.

        Args:
            features: (n, m) of any float dtype.
            classes: Of each text; None for a task without.

        Raises:
            ValueError: If features are not finite, or of another width than the ones before.
        """
        rows = features.detach().double().cpu()
        if not torch.isfinite(rows).all():
            raise ValueError("the features of a text have NaN or infinite entries, expected finite numbers")
        if self.products is not None and rows.shape[1] != len(self.products):
            raise ValueError(f"features are {tuple(rows.shape)}, expected {len(self.products)} columns as before")
        of_rows = [None] * len(rows) if classes is None else list(classes)
        products = rows.T @ rows
        self.products = products if self.products is None else self.products + products
        for name in dict.fromkeys(of_rows):
            of_class = rows[[i for i, found in enumerate(of_rows) if found == name]]
            self.sums[name] = self.sums.get(name, 0) + of_class.sum(0)
            self.counts[name] = self.counts.get(name, 0) + len(of_class)
        self._keep(rows.float(), of_rows)

    def _keep(self, rows: Tensor, classes: Sequence[int | None]) -> None:
        for row, name in zip(rows, classes, strict=True):
            if self._seen % self._stride == 0:
                self.kept.append(row)
                self.kept_classes.append(name)
            self._seen += 1
            if len(self.kept) > MOST_MEASURED:
                self.kept, self.kept_classes = self.kept[::2], self.kept_classes[::2]
                self._stride *= 2

    @classmethod
    def together(cls, parts: Iterable[FeatureSums]) -> FeatureSums:
        """The sums over the texts of all parts."""
        whole = cls()
        for part in parts:
            if part.products is None:
                continue
            whole.products = part.products if whole.products is None else whole.products + part.products
            for name, total in part.sums.items():
                whole.sums[name] = whole.sums.get(name, 0) + total
                whole.counts[name] = whole.counts.get(name, 0) + part.counts[name]
            whole.kept += part.kept
            whole.kept_classes += part.kept_classes
        step = math.ceil(len(whole.kept) / MOST_MEASURED) or 1
        whole.kept, whole.kept_classes = whole.kept[::step], whole.kept_classes[::step]
        return whole

    def learned(self) -> tuple[TaskFeatures, FeatureScatter]:
        """What is kept of a task, and its part of the scatter that all tasks share.

        Raises:
            ValueError: If there are fewer than two texts more than classes.
        """
        names = sorted(self.sums, key=lambda name: (name is not None, name))
        if len(names) > MOST_CLASSES:
            return self._as_one_class().learned()
        total = sum(self.counts.values())
        if total - len(names) < 2 and len(names) > 1:
            return self._as_one_class().learned()
        if total < 3:
            raise ValueError(f"{total} texts to learn a task's features from, expected at least 3")
        counts = torch.tensor([self.counts[name] for name in names])
        means = torch.stack([self.sums[name] for name in names]) / counts[:, None]
        products = self.products - means.T @ (means * counts[:, None])
        degrees = total - len(names)
        squares = products.diagonal().clamp_min(0)
        rows = torch.tensor([names.index(name) for name in self.kept_classes])
        distances = _left_out_distances(torch.stack(self.kept).double(), rows, means, counts, squares, degrees)
        found = TaskFeatures(
            means=means.float(),
            counts=counts,
            variances=(squares / degrees).float(),
            distances=_evenly_spaced(distances.sort().values.float()),
            measured=len(distances),
        )
        return found, FeatureScatter(_on_grid((products + products.T) / 2), degrees)

    def _as_one_class(self) -> FeatureSums:
        return FeatureSums(
            products=self.products,
            sums={None: torch.stack(list(self.sums.values())).sum(0)},
            counts={None: sum(self.counts.values())},
            kept=self.kept,
            kept_classes=[None] * len(self.kept),
        )


class Discriminants:
    """Scores inputs for any number of tasks by one product with their features.

    Args:
        tasks: By name; at least one.
        scatter: The sum of all tasks' scatter.
        shrinkage: Part of the covariance that is replaced by a multiple of the identity of the same trace.
    """

    def __init__(self, tasks: Mapping[str, TaskFeatures], scatter: FeatureScatter, *, shrinkage: float) -> None:
        self.tasks = tuple(tasks)
        self._features = list(tasks.values())
        covariance = scatter.products / max(scatter.degrees, 1)
        level = float(covariance.diagonal().mean()) or 1.0
        covariance = (1 - shrinkage) * covariance + shrinkage * level * torch.eye(len(covariance), dtype=torch.float64)
        means = torch.cat([of.means for of in self._features]).double()
        weights = torch.cholesky_solve(means.T, torch.linalg.cholesky(covariance))  # (m, classes)
        shares = [(of.counts / of.counts.sum()).double().log() for of in self._features]
        self._weights = weights.float()
        self._offsets = (torch.cat(shares) - (means * weights.T).sum(1) / 2).float()
        self._task_of_class = torch.repeat_interleave(
            torch.arange(len(self.tasks)), torch.tensor([len(of.means) for of in self._features])
        )

    def log_likelihoods(self, features: Tensor) -> Tensor:
        """By input and task, the logarithm of how likely the task's texts have such features, up to a constant.

        Args:
            features: (n, m).

        Returns:
            (n, tasks) float32; a constant for each input is left out.
        """
        of_classes = torch.addmm(self._offsets, features.float().cpu(), self._weights)
        if len(of_classes.T) == len(self.tasks):
            return of_classes
        places = self._task_of_class.expand_as(of_classes)
        largest = of_classes.new_full((len(of_classes), len(self.tasks)), -math.inf)
        largest = largest.scatter_reduce(1, places, of_classes, "amax")
        sums = torch.zeros_like(largest).scatter_add(1, places, (of_classes - largest.gather(1, places)).exp())
        return largest + sums.log()

    def is_beyond(self, features: Tensor, chosen: Sequence[int], false_rejects: float) -> list[bool]:
        """Of each input, whether it is farther from its task than that task's own texts are.

        Args:
            features: (n, m).
            chosen: Place of a task, for each input.
            false_rejects: As for `TaskFeatures.threshold`.
        """
        places, rows = torch.tensor(chosen), features.double().cpu()
        beyond = torch.zeros(len(rows), dtype=torch.bool)
        for place in places.unique().tolist():
            of, own = self._features[place], places == place
            distances = _distances(rows[own], of.means.double(), _floored(of.variances.double()))
            beyond[own] = distances.min(1).values > of.threshold(false_rejects)
        return beyond.tolist()


def _distances(rows: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """Squared distances (n, classes), per feature, in units of the variances."""
    scale = variances.rsqrt()
    return torch.cdist(rows * scale, means * scale, compute_mode="donot_use_mm_for_euclid_dist").square() / len(scale)


def _floored(variances: Tensor) -> Tensor:
    """Variances, none of them next to nothing."""
    mean = variances.mean(-1, keepdim=True)
    return variances + _LEAST_VARIANCE * torch.where(mean > 0, mean, 1.0)


def _left_out_distances(
    rows: Tensor, classes: Tensor, means: Tensor, counts: Tensor, squares: Tensor, degrees: int
) -> Tensor:
    """Of each text the distance that it would have, had means and variances been found without it: in closed form.

    Args:
        rows: (n, m) float64.
        classes: (n,), the class of each.
        means: (classes, m).
        counts: (classes,).
        squares: (m,), ``Σ (x - μ)²`` over all texts.
        degrees: Texts less classes.
    """
    found = []
    for row, place in zip(rows, classes.tolist(), strict=True):
        count = int(counts[place])
        off = row - means[place]
        if count > 1:
            left = squares - off.square() * (count / (count - 1))
            variances = _floored(left.clamp_min(0) / (degrees - 1))
            without = means.clone()
            without[place] = row - off * (count / (count - 1))
        else:  # the class goes with its only text
            variances = _floored(squares / degrees)
            without = torch.cat([means[:place], means[place + 1 :]])
        found.append(((row - without).square() / variances).mean(1).min())
    return torch.stack(found)


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
