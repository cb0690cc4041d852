from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from share_hf.subspace import LowRankUpdate, thin_svd_of_update
from share_hf.subspace.factors import inverse_norms, truncated_balanced_factors

from .streams import Stream, dense_learned, examples, random_update, streams


def assert_orthonormal(columns: Tensor, tolerance: float = 1e-12) -> None:
    identity = torch.eye(columns.shape[1], dtype=columns.dtype)
    torch.testing.assert_close(columns.T @ columns, identity, atol=tolerance, rtol=0)


@examples(80)
@given(streams(most_merges=2))
def test_the_compact_form_is_the_singular_value_decomposition_of_the_dense_update(stream: Stream) -> None:
    for updates in stream.merges():
        for update in updates.values():
            dense = dense_learned(update)
            noise = 100 * torch.finfo(torch.float64).eps * update.out_factor.norm() * update.in_factor.norm()

            compact = thin_svd_of_update(update)

            values = torch.linalg.svdvals(dense)
            rank = len(compact.singular_values)
            assert rank == int((values > noise).sum())
            assert float((compact.singular_values - values[:rank]).abs().max() if rank else 0.0) <= noise
            rebuilt = compact.left * compact.singular_values @ compact.right.T
            assert float((rebuilt - dense).norm()) <= noise
            assert abs(float(compact.norm - dense.norm())) <= noise
            assert_orthonormal(compact.left)
            assert_orthonormal(compact.right)


@examples(40)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 4), st.floats(-3, 3, width=16), st.integers(0, 2**31))
def test_the_compact_form_does_not_depend_on_how_the_update_was_factored(
    out_features: int, in_features: int, rank: int, exponent: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    update = random_update(generator, (out_features, in_features), rank)
    gauge = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64)).Q
    gauge = gauge * torch.logspace(0, exponent, rank, dtype=torch.float64)
    other = LowRankUpdate(update.out_factor @ gauge, update.in_factor @ torch.linalg.inv(gauge).T)

    compact, of_other = thin_svd_of_update(update), thin_svd_of_update(other)

    torch.testing.assert_close(of_other.singular_values, compact.singular_values, rtol=1e-9, atol=0)
    rebuilt = of_other.left * of_other.singular_values @ of_other.right.T
    torch.testing.assert_close(rebuilt, update.dense(), rtol=0, atol=1e-9 * float(compact.norm))


def test_an_update_whose_columns_cancel_has_rank_zero() -> None:
    column, row = torch.randn(6, 1), torch.randn(5, 1)
    update = LowRankUpdate(torch.cat([column, -column], dim=1), torch.cat([row, row], dim=1))

    compact = thin_svd_of_update(update)

    assert len(compact.singular_values) == 0
    assert compact.norm == 0
    assert compact.left.shape == (6, 0)
    assert compact.right.shape == (5, 0)


def test_a_singular_value_just_above_rounding_error_is_kept() -> None:
    sides = random_update(torch.Generator().manual_seed(0), (9, 7), 2)
    left, right = torch.linalg.qr(sides.out_factor).Q, torch.linalg.qr(sides.in_factor).Q
    values = torch.tensor([1.0, 1e-13], dtype=torch.float64)

    compact = thin_svd_of_update(LowRankUpdate(left * values, right))

    torch.testing.assert_close(compact.singular_values, values, rtol=0.1, atol=0)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_fresh_lora_has_rank_zero(rank: int) -> None:
    compact = thin_svd_of_update(LowRankUpdate(torch.zeros(6, rank), torch.randn(5, rank)))

    assert len(compact.singular_values) == 0


def test_balanced_factors_are_the_same_update_with_its_weight_on_both_sides() -> None:
    update = random_update(torch.Generator().manual_seed(0), (9, 7), 3, scale=1e4)

    balanced = thin_svd_of_update(update).balanced_factors()

    torch.testing.assert_close(balanced.dense(), update.dense(), rtol=1e-12, atol=0)
    torch.testing.assert_close(balanced.out_factor.norm(dim=0), balanced.in_factor.norm(dim=0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_factors_of_low_precision_are_decomposed_in_float64(dtype: torch.dtype) -> None:
    update = random_update(torch.Generator().manual_seed(0), (9, 7), 3, dtype=dtype)

    compact = thin_svd_of_update(update)

    rebuilt = compact.left * compact.singular_values @ compact.right.T
    assert rebuilt.dtype == torch.float64
    torch.testing.assert_close(rebuilt, dense_learned(update), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["out_factor", "in_factor"])
def test_a_factor_that_is_not_finite_is_refused_by_name(side: str, value: float) -> None:
    factors = {"out_factor": torch.ones(4, 2), "in_factor": torch.ones(3, 2)}
    factors[side][1, 1] = value

    with pytest.raises(ValueError) as error:
        thin_svd_of_update(LowRankUpdate(**factors))

    assert str(error.value) == f"{side} has NaN or infinite entries, expected finite numbers"


@pytest.mark.parametrize(
    ("out_shape", "in_shape", "message"),
    [
        ((4,), (3, 2), "factors are (4,) and (3, 2), expected matrices"),
        ((2, 4, 2), (2, 3, 2), "factors are (2, 4, 2) and (2, 3, 2), expected matrices"),
        ((4, 2), (3, 1), "out_factor has 2 columns and in_factor 1, expected as many"),
    ],
)
def test_factors_that_do_not_fit_together_are_refused(
    out_shape: tuple[int, ...], in_shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        LowRankUpdate(torch.ones(out_shape), torch.ones(in_shape))

    assert str(error.value) == message


@examples(40)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**31))
def test_truncated_factors_are_the_best_of_their_rank(
    k_out: int, k_in: int, columns: int, rank: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    products = [random_update(generator, (k_out, k_in), columns) for _ in range(3)]

    out, in_, lost = truncated_balanced_factors(
        torch.stack([u.out_factor for u in products]), torch.stack([u.in_factor for u in products]), rank
    )

    assert out.shape == (3, k_out, rank)
    assert in_.shape == (3, k_in, rank)
    for i, update in enumerate(products):
        dense, values = update.dense(), torch.linalg.svdvals(update.dense())
        best_error = values[rank:].norm()
        torch.testing.assert_close(lost[i], best_error, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close((dense - out[i] @ in_[i].T).norm(), best_error, rtol=1e-9, atol=1e-12)


def test_columns_beyond_the_size_of_the_product_are_zero() -> None:
    update = random_update(torch.Generator().manual_seed(0), (2, 5), 3)

    out, in_, lost = truncated_balanced_factors(update.out_factor, update.in_factor, 4)

    assert not out[:, 2:].any()
    assert not in_[:, 2:].any()
    assert lost == 0
    torch.testing.assert_close(out @ in_.T, update.dense(), rtol=1e-12, atol=1e-13)


def test_every_update_but_zero_has_a_weight_whatever_the_others_are() -> None:
    weights = inverse_norms(torch.tensor([4.0, 0.0, 1e-20, 1e20], dtype=torch.float64))

    torch.testing.assert_close(weights, torch.tensor([0.25, 0.0, 1e20, 1e-20], dtype=torch.float64))


@pytest.mark.parametrize("count", [0, 3])
def test_a_layer_of_zero_updates_has_no_weights(count: int) -> None:
    weights = inverse_norms(torch.zeros(count, dtype=torch.float64))

    assert torch.equal(weights, torch.zeros(count, dtype=torch.float64))
