"""Steps that are undone, and bases that are rebuilt from the adapters that tasks came from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from share_hf import SharedSubspace
from share_hf.cli import main
from share_hf.format.history import history_of
from share_hf.format.originals import originals_file
from share_hf.state import hub_originals
from tests.hub_server.fixtures import Hub
from tests.trees import assert_same_state, files_of, small_lora


REPO = "org/share-subspace"
QUIET = dict(progress=False)


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("share_hf.hub.push._SECONDS_BETWEEN_ATTEMPTS", 0.0)


@pytest.fixture
def adapters(tmp_path: Path) -> dict[str, Path]:
    """Six adapters that fill any basis of 8 directions."""
    return {f"t{i}": small_lora(tmp_path / f"lora{i}", i, 1.0)[0] for i in range(6)}


@pytest.fixture
def merged(adapters: dict[str, Path]) -> SharedSubspace:
    """A subspace that merged them one by one."""
    made = SharedSubspace.from_adapters({"t0": adapters["t0"]}, num_components=8, pseudo_rank=4, **QUIET)
    for task in list(adapters)[1:]:
        made.add_adapters({task: adapters[task]}, **QUIET)
    return made


def error(subspace: SharedSubspace, adapters: dict[str, Path]) -> float:
    """Return the mean relative error of all tasks and layers against the adapters."""
    exact = SharedSubspace.from_adapters(
        {task: adapters[task] for task in subspace.tasks}, num_components=24, pseudo_rank=4, **QUIET
    )
    errors = []
    for module, layer in exact.state.layers.items():
        for task in layer.tasks:
            true = layer.update_of(task, torch.float64).dense()
            found = subspace.state.layers[module].update_of(task, torch.float64).dense()
            errors.append(float((found - true).norm() / true.norm()))
    return sum(errors) / len(errors)


class TestRefit:
    def test_truncation_does_not_add_up(self, merged: SharedSubspace, adapters: dict[str, Path]) -> None:
        at_once = SharedSubspace.from_adapters(adapters, num_components=8, pseudo_rank=4, **QUIET)
        before = error(merged, adapters)
        merged.refit(**QUIET)
        assert error(merged, adapters) < before
        assert error(merged, adapters) == pytest.approx(error(at_once, adapters), rel=1e-6)
        for module, layer in merged.state.layers.items():
            other = at_once.state.layers[module]
            assert torch.allclose(layer.records.drift_bounds, other.records.drift_bounds, rtol=1e-6)

    def test_what_was_removed_leaves_the_bases(self, merged: SharedSubspace, adapters: dict[str, Path]) -> None:
        for task in ("t1", "t2", "t3", "t4"):
            merged.remove_task(task)
        assert error(merged, adapters) > 0.1
        merged.refit(**QUIET)
        assert merged.tasks == ("t0", "t5")
        assert error(merged, adapters) < 1e-6  # two of rank 4 fit into 8 directions
        assert merged.state.lineage[-1]["refit"] == ["t0", "t5"]

    def test_a_task_without_an_original_goes_in_as_it_is_stored(
        self, merged: SharedSubspace, adapters: dict[str, Path], tmp_path: Path
    ) -> None:
        merged.save_pretrained(tmp_path / "tree")
        loaded = SharedSubspace.from_pretrained(tmp_path / "tree")
        loaded.refit({"t5": adapters["t5"]}, **QUIET)
        assert loaded.state.lineage[-1]["from_originals"] == 1
        for module, layer in loaded.state.layers.items():
            for i, task in enumerate(layer.tasks):
                exact = SharedSubspace.from_adapters({task: adapters[task]}, pseudo_rank=4, **QUIET)
                true = exact.state.layers[module].update_of(task, torch.float64).dense()
                found = layer.update_of(task, torch.float64).dense()
                assert (found - true).norm() <= (layer.records.drift_bounds[i] + 1e-6) * true.norm()

    def test_folders_are_known_beside_the_tree_if_asked_for(
        self, merged: SharedSubspace, adapters: dict[str, Path], tmp_path: Path
    ) -> None:
        merged.save_pretrained(tmp_path / "tree")
        assert not originals_file(tmp_path / "tree").exists()
        with pytest.raises(ValueError, match="no original adapter is known"):
            SharedSubspace.from_pretrained(tmp_path / "tree").refit(**QUIET)
        merged.rename_task("t0", "first")
        merged.remove_task("t4")
        merged.save_pretrained(tmp_path / "tree", keep_originals=True)
        known = json.loads(originals_file(tmp_path / "tree").read_text())
        assert known == {"first": str(adapters["t0"])} | {t: str(adapters[t]) for t in ("t1", "t2", "t3", "t5")}
        assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "tree").rglob("*.json"))
        loaded = SharedSubspace.from_pretrained(tmp_path / "tree")
        loaded.refit(**QUIET)
        assert loaded.state.lineage[-1]["from_originals"] == 5

    def test_another_adapter_is_not_taken_for_the_original(
        self, merged: SharedSubspace, adapters: dict[str, Path], tmp_path: Path
    ) -> None:
        before = merged.state
        with pytest.raises(ValueError, match=r"task 't1': the update of .* has norm"):
            merged.refit({"t1": adapters["t2"]}, **QUIET)
        with pytest.raises(ValueError, match="no task 'rte'"):
            merged.refit({"rte": adapters["t2"]}, **QUIET)
        shutil.rmtree(adapters["t3"])
        with pytest.raises(ValueError, match="lora3: no such folder"):
            merged.refit(**QUIET)
        assert merged.state is before

    def test_adapters_on_the_hub_are_known_by_commit_and_checksum(
        self, hub: Hub, adapters: dict[str, Path], tmp_path: Path
    ) -> None:
        for task in ("t0", "t1"):
            hub.api.create_repo(f"org/{task}")
            hub.api.upload_folder(repo_id=f"org/{task}", folder_path=adapters[task])
        made = SharedSubspace.from_adapters(["org/t0", "org/t1"], num_components=4, pseudo_rank=4, **QUIET)
        made.rename_task("t0", "first")
        known = hub_originals(made.state.lineage)
        assert {task: of["place"] for task, of in known.items()} == {"t1": "org/t1", "first": "org/t0"}
        assert known["t1"]["commit"] == hub.api.repo_info("org/t1").sha
        made.push_to_hub(REPO)
        hub.api.upload_folder(repo_id="org/t1", folder_path=adapters["t2"])  # a later commit is not what was added
        loaded = SharedSubspace.from_pretrained(REPO)
        loaded.remove_task("first")
        loaded.refit(**QUIET)
        assert error(loaded, adapters) < 1e-6
        loaded.push_to_hub(REPO)
        on_hub = SharedSubspace.from_pretrained(REPO)
        assert_same_state(on_hub.state, loaded.state)
        branch = SharedSubspace.from_pretrained(REPO, revision="t1").state
        assert branch.lineage == loaded.state.lineage


class TestUndo:
    def test_the_predecessor_stands_there_again_byte_for_byte(
        self, merged: SharedSubspace, adapters: dict[str, Path], tmp_path: Path
    ) -> None:
        tree, trees = tmp_path / "tree", []
        merged.save_pretrained(tree, history=5)
        trees.append(files_of(tree))
        for change in (
            lambda: merged.remove_task("t5"),
            lambda: merged.rename_task("t4", "last"),
            lambda: merged.refit(**QUIET),
        ):
            change()
            merged.save_pretrained(tree)
            trees.append(files_of(tree))
        (tree / "mine.txt").write_text("mine")
        for expected in reversed(trees[:-1]):
            found = SharedSubspace.undo(tree)
            assert files_of(tree) == {**expected, "mine.txt": b"mine"}
            assert_same_state(found.state, SharedSubspace.from_pretrained(tree).state)
        with pytest.raises(ValueError, match="no earlier version of it is kept"):
            SharedSubspace.undo(tree)

    def test_no_more_are_kept_than_asked_for_and_none_unasked(self, merged: SharedSubspace, tmp_path: Path) -> None:
        tree = tmp_path / "tree"
        merged.save_pretrained(tree)
        merged.remove_task("t5")
        merged.save_pretrained(tree)
        assert not history_of(tree).exists()
        merged.save_pretrained(tree, history=2)
        for task in ("t4", "t3", "t2"):
            merged.remove_task(task)
            merged.save_pretrained(tree)
        merged.save_pretrained(tree)  # not a step
        assert len([path for path in history_of(tree).iterdir() if path.is_dir()]) == 2
        assert SharedSubspace.undo(tree).tasks == ("t0", "t1", "t2")
        assert SharedSubspace.undo(tree).tasks == ("t0", "t1", "t2", "t3")
        merged.save_pretrained(tree, history=0)
        assert not history_of(tree).exists()

    @pytest.mark.parametrize("history", [-1, 1.5, True])
    def test_what_is_not_a_number_of_steps_is_refused(
        self, merged: SharedSubspace, tmp_path: Path, history: object
    ) -> None:
        with pytest.raises(ValueError, match="history is"):
            merged.save_pretrained(tmp_path / "tree", history=history)
        assert not (tmp_path / "tree").exists()


class TestTwoWriters:
    @pytest.mark.parametrize("refitter_pushes_first", [True, False])
    def test_nothing_of_another_writer_is_lost(
        self, hub: Hub, merged: SharedSubspace, adapters: dict[str, Path], tmp_path: Path, refitter_pushes_first: bool
    ) -> None:
        merged.push_to_hub(REPO)
        other = SharedSubspace.from_pretrained(REPO)
        other.rename_task("t1", "second")
        other.add_adapters({"new": small_lora(tmp_path / "new", 9, 1.0)[0]}, **QUIET)
        merged.refit(**QUIET)
        order = (merged, other) if refitter_pushes_first else (other, merged)
        for writer in (*order, *order):
            writer.push_to_hub(REPO)
        assert set(merged.tasks) == {"t0", "second", "t2", "t3", "t4", "t5", "new"}
        assert_same_state(merged.state, other.state)
        known = adapters | {"second": adapters["t1"], "new": tmp_path / "new"}
        for module, layer in merged.state.layers.items():
            for i, task in enumerate(layer.tasks):
                exact = SharedSubspace.from_adapters({"it": known[task]}, pseudo_rank=4, **QUIET).state.layers[module]
                true = exact.update_of("it", torch.float64).dense()
                found = layer.update_of(task, torch.float64).dense()
                assert (found - true).norm() <= (layer.records.drift_bounds[i] + 1e-6) * true.norm()


def test_the_commands(adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = str(tmp_path / "tree")

    def share(*argv: str) -> dict:
        main([*argv, "--json"])
        return json.loads(capsys.readouterr().out)

    settings = ["--num-components", "8", "--pseudo-rank", "4"]
    share(
        "init", tree, *(str(adapters[task]) for task in ("t0", "t1")), *settings, "--history", "3", "--keep-originals"
    )
    share("add", tree, str(adapters["t2"]))
    assert share("undo", tree)["undone"]["merged"] == ["lora2"]
    assert share("undo", tree)["error"].endswith("before the step to undo")
    share("add", tree, str(adapters["t2"]))
    share("remove", tree, "lora0")
    assert share("refit", tree)["from_originals"] == 2
    assert share("undo", tree)["undone"]["refit"] == ["lora1", "lora2"]
    assert share("refit", tree, f"lora1={adapters['t1']}")["from_originals"] == 2
