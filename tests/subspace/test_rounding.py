"""Coefficients in bfloat16 and 4 bits: what they round to, how they are packed, and what merges certify about them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from share_hf.subspace import (
    LayerSubspace,
    LowRankUpdate,
    SubspaceSettings,
    WantedDimensions,
    choose_dimensions,
    merge_into_layer,
    packed,
    stored_bytes,
    unpacked,
)
from share_hf.subspace.rounding import BLOCK, rounded, store

from .streams import Stream, dense_learned, dense_of, examples, random_update, streams
from .test_many import related_updates


FEW_BITS = ("bfloat16", "4bit")


def rows_of(seed: int, p: int, k: int, exponent: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(p, k, generator=generator, dtype=torch.float64) * 10.0**exponent
    return rows * torch.rand(p, k, generator=generator, dtype=torch.float64).round(decimals=1)  # some are zero


random_rows = st.builds(
    rows_of, st.integers(0, 2**31), st.integers(1, 5), st.integers(0, 75), st.floats(-44, 20, width=16)
)


@examples(150)
@given(random_rows, st.sampled_from(FEW_BITS))
def test_what_is_rounded_is_not_changed_by_rounding_it_again(rows: Tensor, dtype: str) -> None:
    once = rounded(rows, dtype)
    assert once.shape == rows.shape
    assert once.dtype == torch.float32
    assert torch.equal(rounded(once, dtype), once)


@examples(150)
@given(random_rows)
def test_4_bit_numbers_are_packed_and_unpacked_to_the_bit(rows: Tensor) -> None:
    exact = rounded(rows, "4bit")
    codes, scales = packed(exact)
    assert (codes.dtype, scales.dtype) == (torch.uint8, torch.bfloat16)
    assert codes.nbytes + scales.nbytes == stored_bytes(rows.shape[1], len(rows), "4bit")
    assert torch.equal(unpacked(codes, scales), exact)
    for i, row in enumerate(exact.tolist()):  # the layout, number by number
        for j, number in enumerate(row):
            code = codes[i, j // 2].item() >> (4 if j % 2 else 0) & 15
            assert 1 <= code <= 15
            size = (0, 1, 2, 3, 5, 7, 10, 15)[abs(code - 8)]
            assert number == math.copysign(size, code - 8) * scales[i, j // BLOCK].item()
    if rows.shape[1] % 2:
        assert (codes[:, -1] >> 4 == 0).all()


@examples(100)
@given(random_rows.filter(lambda rows: rows.abs().max() > 1e-30 if rows.numel() else True))
def test_a_4_bit_block_is_no_worse_than_with_the_scale_of_its_largest_number(rows: Tensor) -> None:
    found = (rounded(rows, "4bit").double() - rows).square()
    levels = torch.tensor([0, 1, 2, 3, 5, 7, 10, 15], dtype=torch.float64)
    levels = torch.cat([-levels, levels])
    for start in range(0, rows.shape[1], BLOCK):
        block = rows[:, start : start + BLOCK]
        step = block.abs().amax(1, keepdim=True) / 15
        naive = (step.unsqueeze(-1) * levels - block.unsqueeze(-1)).abs().amin(-1).square().sum()
        # The scale itself has 8 bits, which moves every number that it scales.
        assert found[:, start : start + BLOCK].sum().sqrt() <= naive.sqrt() + 0.004 * block.norm()


def test_numbers_that_are_not_of_4_bits_are_not_packed() -> None:
    with pytest.raises(ValueError, match="coefficients are not 4-bit numbers, expected those that a merge rounded"):
        packed(torch.tensor([[1.0, 0.37]]))


@pytest.mark.parametrize(
    ("codes", "scales", "message"),
    [
        (torch.full((2, 3), 0x88), torch.zeros(2, 1), r"codes and scales are torch.int64 \(2, 3\)"),
        (torch.full((2, 3), 0x88, dtype=torch.uint8), torch.zeros(2, 1), r"torch.float32 \(2, 1\), expected matrices"),
        (torch.full((6,), 0x88, dtype=torch.uint8), torch.zeros(2, 1).bfloat16(), r"torch.uint8 \(6,\)"),
        (
            torch.full((2, 3), 0x80, dtype=torch.uint8),
            torch.zeros(2, 1).bfloat16(),
            "codes have a 0, expected 1 to 15",
        ),
        (
            torch.full((2, 17), 0x88, dtype=torch.uint8),
            torch.zeros(2, 1).bfloat16(),
            r"scales are \(2, 1\), .* k = 34",
        ),
        (torch.full((2, 3), 0x88, dtype=torch.uint8), torch.zeros(1, 1).bfloat16(), r"expected \(2, 1\) for k = 6"),
    ],
)
def test_what_is_not_codes_and_scales_is_refused(codes: Tensor, scales: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpacked(codes, scales)


@pytest.mark.parametrize("dtype", FEW_BITS)
@examples(50)
@given(streams("joint", kinds=("random", "related", "zero"), most_merges=4))
def test_merges_certify_what_is_stored(dtype: str, stream: Stream) -> None:
    settings = replace(stream.settings, coefficient_dtype=dtype)
    layer, learned = stream.empty(torch.float32), {}
    for updates in stream.merges():
        before = {task: dense_of(layer, task) for task in layer.tasks}
        layer, report = merge_into_layer(layer, updates, settings)
        learned |= {task: dense_learned(update) for task, update in updates.items()}
        for side in (layer.coefficients_out, layer.coefficients_in):
            assert torch.equal(rounded(side.mT, dtype).mT, side)
        for task, norm in zip(layer.tasks, layer.records.norms.tolist(), strict=True):
            if not norm:
                continue
            after = dense_of(layer, task)
            assert float((after - learned[task]).norm()) / norm <= report.drift_bound[task] + 1e-12
            if task in before:
                drift = float((after - before[task]).norm()) / norm
                assert report.drift[task] == pytest.approx(drift, rel=1e-4, abs=2e-6)


@pytest.mark.parametrize(("k", "p"), [(4, 4), (8, 8), (9, 8), (16, 8), (40, 3)])
def test_a_pair_in_4_bits_is_no_worse_than_each_side_alone(k: int, p: int) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = tuple(torch.randn(400, k, p, generator=generator, dtype=torch.float64) for _ in range(2))
    stored = tuple(torch.empty_like(side, dtype=torch.float32) for side in exact)
    changes = store(exact, stored, "4bit", dim=-2).changes
    products = [
        out.double() @ in_.double().mT
        for out, in_ in (exact, stored, tuple(rounded(side.mT, "4bit").mT for side in exact))
    ]
    found, alone = (torch.linalg.matrix_norm(product - products[0]) for product in products[1:])
    assert torch.allclose(changes, found, rtol=1e-6)
    assert (found <= alone * (1 + 1e-9)).all()
    assert (found < 0.3 * torch.linalg.matrix_norm(products[0])).all()
    again = tuple(torch.empty_like(side) for side in stored)
    assert (store(tuple(side.double() for side in stored), again, "4bit", dim=-2).changes < 1e-12).all()
    assert all(map(torch.equal, again, stored))


@pytest.mark.parametrize("dtype", FEW_BITS)
@pytest.mark.parametrize("basis", ["joint", "factor"])
def test_merges_of_many_certify_what_is_stored(dtype: str, basis: str) -> None:
    settings = SubspaceSettings(num_components=12, pseudo_rank=4, basis=basis, coefficient_dtype=dtype)
    updates = related_updates(60)
    layer = LayerSubspace.empty(*updates["task0"].shape, 4)
    layer, _ = merge_into_layer(layer, dict(list(updates.items())[:50]), settings)
    layer, report = merge_into_layer(layer, dict(list(updates.items())[50:]), settings)
    for task, update in updates.items():
        learned = dense_learned(update)
        assert float((dense_of(layer, task) - learned).norm() / learned.norm()) <= report.drift_bound[task]


@pytest.mark.parametrize("dtype", FEW_BITS)
def test_rounding_counts_for_the_tolerated_drift(dtype: str) -> None:
    updates = {"a": random_update(torch.Generator().manual_seed(0), (30, 20), 3)}
    settings = SubspaceSettings(num_components=8, pseudo_rank=3, coefficient_dtype=dtype, drift_tolerance=1e-4)
    with pytest.raises(ValueError, match="a task would have drifted"):
        merge_into_layer(LayerSubspace.empty(30, 20, 3), updates, settings)


@pytest.mark.parametrize("dtype", FEW_BITS)
@examples(40)
@given(st.integers(0, 2**31), st.floats(-3, 3, width=16))
def test_what_was_learned_inside_the_basis_is_certified_too(dtype: str, seed: int, exponent: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer, _ = merge_into_layer(
        LayerSubspace.empty(40, 50, 3),
        {"a": random_update(generator, (40, 50), 6)},
        SubspaceSettings(num_components=6, pseudo_rank=3),
    )
    sides = [torch.randn(6, 3, generator=generator) * 10.0**exponent for _ in range(2)]
    learned = layer.with_task("b", *sides, dtype=dtype)
    exact = layer.with_task("b", *sides)
    change = (dense_of(learned, "b") - dense_of(exact, "b")).norm() / dense_of(exact, "b").norm()
    assert 0 < change <= learned.records.drift_bounds[1]
    assert learned.records.norms[1] == exact.records.norms[1]
    assert torch.equal(rounded(learned.coefficients_out[1].T, dtype).T, learned.coefficients_out[1])
    assert exact.records.drift_bounds[1] == 0


def test_an_update_that_a_type_does_not_hold_is_refused() -> None:
    quiet = LowRankUpdate(
        torch.full((9, 1), 1e-38, dtype=torch.float64), torch.full((7, 1), 1e-27, dtype=torch.float64)
    )
    settings = SubspaceSettings(num_components=2, pseudo_rank=1, basis="factor", coefficient_dtype="4bit")
    with pytest.raises(ValueError, match=r"task 'quiet': its update of norm .* cannot be stored in 4bit beside"):
        merge_into_layer(LayerSubspace.empty(9, 7, 1), {"quiet": quiet}, settings)


@pytest.mark.parametrize(("dtype", "part"), [("float32", 1.0), ("bfloat16", 0.5), ("4bit", 0.16)])
def test_auto_knows_what_they_take(dtype: str, part: float) -> None:
    updates = {task: {"m": update} for task, update in related_updates(30).items()}
    wanted, settings = WantedDimensions(32, 4, target_bytes=None), SubspaceSettings(coefficient_dtype=dtype)
    wanted = replace(wanted, pseudo_rank="auto", target_bytes=10**7)
    chosen = choose_dimensions(updates, wanted, settings)
    bases = 4 * 32 * (120 + 150)
    assert chosen.pseudo_rank == 8
    assert chosen.bytes - bases == pytest.approx(30 * 2 * 32 * 8 * 4 * part, rel=0.15)
    assert chosen.bytes - bases == 30 * 2 * stored_bytes(32, 8, dtype)


@pytest.mark.parametrize(("dtype", "accuracy"), [("bfloat16", 0.01), ("4bit", 0.06)])
@pytest.mark.parametrize("target", [0.3, 0.5])
def test_auto_knows_what_rounding_costs(dtype: str, accuracy: float, target: float) -> None:
    updates = related_updates(60)
    settings = SubspaceSettings(coefficient_dtype=dtype)
    chosen = choose_dimensions(
        {task: {"m": update} for task, update in updates.items()},
        WantedDimensions("auto", "auto", target_error=target, max_components=64),
        settings,
    )
    k, p = chosen.num_components, chosen.pseudo_rank
    layer, _ = merge_into_layer(
        LayerSubspace.empty(120, 150, p), updates, replace(settings, num_components=k, pseudo_rank=p)
    )
    errors = [
        float((dense_of(layer, task) - dense_learned(update)).norm() / dense_learned(update).norm())
        for task, update in updates.items()
    ]
    assert sum(errors) / len(errors) == pytest.approx(chosen.error, rel=accuracy)


def test_a_type_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="coefficient_dtype is 'int8', expected one of float32, bfloat16, 4bit"):
        SubspaceSettings(coefficient_dtype="int8")
