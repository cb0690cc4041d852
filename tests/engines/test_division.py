"""Modules divided between processes, as one process sees it; `tests/distributed/test_builds.py` has two."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from share_hf.engines import dividing_modules
from share_hf.engines.division import shares_of
from share_hf.subspace import LowRankUpdate, SubspaceSettings, merge_into_layers


@given(count=st.integers(0, 60), processes=st.integers(1, 9))
def test_each_module_has_one_process_and_shares_differ_by_one_at_most(count: int, processes: int) -> None:
    modules = [str(i) for i in range(count)]
    shares = shares_of(modules, processes)
    assert sorted(itertools.chain(*shares)) == sorted(modules)
    assert all(share == sorted(share, key=int) for share in shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("processes", [2, 3, 4, 7])
def test_modules_that_come_in_turns_are_shared_fairly(processes: int) -> None:
    """The q, k, v, o, gate, up and down projections of a transformer cost differently."""
    modules = [f"{layer}.{kind}" for layer in range(32) for kind in range(7)]
    for kind in range(7):
        counts = [sum(module.endswith(f".{kind}") for module in share) for share in shares_of(modules, processes)]
        assert max(counts) - min(counts) <= 32 / processes


def test_one_process_works_as_without_division() -> None:
    def updates() -> dict[str, dict[str, LowRankUpdate]]:
        torch.manual_seed(0)
        return {
            task: {module: LowRankUpdate(torch.randn(9, 2), torch.randn(7, 2)) for module in "xyz"} for task in "ab"
        }

    settings = SubspaceSettings(num_components=3, pseudo_rank=2)
    expected, report = merge_into_layers({}, updates(), settings)
    with dividing_modules() as division:
        assert division.is_first
        layers, divided_report = merge_into_layers({}, updates(), settings)
    assert list(layers) == list(expected)
    assert report == divided_report
    assert all(torch.equal(layers[module].basis_out, expected[module].basis_out) for module in "xyz")


def test_an_error_is_the_same_error() -> None:
    with pytest.raises(KeyError, match="nowhere"), dividing_modules():
        raise KeyError("nowhere")
