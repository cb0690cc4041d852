# ruff: noqa: F401, F811 -- fixtures of other modules
"""The adapters that a command is given: lists, components, broken ones, and interruptions."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from share_hf import SharedSubspace
from share_hf.cli import main
from share_hf.subspace import merge_into_layer
from tests.continual.test_full_disk import Disk, disk
from tests.facade.test_bad_adapters import rewrite_in_place, truncate, write_adapter
from tests.format.test_pipelines import TEXT, UNET, factors_of, in_style_of_kohya, write
from tests.test_cli import SMALL, Output, as_before, column, share, share_json
from tests.trees import edit_json, files_of


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Small adapters by name, in the folder `loras` of the current one."""
    monkeypatch.chdir(tmp_path)
    return {name: write_adapter(Path("loras") / name, seed) for seed, name in enumerate(("a", "b", "c", "d"))}


# ---- Lists ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def listed(folders: dict[str, Path]) -> Path:
    """A list with everything that a list can contain."""
    text = "# The first ones.\n\nloras/a\n  second=loras/b  \n\t\nloras/c # the best\n# loras/d\n"
    Path("list.txt").write_text(text)
    return Path("list.txt")


def test_a_list_has_places_names_comments_and_blank_lines(
    share: Callable[..., Output], share_json: Callable[..., Any], listed: Path
) -> None:
    code, out, err = share("init", "sub", "--from-file", str(listed), *SMALL)
    assert (code, err) == (0, "")
    assert column(out, "task") == ["a", "second", "c"]
    listed.write_text("loras/d\n")
    assert share_json("add", "sub", "again=loras/a", "--from-file", str(listed))["new_tasks"] == ["again", "d"]
    assert SharedSubspace.from_pretrained("sub").tasks == ("a", "second", "c", "again", "d")


def test_an_audit_takes_a_list(share_json: Callable[..., Any], listed: Path) -> None:
    facts = share_json("audit", "--from-file", str(listed))
    assert sorted(name for group in facts["groups"] for name in group) == ["a", "c", "second"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"loras/a\nloras/a.b\nloras/a b\n", "loras/a.b and loras/a b are both called 'a-b'"),
        (b"# nothing\n\n", "list.txt: lists no adapters, expected one per line"),
        (b"\xff\xfe\x00", "list.txt: expected a list of adapters, one per line, as text"),
        (b"x=loras/a\nx=loras/b\n", "loras/a and loras/b are both called 'x'"),
        (b"loras/a\nloras/nowhere/at-all\n", "loras/nowhere/at-all: no such folder or file"),
        (b"\xe6\x97\xa5\n", "no task can be called"),
    ],
)
def test_a_list_that_is_none_is_refused(
    content: bytes, message: str, share: Callable[..., Output], folders: dict[str, Path]
) -> None:
    Path("list.txt").write_bytes(content)
    before = files_of(Path())
    for argv in (["init", "sub"], ["audit"]):
        code, out, err = share(*argv, "--from-file", "list.txt")
        assert (code, out) == (1, "")
        assert message in err
    assert files_of(Path()) == before


def test_a_list_that_is_not_there_is_named(share: Callable[..., Output], folders: dict[str, Path]) -> None:
    code, _, err = share("init", "sub", "--from-file", "nowhere.txt")
    assert code == 1
    assert "nowhere.txt" in err
    assert not Path("sub").exists()


def test_a_subspace_is_audited_whatever_its_folder_is_called(
    share_json: Callable[..., Any], folders: dict[str, Path]
) -> None:
    share_json("init", "日本", str(folders["a"]), str(folders["b"]), *SMALL)
    assert len(share_json("audit", "日本")["rows"]) == 1


@pytest.mark.parametrize("argv", [["init", "sub"], ["add", "sub"], ["audit"]])
def test_a_command_needs_an_adapter_or_a_list(argv: list[str], share: Callable[..., Output]) -> None:
    code, _, err = share(*argv)
    assert code == 2
    assert "expected an ADAPTER, or --from-file" in err


# ---- What came of reading -------------------------------------------------------------------------------------------


def test_mended_names_and_adapters_that_are_the_same_are_shown(
    share: Callable[..., Output], share_json: Callable[..., Any], folders: dict[str, Path]
) -> None:
    shutil.copytree("loras/a", "loras/v1.0")
    code, out, err = share("init", "sub", "loras/a", "loras/v1.0", *SMALL)
    assert (code, err) == (0, "")
    assert out.startswith("'v1.0' is called v1-0\na, v1-0 are the same adapter\n\nsub: 2 tasks")
    assert column(out, "task") == ["a", "v1-0"]
    facts = share_json("init", "other", "loras/a", "loras/v1.0", *SMALL)
    assert (facts["mended"], facts["duplicates"]) == ({"v1-0": "v1.0"}, [["a", "v1-0"]])


