"""A subspace computes the same bits whether it was merged, loaded, or laid out differently in memory."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from share_hf.subspace import LayerSubspace, LowRankUpdate, SubspaceSettings, merge_into_layer


SETTINGS = SubspaceSettings(num_components=6, pseudo_rank=4)


def merged(tasks: int = 3) -> LayerSubspace:
    layer = LayerSubspace.empty(24, 20, SETTINGS.pseudo_rank)
    for i in range(tasks):
        update = LowRankUpdate(torch.randn(24, 4), torch.randn(20, 4))
        layer, _ = merge_into_layer(layer, {f"task{i}": update}, SETTINGS)
    return layer


def laid_out_otherwise(layer: LayerSubspace) -> LayerSubspace:
    """Return the same numbers, with each matrix stored column by column."""
    changed = {
        name: getattr(layer, name).mT.contiguous().mT
        for name in ("basis_out", "basis_in", "coefficients_out", "coefficients_in")
    }
    return replace(layer, **changed)


def tensors_of(layer: LayerSubspace) -> dict[str, Tensor]:
    return {field.name: value for field in fields(layer) if isinstance(value := getattr(layer, field.name), Tensor)}


@pytest.mark.parametrize("basis", ["joint", "factor"])
def test_every_way_to_a_layer_leads_to_one_memory_layout(basis: str) -> None:
    settings = replace(SETTINGS, basis=basis)
    layer = merged()
    update = LowRankUpdate(torch.randn(20, 4).T.reshape(4, 20).T, torch.randn(20, 4))
    update = LowRankUpdate(torch.randn(24, 4), update.in_factor)
    explained = layer.update_of("task0")
    ways = [
        layer,
        merge_into_layer(layer, {"new": update}, settings)[0],
        merge_into_layer(layer, {"new": explained}, settings)[0],
        layer.with_task("new", layer.coefficients_out[0].T.contiguous().T, layer.coefficients_in[0]),
        layer.without_task("task1"),
        layer.select([2, 0]),
        layer.to("cpu"),
        laid_out_otherwise(layer),
    ]
    for way in ways:
        for name, tensor in tensors_of(way).items():
            assert tensor.is_contiguous(), name


def test_what_is_computed_does_not_depend_on_the_layout_it_came_in() -> None:
    layer = merged()
    other = laid_out_otherwise(layer)
    for task in layer.tasks:
        for side in ("out_factor", "in_factor"):
            assert torch.equal(getattr(layer.update_of(task), side), getattr(other.update_of(task), side))
    update = LowRankUpdate(torch.randn(24, 4), torch.randn(20, 4))
    one, two = (merge_into_layer(each, {"new": update}, SETTINGS)[0] for each in (layer, other))
    for name, tensor in tensors_of(one).items():
        assert torch.equal(tensor, tensors_of(two)[name]), name
