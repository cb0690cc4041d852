"""Tasks that are projected, merged, removed, renamed and replaced."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from share_hf import SharedSubspace
from share_hf.cli import main
from share_hf.state import ContinualMetrics, reconcile
from share_hf.subspace import residual_outside
from tests.hub_server.fixtures import Hub
from tests.tree_fixtures import SaveLora
from tests.trees import assert_same_state, distance, small_lora


REPO = "org/share-subspace"
QUIET = dict(progress=False)


def branches(hub: Hub) -> set[str]:
    return {*hub.repository(REPO).branches} - {"main"}


class TestAdding:
    def test_what_the_basis_explains_is_projected_and_nothing_else_changes(
        self, loras: dict[str, Path], tmp_path: Path
    ) -> None:
        made = SharedSubspace.from_adapters(
            {task: loras[task] for task in ("mrpc", "sst2")}, num_components=7, pseudo_rank=4, **QUIET
        )
        before = made.state
        updates = SharedSubspace.from_adapters({"mrpc": loras["mrpc"]}, **QUIET).state.updates_of("mrpc")
        residual = max(residual_outside(before.layers[module], update) for module, update in updates.items())
        assert 1e-3 < residual < 0.9
        report = made.add_adapters({"again": loras["mrpc"]}, tolerance=residual * 1.01, **QUIET)
        assert (report.projected_tasks, report.changed_layers) == (("again",), 0)
        for module, layer in made.state.layers.items():
            assert layer.basis_out is before.layers[module].basis_out
            for i, task in enumerate(before.layers[module].tasks):
                assert torch.equal(layer.coefficients_out[i], before.layers[module].coefficients_of(task)[0])
            assert float(layer.records.drift_bounds[-1]) >= residual_outside(before.layers[module], updates[module])

    @pytest.mark.parametrize("tolerance", [None, 0.0, 0.05])
    def test_what_it_does_not_explain_is_merged(self, loras: dict[str, Path], tolerance: float | None) -> None:
        made = SharedSubspace.from_adapters(
            {task: loras[task] for task in ("mrpc", "sst2")}, num_components=7, pseudo_rank=4, **QUIET
        )
        report = made.add_adapters({"rte": loras["rte"]}, tolerance=tolerance, **QUIET)
        assert report.projected_tasks == ()
        assert report.changed_layers == len(report.layers)

    @pytest.mark.parametrize("tolerance", [-0.1, 1.0, float("nan"), True, "0.1"])
    def test_what_is_not_a_tolerance_is_refused(self, subspace: SharedSubspace, tolerance: object) -> None:
        before = subspace.state
        with pytest.raises(ValueError, match="tolerance is"):
            subspace.add_adapters({"rte": "no-such-folder"}, tolerance=tolerance, **QUIET)
        assert subspace.state is before

    @pytest.mark.parametrize("tolerance", [None, 0.5])
    def test_one_by_one_and_at_once_agree_within_the_certificate(
        self, tmp_path: Path, tolerance: float | None
    ) -> None:
        adapters = {f"t{i}": small_lora(tmp_path / f"lora{i}", i, 10.0**i)[0] for i in range(5)}
        at_once = SharedSubspace.from_adapters(adapters, num_components=10, pseudo_rank=4, **QUIET)
        first, *others = adapters
        one_by_one = SharedSubspace.from_adapters({first: adapters[first]}, num_components=10, pseudo_rank=4, **QUIET)
        for task in others:
            one_by_one.add_adapters({task: adapters[task]}, tolerance=tolerance, **QUIET)
        assert one_by_one.tasks == at_once.tasks
        for module, layer in at_once.state.layers.items():
            other = one_by_one.state.layers[module]
            for i, task in enumerate(layer.tasks):
                found, expected = (of.update_of(task, torch.float64).dense() for of in (other, layer))
                allowed = other.records.drift_bounds[i] + layer.records.drift_bounds[i]
                assert other.records.norms[i] == pytest.approx(float(layer.records.norms[i]), rel=1e-9)
                assert (found - expected).norm() <= allowed * layer.records.norms[i] * (1 + 1e-9)


class TestRenaming:
    def test_everything_but_the_name_stays(self, subspace: SharedSubspace, tmp_path: Path) -> None:
        before = subspace.state
        subspace.rename_task("mrpc", "paraphrases")
        assert subspace.tasks == ("paraphrases", "sst2")
        for module, layer in subspace.state.layers.items():
            assert torch.equal(layer.coefficients_out, before.layers[module].coefficients_out)
            assert layer.records is before.layers[module].records
        subspace.save_pretrained(tmp_path / "tree")
        assert sorted(path.name for path in (tmp_path / "tree" / "tasks").iterdir()) == ["paraphrases", "sst2"]
        assert_same_state(SharedSubspace.from_pretrained(tmp_path / "tree").state, subspace.state)

    def test_scores_and_the_default_go_along(self, subspace: SharedSubspace) -> None:
        metrics = ContinualMetrics(score="accuracy", tasks=["mrpc", "sst2"], matrix=[[0.5, 0.1], [0.4, 0.9]])
        metrics.baseline.extend([0.1, 0.2])
        metrics.drift["mrpc"] = 0.25
        subspace = SharedSubspace(replace(subspace.state, metrics=metrics.as_dict(), default_task="mrpc"))
        subspace.rename_task("mrpc", "other")
        found = ContinualMetrics.from_dict(subspace.state.metrics)
        assert found.tasks == ["other", "sst2"] and found.matrix == metrics.matrix and found.drift == {"other": 0.25}
        assert subspace.state.default_task == "other"
        assert subspace.state.scores()["other"].now == 0.4

    @pytest.mark.parametrize(
        ("old", "new", "told"),
        [
            ("mprc", "new", "no task 'mprc'"),
            ("mrpc", "sst2", "already exists"),
            ("mrpc", "SST2", "only in case"),
            ("mrpc", "main", "reserved"),
            ("mrpc", "a.b", "not usable"),
            ("mrpc", "mrpc", "already has this name"),
        ],
    )
    def test_what_is_not_a_new_name_is_refused(self, subspace: SharedSubspace, old: str, new: str, told: str) -> None:
        before = subspace.state
        with pytest.raises(ValueError, match=told):
            subspace.rename_task(old, new)
        assert subspace.state is before

    def test_names_can_be_exchanged(self, subspace: SharedSubspace, tmp_path: Path) -> None:
        before = {task: subspace.state.updates_of(task) for task in subspace.tasks}
        for old, new in (("mrpc", "held"), ("sst2", "mrpc"), ("held", "sst2")):
            subspace.rename_task(old, new)
        assert subspace.tasks == ("sst2", "mrpc")
        for module, update in subspace.state.updates_of("sst2").items():
            assert torch.equal(update.dense(), before["mrpc"][module].dense())


class TestTwoWriters:
    @pytest.fixture
    def writers(
        self, hub: Hub, subspace: SharedSubspace, loras: dict[str, Path]
    ) -> tuple[SharedSubspace, SharedSubspace]:
        subspace.push_to_hub(REPO)
        first, second = (SharedSubspace.from_pretrained(REPO) for _ in range(2))
        second.add_adapters({"rte": loras["rte"]}, **QUIET)
        return first, second

    @pytest.mark.parametrize("renamer_pushes_first", [True, False])
    def test_the_new_name_reaches_the_other(
        self, hub: Hub, writers: tuple[SharedSubspace, SharedSubspace], renamer_pushes_first: bool
    ) -> None:
        renamer, other = writers
        renamer.rename_task("mrpc", "paraphrases")
        order = writers if renamer_pushes_first else (other, renamer)
        for writer in (*order, *order):
            writer.push_to_hub(REPO)
        assert set(renamer.tasks) == {"paraphrases", "sst2", "rte"}
        assert_same_state(renamer.state, other.state)
        assert branches(hub) == {"paraphrases", "sst2", "rte"}
        for task in renamer.tasks:
            assert SharedSubspace.from_pretrained(REPO, revision=task).state.root_task == task

    def test_the_same_task_is_not_merged_once_more(self, writers: tuple[SharedSubspace, SharedSubspace]) -> None:
        renamer, other = writers
        renamer.rename_task("mrpc", "first-name")
        renamer.rename_task("first-name", "paraphrases")
        merged = reconcile(renamer.state, other.state)
        assert [*merged.tasks] == ["paraphrases", "sst2", "rte"]
        for module, layer in merged.layers.items():
            assert layer.basis_out is other.state.layers[module].basis_out
            assert layer.records is other.state.layers[module].records

    def test_what_the_other_replaced_meanwhile_stays_beside_it(
        self, writers: tuple[SharedSubspace, SharedSubspace], save_lora: SaveLora
    ) -> None:
        renamer, other = writers
        other.replace_task("mrpc", save_lora("mrpc2", seed=40), **QUIET)
        renamer.rename_task("mrpc", "paraphrases")
        both = reconcile(renamer.state, other.state), reconcile(other.state, renamer.state)
        for merged in both:
            assert set(merged.tasks) == {"mrpc", "paraphrases", "sst2", "rte"}

    def test_a_replaced_task_is_replaced_for_the_other(
        self, hub: Hub, writers: tuple[SharedSubspace, SharedSubspace], save_lora: SaveLora
    ) -> None:
        replacer, other = writers
        replacer.replace_task("mrpc", save_lora("mrpc2", seed=40), **QUIET)
        for writer in (other, replacer, other):
            writer.push_to_hub(REPO)
        assert_same_state(replacer.state, other.state)
        fresh = SharedSubspace.from_adapters({"mrpc": save_lora("mrpc3", seed=40)}, pseudo_rank=4, **QUIET)
        assert distance(other, fresh, "mrpc") <= other.state.drifts()["mrpc"] + 1e-6

    def test_two_replacements_of_one_task_are_a_conflict(
        self, writers: tuple[SharedSubspace, SharedSubspace], save_lora: SaveLora
    ) -> None:
        for seed, writer in enumerate(writers):
            writer.replace_task("mrpc", save_lora(f"mrpc{seed}", seed=40 + seed), **QUIET)
        before = writers[1].state
        writers[0].push_to_hub(REPO)
        with pytest.raises(ValueError, match="task 'mrpc' was learned by both sides"):
            writers[1].push_to_hub(REPO)
        assert writers[1].state is before


class TestBranches:
    def test_a_branch_moves_with_the_name_whatever_is_asked_for(self, hub: Hub, subspace: SharedSubspace) -> None:
        subspace.push_to_hub(REPO, branches=["mrpc"])
        subspace.rename_task("mrpc", "paraphrases")
        subspace.push_to_hub(REPO, branches="none")
        assert branches(hub) == {"paraphrases"}
        assert SharedSubspace.from_pretrained(REPO, revision="paraphrases").tasks == ("paraphrases", "sst2")

    def test_a_branch_of_the_old_name_that_somebody_else_wrote_stays(
        self, hub: Hub, subspace: SharedSubspace, loras: dict[str, Path], tmp_path: Path
    ) -> None:
        subspace.push_to_hub(REPO)
        theirs = SharedSubspace.from_pretrained(REPO)
        theirs.add_adapters({"rte": loras["rte"]}, **QUIET)
        theirs.save_pretrained(tmp_path / "theirs")
        hub.api.upload_folder(repo_id=REPO, folder_path=tmp_path / "theirs", revision="mrpc")
        subspace.rename_task("mrpc", "paraphrases")
        subspace.push_to_hub(REPO)
        assert branches(hub) == {"mrpc", "paraphrases", "sst2"}

    def test_the_step_of_the_newest_task_has_its_new_name(self, hub: Hub, subspace: SharedSubspace) -> None:
        subspace.rename_task("sst2", "reviews")
        subspace.push_to_hub(REPO)
        assert [*hub.repository(REPO).tags] == ["step-0002-reviews"]


class TestReplacing:
    def test_the_task_is_the_new_adapter(self, subspace: SharedSubspace, save_lora: SaveLora) -> None:
        subspace = SharedSubspace(replace(subspace.state, default_task="mrpc"))
        report = subspace.replace_task("mrpc", save_lora("other", seed=41), **QUIET)
        assert report.new_tasks == ("mrpc",)
        assert subspace.tasks == ("sst2", "mrpc")
        assert subspace.state.default_task == "mrpc"

    def test_what_cannot_be_read_leaves_the_old_one(self, subspace: SharedSubspace, tmp_path: Path) -> None:
        before = subspace.state
        for name, place, told in (("mrpc", tmp_path, "no adapter_config.json"), ("rte", tmp_path, "no task 'rte'")):
            with pytest.raises(ValueError, match=told):
                subspace.replace_task(name, place, **QUIET)
        assert subspace.state is before


class TestCommands:
    @pytest.fixture
    def share(self, tree: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict]:
        def run(command: str, *argv: str) -> dict:
            code = main([command, str(tree), *argv, "--json"])
            facts = json.loads(capsys.readouterr().out)
            assert (code == 0) == ("error" not in facts)
            return facts

        return run

    def test_tasks_are_edited_in_their_folder(
        self, share: Callable[..., dict], tree: Path, loras: dict[str, Path], save_lora: SaveLora
    ) -> None:
        assert share("rename", "mrpc", "paraphrases")["tasks"] == ["paraphrases", "sst2"]
        assert share("add", f"again={loras['mrpc']}", "--tolerance", "0.9")["projected"] == ["again"]
        assert share("add", f"rte={loras['rte']}")["merged"] == ["rte"]
        assert share("replace", f"sst2={save_lora('sst2', seed=44)}")["new_tasks"] == ["sst2"]
        assert share("remove", "again", "rte")["tasks"] == ["paraphrases", "sst2"]
        assert SharedSubspace.from_pretrained(tree).tasks == ("paraphrases", "sst2")

    def test_of_several_tasks_none_is_removed_where_one_is_unknown(
        self, share: Callable[..., dict], tree: Path
    ) -> None:
        assert "no task 'mprc'" in share("remove", "mrpc", "mprc")["error"]
        assert SharedSubspace.from_pretrained(tree).tasks == ("mrpc", "sst2")
