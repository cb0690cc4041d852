"""`"auto"`: the k and p that reach a target, against dense updates and a full decomposition of every candidate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from share_hf.subspace import (
    LowRankUpdate,
    SubspaceSettings,
    WantedDimensions,
    choose_dimensions,
    merge_into_layers,
)
from share_hf.subspace.dimensions import ChosenDimensions, settled

from .streams import Stream, dense_learned, examples, random_update, streams
from .test_many import related_updates


LIMIT = 10
SHAPE = (60, 48)

Updates = dict[str, dict[str, LowRankUpdate]]


def naive_errors(updates: Mapping[str, LowRankUpdate], limit: int) -> tuple[Tensor, int]:
    """Return sums of relative errors (limit, limit) of all nonzero updates by k and p, and the number of updates."""
    dense = [dense_learned(update) for update in updates.values()]
    dense = [each / each.norm() for each in dense if each.norm() > 0]
    errors = torch.zeros(limit, limit, dtype=torch.float64)
    for k in range(1, limit + 1 if dense else 1):
        out = torch.linalg.svd(torch.cat(dense, dim=1)).U[:, :k]
        in_ = torch.linalg.svd(torch.cat([each.T for each in dense], dim=1)).U[:, :k]
        for _ in range(3):
            out = torch.linalg.svd(torch.cat([each @ in_ for each in dense], dim=1)).U[:, :k]
            in_ = torch.linalg.svd(torch.cat([each.T @ out for each in dense], dim=1)).U[:, :k]
        for each in dense:
            left, values, right_t = torch.linalg.svd(out.T @ each @ in_)
            for p in range(1, limit + 1):
                core = left[:, :p] @ torch.diag(values[:p]) @ right_t[: len(values)][:p]
                errors[k - 1, p - 1] += (each - out @ core @ in_.T).norm()
    return errors, len(dense)


def naive_mean(updates: Updates, limit: int = LIMIT) -> Tensor:
    sums = [naive_errors(of_module, limit) for of_module in by_module(updates).values()]
    return sum(errors for errors, _ in sums) / max(1, sum(count for _, count in sums))


def by_module(updates: Updates) -> dict[str, dict[str, LowRankUpdate]]:
    layers: dict[str, dict[str, LowRankUpdate]] = {}
    for task, modules in updates.items():
        for module, update in modules.items():
            layers.setdefault(module, {})[task] = update
    return layers


def built(updates: Updates, chosen: ChosenDimensions, settings: SubspaceSettings) -> tuple[float, int]:
    """Return the mean relative error and the bytes of a build with the chosen k and p."""
    settings = replace(settings, num_components=chosen.num_components, pseudo_rank=chosen.pseudo_rank)
    layers, report = merge_into_layers({}, updates, settings)
    drifts = [
        drift
        for module, layer in report.layers.items()
        for drift, norm in zip(layer.drift.values(), layers[module].records.norms, strict=True)
        if norm > 0
    ]
    tensors = [
        tensor
        for layer in layers.values()
        for tensor in (layer.basis_out, layer.basis_in, layer.coefficients_out, layer.coefficients_in)
    ]
    return sum(drifts) / max(1, len(drifts)), sum(tensor.nbytes for tensor in tensors)


def some_updates(count: int = 5, rank: int = 6, modules: int = 2) -> Updates:
    layers = [related_updates(count, seed=seed, shape=SHAPE, rank=rank) for seed in range(modules)]
    return {task: {f"m{i}": layer[task] for i, layer in enumerate(layers)} for task in layers[0]}


def updates_of(stream: Stream) -> Updates:
    return {task: {"m": update} for merge in stream.merges() for task, update in merge.items()}


@examples(12)
@given(streams("joint", kinds=("random", "related", "zero"), largest_side=24, most_merges=3), st.floats(0.02, 0.95))
def test_the_target_error_is_reached_with_the_fewest_bytes(stream: Stream, target: float) -> None:
    updates, limit = updates_of(stream), min(LIMIT, *stream.shape)
    naive = naive_mean(updates, limit)
    wanted = WantedDimensions("auto", "auto", target_error=target, max_components=limit)
    if naive[-1, -1] > target * 0.99:
        if naive[-1, -1] > target * 1.03:
            with pytest.raises(ValueError, match=r"target_error is .* the error is at least"):
                choose_dimensions(updates, wanted, stream.settings)
        return
    chosen = choose_dimensions(updates, wanted, stream.settings)
    assert chosen.error <= target
    # The alternation may end at another optimum than the naive one does.
    assert naive[chosen.num_components - 1, chosen.pseudo_rank - 1] <= target * 1.05 + 1e-6
    error, size = built(updates, chosen, stream.settings)
    assert error <= target * 1.01 + 1e-6
    assert size == chosen.bytes
    for k, p in (naive <= target * 0.93).nonzero().tolist():
        if p <= k:
            cheaper = ChosenDimensions(k + 1, p + 1, 0.0, 0)
            assert built(updates, cheaper, stream.settings)[1] >= chosen.bytes


@examples(12)
@given(streams("joint", kinds=("random", "related", "zero"), largest_side=24, most_merges=3), st.floats(0.1, 1.5))
def test_the_bytes_are_spent_on_the_smallest_error(stream: Stream, part: float) -> None:
    updates, limit = updates_of(stream), min(LIMIT, *stream.shape)
    most = built(updates, ChosenDimensions(limit, limit, 0.0, 0), stream.settings)[1]
    least = built(updates, ChosenDimensions(1, 1, 0.0, 0), stream.settings)[1]
    budget = max(1, int(part * most))
    wanted = WantedDimensions("auto", "auto", target_bytes=budget, max_components=limit)
    if budget < least:
        with pytest.raises(ValueError, match=f"target_bytes is {budget}, expected at least {least}, the size"):
            choose_dimensions(updates, wanted, stream.settings)
        return
    chosen = choose_dimensions(updates, wanted, stream.settings)
    error, size = built(updates, chosen, stream.settings)
    assert size == chosen.bytes <= budget
    naive = naive_mean(updates, limit)
    for k in range(1, limit + 1):
        for p in range(1, k + 1):
            if built(updates, ChosenDimensions(k, p, 0.0, 0), stream.settings)[1] <= budget:
                assert error <= naive[k - 1, p - 1] * 1.05 + 1e-6


@pytest.mark.parametrize("basis", ["joint", "factor"])
@pytest.mark.parametrize(
    "wanted",
    [
        WantedDimensions("auto", "auto", target_error=0.3),
        WantedDimensions("auto", 3, target_error=0.5),
        WantedDimensions(12, "auto", target_error=0.6),
        WantedDimensions("auto", "auto", target_bytes=20_000),
        WantedDimensions("auto", 4, target_bytes=20_000),
        WantedDimensions(7, "auto", target_bytes=20_000),
    ],
    ids=str,
)
def test_a_build_has_the_error_and_the_size_that_were_announced(basis: str, wanted: WantedDimensions) -> None:
    updates, settings = some_updates(), SubspaceSettings(basis=basis)
    chosen = choose_dimensions(updates, wanted, settings)
    error, size = built(updates, chosen, settings)
    assert error == pytest.approx(chosen.error, rel=0.03)
    assert size == chosen.bytes
    if wanted.target_error is not None:
        assert error <= wanted.target_error
    else:
        assert size <= wanted.target_bytes
    for asked, found in ((wanted.num_components, chosen.num_components), (wanted.pseudo_rank, chosen.pseudo_rank)):
        assert asked in ("auto", found)


def test_of_many_updates_the_error_is_that_of_a_build_to_a_percent() -> None:
    updates, settings = some_updates(count=150, rank=8, modules=1), SubspaceSettings()
    chosen = choose_dimensions(updates, WantedDimensions("auto", "auto", 0.35, max_components=24), settings)
    error, size = built(updates, chosen, settings)
    assert error <= 0.35
    assert chosen.error == pytest.approx(error, rel=0.02)
    assert size == chosen.bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "4bit"])
@pytest.mark.parametrize("basis", ["joint", "factor"])
def test_what_is_announced_for_many_updates_is_built(basis: str, dtype: str) -> None:
    updates = some_updates(count=60, rank=8, modules=1)
    settings = SubspaceSettings(basis=basis, coefficient_dtype=dtype)
    for wanted in (WantedDimensions("auto", "auto", 0.4, max_components=32), WantedDimensions(16, "auto", 0.6)):
        chosen = choose_dimensions(updates, wanted, settings)
        error, _ = built(updates, chosen, settings)
        assert error <= wanted.target_error
        assert error == pytest.approx(chosen.error, rel=0.03)


def test_modules_are_taken_one_after_another() -> None:
    updates, taken = some_updates(count=3, modules=3), []

    class Noting(dict[str, LowRankUpdate]):
        def __getitem__(self, module: str) -> LowRankUpdate:
            taken.append(module)
            return super().__getitem__(module)

    noting = {task: Noting(modules) for task, modules in updates.items()}
    choose_dimensions(noting, WantedDimensions("auto", "auto", 0.3), SubspaceSettings())
    assert taken == ["m0"] * 3 + ["m1"] * 3 + ["m2"] * 3


def test_a_rank_that_loses_nothing_is_the_largest_there_is() -> None:
    generator = torch.Generator().manual_seed(0)
    updates = {f"t{rank}": {"m": random_update(generator, SHAPE, rank)} for rank in (1, 2, 3)}
    chosen = choose_dimensions(updates, WantedDimensions("auto", "auto", target_error=1e-6), SubspaceSettings())
    assert (chosen.num_components, chosen.pseudo_rank) == (6, 3)


def test_updates_that_are_zero_need_least() -> None:
    updates = {"t": {"m": LowRankUpdate(torch.zeros(9, 2), torch.ones(7, 2))}}
    chosen = choose_dimensions(updates, WantedDimensions("auto", "auto", target_error=0.1), SubspaceSettings())
    assert (chosen.num_components, chosen.pseudo_rank, chosen.error, chosen.bytes) == (1, 1, 0.0, 0)


def test_the_module_of_a_broken_update_is_named() -> None:
    updates = some_updates(count=2)
    updates["task1"]["m1"].in_factor[3, 1] = torch.nan
    with pytest.raises(ValueError, match="'m1': task 'task1': in_factor has NaN"):
        choose_dimensions(updates, WantedDimensions("auto", "auto", 0.3), SubspaceSettings())
    updates["task1"]["m1"] = random_update(torch.Generator(), (5, 5), 2)
    with pytest.raises(ValueError, match=r"'m1': the update of task 'task1' is \(5, 5\), the layer is \(60, 48\)"):
        choose_dimensions(updates, WantedDimensions("auto", "auto", 0.3), SubspaceSettings())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_components": "auto"}, "with no target, expected one of target_error and target_bytes"),
        ({"pseudo_rank": "auto"}, "with no target"),
        ({"num_components": "auto", "target_error": 0.1, "target_bytes": 9}, "with target_bytes and target_error,"),
        ({"target_error": 0.1}, "target_error is given with num_components = 32 and pseudo_rank = 8"),
        ({"num_components": "all", "target_error": 0.1}, "num_components is 'all', expected a positive integer or"),
        ({"pseudo_rank": "", "target_error": 0.1}, "pseudo_rank is '', expected"),
        ({"pseudo_rank": "auto", "target_error": 0.0}, "target_error is 0.0, expected a positive number"),
        ({"pseudo_rank": "auto", "target_error": float("nan")}, "target_error is nan, expected a positive number"),
        ({"pseudo_rank": "auto", "target_bytes": True}, "target_bytes is True, expected a positive number"),
        ({"num_components": "auto", "pseudo_rank": 0, "target_error": 0.1}, "pseudo_rank is 0, expected"),
        ({"num_components": "auto", "pseudo_rank": 200, "target_error": 0.1}, "pseudo_rank is 200, expected at most"),
        ({"num_components": -1, "pseudo_rank": "auto", "target_error": 0.1}, "num_components is -1, expected"),
        ({"num_components": 2.5}, "num_components is 2.5, expected a positive integer"),
        ({"num_components": 4}, "pseudo_rank is 8, expected at most num_components = 4"),
    ],
)
def test_what_cannot_be_chosen_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WantedDimensions(**values)


@pytest.mark.parametrize("name", ["explained_variance", "drift_tolerance"])
def test_k_is_chosen_by_one_setting_alone(name: str) -> None:
    settings = SubspaceSettings(**{name: 0.5})
    with pytest.raises(ValueError, match=f"num_components is 'auto' and {name} is 0.5, expected one of the two"):
        WantedDimensions("auto", 8, target_error=0.1).check_beside(settings)
    WantedDimensions(32, "auto", target_error=0.1).check_beside(settings)


def test_settings_that_are_given_are_kept() -> None:
    settings = SubspaceSettings(num_components=5, pseudo_rank=2)
    assert settled(settings, WantedDimensions(5, 2), {}) == (settings, None)


def test_an_error_that_is_out_of_reach_says_what_is_not() -> None:
    updates = some_updates()
    with pytest.raises(ValueError, match=r"up to num_components = 3 and pseudo_rank = 3 the error is at least 0\.\d+"):
        choose_dimensions(updates, WantedDimensions("auto", "auto", 0.01, max_components=3), SubspaceSettings())
    with pytest.raises(ValueError, match=r"pseudo_rank = 1 .*a larger max_components looks further"):
        choose_dimensions(updates, WantedDimensions("auto", 1, 0.01), SubspaceSettings())
