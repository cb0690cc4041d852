"""Scores of predictions, and confidence intervals for the difference of two methods tested on the same examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


Array = NDArray[np.float64]
Answers = Mapping[str, Array]  # by task, predicted or true values (examples,); classes as numbers

SAMPLES = 2000
CONFIDENCE = 0.95


def accuracy(found: Array, true: Array, weights: Array) -> Array:
    """Return the shares (samples,) of right answers, with examples weighted by `weights` (samples, examples)."""
    return weights @ (found == true) / weights.sum(-1)


def f1(found: Array, true: Array, weights: Array) -> Array:
    """Return the F1 scores (samples,) of class 1; 0 if the class is neither predicted nor present."""
    hits = weights @ ((found == 1) & (true == 1))
    predicted, actual = weights @ (found == 1), weights @ (true == 1)
    return _ratio(2 * hits, predicted + actual)


def matthews_correlation(found: Array, true: Array, weights: Array) -> Array:
    """Return the correlations (samples,) of predicted and true class (Gorodkin 2004); 0 if either is constant."""
    total = weights.sum(-1)
    right = weights @ (found == true)
    both, squares_found, squares_true = 0.0, 0.0, 0.0
    for label in np.union1d(found, true):
        predicted, actual = weights @ (found == label), weights @ (true == label)
        both, squares_found, squares_true = (
            both + predicted * actual,
            squares_found + predicted**2,
            squares_true + actual**2,
        )
    return _ratio(right * total - both, np.sqrt((total**2 - squares_found) * (total**2 - squares_true)))


def pearson(found: Array, true: Array, weights: Array) -> Array:
    """Return the correlations (samples,) of predicted and true values; 0 if either is constant."""
    shares = weights / weights.sum(-1, keepdims=True)
    x = found - (shares @ found)[:, None]
    y = true - (shares @ true)[:, None]
    return _ratio((shares * x * y).sum(-1), np.sqrt((shares * x**2).sum(-1) * (shares * y**2).sum(-1)))


METRICS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews_correlation": matthews_correlation,
    "pearson": pearson,
}


@dataclass(frozen=True)
class Difference:
    """The mean of a difference, and its percentile interval at 95 %.

    Args:
        mean: Mean over all runs.
        low: Lower end of the interval.
        high: Upper end of the interval.
        seeds: Number of seeds to draw from. With one seed, the interval only reflects the choice of test examples;
            with few seeds, it reflects little of how seeds differ.
    """

    mean: float
    low: float
    high: float
    seeds: int


def paired_difference(
    ours: Sequence[Answers],
    theirs: Sequence[Answers],
    true: Answers,
    metrics: Mapping[str, str],
    *,
    seeds: Sequence[int] | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Difference:
    """Estimate how much better one method is than another, on average over tasks and runs.

    The bootstrap draws examples, the same ones for both methods and all runs. It also draws seeds, each with all of
    its runs and the runs that they are compared with (Efron & Tibshirani 1993, Ch. 8 and 13: percentiles).

    Args:
        ours: Answers to all tasks, for each run.
        theirs: Answers of the other method, run by run.
        true: True answers.
        metrics: Name of each task's metric.
        seeds: Seed of each run. None means that each run has a different seed.
        samples: Number of draws.
        seed: Seed of the draws.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{len(ours)} and {len(theirs)} runs, expected as many of both, at least one")
    generator = np.random.default_rng(seed)
    drawn = np.zeros((len(ours), samples))
    measured = np.zeros(len(ours))
    for task, values in true.items():
        metric, count = METRICS[metrics[task]], len(values)
        weights = generator.multinomial(count, np.full(count, 1 / count), size=samples).astype(np.float64)
        once = np.ones((1, count))
        for run, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            drawn[run] += metric(our[task], values, weights) - metric(their[task], values, weights)
            measured[run] += float(metric(our[task], values, once)[0] - metric(their[task], values, once)[0])
    known = np.arange(len(ours)) if seeds is None else np.asarray(seeds)
    different = np.unique(known)
    of_seed = (known == different[:, None]).astype(np.float64)  # (seeds, runs)
    times = generator.multinomial(len(different), np.full(len(different), 1 / len(different)), size=samples) @ of_seed
    means = (times * drawn.T).sum(-1) / times.sum(-1) / len(true)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Difference(float(measured.mean() / len(true)), float(low), float(high), len(different))


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean, or None for a single value."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None


def _ratio(above: Array, below: Array) -> Array:
    return np.divide(above, below, out=np.zeros_like(above, dtype=np.float64), where=below > 0)
