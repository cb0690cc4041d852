"""Adapters of very different sizes, from their files to the tree and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from share_hf import SharedSubspace
from tests.trees import small_lora


@pytest.mark.parametrize("room", [4, 16])
def test_bounds_hold_for_what_a_tree_holds_of_adapters_of_any_size(room: int, tmp_path: Path) -> None:
    scales = {"usual": 1.0, "quiet": 1e-20, "loud": 1e20, "next": 1e-3}
    adapters = {name: small_lora(tmp_path / name, seed, scale) for seed, (name, scale) in enumerate(scales.items())}
    first = {name: adapters[name][0] for name in ("usual", "quiet")}
    subspace = SharedSubspace.from_adapters(first, num_components=room, pseudo_rank=4, progress=False)
    for name in ("loud", "next"):
        subspace.add_adapters({name: adapters[name][0]}, progress=False)
        subspace.save_pretrained(tmp_path / "tree")
        subspace = SharedSubspace.from_pretrained(tmp_path / "tree")

    for name, (_, updates) in adapters.items():
        for module, layer in subspace.state.layers_of(name).items():
            stored = layer.update_of(name, torch.float64).dense()
            error = float((stored - updates[module]).norm() / updates[module].norm())
            bound = float(layer.records.drift_bounds[layer.index(name)])
            assert error <= bound + 1e-12, (name, module)
            assert bound < (1e-5 if room == 16 else 4)


def test_two_writers_of_tasks_of_other_sizes_end_with_bounds_that_hold(tmp_path: Path) -> None:
    adapters = {
        name: small_lora(tmp_path / name, i, 10.0 ** (10 * i - 10)) for i, name in enumerate(("old", "ours", "theirs"))
    }
    base = SharedSubspace.from_adapters({"old": adapters["old"][0]}, num_components=6, pseudo_rank=4, progress=False)
    ours, theirs = SharedSubspace(base.state), SharedSubspace(base.state)
    ours.add_adapters({"ours": adapters["ours"][0]}, progress=False)
    theirs.add_adapters({"theirs": adapters["theirs"][0]}, progress=False)

    ours.update_from(theirs)

    assert set(ours.tasks) == adapters.keys()
    for name, (_, updates) in adapters.items():
        for module, layer in ours.state.layers_of(name).items():
            stored = layer.update_of(name, torch.float64).dense()
            error = float((stored - updates[module]).norm() / updates[module].norm())
            assert error <= float(layer.records.drift_bounds[layer.index(name)]) + 1e-12, (name, module)
