"""Merging into all layers of a model at once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from share_hf.subspace import (
    DriftToleranceError,
    LayerSubspace,
    LowRankUpdate,
    SubspaceSettings,
    merge_into_layer,
    merge_into_layers,
)

from .streams import dense_learned, dense_of, random_update


SETTINGS = SubspaceSettings(num_components=3, pseudo_rank=2)
SHAPES = {"q_proj": (12, 9), "v_proj": (6, 9), "out": (9, 14)}


def adapters(*tasks: str, modules: tuple[str, ...] = tuple(SHAPES)) -> dict[str, dict[str, LowRankUpdate]]:
    generator = torch.Generator().manual_seed(sum(ord(task) for task in tasks))
    return {task: {name: random_update(generator, SHAPES[name], 2) for name in modules} for task in tasks}


def test_every_layer_is_merged_as_if_alone() -> None:
    first, second = adapters("a", "b"), adapters("c")
    layers, _ = merge_into_layers({}, first, SETTINGS)

    merged, report = merge_into_layers(layers, second, SETTINGS)

    assert report.new_tasks == ("c",)
    assert tuple(merged) == tuple(SHAPES)
    for name in SHAPES:
        alone, alone_report = merge_into_layer(layers[name], {"c": second["c"][name]}, SETTINGS)
        assert torch.equal(merged[name].basis_out, alone.basis_out)
        assert torch.equal(merged[name].coefficients_in, alone.coefficients_in)
        assert report.layers[name] == alone_report


def test_a_layer_seen_for_the_first_time_is_initialized() -> None:
    layers, report = merge_into_layers({}, adapters("a"), SETTINGS)

    assert {name: layer.shape for name, layer in layers.items()} == SHAPES
    assert {layer.num_components for layer in layers.values()} == {(2, 2)}
    assert {layer.basis_out.dtype for layer in layers.values()} == {torch.float32}
    assert report.changed_layers == 3


def test_tasks_that_adapt_other_layers_leave_a_layer_as_it_is() -> None:
    layers, _ = merge_into_layers({}, adapters("a"), SETTINGS)

    merged, report = merge_into_layers(layers, adapters("b", modules=("q_proj",)), SETTINGS)

    assert merged["v_proj"] is layers["v_proj"]
    assert merged["out"] is layers["out"]
    assert merged["q_proj"].tasks == ("a", "b")
    assert set(report.layers) == {"q_proj"}
    assert layers["q_proj"].tasks == ("a",)


def test_drift_over_all_layers_is_that_of_all_updates_together() -> None:
    first, second = adapters("a", "b"), adapters("c", modules=("q_proj", "out"))
    layers, _ = merge_into_layers({}, first, SETTINGS)

    merged, report = merge_into_layers(layers, second, SETTINGS)

    def all_updates(state: dict[str, LayerSubspace], task: str) -> Tensor:
        return torch.cat([dense_of(layer, task).flatten() for layer in state.values() if task in layer.tasks])

    for task in ("a", "b"):
        learned = torch.cat([dense_learned(first[task][name]).flatten() for name in SHAPES])
        drift = (all_updates(merged, task) - all_updates(layers, task)).norm() / learned.norm()
        assert report.drift[task] == pytest.approx(float(drift), rel=1e-5)
    learned = torch.cat([dense_learned(update).flatten() for update in second["c"].values()])
    error = (all_updates(merged, "c") - learned).norm() / learned.norm()
    assert report.drift["c"] == pytest.approx(float(error), rel=1e-5)
    assert report.max_drift == max(report.drift["a"], report.drift["b"]) != report.drift["c"]
    assert report.max_drift_bound == max(max(layer.drift_bound.values()) for layer in report.layers.values())


def test_what_the_bases_explain_changes_no_layer() -> None:
    layers, _ = merge_into_layers({}, adapters("a"), SETTINGS)
    again = {"again": {name: layer.update_of("a") for name, layer in layers.items()}}

    merged, report = merge_into_layers(layers, again, SETTINGS)

    assert report.changed_layers == 0
    assert all(merged[name].basis_out is layers[name].basis_out for name in SHAPES)


def test_a_task_that_is_zero_everywhere_has_no_drift() -> None:
    zero = {"zero": {"q_proj": LowRankUpdate(torch.zeros(12, 2), torch.ones(9, 2))}}

    _, report = merge_into_layers({}, zero, SETTINGS)

    assert report.drift == {"zero": 0.0}
    assert report.max_drift == 0.0


def test_an_update_that_is_refused_is_named_by_its_module() -> None:
    bad = adapters("a")
    bad["a"]["v_proj"].in_factor[0, 0] = math.nan

    with pytest.raises(
        ValueError, match="'v_proj': task 'a': in_factor has NaN or infinite entries, expected finite numbers"
    ):
        merge_into_layers({}, bad, SETTINGS)


def test_a_tolerance_that_cannot_be_met_names_the_module_and_changes_no_layer() -> None:
    layers, _ = merge_into_layers({}, adapters("a"), SETTINGS)
    tight = SubspaceSettings(num_components=3, pseudo_rank=2, drift_tolerance=0.01, max_components=3)

    with pytest.raises(DriftToleranceError, match=r"^'q_proj': drift_tolerance is"):
        merge_into_layers(layers, adapters("b"), tight)

    assert all(layer.tasks == ("a",) for layer in layers.values())
