# ruff: noqa: F401, F811 -- fixtures of other modules
"""What a person reads from a command: help, one line per fault, nothing twice, and what a mistake was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from share_hf import SharedSubspace
from share_hf.cli import build_parser
from share_hf.subspace.collection import SAMPLE_MODULES_FROM
from tests.collections_on_disk import write_collection
from tests.facade.test_bad_adapters import truncate
from tests.format.test_pipelines import UNET, factors_of, in_style_of_kohya, write
from tests.test_cli import SMALL, Output, as_before, share
from tests.test_cli_adapters import folders
from tests.trees import files_of


Share = Callable[..., Output]


@pytest.fixture
def made(share: Share, folders: dict[str, Path]) -> str:
    """A subspace of a and b."""
    assert share("init", "sub", "loras/a", "loras/b", *SMALL, "--history", "5")[0] == 0
    return "sub"


def test_every_help_text_begins_with_what_the_option_is() -> None:
    for name, command in build_parser()[1].items():
        for action in command._actions:
            first = (action.help or "").split()[0]
            assert first[0].isupper() or action.dest == "help", f"{name} {action.dest}: {action.help}"
            assert first not in {"Of", "By", "For", "While", "Whose"}, f"{name} {action.dest}: {action.help}"


# ---- Faults ---------------------------------------------------------------------------------------------------------


def test_each_bad_adapter_has_its_line(share: Share, folders: dict[str, Path]) -> None:
    truncate(folders["b"])
    (folders["d"] / "adapter_config.json").unlink()
    code, _, err = share("init", "sub", *map(str, folders.values()), *SMALL)
    lines = err.splitlines()
    assert (code, len(lines)) == (1, 3)
    assert lines[0].endswith("leaves them out:")
    assert [line.split(":")[0] for line in lines[1:]] == ["  b", "  d"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["init", "new", "--from-file", "nowhere.txt"], "error: nowhere.txt: No such file or directory"),
        (["init", "new", "--from-file", "loras"], "error: loras: Is a directory"),
        (["init", "new", "loras/*.safetensors"], "error: loras/*.safetensors: no such folder or file"),
        (["init", "new", "x="], "error: adapter 'x' has no place, expected name=place or a place"),
        (["info", "loras/a"], "expected the folder of a shared subspace; loras/a holds an adapter"),
        (["add", "loras", "loras/a"], "expected the folder of a shared subspace; loras holds no subspace"),
        (["export", "sub", "aa", "out"], "no task 'aa' in the subspace, it has ['a', 'b'], did you mean 'a'?"),
        (
            ["export", "sub", "a", "out", "--merge-into", "nowhere"],
            "nowhere: no base model that transformers can load",
        ),
        (["export", "sub", "a", "out", "--style", "diffusers"], "(share-hf: --component)"),
    ],
)
def test_a_mistake_is_named(argv: list[str], message: str, share: Share, made: str) -> None:
    before = files_of(Path())
    code, out, err = share(*argv)
    assert (code, out) == (1, "")
    assert message in err
    assert "Errno" not in err
    assert files_of(Path()) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["audit", "sub", "--num-components", "8"], "--num-components is for LoRAs"),
        (["audit", "sub", "--skip-bad"], "--skip-bad is for LoRAs"),
        (["audit", "a", "b", "--target-error", "3"], "'3' is not a relative error"),
        (["audit", "a", "b", "--target-error", "much"], "'much' is not a relative error"),
        (["export", "sub", "a", "out", "--component", "unet"], "--component is for --style diffusers"),
    ],
)
def test_options_that_would_be_ignored_are_refused(argv: list[str], message: str, share: Share) -> None:
    code, _, err = share(*argv)
    assert code == 2
    assert message in err


@pytest.mark.parametrize(
    ("figure", "message"),
    [
        ("nowhere/x.png", "no such folder, expected the name of a file to write"),
        ("loras.png", "is a folder, expected the name of a file to write"),
        ("x.xyz", "expected a file name that ends in one of"),
        ("x", "expected a file name that ends in one of"),
    ],
)
def test_a_place_for_no_figure_is_refused_before_the_audit(
    figure: str, message: str, share: Share, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Path.cwd()
    monkeypatch.undo()  # so that matplotlib seems to be installed
    monkeypatch.chdir(here)
    Path("loras.png").mkdir()
    code, out, err = share("audit", "nowhere/a", "nowhere/b", "--figure", figure)  # the audit would fail on these
    assert (code, out) == (1, "")
    assert f"error: {figure}: " in err
    assert message in err


# ---- What was done --------------------------------------------------------------------------------------------------


def test_what_a_command_prints_is_not_warned_of_too(
    share: Share, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree("loras/a", "loras/v1.0")
    truncate(folders["b"])
    places = ["loras/a", "loras/b", "loras/c", "loras/v1.0"]
    auto = ["--num-components", "auto", "--pseudo-rank", "auto", "--target-error", "0.3", "--skip-bad"]
    code, out, _ = share("init", "sub", *places, *auto)
    assert code == 0
    assert [out.count(text) for text in ("chose num_", "is called v1-0", "the same adapter", "1 adapter was")] == [
        1
    ] * 4
    code, out, _ = share("init", "wide", "loras/a", "--num-components", "20", "--pseudo-rank", "2")
    assert out.count("1 of 1 layers have fewer outputs or inputs than num_components = 20") == 1
    assert caplog.records == []
    # The library on its own still warns.
    SharedSubspace.from_adapters(["loras/a", "loras/v1.0"], num_components=4, pseudo_rank=2, progress=False)
    assert any("are the same adapter" in record.message for record in caplog.records)


def test_the_ending_of_a_file_is_not_part_of_a_name_that_had_to_be_mended(
    share: Share, folders: dict[str, Path]
) -> None:
    for name in ("water", "v1.0"):
        write(Path(f"{name}.safetensors"), in_style_of_kohya(factors_of(UNET), "unet."))
    code, out, _ = share("init", "sub", "water.safetensors", "v1.0.safetensors", *SMALL)
    assert code == 0
    assert [line for line in out.splitlines() if "is called" in line] == ["'v1.0' is called v1-0"]
    code, out, _ = share("init", "other", "loras/a/adapter_model.safetensors", *SMALL)
    assert out.startswith("other: 1 task of org/base\n1 module, ")


def test_an_audit_of_many_lists_a_few(share: Share, folders: dict[str, Path]) -> None:
    places = [f"t{i}={folders['abcd'[i % 4]]}" for i in range(50)]
    code, out, _ = share("audit", *places, "--num-components", "4")
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("Tasks by the random A"))
    assert " more" in line
    assert len(line) < 500


def test_an_audit_of_some_adapters_takes_a_sample_of_modules_and_says_so(share: Share, tmp_path: Path) -> None:
    places = write_collection(tmp_path / "loras", SAMPLE_MODULES_FROM, modules=20, features=16)
    code, out, _ = share("audit", *places, "--num-components", "4", "--json")
    facts = json.loads(out)
    assert code == 0
    rows, modules = ([row["module"] for row in facts["rows"]], facts["collection"]["curve_modules"])
    assert rows == modules and len(modules) == 12
    assert {row["tasks"] for row in facts["rows"]} == {SAMPLE_MODULES_FROM}
    assert any("all 16 adapters in 12 of 20 modules" in sentence for sentence in facts["collection"]["sentences"])


def test_an_undone_step_is_described_in_words(share: Share, made: str) -> None:
    assert share("rename", "sub", "b", "second")[0] == 0
    assert share("undo", "sub")[1] == "sub: undid the renaming of b to second; it now has 2 tasks\n"
    assert share("remove", "sub", "b", "b")[1] == "sub: removed b; 1 task is left\n"
    assert share("undo", "sub")[1] == "sub: undid the removal of b; it now has 2 tasks\n"
    assert share("add", "sub", "loras/c", "loras/d")[0] == 0
    assert share("undo", "sub")[1] == "sub: undid the merge of c, d; it now has 2 tasks\n"


def test_a_subspace_without_tasks_exports_nothing(share: Share, made: str) -> None:
    assert share("remove", "sub", "a", "b")[1] == "sub: removed a, b; 0 tasks are left\n"
    code, out, err = share("export", "sub", "out", "--all")
    assert (code, out, err) == (1, "", "error: sub: has no tasks, expected at least one to export\n")
