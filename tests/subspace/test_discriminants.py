"""Discriminants of features, compared with their definition in float64."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from share_hf.subspace.discriminants import (
    MOST_DISTANCES,
    MOST_MEASURED,
    Discriminants,
    FeatureSums,
    TaskFeatures,
)
from share_hf.subspace.pooling import folded, pooled, to_the_left


WIDTH = 6


def texts(seed: int, count: int, *, width: int = WIDTH, offset: float = 0.0) -> Tensor:
    """Return features (count, width) about a random mean."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(width, generator=generator) + 0.2
    return torch.randn(count, width, generator=generator) * spread + torch.randn(width, generator=generator) + offset


def sums_of(features: Tensor, *, batch: int = 5) -> FeatureSums:
    sums = FeatureSums()
    for rows in features.split(batch):
        sums.add(rows)
    return sums


def naive_moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean, and the scatter about it, by definition."""
    rows = features.double()
    mean = rows.mean(0)
    return mean, sum(torch.outer(row - mean, row - mean) for row in rows)


@given(seed=st.integers(0, 10**6), count=st.integers(3, 40), batch=st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_sums_over_batches_are_mean_and_scatter(seed: int, count: int, batch: int) -> None:
    features = texts(seed, count, offset=3.0)
    found, scatter = sums_of(features, batch=batch).learned()
    mean, expected = naive_moments(features)
    torch.testing.assert_close(found.mean.double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scatter.products, expected, rtol=0, atol=2**-22 * float(expected.abs().max()) + 1e-9)
    torch.testing.assert_close(found.variances.double(), expected.diagonal() / (count - 1), rtol=1e-5, atol=1e-9)
    assert scatter.degrees == count - 1


@given(seed=st.integers(0, 10**6), count=st.integers(3, 20))
@settings(max_examples=20, deadline=None)
def test_an_input_is_measured_as_if_it_had_not_been_there(seed: int, count: int) -> None:
    features = texts(seed, count)
    found, _ = sums_of(features).learned()
    expected = []
    for i in range(count):
        mean, scatter = naive_moments(features[[j for j in range(count) if j != i]])
        variances = scatter.diagonal() / (count - 2)
        off = features[i].double() - mean
        expected.append(float((off.square() / (variances + 1e-2 * variances.mean())).mean()))
    assert found.measured == count
    torch.testing.assert_close(found.distances.double(), torch.tensor(sorted(expected)).double(), rtol=1e-4, atol=1e-6)


@given(seed=st.integers(0, 10**6), tasks=st.integers(2, 5))
@settings(max_examples=30, deadline=None)
def test_scores_are_those_of_gaussians_of_one_covariance(seed: int, tasks: int) -> None:
    learned = [sums_of(texts(seed + i, 30)).learned() for i in range(tasks)]
    scatter = sum((part for _, part in learned[1:]), start=learned[0][1])
    found = Discriminants([of for of, _ in learned], scatter)
    inputs = texts(seed + 99, 7)
    plain = scatter.products / scatter.degrees
    # Chen et al. 2010, Eq. 23, term by term.
    ratio = float((plain @ plain).trace()), float(plain.trace()) ** 2
    part = ((1 - 2 / WIDTH) * ratio[0] + ratio[1]) / (
        (scatter.degrees + 1 - 2 / WIDTH) * (ratio[0] - ratio[1] / WIDTH)
    )
    part = min(1.0, max(1e-3, part))
    covariance = (1 - part) * plain + part * plain.trace() / WIDTH * torch.eye(WIDTH).double()
    gaussians = [torch.distributions.MultivariateNormal(of.mean.double(), covariance) for of, _ in learned]
    expected = torch.stack([gaussian.log_prob(inputs.double()) for gaussian in gaussians], dim=1)
    torch.testing.assert_close(
        found.log_likelihoods(inputs).double().softmax(1), expected.softmax(1), rtol=1e-3, atol=1e-4
    )


@given(seed=st.integers(0, 10**6), widths=st.integers(2, 12))
@settings(max_examples=15, deadline=None)
def test_the_order_of_tasks_makes_no_difference_to_the_bit(seed: int, widths: int) -> None:
    parts = [sums_of(texts(seed + i, 12 + i, width=widths) * 10 ** (i - 1)).learned()[1] for i in range(4)]
    totals = [sum(order[1:], start=order[0]) for order in permutations(parts)]
    assert all(torch.equal(total.products, totals[0].products) for total in totals)
    assert {total.degrees for total in totals} == {sum(part.degrees for part in parts)}
    # And nothing is lost if a part is stored in float32.
    assert all(torch.equal(part.products.float().double(), part.products) for part in parts)


@given(seed=st.integers(0, 10**6), ranks=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_processes_add_up_to_one(seed: int, ranks: int) -> None:
    features = texts(seed, 37)
    alone, scatter = sums_of(features).learned()
    parts = [sums_of(features[rank::ranks]) for rank in range(ranks)]
    together, of_parts = FeatureSums.together([*parts, FeatureSums()]).learned()
    torch.testing.assert_close(together.mean, alone.mean)
    torch.testing.assert_close(together.distances, alone.distances)
    torch.testing.assert_close(of_parts.products, scatter.products, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("false_rejects", [0.01, 0.05, 0.2])
def test_no_more_of_a_tasks_own_inputs_are_refused_than_is_stated(false_rejects: float) -> None:
    rates = []
    for seed in range(20):
        features = texts(seed, 1400, width=20)
        found, scatter = sums_of(features[:400]).learned()
        beyond = Discriminants([found], scatter).is_beyond(features[400:], [0] * 1000, false_rejects)
        rates.append(sum(beyond) / 1000)
    assert false_rejects / 2 < sum(rates) / len(rates) <= 1.15 * false_rejects


def test_what_is_far_from_every_task_is_beyond_them() -> None:
    found, scatter = sums_of(texts(0, 300)).learned()
    discriminants = Discriminants([found], scatter)
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
    of = TaskFeatures(torch.zeros(1), torch.ones(1), torch.tensor(ranks).float(), count)
    needed = math.ceil((count + 1) * (1 - false_rejects))
    expected = min((rank for rank in ranks if rank >= needed), default=math.inf)
    assert of.threshold(false_rejects) == expected


def test_many_texts_are_measured_in_part_and_evenly() -> None:
    features = texts(0, 2 * MOST_MEASURED + 100)
    sums = sums_of(features, batch=1000)
    assert torch.equal(torch.cat(sums.kept), features[::4])
    found, _ = sums.learned()
    assert len(found.distances) == MOST_DISTANCES and found.measured == len(features[::4]) <= MOST_MEASURED


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([torch.ones(2, 3)], "2 inputs to learn a route from, expected at least 3"),
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
    (one, scatter), (two, other) = (sums_of(torch.full((5, 3), value)).learned() for value in (1.0, 2.0))
    found = Discriminants([one, two], scatter + other)
    found = found.log_likelihoods(torch.tensor([[1.1] * 3, [1.9] * 3]))
    assert found.argmax(1).tolist() == [0, 1]


@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), left=st.booleans())
@settings(max_examples=30, deadline=None)
def test_pooling_takes_the_mean_of_what_is_not_padding(seed: int, lengths: list[int], left: bool) -> None:
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


def test_folded_features_keep_products_of_inputs() -> None:
    features = torch.nn.functional.normalize(torch.randn(40, 8192), dim=1)
    features[1::2] += 0.8 * features[::2]
    found, expected = (rows @ rows.T for rows in (folded(features, 1024), features))
    assert folded(features, 1024).shape == (40, 1024)
    assert float((found - expected).abs().max()) < 6 / 1024**0.5
    assert torch.equal(folded(features[:, :1024], 1024), features[:, :1024])
