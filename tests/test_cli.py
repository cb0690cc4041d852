"""The command line, as a user calls it."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from peft import PeftModel
from transformers import PreTrainedModel

from share_hf import SharedSubspace
from share_hf.cli import build_parser, commands, main, parse
from share_hf.cli.tables import size
from share_hf.state import ContinualMetrics
from tests.format.test_old_trees import VERSION_1
from tests.hub_server.fixtures import Hub
from tests.trees import (
    assert_close,
    assert_same_state,
    edit_json,
    files_of,
    logits,
    lora_config,
    named,
    save_adapter,
)


COMMANDS = (
    *("init", "add", "info", "audit", "export", "remove", "rename", "replace", "refit", "undo"),
    *("route", "push", "pull", "upgrade", "env"),
)
REPO = "org/share-subspace"
SMALL = ["--num-components", "6", "--pseudo-rank", "4"]

Output = tuple[int, str, str]


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what a command sets for its process, and draw no figures, which take most of the time."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub", "bitsandbytes")]
    levels, bars = [logger.level for logger in loggers], not are_progress_bars_disabled()
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    if bars:
        enable_progress_bars()


@pytest.fixture(scope="session")
def adapters(pristine_models: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """LoRAs of the tiny Llama that PEFT wrote, by task."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: str(save_adapter(named(copy.deepcopy(pristine_models["llama"])), root / name, lora_config(), seed))
        for seed, name in enumerate(("mrpc", "sst2", "rte", "cola"))
    }


