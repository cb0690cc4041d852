"""Discriminants of features, against what they are by definition in float64."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from share_hf.subspace.discriminants import (
    MOST_CLASSES,
    MOST_DISTANCES,
    MOST_MEASURED,
    Discriminants,
    FeatureScatter,
    FeatureSums,
    TaskFeatures,
)
from share_hf.subspace.pooling import pooled, to_the_left


WIDTH = 6
SHRINKAGE = 1e-3


def texts(seed: int, count: int, *, width: int = WIDTH, offset: float = 0.0) -> Tensor:
    """Features (count, width) about a random mean."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(width, generator=generator) + 0.2
    return torch.randn(count, width, generator=generator) * spread + torch.randn(width, generator=generator) + offset


def sums_of(features: Tensor, classes: list[int] | None = None, *, batch: int = 5) -> FeatureSums:
    sums = FeatureSums()
    for start in range(0, len(features), batch):
        sums.add(features[start : start + batch], None if classes is None else classes[start : start + batch])
    return sums


def naive_moments(features: Tensor, classes: list[int]) -> tuple[dict[int, Tensor], Tensor]:
    """Mean of each class, and the scatter about them, by definition."""
    rows = features.double()
    means = {name: rows[[c == name for c in classes]].mean(0) for name in sorted(set(classes))}
    scatter = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for row, name in zip(rows, classes, strict=True):
        off = row - means[name]
        scatter += torch.outer(off, off)
    return means, scatter


