"""What a merge refuses because of a single update is known before it starts; whatever is accepted is merged."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from share_hf.subspace import BasisKind, LowRankUpdate, SubspaceSettings, merge_into_layers
from share_hf.subspace.refused import refused_updates

from .streams import examples, random_update


SHAPE = (14, 11)
EXPONENTS = st.tuples(st.integers(-120, 120), st.integers(-120, 120))


def scaled(seed: int, exponents: tuple[int, int], rank: int = 2) -> LowRankUpdate:
    update = random_update(torch.Generator().manual_seed(seed), SHAPE, rank)
    return LowRankUpdate(update.out_factor * 10.0 ** exponents[0], update.in_factor * 10.0 ** exponents[1])


@examples(80)
@given(st.lists(EXPONENTS, min_size=1, max_size=4))
def test_updates_of_any_scale_are_refused_just_where_a_joint_merge_refuses_them(
    exponents: list[tuple[int, int]],
) -> None:
    updates = {f"t{i}": {"a": scaled(i, pair)} for i, pair in enumerate(exponents)}
    settings = SubspaceSettings(num_components=4, pseudo_rank=2)
    refused = refused_updates(updates, "joint")
    merge_into_layers({}, {task: of for task, of in updates.items() if task not in refused}, settings)
    for task, reason in refused.items():
        with pytest.raises(ValueError, match=f"task '{task}'") as caught:
            merge_into_layers({}, {task: updates[task]}, settings)
        assert str(caught.value) == str(reason)


@pytest.mark.parametrize("basis", ["joint", "factor"])
def test_updates_that_no_numbers_hold_are_named_with_their_modules(basis: BasisKind) -> None:
    usual, spoiled = scaled(0, (0, 0)), scaled(1, (0, 0))
    spoiled.in_factor[3, 1] = torch.nan
    updates = {
        "usual": {"a": usual, "b": usual},
        "spoiled": {"a": usual, "b": spoiled},
        "loud": {"a": scaled(2, (20, 20))},
        "fresh": {"b": LowRankUpdate(torch.zeros(SHAPE[0], 2), usual.in_factor)},
    }
    refused = refused_updates(updates, basis)
    assert refused.keys() == {"spoiled", "loud"}
    assert "'b': task 'spoiled': in_factor has NaN or infinite entries" in str(refused["spoiled"])
    assert "'a': task 'loud': its update has norm" in str(refused["loud"])


def test_factors_that_are_stored_as_they_are_must_fit_alone() -> None:
    """A norm that is in range, of factors that float32 cannot hold. Balanced factors can be stored."""
    updates = {"lopsided": {"a": scaled(0, (60, -60))}, "usual": {"a": scaled(1, (0, 0))}}
    first = torch.randn(SHAPE[0], 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    second = torch.randn(SHAPE[1], 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    cancelling = LowRankUpdate(torch.cat([first, first], 1), torch.cat([second, second * (1e-9 - 1)], 1))
    updates["cancelling"] = {"a": cancelling}
    assert refused_updates(updates, "joint") == {}
    assert refused_updates(updates, "factor").keys() == {"lopsided", "cancelling"}