@pytest.fixture
def here(adapters: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a subspace `sub` of mrpc and sst2 in it."""
    monkeypatch.chdir(tmp_path)
    made = SharedSubspace.from_adapters(
        {task: adapters[task] for task in ("mrpc", "sst2")}, num_components=6, pseudo_rank=4, progress=False
    )
    made.save_pretrained("sub")
    return tmp_path


@pytest.fixture
def share(capsys: pytest.CaptureFixture[str]) -> Callable[..., Output]:
    """Run a command, and return its exit code, stdout and stderr."""

    def run(*argv: str) -> Output:
        capsys.readouterr()
        try:
            code = main(argv)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def share_json(share: Callable[..., Output]) -> Callable[..., Any]:
    """Run a command with `--json`, which must succeed, and return stdout. Nothing may be on stderr."""

    def run(*argv: str) -> Any:
        code, out, err = share(*argv, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return run


def column(text: str, title: str) -> list[str]:
    """Return the cells under a heading of the table in a text."""
    lines = [re.split(r" {2,}", line) for line in text.splitlines()]
    start = next(i for i, cells in enumerate(lines) if title in cells)
    end = lines.index([""], start) if [""] in lines[start:] else len(lines)
    return [cells[lines[start].index(title)] for cells in lines[start + 1 : end] if len(cells) == len(lines[start])]


class TestInit:
    def test_makes_what_the_library_makes(
        self, share: Callable[..., Output], adapters: dict[str, str], tmp_path: Path
    ) -> None:
        code, out, err = share("init", str(tmp_path / "sub"), adapters["mrpc"], f"second={adapters['sst2']}", *SMALL)
        assert (code, err) == (0, "")
        assert column(out, "task") == ["mrpc", "second"]
        expected = SharedSubspace.from_adapters(
            {"mrpc": adapters["mrpc"], "second": adapters["sst2"]}, num_components=6, pseudo_rank=4, progress=False
        )
        found = SharedSubspace.from_pretrained(tmp_path / "sub")
        assert found.tasks == ("mrpc", "second")
        assert_same_state(found.state, expected.state)

    def test_a_base_model_of_several_names_is_named(
        self,
        share: Callable[..., Output],
        share_json: Callable[..., Any],
        pristine_models: dict[str, PreTrainedModel],
        adapters: dict[str, str],
        tmp_path: Path,
    ) -> None:
        model = named(copy.deepcopy(pristine_models["llama"]), "./models/tiny")
        local = str(save_adapter(model, tmp_path / "local", lora_config(), 5))
        sub = str(tmp_path / "sub")
        for argv in (["init", sub, adapters["mrpc"], local], ["audit", adapters["mrpc"], local]):
            code, _, err = share(*argv)
            assert code == 1
            assert "belongs to base model './models/tiny', expected 'org/tiny'" in err
            assert "--base-model" in err
            assert share(*argv, "--base-model", "org/tiny")[0] == 0
        assert SharedSubspace.from_pretrained(sub).base_model_name_or_path == "org/tiny"
        assert share("add", sub, f"again={local}")[0] == 1
        assert share_json("add", sub, f"again={local}", "--base-model", "org/tiny")["new_tasks"] == ["again"]

    def test_every_setting_can_be_given(
        self, share_json: Callable[..., Any], adapters: dict[str, str], tmp_path: Path
    ) -> None:
        given = {
            "num_components": 7,
            "pseudo_rank": 3,
            "basis": "factor",
            "explained_variance": 0.9,
            "drift_tolerance": 5.0,
            "max_components": 12,
        }
        options = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        facts = share_json("init", str(tmp_path / "sub"), adapters["mrpc"], *options, "--center")
        assert facts["settings"] == {**given, "center": True}

    def test_has_the_defaults_of_the_library(self) -> None:
        args = vars(parse(["init", "sub", "mrpc"]))
        parameters = inspect.signature(SharedSubspace.from_adapters).parameters
        settings = {name: parameters[name].default for name in parameters if name in args and name != "adapters"}
        assert len(settings) == 15  # four are about reading the adapters
        assert settings == {name: args[name] for name in settings}

    def test_says_what_it_chose_and_what_it_costs(
        self,
        share: Callable[..., Output],
        share_json: Callable[..., Any],
        adapters: dict[str, str],
        tmp_path: Path,
    ) -> None:
        places = [adapters["mrpc"], adapters["sst2"]]
        auto = ["--num-components", "auto", "--pseudo-rank", "auto"]
        code, out, err = share("init", str(tmp_path / "a"), *places, *auto, "--target-error", "0.4")
        assert (code, err) == (0, "")
        settings = SharedSubspace.from_pretrained(tmp_path / "a").settings
        k, p = settings.num_components, settings.pseudo_rank
        assert re.match(
            rf"chose num_components = {k} and pseudo_rank = {p}: a mean relative error of 0\.\d+ and ", out
        )
        facts = share_json("init", str(tmp_path / "b"), *places, *auto, "--target-bytes", "12KB")
        report = SharedSubspace.from_pretrained(tmp_path / "b").report()
        stored = report.basis_bytes + sum(task.bytes for task in report.tasks)
        assert facts["chosen"]["bytes"] == stored <= 12_000
        assert facts["settings"]["num_components"] == facts["chosen"]["num_components"]

    @pytest.mark.parametrize(("text", "size"), [("12KB", 12_000), ("1.5mb", 1_500_000), ("2G", 2 * 10**9), ("77", 77)])
    def test_takes_sizes_with_units(self, text: str, size: int) -> None:
        assert parse(["init", "sub", "mrpc", "--target-bytes", text]).target_bytes == size

    def test_refuses_a_size_that_is_none(self, share: Callable[..., Output]) -> None:
        code, _, err = share("init", "sub", "mrpc", "--target-bytes", "much")
        assert code == 2
        assert "'much' is not a size, expected a number of bytes such as 1500000, or a size such as 1.5MB" in err

    def test_refuses_a_folder_that_is_a_subspace(
        self, share: Callable[..., Output], here: Path, adapters: dict[str, str]
    ) -> None:
        before = files_of(here)
        code, out, err = share("init", "sub", adapters["rte"], *SMALL)
        assert (code, out) == (1, "")
        assert err == "error: sub is already a shared subspace, add to it with `share-hf add`\n"
        assert files_of(here) == before

    def test_refuses_a_folder_that_is_an_adapter(self, share: Callable[..., Output], adapters: dict[str, str]) -> None:
        before = files_of(Path(adapters["mrpc"]))
        code, _, err = share("init", adapters["mrpc"], adapters["sst2"])
        assert code == 1
        assert "holds an adapter" in err
        assert files_of(Path(adapters["mrpc"])) == before

    def test_names_two_adapters_of_one_name(
        self, share: Callable[..., Output], adapters: dict[str, str], tmp_path: Path
    ) -> None:
        code, _, err = share("init", str(tmp_path / "sub"), adapters["mrpc"], f"mrpc={adapters['sst2']}")
        assert code == 1
        assert "both called 'mrpc'" in err
        assert not (tmp_path / "sub").exists()

    @pytest.mark.parametrize(
        ("text", "name", "place"),
        [
            ("adapters/mrpc/", "mrpc", "adapters/mrpc/"),
            ("org/lora-mrpc", "lora-mrpc", "org/lora-mrpc"),
            ("mrpc=org/lora", "mrpc", "org/lora"),
            ("mrpc=out/lr=0.1", "mrpc", "out/lr=0.1"),
            ("out/lr=0.1/mrpc", "mrpc", "out/lr=0.1/mrpc"),
            ("mrpc=~/lora", "mrpc", os.path.expanduser("~/lora")),
        ],
    )
    def test_an_adapter_has_a_name_and_a_place(self, text: str, name: str, place: str) -> None:
        assert parse(["init", "sub", text]).adapters == [(name, place)]


class TestAdd:
    def test_prints_the_drift_of_every_task(
        self, share: Callable[..., Output], here: Path, adapters: dict[str, str]
    ) -> None:
        code, out, err = share("add", "sub", f"third={adapters['rte']}", adapters["cola"])
        assert (code, err) == (0, "")
        assert SharedSubspace.from_pretrained("sub").tasks == ("mrpc", "sst2", "third", "cola")
        assert "added third, cola, 4 of 4 layers changed" in out
        assert column(out, "task") == ["mrpc", "sst2", "third", "cola"]
        assert all(float(drift) > 0 for drift in column(out, "drift by this merge"))

    def test_reports_what_the_library_reports(
        self, share_json: Callable[..., Any], here: Path, adapters: dict[str, str]
    ) -> None:
        other = SharedSubspace.from_pretrained("sub")
        merge = other.add_adapters({"rte": adapters["rte"]}, progress=False)
        facts = share_json("add", "sub", adapters["rte"])
        assert {task["name"]: task["drift_by_merge"] for task in facts["tasks"]} == merge.drift
        assert facts["max_drift"] == merge.max_drift
        assert facts["new_tasks"] == ["rte"]

    def test_changes_nothing_where_it_fails(
        self, share: Callable[..., Output], here: Path, adapters: dict[str, str]
    ) -> None:
        before = files_of(here)
        for adapter, problem in ((adapters["mrpc"], "already exists"), ("missing/folder/third", "no such folder")):
            code, out, err = share("add", "sub", adapters["rte"], adapter)
            assert (code, out) == (1, "")
            assert problem in err
            assert err.count("\n") == 1
            assert files_of(here) == before

    def test_suggests_the_adapter_that_was_meant(
        self, share: Callable[..., Output], here: Path, adapters: dict[str, str]
    ) -> None:
        (here / "adapters").symlink_to(Path(adapters["rte"]).parent)
        for argv in (["add", "sub"], ["init", "new"], ["audit", "adapters/mrpc"]):
            code, _, err = share(*argv, "adapters/rto", "second=adapters/sst2")
            assert code == 1
            assert err.startswith("error: adapters/rto: no such folder, and no repository that could be read")
            assert err.endswith("did you mean adapters/rte?\n")

    def test_keeps_a_tolerance(self, share: Callable[..., Output], adapters: dict[str, str], tmp_path: Path) -> None:
        folder = str(tmp_path / "sub")
        strict = ["--drift-tolerance", "0.001", "--max-components", "6"]
        assert share("init", folder, adapters["mrpc"], *SMALL, *strict)[0] == 0
        before = files_of(tmp_path)
        code, _, err = share("add", folder, adapters["sst2"])
        assert code == 1
        assert "drift" in err
        assert files_of(tmp_path) == before


class TestInfo:
    def test_shows_tasks_and_sizes(self, share: Callable[..., Output], here: Path) -> None:
        code, out, err = share("info", "sub")
        assert (code, err) == (0, "")
        assert out.startswith("sub: 2 tasks of org/tiny\n4 modules, 6 directions (k = 6), rank p = 4, joint basis")
        assert column(out, "task") == ["mrpc", "sst2"]
        assert column(out, "size") == ["768 B", "768 B"]

    def test_is_the_report_of_the_library(self, share_json: Callable[..., Any], here: Path) -> None:
        facts, report = share_json("info", "sub"), SharedSubspace.from_pretrained("sub").report().to_dict()
        assert {name: facts[name] for name in report} == json.loads(json.dumps(report))

    def test_shows_scores_where_there_are_some(
        self, share: Callable[..., Output], share_json: Callable[..., Any], here: Path
    ) -> None:
        subspace = SharedSubspace.from_pretrained("sub")
        metrics = ContinualMetrics(tasks=["mrpc", "sst2"], matrix=[[0.75, None], [0.5, 0.875]], baseline=[None, None])
        subspace.state.metrics.update(metrics.as_dict())
        subspace.save_pretrained("sub")
        _, out, _ = share("info", "sub")
        assert re.search(r"mrpc .* accuracy +0\.750 +0\.500\n", out)
        assert "average 0.688, backward transfer -0.250, forgetting 0.250" in out
        facts = share_json("info", "sub")
        assert facts["scores"]["sst2"] == {"metric": "accuracy", "learned": 0.875, "now": 0.875}
        assert facts["metrics"] == {"average": 0.6875, "forgetting": 0.25, "backward_transfer": -0.25}

    def test_suggests_the_folder_that_was_meant(self, share: Callable[..., Output], here: Path) -> None:
        code, out, err = share("info", "sbu")
        assert (code, out) == (1, "")
        assert err == "error: sbu: no such folder, and no repository that could be read, did you mean sub?\n"

    def test_names_a_damaged_file(self, share: Callable[..., Output], here: Path) -> None:
        edit_json(here / "sub" / "share_config.json", lambda content: content.pop("tasks"))
        code, _, err = share("info", "sub")
        assert code == 1
        assert err.startswith("error: sub/share_config.json")


class TestAudit:
    def test_of_adapters_compares_with_chance(
        self, share: Callable[..., Output], share_json: Callable[..., Any], adapters: dict[str, str]
    ) -> None:
        code, out, err = share("audit", adapters["mrpc"], f"second={adapters['sst2']}", "--num-components", "4")
        assert (code, err) == (0, "")
        assert "layers.*.self_attn.q_proj" in out
        assert "Tasks by the random A they started from: mrpc; second" in out
        facts = share_json("audit", adapters["mrpc"], f"second={adapters['sst2']}", "--num-components", "4")
        assert len(facts["rows"]) == 4
        assert facts["groups"] == [["mrpc"], ["second"]]
        assert all(sentence in out for sentence in facts["sentences"])
        assert len(facts["sentences"]) == 2

    def test_of_a_subspace_looks_at_all_layers(
        self, share: Callable[..., Output], share_json: Callable[..., Any], here: Path
    ) -> None:
        assert len(share_json("audit", "sub")["rows"]) == 4
        _, by_kind, _ = share("audit", "sub")
        _, by_module, _ = share("audit", "sub", "--per-module")
        assert column(by_kind, "layers") == ["2", "2"]
        assert column(by_module, "layers") == ["1"] * 4

    def test_a_figure_is_drawn_and_advice_is_given(
        self,
        share: Callable[..., Output],
        share_json: Callable[..., Any],
        adapters: dict[str, str],
        here: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.undo()
        monkeypatch.chdir(here)
        copied = [f"{name}={adapters['mrpc']}" for name in ("first", "second")]
        facts = share_json("audit", *copied, adapters["rte"], "--target-error", "0.3", "--figure", "audit.png")
        assert Path("audit.png").read_bytes().startswith(b"\x89PNG")
        assert facts["collection"]["duplicates"] == [["first", "second"]]
        assert [advice["target_error"] for advice in facts["collection"]["advice"]] == [0.3]
        assert facts["collection"]["curve"][-1]["explained"] == pytest.approx(1)
        _, out, _ = share("audit", "sub")
        assert "error of ΔW" in out

    def test_of_adapters_of_two_models_is_refused(
        self, share: Callable[..., Output], adapters: dict[str, str], tmp_path: Path
    ) -> None:
        other = Path(shutil.copytree(adapters["sst2"], tmp_path / "other"))
        edit_json(other / "adapter_config.json", lambda config: config.update(base_model_name_or_path="org/large"))
        code, _, err = share("audit", adapters["mrpc"], str(other))
        assert code == 1
        assert "org/tiny" in err
        assert "org/large" in err

    def test_of_one_adapter_says_what_is_missing(self, share: Callable[..., Output], adapters: dict[str, str]) -> None:
        code, _, err = share("audit", adapters["mrpc"])
        assert code == 1
        assert "share_config.json" in err


class TestExport:
    def test_writes_a_lora_that_peft_loads(
        self, share: Callable[..., Output], here: Path, tiny_model: Callable[[str], PreTrainedModel]
    ) -> None:
        code, out, err = share("export", "sub", "mrpc", "out")
        assert (code, err) == (0, "")
        assert out.split() == ["task", "LoRA", "mrpc", "out"]
        exported = logits(PeftModel.from_pretrained(tiny_model("llama"), "out").eval())
        applied = SharedSubspace.from_pretrained("sub").apply(tiny_model("llama"), ["mrpc"])
        assert_close(exported, logits(applied))

    def test_writes_all(self, share_json: Callable[..., Any], here: Path) -> None:
        assert share_json("export", "sub", "outs", "--all") == {"exported": {"mrpc": "outs/mrpc", "sst2": "outs/sst2"}}
        assert sorted(path.name for path in (here / "outs").iterdir()) == ["mrpc", "sst2"]

    def test_names_the_tasks_there_are(self, share: Callable[..., Output], here: Path) -> None:
        code, _, err = share("export", "sub", "mprc", "out")
        assert code == 1
        assert "'mprc'" in err
        assert "'mrpc'" in err
        assert not (here / "out").exists()

    def test_does_not_write_over_a_subspace(self, share: Callable[..., Output], here: Path) -> None:
        before = files_of(here)
        assert share("export", "sub", "mrpc", "sub")[0] == 1
        assert files_of(here) == before

    @pytest.mark.parametrize("argv", [["sub", "out"], ["sub", "mrpc", "out", "--all"]])
    def test_needs_a_task_or_all(self, share: Callable[..., Output], argv: list[str]) -> None:
        code, _, err = share("export", *argv)
        assert code == 2
        assert "expected one TASK, or --all" in err


class TestUpgrade:
    def test_rewrites_a_folder_once(
        self, share: Callable[..., Output], share_json: Callable[..., Any], tmp_path: Path
    ) -> None:
        old = Path(shutil.copytree(VERSION_1, tmp_path / "old"))
        before = SharedSubspace.from_pretrained(old).state
        code, out, err = share("upgrade", str(old))
        assert (code, out, err) == (0, f"{old}: upgraded from format version 1 to 2\n", "")
        assert json.loads((old / "share_config.json").read_text())["format_version"] == 2
        assert_same_state(SharedSubspace.from_pretrained(old).state, before)
        written = files_of(old)
        assert share_json("upgrade", str(old))["upgraded"] == []
        assert files_of(old) == written

    def test_rewrites_a_repository_and_its_branches(
        self, share: Callable[..., Output], share_json: Callable[..., Any], here: Path, hub: Hub
    ) -> None:
        hub.api.create_repo(REPO)
        hub.api.upload_folder(repo_id=REPO, folder_path=VERSION_1)
        for task in ("mrpc", "rte"):
            hub.api.create_branch(REPO, branch=task)
        assert share_json("upgrade", REPO) == {"from": 1, "to": 2, "upgraded": ["main"]}
        hub.move_to_another_machine()
        for revision in ("main", "mrpc", "rte"):
            index = json.loads(Path(hf_hub_download(REPO, "share_config.json", revision=revision)).read_text())
            assert index["format_version"] == 2
            subspace = SharedSubspace.from_pretrained(REPO, revision=revision)
            assert_same_state(
                replace(subspace.state, default_task=None), SharedSubspace.from_pretrained(VERSION_1).state
            )
        hub.api.delete_branch(REPO, branch="mrpc")
        hub.api.create_branch(REPO, branch="mrpc", revision=hub.api.list_repo_commits(REPO)[-2].commit_id)
        assert share_json("upgrade", REPO) == {"from": 1, "to": 2, "upgraded": ["mrpc"]}
        assert share_json("upgrade", REPO)["upgraded"] == []

    def test_names_a_folder_that_is_not_a_subspace(self, share: Callable[..., Output], here: Path) -> None:
        assert "no such folder" in share("upgrade", "./nothing")[2]
        (here / "empty").mkdir()
        assert "share_config.json: no such file" in share("upgrade", "empty")[2]


class TestHub:
    def test_what_is_pushed_can_be_shown_and_pulled(
        self, share: Callable[..., Output], share_json: Callable[..., Any], here: Path, hub: Hub
    ) -> None:
        code, out, err = share("push", "sub", REPO, "--private", "-m", "First", "--commit-description", "Two tasks")
        assert (code, err) == (0, "")
        assert out == f"{hub.url}/{REPO}/commit/{hub.api.repo_info(REPO).sha}\nnew on the hub: mrpc, sst2\n"
        assert hub.api.repo_info(REPO).private
        assert hub.api.list_repo_commits(REPO)[0].title == "First"
        hub.move_to_another_machine()
        facts = share_json("info", REPO, "--revision", "mrpc")
        assert [task["name"] for task in facts["tasks"]] == ["mrpc", "sst2"]
        pulled = share_json("pull", REPO, "copy")
        assert pulled["new_in_the_folder"] == ["mrpc", "sst2"]
        assert_same_state(SharedSubspace.from_pretrained("copy").state, SharedSubspace.from_pretrained("sub").state)

    def test_two_writers_meet(
        self,
        share: Callable[..., Output],
        share_json: Callable[..., Any],
        here: Path,
        hub: Hub,
        adapters: dict[str, str],
    ) -> None:
        assert share("push", "sub", REPO)[0] == 0
        assert share("pull", REPO, "other")[0] == 0
        assert share("add", "other", adapters["cola"])[0] == 0
        assert share("push", "other", REPO)[0] == 0
        assert share("add", "sub", adapters["rte"])[0] == 0
        facts = share_json("push", "sub", REPO)
        assert facts["new_on_the_hub"] == ["rte"]
        assert facts["new_in_the_folder"] == ["cola"]
        assert SharedSubspace.from_pretrained("sub").tasks == ("mrpc", "sst2", "cola", "rte")
        code, out, _ = share("pull", REPO, "other")
        assert (code, out) == (0, "other: 4 tasks\nnew in the folder: rte\n")
        before = files_of(here / "other")
        assert share("pull", REPO, "other")[1] == "other: 4 tasks, up to date\n"
        assert files_of(here / "other") == before
        assert_same_state(SharedSubspace.from_pretrained("other").state, SharedSubspace.from_pretrained("sub").state)

    def test_a_pull_keeps_what_was_not_pushed(
        self, share_json: Callable[..., Any], here: Path, hub: Hub, adapters: dict[str, str]
    ) -> None:
        share_json("push", "sub", REPO)
        share_json("add", "sub", adapters["rte"])
        facts = share_json("pull", REPO, "sub", "--revision", "step-0002-sst2")
        assert (facts["changed"], facts["not_on_the_hub"]) == (False, ["rte"])

    def test_a_pull_request_leaves_main_alone(
        self, share_json: Callable[..., Any], here: Path, hub: Hub, adapters: dict[str, str]
    ) -> None:
        share_json("push", "sub", REPO)
        head = hub.api.repo_info(REPO).sha
        share_json("add", "sub", adapters["rte"])
        assert "/discussions/1" in share_json("push", "sub", REPO, "--create-pr")["url"]
        assert hub.api.repo_info(REPO).sha == head

    @pytest.mark.parametrize(
        ("choice", "branches"),
        [
            ([], ["mrpc", "sst2"]),
            (["none"], []),
            (["sst2"], ["sst2"]),
            (["mrpc", "sst2"], ["mrpc", "sst2"]),
        ],
        ids=str,
    )
    def test_the_tasks_that_get_a_branch_are_chosen(
        self, choice: list[str], branches: list[str], share: Callable[..., Output], here: Path, hub: Hub
    ) -> None:
        assert share("push", "sub", REPO, *(part for name in choice for part in ("--branches", name)))[0] == 0
        assert set(hub.repository(REPO).branches) == {"main", *branches}

    def test_branches_of_no_task_are_an_error(self, share: Callable[..., Output], here: Path, hub: Hub) -> None:
        code, _, err = share("push", "sub", REPO, "--branches", "mrcp")
        assert code == 1
        assert "branches has ['mrcp'], expected tasks of the subspace, which has ['mrpc', 'sst2']" in err
        assert REPO not in hub.server.repositories

    def test_an_unknown_revision_is_an_error(self, share: Callable[..., Output], here: Path, hub: Hub) -> None:
        share("push", "sub", REPO)
        code, _, err = share("info", REPO, "--revision", "mrcp")
        assert code == 1
        assert "did you mean 'mrpc'" in err

    def test_a_refused_push_is_an_error_in_one_line(self, share: Callable[..., Output], here: Path, hub: Hub) -> None:
        code, out, err = share("push", "sub", "somebody/else", "--json")
        assert code == 1
        assert "403" in json.loads(out)["error"]
        assert err == f"error: {json.loads(out)['error']}\n"

    def test_adapters_come_from_the_hub_with_a_token(
        self, share: Callable[..., Output], here: Path, hub: Hub, adapters: dict[str, str]
    ) -> None:
        hub.api.create_repo("org/lora-rte", private=True)
        hub.api.upload_folder(repo_id="org/lora-rte", folder_path=adapters["rte"], ignore_patterns="README.md")
        with hub.logged_in_as(None):
            assert share("add", "sub", "rte=org/lora-rte")[0] == 1
            assert share("add", "sub", "rte=org/lora-rte", "--token", "hf_alice")[0] == 0
        assert SharedSubspace.from_pretrained("sub").tasks[-1] == "rte"

    def test_a_push_of_no_folder_is_an_error(self, share: Callable[..., Output], here: Path) -> None:
        code, _, err = share("push", "sbu", REPO)
        assert (code, err) == (1, "error: sbu: no such folder\n")


class TestArguments:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_the_example_of_a_help_text_is_a_command(self, command: str) -> None:
        _, parsers = build_parser()
        lines = parsers[command].format_help().partition("example:\n")[2].splitlines()
        assert lines
        for line in lines:
            program, *argv = shlex.split(line)
            assert program == "share-hf"
            assert parse(argv).command == command

    def test_every_command_is_there(self) -> None:
        assert tuple(build_parser()[1]) == COMMANDS

    @pytest.mark.parametrize(
        ("argv", "advice"),
        [
            (["ifno"], "did you mean info?"),
            (["info", "sub", "--jsn"], "did you mean --json?"),
            (["init", "sub", "mrpc", "--basis", "joined"], "did you mean joint?"),
            (["init", "sub", "mrpc", "--num-components", "many"], "invalid int value"),
            (["init", "sub"], "ADAPTER"),
            (["push", "sub", REPO, "--private", "--public"], "not allowed with"),
        ],
    )
    def test_wrong_arguments_exit_with_2(self, share: Callable[..., Output], argv: list[str], advice: str) -> None:
        code, out, err = share(*argv)
        assert (code, out) == (2, "")
        assert advice in err

    def test_options_may_stand_anywhere(self) -> None:
        args = parse(["init", "--basis", "factor", "sub", "a", "--json", "b"])
        assert (args.basis, args.json, [name for name, _ in args.adapters]) == ("factor", True, ["a", "b"])
        args = parse(["export", "sub", "--json", "mrpc", "--quiet", "out"])
        assert (args.place, args.task, args.out) == ("sub", "mrpc", Path("out"))

    @pytest.mark.parametrize(("flags", "private"), [([], None), (["--private"], True), (["--public"], False)])
    def test_a_repository_is_private_if_asked_for(self, flags: list[str], private: bool | None) -> None:
        assert parse(["push", "sub", REPO, *flags]).private is private

    def test_without_arguments_it_shows_its_help(self, share: Callable[..., Output]) -> None:
        code, out, _ = share()
        assert code == 0
        assert all(re.search(rf"^    {command} ", out, re.MULTILINE) for command in COMMANDS)


class TestFailures:
    def test_with_json_it_is_on_stdout_too(self, share: Callable[..., Output], here: Path) -> None:
        code, out, err = share("export", "sub", "mprc", "out", "--json")
        assert code == 1
        assert err == f"error: {json.loads(out)['error']}\n"

    def test_a_traceback_is_shown_if_asked_for(
        self, share: Callable[..., Output], here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert "Traceback" not in share("info", "./missing")[2]
        assert "Traceback" in share("info", "./missing", "--debug")[2]
        monkeypatch.setenv("SHARE_HF_DEBUG", "1")
        assert "Traceback" in share("info", "./missing")[2]

    def test_ctrl_c_is_130(
        self, share: Callable[..., Output], here: Path, monkeypatch: pytest.MonkeyPatch, adapters: dict[str, str]
    ) -> None:
        def interrupted(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        before = files_of(here)
        monkeypatch.setattr(SharedSubspace, "add_adapters", interrupted)
        code, out, err = share("add", "sub", adapters["rte"])
        assert (code, out, err) == (130, "", "error: interrupted; run the command again\n")
        assert files_of(here) == before

    def test_an_error_of_ours_has_its_type(
        self, share: Callable[..., Output], here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(SharedSubspace, "report", lambda self: {}["gone"])
        assert share("info", "sub")[2] == "error: KeyError('gone')\n"

    def test_what_a_library_prints_is_not_on_stdout(
        self, share: Callable[..., Output], here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(commands._COMMANDS, "info", lambda args: (print("chatter"), commands.Outcome("", {}))[1])
        code, out, err = share("info", "sub", "--json")
        assert (code, json.loads(out), err) == (0, {}, "chatter\n")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1536, "1.54 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (2.5e9, "2.5 GB"),
    ],
)
def test_bytes_are_shown_to_three_digits(count: float, text: str) -> None:
    assert size(count) == text


class TestInstalled:
    """The program that pip installed for this Python."""

    PROGRAM = Path(sys.executable).with_name("share-hf")

    def test_help_does_not_wait_for_torch(self) -> None:
        seconds = []
        for argv in (["--help"], ["push", "--help"], ["--version"]):
            start = time.perf_counter()
            done = subprocess.run([self.PROGRAM, *argv], capture_output=True, text=True, check=True)
            seconds.append(time.perf_counter() - start)
            assert done.stdout.startswith(("usage: share-hf", "share-hf "))
        assert min(seconds) < 1
        code = "import share_hf_cli, sys; share_hf_cli.build_parser(); assert not {'torch', 'peft'} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_runs_and_bears_a_closed_pipe(self, here: Path) -> None:
        command = f"{shlex.quote(str(self.PROGRAM))} info sub | true; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=here)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
