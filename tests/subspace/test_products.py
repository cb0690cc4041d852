"""Products in float32 and the bound on their rounding, compared with float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from share_hf.subspace import LayerSubspace, LowRankUpdate
from share_hf.subspace.batch import LargeBatch, Scratch, batch_of_many
from share_hf.subspace.coordinates import Coordinates, found_coordinates
from share_hf.subspace.factors import inverse_norms
from share_hf.subspace.products import product, product_rounding
from share_hf.subspace.stack import UpdateStack

from .streams import dense_learned
from .test_many import MANY, SHAPE, related_updates


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    features=st.integers(1, 700),
    rank=st.integers(1, 5),
    columns=st.integers(1, 9),
    spread=st.integers(0, 12),
    seed=st.integers(0, 2**16),
)
def test_rounding_is_within_its_bound(features: int, rank: int, columns: int, spread: int, seed: int) -> None:
    scales = 10.0 ** (normal(features, seed=seed) * spread / 4).clamp(-spread, spread)
    rows = (normal(3, rank, features, seed=seed + 1) * scales).float()
    side = torch.linalg.qr(normal(features, min(columns, features), seed=seed + 2)).Q
    errors = (product(rows, side).double() - rows.double() @ side).abs()
    assert (errors <= product_rounding(features) * rows.double().norm(dim=2, keepdim=True) * (1 + 1e-12)).all()


def test_sums_that_round_one_way_are_within_their_bound_and_nearly_reach_it() -> None:
    # Each sum of equal numbers is cut off by the next addition.
    rows = torch.full((1, 1, 4096), 1 + 2.0**-12, dtype=torch.float32)
    side = torch.full((4096, 1), 4096**-0.5, dtype=torch.float64)
    error = float((product(rows, side).double() - rows.double() @ side).abs())
    bound = product_rounding(4096) * float(rows.double().norm())
    assert error <= bound
    assert bound < 2e-5 * float(rows.double().norm())


def found(exponent: float = 0.0) -> tuple[LargeBatch, Coordinates, UpdateStack, Tensor, list[Tensor]]:
    """Return updates in coordinates of 14 directions, with a bound on the rounding, and the updates themselves."""
    updates = related_updates(MANY)
    first = updates["task0"]
    updates["task0"] = LowRankUpdate(first.out_factor * 10**exponent, first.in_factor)
    layer = LayerSubspace.empty(*SHAPE, 8)
    batch = batch_of_many(layer, updates, Scratch(), as_they_are=False)
    coordinates, stack, rounding = found_coordinates(layer, batch, inverse_norms(batch.norms), 14, joint=True)
    return batch, coordinates, stack, rounding, [dense_learned(update) for update in updates.values()]


@pytest.mark.parametrize("exponent", [0.0, 6.0, -6.0])
def test_what_is_seen_in_float32_is_certified(exponent: float) -> None:
    batch, (out, in_), stack, rounding, learned = found(exponent)
    assert batch.out.dtype == torch.float32 and (rounding > 0).all()
    for j, dense in enumerate(learned):
        inside = out @ (stack.new_out[j].T @ stack.new_in[j]) @ in_.T
        exact_inside = out @ (out.T @ dense @ in_) @ in_.T
        outside = float((dense - exact_inside).norm())
        assert float((inside - exact_inside).norm()) <= float(rounding[j])
        assert outside <= float(stack.outside[j] + rounding[j]) * (1 + 1e-12)
        assert float(rounding[j]) <= 0.02 * float(stack.outside[j])
        assert outside == pytest.approx(float(stack.outside[j]), rel=1e-4)


def test_where_float32_products_may_have_fewer_digits_coordinates_are_seen_in_float64() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        _, (out, in_), stack, rounding, learned = found()
    finally:
        torch.set_float32_matmul_precision(before)
    assert not rounding.any()
    for j, dense in enumerate(learned):
        inside = stack.new_out[j].T @ stack.new_in[j]
        assert float((inside - out.T @ dense @ in_).norm()) <= 1e-13 * float(dense.norm())


def test_updates_that_lie_nearly_inside_are_seen_in_float64_and_others_are_not() -> None:
    layer = LayerSubspace.empty(*SHAPE, 8)
    common = [normal(features, 10, seed=features).float() for features in SHAPE]
    updates = related_updates(MANY)
    for i in range(MANY // 2):
        mixing = normal(2, 10, 8, seed=i).float()
        updates[f"task{i}"] = LowRankUpdate(*(side @ mix for side, mix in zip(common, mixing, strict=True)))
    batch = batch_of_many(layer, updates, Scratch(), as_they_are=False)
    (out, in_), stack, rounding = found_coordinates(layer, batch, inverse_norms(batch.norms), 30, joint=True)
    inside = stack.outside * inverse_norms(batch.norms) < 0.03
    assert inside.tolist() == [True] * (MANY // 2) + [False] * (MANY // 2)
    assert not rounding[inside].any() and (rounding[~inside] > 0).all()
    for j, update in enumerate(updates.values()):
        dense = dense_learned(update)
        changed = float((stack.new_out[j].T @ stack.new_in[j] - out.T @ dense @ in_).norm())
        assert changed <= float(rounding[j]) + 1e-13 * float(dense.norm())