@given(seed=st.integers(0, 10**6), count=st.integers(8, 40), kinds=st.integers(1, 3), batch=st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_sums_over_batches_are_means_and_scatter(seed: int, count: int, kinds: int, batch: int) -> None:
    features = texts(seed, count, offset=3.0)
    classes = [i % kinds for i in range(count)]
    found, scatter = sums_of(features, classes, batch=batch).learned()
    means, expected = naive_moments(features, classes)
    torch.testing.assert_close(found.means.double(), torch.stack(list(means.values())), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scatter.products, expected, rtol=0, atol=2**-22 * float(expected.abs().max()) + 1e-9)
    torch.testing.assert_close(found.variances.double(), expected.diagonal() / (count - kinds), rtol=1e-5, atol=1e-9)
    assert found.counts.tolist() == [classes.count(name) for name in range(kinds)]
    assert scatter.degrees == count - kinds


@given(seed=st.integers(0, 10**6), count=st.integers(6, 20), kinds=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_a_text_is_measured_as_if_it_had_not_been_there(seed: int, count: int, kinds: int) -> None:
    features, classes = texts(seed, count), [i % kinds for i in range(count)]
    found, _ = sums_of(features, classes).learned()
    expected = []
    for i in range(count):
        rest = [j for j in range(count) if j != i]
        means, scatter = naive_moments(features[rest], [classes[j] for j in rest])
        variances = scatter.diagonal() / (len(rest) - len(means))
        # A class that goes with its only text takes no degree of freedom with it.
        if classes[i] not in means:
            variances = scatter.diagonal() / (count - kinds)
        variances = variances + 1e-2 * variances.mean()
        row = features[i].double()
        expected.append(min(float(((row - mean).square() / variances).mean()) for mean in means.values()))
    assert found.measured == count
    torch.testing.assert_close(found.distances.double(), torch.tensor(sorted(expected)).double(), rtol=1e-4, atol=1e-6)


@given(seed=st.integers(0, 10**6), tasks=st.integers(2, 5), kinds=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_scores_are_those_of_gaussians_of_one_covariance(seed: int, tasks: int, kinds: int) -> None:
    learned, scatter = {}, None
    for i in range(tasks):
        features = texts(seed + i, 30)
        learned[f"task{i}"], part = sums_of(features, [j % (kinds if i else 1) for j in range(30)]).learned()
        scatter = part if scatter is None else scatter + part
    found = Discriminants(learned, scatter, shrinkage=SHRINKAGE).log_likelihoods(inputs := texts(seed + 99, 7))
    covariance = scatter.products / scatter.degrees
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * covariance.diagonal().mean() * torch.eye(WIDTH).double()
    expected = torch.empty(7, tasks, dtype=torch.float64)
    for j, of in enumerate(learned.values()):
        for i, row in enumerate(inputs.double()):
            gaussians = [
                count
                / of.counts.sum()
                * torch.distributions.MultivariateNormal(mean.double(), covariance).log_prob(row).exp()
                for mean, count in zip(of.means, of.counts, strict=True)
            ]
            expected[i, j] = sum(gaussians).log()
    keep = torch.isfinite(expected).all(1)
    torch.testing.assert_close(found[keep].double().softmax(1), expected[keep].softmax(1), rtol=1e-3, atol=1e-4)


@given(seed=st.integers(0, 10**6), widths=st.integers(2, 12))
@settings(max_examples=15, deadline=None)
def test_the_order_of_tasks_makes_no_difference_to_the_bit(seed: int, widths: int) -> None:
    parts = [sums_of(texts(seed + i, 12 + i, width=widths) * 10 ** (i - 1)).learned()[1] for i in range(4)]
    totals = [sum(order[1:], start=order[0]) for order in permutations(parts)]
    assert all(torch.equal(total.products, totals[0].products) for total in totals)
    assert {total.degrees for total in totals} == {sum(part.degrees for part in parts)}
    # And nothing is lost where a part is stored in float32.
    assert all(torch.equal(part.products.float().double(), part.products) for part in parts)


@given(seed=st.integers(0, 10**6), ranks=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_processes_add_up_to_one(seed: int, ranks: int) -> None:
    features, classes = texts(seed, 37), [i % 3 for i in range(37)]
    alone, scatter = sums_of(features, classes).learned()
    parts = [sums_of(features[rank::ranks], classes[rank::ranks]) for rank in range(ranks)]
    together, of_parts = FeatureSums.together([*parts, FeatureSums()]).learned()
    torch.testing.assert_close(together.means, alone.means)
    torch.testing.assert_close(together.distances, alone.distances)
    torch.testing.assert_close(of_parts.products, scatter.products, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("false_rejects", [0.01, 0.05, 0.2])
def test_no_more_of_a_tasks_own_inputs_are_refused_than_is_stated(false_rejects: float) -> None:
    rates = []
    for seed in range(20):
        features = texts(seed, 1400, width=20)
        found, scatter = sums_of(features[:400]).learned()
        beyond = Discriminants({"one": found}, scatter, shrinkage=SHRINKAGE).is_beyond(
            features[400:], [0] * 1000, false_rejects
        )
        rates.append(sum(beyond) / 1000)
    assert false_rejects / 2 < sum(rates) / len(rates) <= 1.15 * false_rejects


def test_what_is_far_from_every_task_is_beyond_them() -> None:
    found, scatter = sums_of(texts(0, 300)).learned()
    discriminants = Discriminants({"one": found}, scatter, shrinkage=SHRINKAGE)
    assert discriminants.is_beyond(texts(0, 20, offset=20.0), [0] * 20, 0.01) == [True] * 20


def test_too_few_texts_cannot_promise_a_small_rate() -> None:
    found, _ = sums_of(texts(0, 30)).learned()
    assert found.threshold(0.01) == math.inf
    assert found.threshold(0.1) == pytest.approx(float(found.distances[27]))


@given(count=st.integers(1, 700), false_rejects=st.floats(0.001, 0.999))
@settings(max_examples=100, deadline=None)
def test_a_threshold_between_kept_distances_is_the_next_one(count: int, false_rejects: float) -> None:
    kept = min(count, MOST_DISTANCES)
    ranks = [-(-(i + 1) * count // kept) for i in range(kept)]
    of = TaskFeatures(torch.zeros(1, 1), torch.ones(1).long(), torch.ones(1), torch.tensor(ranks).float(), count)
    needed = math.ceil((count + 1) * (1 - false_rejects))
    expected = min((rank for rank in ranks if rank >= needed), default=math.inf)
    assert of.threshold(false_rejects) == expected


def test_more_classes_than_are_told_apart_are_one() -> None:
    features = texts(0, 100)
    found, scatter = sums_of(features, [i % (MOST_CLASSES + 1) for i in range(100)]).learned()
    as_one, expected = sums_of(features).learned()
    assert torch.equal(found.means, as_one.means)
    assert scatter.identity == expected.identity


def test_many_texts_are_measured_in_part_and_evenly() -> None:
    features = texts(0, 2 * MOST_MEASURED + 100)
    sums = sums_of(features, batch=1000)
    assert MOST_MEASURED / 2 <= len(sums.kept) <= MOST_MEASURED
    assert torch.equal(torch.stack(sums.kept), features[::4])
    found, _ = sums.learned()
    assert len(found.distances) == MOST_DISTANCES and found.measured == len(sums.kept)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([torch.ones(2, 3)], "2 texts to learn a task's features from, expected at least 3"),
        ([torch.full((4, 3), math.nan)], "NaN or infinite entries"),
        ([torch.ones(4, 3), torch.ones(4, 2)], r"features are \(4, 2\), expected 3 columns"),
    ],
)
def test_unusable_features_are_refused(features: list[Tensor], message: str) -> None:
    sums = FeatureSums()
    with pytest.raises(ValueError, match=message):
        for rows in features:
            sums.add(rows)
        sums.learned()


def test_features_that_do_not_vary_can_be_compared_all_the_same() -> None:
    learned, scatter = {}, FeatureScatter(torch.zeros(3, 3, dtype=torch.float64), 0)
    for name, value in (("one", 1.0), ("two", 2.0)):
        learned[name], part = sums_of(torch.full((5, 3), value)).learned()
        scatter = scatter + part
    found = Discriminants(learned, scatter, shrinkage=SHRINKAGE).log_likelihoods(torch.tensor([[1.1] * 3, [1.9] * 3]))
    assert found.argmax(1).tolist() == [0, 1]


@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), left=st.booleans())
@settings(max_examples=30, deadline=None)
def test_pooling_takes_the_mean_of_what_is_no_padding(seed: int, lengths: list[int], left: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(len(lengths), 6, 4, generator=generator) for _ in range(2)]
    mask = torch.tensor([[0] * (6 - n) + [1] * n if left else [1] * n + [0] * (6 - n) for n in lengths])
    for of_layer in states:
        of_layer[mask == 0] = math.nan
    found = pooled(states, mask)
    for i in range(len(lengths)):
        means = [of_layer[i][mask[i] == 1].double().mean(0) for of_layer in states]
        expected = torch.cat([mean / mean.square().mean().sqrt() for mean in means])
        torch.testing.assert_close(found[i].double(), expected, rtol=1e-4, atol=1e-5)


def test_padding_is_brought_behind_the_tokens() -> None:
    ids = torch.tensor([[0, 0, 5, 6], [7, 0, 8, 0], [1, 2, 3, 4]])
    mask = (ids != 0).long()
    assert to_the_left(ids, mask).tolist() == [[5, 6, 0, 0], [7, 8, 0, 0], [1, 2, 3, 4]]
    assert to_the_left(ids[:, :, None].expand(-1, -1, 2), mask)[0].tolist() == [[5, 5], [6, 6], [0, 0], [0, 0]]