def test_an_adapter_that_is_there_already_is_shown(
    share: Callable[..., Output], share_json: Callable[..., Any], folders: dict[str, Path]
) -> None:
    assert share("init", "sub", "loras/a", "loras/b", *SMALL)[0] == 0
    code, out, err = share("add", "sub", "again=loras/b", "loras/c")
    assert (code, err) == (0, "")
    assert out.startswith("again is the same adapter as b, which is already in the subspace\n\nsub: added again, c")
    assert share_json("replace", "sub", "c=loras/a")["known"] == {"c": "a"}


def test_bad_adapters_are_left_out_when_asked_for_and_all_named_when_not(
    share: Callable[..., Output], share_json: Callable[..., Any], folders: dict[str, Path]
) -> None:
    truncate(folders["b"])
    (folders["d"] / "adapter_config.json").unlink()
    places = [str(folder) for folder in folders.values()]
    for argv in (["init", "sub"], ["audit"]):
        code, out, err = share(*argv, *places)
        assert (code, out) == (1, "")
        assert "2 of 4 adapters cannot be used" in err
        assert "share-hf: --skip-bad" in err
        assert "b: loras/b/adapter_model.safetensors: not a readable" in err
        assert "d: loras/d: no adapter_config.json in it" in err
        assert not Path("sub").exists()
    code, out, _ = share("init", "sub", *places, "--skip-bad", *SMALL)
    assert code == 0
    assert out.startswith("2 adapters were left out:\n  b: loras/b/adapter_model.safetensors: not a readable")
    assert column(out, "task") == ["a", "c"]
    facts = share_json("audit", *places, "--skip-bad")
    assert facts["skipped"].keys() == {"b", "d"}
    again = {f"{name}2={place}" for name, place in folders.items()}
    facts = share_json("add", "sub", *sorted(again), "--skip-bad")
    assert (facts["new_tasks"], list(facts["skipped"])) == (["a2", "c2"], ["b2", "d2"])


def test_adapters_that_only_a_merge_refuses_are_left_out_when_asked_for(
    share: Callable[..., Output], share_json: Callable[..., Any], folders: dict[str, Path]
) -> None:
    places = [str(folder) for folder in folders.values()]
    edit_json(folders["b"] / "adapter_config.json", lambda config: config.update(lora_alpha=1e60))
    edit_json(folders["d"] / "adapter_config.json", lambda config: config.update(lora_alpha=1e308))
    for argv in (["init", "sub", *SMALL], ["audit"]):
        code, out, _ = share(*argv, *places)
        assert (code, out) == (1, "")
        code, out, _ = share(*argv, *places, "--skip-bad")
        assert code == 0
        assert out.startswith(
            "2 adapters were left out:\n  b: 'model.layers.0.self_attn.q_proj': task 'b': its update"
        )
    assert SharedSubspace.from_pretrained("sub").tasks == ("a", "c")
    before = files_of(Path("sub"))
    code, out, err = share("add", "sub", places[1], places[3], "--skip-bad")
    assert (code, out) == (1, "")
    assert "2 of 2 adapters cannot be used" in err
    assert files_of(Path("sub")) == before
    assert sorted(path.name for path in Path().iterdir()) == ["loras", "sub"]


def test_a_component_of_a_pipeline_is_named(
    share: Callable[..., Output], share_json: Callable[..., Any], folders: dict[str, Path]
) -> None:
    for seed in range(2):
        tensors = in_style_of_kohya(factors_of(UNET, seed), "unet.")
        tensors |= in_style_of_kohya(factors_of(TEXT, seed), "text_encoder.")
        write(Path(f"style{seed}.safetensors"), tensors)
    places = ["style0.safetensors", "style1.safetensors"]
    code, _, err = share("init", "sub", *places)
    assert code == 1
    assert "text_encoder (6 tensors), unet (6 tensors)" in err
    assert "--component" in err
    assert len(share_json("audit", *places, "--component", "text_encoder")["rows"]) == len(TEXT)
    assert share_json("init", "sub", places[0], "--component", "unet", *SMALL)["modules"] == len(UNET)
    assert share_json("add", "sub", places[1], "--component", "unet")["new_tasks"] == ["style1"]
    before = files_of(Path("sub"))
    code, _, err = share("add", "sub", "x=style1.safetensors", "--component", "text_encoder")
    assert code == 1
    assert "is of component 'text_encoder', the others are of 'unet'" in err
    assert files_of(Path("sub")) == before


