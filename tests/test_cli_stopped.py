# ruff: noqa: F401, F811 -- fixtures of other modules
"""Builds that are interrupted, and the same command again."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

from share_hf.cli import main
from tests.collections_on_disk import scale, write_collection
from tests.continual.test_full_disk import Disk, disk
from tests.test_cli import SMALL, Output, as_before, share
from tests.trees import files_of


MODULES, STOPPED_AT = 6, 3
UNFINISHED = ".sub.share_hf.unfinished"


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return write_collection(Path("loras"), 4, MODULES)


def stopped(argv: list[str], at: int = STOPPED_AT) -> None:
    """Run a command that Ctrl-C stops when this number of modules is finished."""
    kept = 0

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal kept
        of_build = frame.f_code.co_name == "write" and frame.f_code.co_filename.endswith("unfinished.py")
        kept += event == "return" and of_build
        if kept == at:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(count)
    try:
        assert main(argv) == 130
    finally:
        sys.setprofile(None)


def whole(argv: list[str]) -> dict[str, bytes]:
    """Return the files of a command that nothing interrupted."""
    assert main(argv) == 0
    return files_of(Path(argv[1]))


def test_a_stopped_command_continues_at_the_module_that_it_reached(
    share: Callable[..., Output], places: list[str]
) -> None:
    # Commands, and the same ones in a folder beside it.
    steps = [
        (["init", "sub", *places[:2], *SMALL, "--keep-originals"], ["init", "other", *places[:2], *SMALL]),
        (["add", "sub", *places[2:]], ["add", "other", *places[2:], "--keep-originals"]),
        (["refit", "sub"], ["refit", "other", *(f"task{i}={place}" for i, place in enumerate(places))]),
    ]
    for argv, beside in steps:
        expected, before = whole(beside), files_of(Path("sub")) if Path("sub").exists() else {}
        stopped(argv)
        assert (files_of(Path("sub")) if Path("sub").exists() else {}) == before
        assert len([*Path(UNFINISHED).glob("*.safetensors")]) == STOPPED_AT
        code, out, err = share(*argv)
        assert (code, err) == (0, f"sub: continuing, {STOPPED_AT} of {MODULES} modules are finished\n")
        assert out.startswith("sub: ")
        assert files_of(Path("sub")) == expected
        assert not Path(UNFINISHED).exists()


def test_a_build_of_changed_adapters_or_settings_starts_over(share: Callable[..., Output], places: list[str]) -> None:
    argv = ["init", "sub", *places, *SMALL]
    others = ([*places], SMALL), (places, [*SMALL, "--tolerance", "0.5"]), (places[:-1], SMALL), (places[::-1], SMALL)
    for number, (given, settings) in enumerate(others):
        stopped(argv)
        if number == 0:
            scale(places[1], 5, 2.0)
        code, _, err = share("init", "sub", *given, *settings)
        assert code == 0
        assert (
            err
            == "sub: starting over, because the adapters or the settings differ from those of the interrupted run\n"
        )
        assert files_of(Path("sub")) == whole(["init", "other", *given, *settings])
        assert not Path(UNFINISHED).exists()
        for name in ("sub", "other"):
            shutil.rmtree(name)


def test_a_damaged_module_is_made_again(share: Callable[..., Output], places: list[str]) -> None:
    argv = ["init", "sub", *places, *SMALL]
    stopped(argv)
    first = min(Path(UNFINISHED).glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-8])
    assert share(*argv)[0] == 0
    assert files_of(Path("sub")) == whole(["init", "other", *argv[2:]])


def test_a_refused_build_keeps_nothing(share: Callable[..., Output], places: list[str]) -> None:
    scale(places[1], MODULES - 1, 1e25)
    code, out, err = share("init", "sub", *places, *SMALL)
    assert (code, out) == (1, "")
    assert "task1" in err
    assert sorted(path.name for path in Path().iterdir()) == ["loras"]


def test_what_is_kept_takes_no_room_from_the_tree(disk: Disk, share: Callable[..., Output], places: list[str]) -> None:
    argv = [*places, *SMALL]
    sizes = [len(content) + -len(content) % 4096 for content in whole(["init", "other", *argv]).values()]
    disk.fill(sizes, 1.15)
    tree = disk.folder / "sub"
    code, _, err = share("init", str(tree), *argv)
    assert (code, err) == (0, "")
    assert files_of(tree) == files_of(Path("other"))
    assert {path.name for path in disk.folder.iterdir()} <= {"ballast", "sub"}
