"""Finished modules of an interrupted build, each in a file of its own."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from share_hf.format.unfinished import Merged, UnfinishedBuild
from share_hf.subspace import LayerSubspace, LowRankUpdate, SubspaceSettings, merge_into_layer


INPUTS = {"adapters": {"a": [["a/adapter_model.safetensors", 1, 2, 3]]}, "settings": {"tolerance": None, "k": (1, 2)}}


def merged(*tasks: str) -> Merged:
    updates = {task: LowRankUpdate(torch.randn(9, 3), torch.randn(7, 3)) for task in tasks}
    empty = LayerSubspace.empty(9, 7, 2)
    return merge_into_layer(empty, updates, SubspaceSettings(num_components=3, pseudo_rank=2))


def assert_same(found: Merged | None, expected: Merged) -> None:
    assert found is not None and found[1] == expected[1]
    for one, other in ((found[0], expected[0]), (found[0].records, expected[0].records)):
        for field in fields(one):
            first, second = getattr(one, field.name), getattr(other, field.name)
            if isinstance(first, Tensor):
                assert first.dtype == second.dtype and torch.equal(first, second), field.name
            elif field.name != "records":
                assert first == second, field.name


@pytest.mark.parametrize("tasks", [("a", "b"), ("ä" * 90,)])
def test_a_module_comes_back_as_it_was(tmp_path: Path, tasks: tuple[str, ...]) -> None:
    module, expected = "model/layers." * 40, merged(*tasks)
    UnfinishedBuild(tmp_path / "tree", INPUTS).write(module, expected)
    again = UnfinishedBuild(tmp_path / "tree", INPUTS)
    assert not again.is_other
    assert again.has(module) and not again.has(module[1:])
    assert_same(again.read(module), expected)
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_before_a_module_is_finished(tmp_path: Path) -> None:
    build = UnfinishedBuild(tmp_path / "tree", INPUTS)
    assert not build.has("x") and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("other", [{}, {**INPUTS, "adapters": {"a": [["a/adapter_model.safetensors", 1, 2, 4]]}}])
def test_modules_of_other_inputs_are_removed(tmp_path: Path, other: dict) -> None:
    UnfinishedBuild(tmp_path / "tree", INPUTS).write("x", merged("a"))
    build = UnfinishedBuild(tmp_path / "tree", other)
    assert build.is_other and not build.has("x") and not build.place.exists()


@pytest.mark.parametrize("damage", [b"", b"{}", b"[" * 100_000, b"\xff"])
def test_modules_whose_inputs_nobody_knows_are_removed(tmp_path: Path, damage: bytes) -> None:
    build = UnfinishedBuild(tmp_path / "tree", INPUTS)
    build.write("x", merged("a"))
    (build.place / "inputs.json").write_bytes(damage)
    assert not UnfinishedBuild(tmp_path / "tree", INPUTS).has("x")


def test_a_damaged_module_is_none(tmp_path: Path) -> None:
    build = UnfinishedBuild(tmp_path / "tree", INPUTS)
    build.write("x", merged("a"))
    build = UnfinishedBuild(tmp_path / "tree", INPUTS)
    (path,) = build.place.glob("*.safetensors")
    content = path.read_bytes()
    for damaged in (b"", content[:-1], content[: len(content) // 2], content[:-1] + b"?"):
        path.write_bytes(damaged)
        assert build.read("x") is None
    path.unlink()
    assert build.read("x") is None


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path) -> None:
    build = UnfinishedBuild(tmp_path / "tree", INPUTS)
    build.place.write_text("somebody else's")
    build.write("x", merged("a"))
    assert build.place.read_text() == "somebody else's"