# ---- What interrupts ------------------------------------------------------------------------------------------------


def run_until(calls: float, argv: list[str]) -> tuple[int, int]:
    """Run a command that Ctrl-C interrupts at this call of a function; return its exit code and number of calls."""
    made = 0

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal made
        made += event == "call"
        if made >= calls:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(count)
    try:
        return main(argv), made
    except KeyboardInterrupt:  # before the command began
        return 130, made
    finally:
        sys.setprofile(None)


def test_an_interruption_leaves_the_old_tree_or_a_whole_new_one(
    share: Callable[..., Output], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    adapters = [str(write_adapter(Path("loras") / str(seed), seed)) for seed in range(20)]
    assert share("init", "old", adapters[0], *SMALL)[0] == 0
    before = files_of(Path("old"))
    for argv in (["init", "new", *SMALL], ["add", "old"]):
        command = [*argv, *(f"t{i}={place}" for i, place in enumerate(adapters)), "--quiet"]
        code, total = run_until(math.inf, command)
        assert code == 0
        interrupted = 0
        for i in range(8):
            shutil.rmtree("new", ignore_errors=True)
            shutil.rmtree("old")
            for name, content in before.items():
                Path("old", name).parent.mkdir(parents=True, exist_ok=True)
                Path("old", name).write_bytes(content)
            code, _ = run_until(total * (i + 0.5) / 8, command)
            interrupted += code == 130
            unchanged = files_of(Path("old")) == before and not Path("new").exists()
            # The last calls are those that print what was done.
            assert unchanged or len(SharedSubspace.from_pretrained(argv[1]).tasks) >= len(adapters)
        assert interrupted >= 6


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_an_adapter_that_changes_during_the_merge_leaves_the_old_tree_or_none(
    keep: float, share: Callable[..., Output], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert share("init", "old", "loras/a", *SMALL)[0] == 0
    before = files_of(Path("old"))

    def merged_while_it_changes(*arguments: Any, **options: Any) -> Any:
        merged = merge_into_layer(*arguments, **options)
        rewrite_in_place(folders["c"], keep=keep)
        return merged

    monkeypatch.setattr("share_hf.subspace.model.merge_into_layer", merged_while_it_changes)
    for argv in (["init", "new", *SMALL], ["add", "old"]):
        shutil.rmtree(folders["c"])
        write_adapter(folders["c"], 2)
        code, out, err = share(*argv, "loras/b", "loras/c", "loras/d")
        assert (code, out) == (1, "")
        assert "loras/c/adapter_model.safetensors: changed while it was read" in err
        assert "wait until it is written, and try again" in err
    assert files_of(Path("old")) == before
    assert sorted(path.name for path in Path().iterdir()) == ["loras", "old"]


def test_a_folder_that_holds_no_adapter_leaves_the_old_tree_or_none(
    share: Callable[..., Output], folders: dict[str, Path]
) -> None:
    assert share("init", "old", "loras/a", *SMALL)[0] == 0
    before = files_of(Path("old"))
    Path("loras/empty").mkdir()
    advice = {"loras/empty": "expected the folder of a PEFT adapter", "loras": "name the adapters in it instead: a, b"}
    for place, told in advice.items():
        for argv in (["init", "new", *SMALL], ["add", "old"], ["audit", "loras/b"]):
            code, out, err = share(*argv, place)
            assert (code, out) == (1, "")
            assert f"{place}: no adapter_config.json in it" in err
            assert told in err
    assert files_of(Path("old")) == before
    assert sorted(path.name for path in Path().iterdir()) == ["loras", "old"]


def test_a_full_disk_leaves_the_old_tree_or_none(disk: Disk, share: Callable[..., Output], tmp_path: Path) -> None:
    adapters = [str(write_adapter(tmp_path / f"lora{seed}", seed)) for seed in range(3)]
    tree, other = disk.folder / "sub", disk.folder / "other"
    assert share("init", str(tree), adapters[0], *SMALL)[0] == 0
    before = files_of(tree)
    disk.fill([len(content) for content in before.values()], 0.3)
    for argv in (["add", str(tree)], ["init", str(other), *SMALL]):
        code, out, err = share(*argv, *adapters[1:])
        assert (code, out) == (1, "")
        assert str(disk.folder) in err
        assert "free some space there and run the command again" in err
        assert files_of(tree) == before
        assert not other.exists()
    disk.make_space()
    assert share("add", str(tree), *adapters[1:])[0] == 0
    assert json.loads((tree / "share_config.json").read_text())["tasks"] == ["lora0", "lora1", "lora2"]
