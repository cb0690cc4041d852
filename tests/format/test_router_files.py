"""Routes on disk come back bit by bit, cost nothing in a tree without them, and are refused if they are damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from share_hf import SharedSubspace
from share_hf.format.router_file import ROUTER_FILE
from share_hf.state.routing import MOST_PARTS
from tests.routes import LAYERS, WIDTH, assert_same_routes, learn
from tests.trees import assert_same_state, edit_index, edit_tensors, files_of, sign_anew


TASK_ROUTE = f"tasks/mrpc/{ROUTER_FILE}"


@pytest.fixture
def routed_tree(subspace: SharedSubspace, tmp_path: Path) -> Path:
    """A tree in which both tasks have routes."""
    for seed, task in enumerate(subspace.tasks):
        learn(subspace, task, seed)
    subspace.save_pretrained(tmp_path / "routed")
    return tmp_path / "routed"


def test_routes_come_back_to_the_bit(subspace: SharedSubspace, routed_tree: Path) -> None:
    loaded = SharedSubspace.from_pretrained(routed_tree)
    assert_same_state(loaded.state, subspace.state)
    assert_same_routes(loaded.state, subspace.state)
    loaded.save_pretrained(routed_tree.with_name("again"))
    assert files_of(routed_tree.with_name("again")) == files_of(routed_tree)


def test_a_tree_has_two_kinds_of_files_more_and_the_version_that_knows_them(tree: Path, routed_tree: Path) -> None:
    more = files_of(routed_tree).keys() - files_of(tree).keys()
    assert sorted(more) == [ROUTER_FILE, f"tasks/mrpc/{ROUTER_FILE}", f"tasks/sst2/{ROUTER_FILE}"]
    index = json.loads((routed_tree / "share_config.json").read_text())
    assert index["format_version"] == 3
    assert index["router"]["tasks"] == ["mrpc", "sst2"]
    assert index["router"]["layers"] == list(LAYERS) and index["router"]["width"] == WIDTH
    assert ROUTER_FILE in index["sha256"]


def test_without_routes_a_tree_is_what_it_was(tree: Path, routed_tree: Path) -> None:
    plain = SharedSubspace.from_pretrained(tree)
    plain.save_pretrained(tree.with_name("again"))
    assert files_of(tree.with_name("again")) == files_of(tree)
    assert b"router" not in (tree / "share_config.json").read_bytes()


def test_what_is_no_longer_routed_leaves_no_file(subspace: SharedSubspace, routed_tree: Path) -> None:
    loaded = SharedSubspace.from_pretrained(routed_tree)
    loaded.rename_task("mrpc", "paraphrases")
    loaded.remove_task("sst2")
    loaded.save_pretrained(routed_tree)
    found = SharedSubspace.from_pretrained(routed_tree)
    assert found.routed_tasks == ("paraphrases",)
    assert torch.equal(found.state.tasks["paraphrases"].route.mean, subspace.state.tasks["mrpc"].route.mean)
    assert sorted(path.parent.name for path in routed_tree.rglob(ROUTER_FILE)) == ["paraphrases", "routed"]


def test_older_parts_are_one_sum_and_nothing_is_lost(subspace: SharedSubspace, tmp_path: Path) -> None:
    for seed in range(MOST_PARTS + 3):
        learn(subspace, "mrpc", seed)
    subspace.save_pretrained(tmp_path / "many")
    found = SharedSubspace.from_pretrained(tmp_path / "many").state
    assert_same_routes(found, subspace.state)
    assert len(found.router.parts) == MOST_PARTS and len(found.router.settled_identities) == 3


def test_undo_takes_back_a_route(subspace: SharedSubspace, tmp_path: Path) -> None:
    folder = tmp_path / "history"
    subspace.save_pretrained(folder, history=2)
    before = files_of(folder)
    learn(subspace, "mrpc", 0)
    subspace.save_pretrained(folder)
    assert (folder / ROUTER_FILE).is_file()
    assert SharedSubspace.undo(folder).routed_tasks == ()
    assert files_of(folder) == before


def _set(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name])

    return edit


def _first(tensors: dict[str, Tensor]) -> str:
    return min(name for name in tensors if name.startswith("part."))


def _part(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: _set(_first(tensors), change)(tensors)


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        (TASK_ROUTE, _set("mean", lambda of: of[:-1]), r"tasks/mrpc/router.*'mean' has shape \(5,\), expected \(6,\)"),
        (TASK_ROUTE, _set("mean", lambda of: of.double()), "'mean' is torch.float64, expected torch.float32"),
        (TASK_ROUTE, _set("mean", lambda of: of * torch.nan), "'mean' has NaN or infinite entries"),
        (TASK_ROUTE, _set("variances", lambda of: -of), "'variances' has -.*, expected no negative number"),
        (TASK_ROUTE, _set("distances", lambda of: of.flip(0)), "'distances' are not in ascending order"),
        (TASK_ROUTE, _set("measured", lambda of: of * 0), "'measured' is 0, expected at least 1"),
        (TASK_ROUTE, _set("measured", lambda of: of - 5), r"'distances' has shape \(40,\), expected \(35,\)"),
        (TASK_ROUTE, lambda tensors: tensors.pop("mean"), "'mean' is missing or unexpected"),
        (TASK_ROUTE, lambda tensors: tensors.update(x=torch.ones(1)), "'x' is missing or unexpected"),
        (ROUTER_FILE, lambda tensors: tensors.pop(_first(tensors)), "'part.* is missing here or in the index"),
        (ROUTER_FILE, _part(lambda of: of[:-1]), r"is \(20,\) torch.float32, expected \(21,\)"),
        (ROUTER_FILE, _part(lambda of: -of), "has a negative diagonal"),
        (ROUTER_FILE, _set("probe", lambda of: of[:-1]), r"'probe' has shape \(5,\), expected \(6,\)"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_with_its_tensor(
    routed_tree: Path, file: str, edit: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    edit_tensors(routed_tree / file, edit)
    sign_anew(routed_tree, file)
    with pytest.raises(ValueError, match=message):
        SharedSubspace.from_pretrained(routed_tree)


@pytest.mark.parametrize("file", [ROUTER_FILE, TASK_ROUTE])
def test_a_file_that_was_edited_is_not_loaded(routed_tree: Path, file: str) -> None:
    name = "probe" if file == ROUTER_FILE else "mean"
    edit_tensors(routed_tree / file, _set(name, lambda of: of + 1))
    with pytest.raises(ValueError, match=f"{file}: sha256 is .*, expected .*: the file was truncated or edited"):
        SharedSubspace.from_pretrained(routed_tree)
    (routed_tree / file).unlink()
    with pytest.raises(ValueError, match=f"{file}: no such file"):
        SharedSubspace.from_pretrained(routed_tree)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": []}, r"router has layers \[\], expected indices of layers"),
        ({"layers": [True]}, "router has layers"),
        ({"width": 0}, "router has width 0, expected a number of features up to"),
        ({"width": 10**9}, "router has width 1000000000"),
        ({"tasks": ["cola"]}, "router has 'cola' among its tasks, expected tasks of the tree"),
        ({"degrees": []}, "router has no degrees"),
        ({"degrees": [["x", -1]]}, "expected pairs of a name and a positive number"),
        ({"settled": "x"}, "router has settled 'x', expected a list of names"),
    ],
)
def test_an_index_is_checked_too(routed_tree: Path, change: dict[str, Any], message: str) -> None:
    edit_index(routed_tree, lambda index: index["router"].update(change))
    with pytest.raises(ValueError, match=message):
        SharedSubspace.from_pretrained(routed_tree)
