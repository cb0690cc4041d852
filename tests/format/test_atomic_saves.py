"""A save that is interrupted leaves the old tree or the new one, and everything else in its folder."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import share_hf.card.tree as card_tree
import share_hf.format.files as files
import share_hf.format.replacing as replacing
from share_hf import SharedSubspace
from share_hf.card import write_tree
from share_hf.format.files import FolderWriter
from tests.trees import assert_same_state, files_of


needs_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="kills forked copies of this process"
)


class Interruption(Exception):
    """Raised in the middle of a save."""


@pytest.fixture
def newer(subspace: SharedSubspace, loras: dict[str, Path]) -> SharedSubspace:
    """The subspace of the tree with one more task."""
    extended = SharedSubspace(subspace.state)
    extended.add_adapters({"rte": loras["rte"]}, progress=False)
    return extended


@pytest.fixture
def notes(tree: Path) -> Path:
    """A file of the owner in the folder of the tree."""
    (tree / "notes.txt").write_text("mine")
    return tree / "notes.txt"


def siblings(tree: Path) -> list[str]:
    return sorted(path.name for path in tree.parent.iterdir() if path.name != "adapters")


def interrupting(original: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """Make a function that does its work a number of times and then raises."""
    remaining = [calls]

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not remaining[0]:
            raise Interruption
        remaining[0] -= 1
        return original(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("puts", range(10), ids=lambda puts: f"after-{puts}-files")
def test_an_error_in_any_write_leaves_the_old_tree(
    puts: int,
    subspace: SharedSubspace,
    newer: SharedSubspace,
    tree: Path,
    notes: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FolderWriter, "put", interrupting(FolderWriter.put, puts))
    assert_cut_off(subspace, newer, tree)


@pytest.mark.parametrize("writer", ["write_figures", "write_card"])
def test_an_error_in_what_a_person_reads_leaves_the_old_tree(
    writer: str,
    subspace: SharedSubspace,
    newer: SharedSubspace,
    tree: Path,
    notes: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(card_tree, writer, interrupting(getattr(card_tree, writer), 0))
    assert_cut_off(subspace, newer, tree)


def assert_cut_off(subspace: SharedSubspace, newer: SharedSubspace, tree: Path) -> None:
    """Assert that a save of the newer subspace over the tree fails and leaves nothing behind."""
    before = files_of(tree)
    with pytest.raises(Interruption):
        newer.save_pretrained(tree)
    assert files_of(tree) == before
    assert siblings(tree) == ["tree"]
    assert_same_state(SharedSubspace.from_pretrained(tree).state, subspace.state)


def test_an_error_in_a_first_save_leaves_nothing(
    subspace: SharedSubspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card_tree, "write_card", interrupting(card_tree.write_card, 0))
    with pytest.raises(Interruption):
        subspace.save_pretrained(tmp_path / "tree")
    assert siblings(tmp_path / "tree") == []


def test_an_error_in_an_export_leaves_the_old_one(
    subspace: SharedSubspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subspace.export_lora("mrpc", tmp_path / "exported")
    before = files_of(tmp_path / "exported")
    monkeypatch.setattr(FolderWriter, "put", interrupting(FolderWriter.put, 1))
    with pytest.raises(Interruption):
        subspace.export_lora("sst2", tmp_path / "exported")
    assert files_of(tmp_path / "exported") == before
    assert siblings(tmp_path / "exported") == ["exported"]


# ---- Files that are there already -----------------------------------------------------------------------------------


def test_files_that_are_known_to_be_there_are_linked(newer: SharedSubspace, tree: Path) -> None:
    known = write_tree(newer.state, tree)
    inodes = {name: (tree / name).stat().st_ino for name in known}
    scored = replace(newer.state.tasks["rte"], scores={"accuracy": 0.5})
    state = replace(newer.state, tasks={**newer.state.tasks, "rte": scored})
    write_tree(state, tree, known=known)
    moved = {name for name in known if (tree / name).stat().st_ino != inodes[name]}
    assert moved == {"tasks/rte/metrics.json", "share_config.json"}
    assert_same_state(SharedSubspace.from_pretrained(tree).state, state)


def test_a_save_after_a_task_was_added_inside_the_basis_writes_what_is_new(
    newer: SharedSubspace, tmp_path: Path
) -> None:
    tree, inside = tmp_path / "tree", tmp_path / "inside"
    newer.save_pretrained(tree)
    before = {path: path.stat().st_ino for path in tree.rglob("*") if path.is_file()}
    newer.export_lora(newer.tasks[0], inside)
    newer.add_adapters([inside], progress=False)
    newer.save_pretrained(tree)
    written = {
        path.relative_to(tree).as_posix()
        for path in tree.rglob("*")
        if path.is_file() and before.get(path) != path.stat().st_ino
    }
    new = {f"tasks/inside/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", "metrics.json")}
    assert new <= written
    assert {name for name in written - new if "/" in name and not name.startswith("figures/")} == set()
    assert "subspace.safetensors" not in written
    assert_same_state(SharedSubspace.from_pretrained(tree).state, newer.state)


@pytest.mark.parametrize("kind", ["link", "other content of its size", "folder"])
def test_what_is_not_a_file_of_the_same_content_is_not_linked(kind: str, tmp_path: Path) -> None:
    folder, scratch = tmp_path / "folder", tmp_path / "scratch"
    folder.mkdir()
    if kind == "link":
        (tmp_path / "elsewhere").write_bytes(b"content")
        (folder / "file").symlink_to(tmp_path / "elsewhere")
    elif kind == "folder":
        (folder / "file").mkdir()
    else:
        (folder / "file").write_bytes(b"CONTENT")
    FolderWriter(scratch, folder).put("file", b"content")
    assert (scratch / "file").read_bytes() == b"content"
    assert (scratch / "file").lstat().st_nlink == 1
    assert not (scratch / "file").is_symlink()


def test_a_file_that_is_not_known_is_written_again(newer: SharedSubspace, tree: Path) -> None:
    newer.save_pretrained(tree)
    (tree / "subspace.safetensors").write_bytes(b"damaged")
    newer.save_pretrained(tree)
    assert_same_state(SharedSubspace.from_pretrained(tree).state, newer.state)


def test_a_tree_is_written_where_the_file_system_has_no_links(
    newer: SharedSubspace, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = write_tree(newer.state, tree)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EPERM, "links are not supported")

    monkeypatch.setattr(files.os, "link", refuse)
    write_tree(newer.state, tree, known=known)
    assert_same_state(SharedSubspace.from_pretrained(tree).state, newer.state)


def test_a_file_of_the_old_tree_is_never_written_through_a_link(tmp_path: Path) -> None:
    folder, scratch = tmp_path / "folder", tmp_path / "scratch"
    folder.mkdir()
    known = FolderWriter(folder)
    known.put("file", b"old")
    writer = FolderWriter(scratch, folder, known.sha256)
    writer.put("file", b"old")
    assert (scratch / "file").samefile(folder / "file")
    writer.put("file", b"new")
    assert (folder / "file").read_bytes() == b"old"
    assert writer.sha256["file"] != known.sha256["file"]


# ---- Renames --------------------------------------------------------------------------------------------------------


@contextmanager
def cut_off(rename: int) -> Iterator[None]:
    """Stop the process in the block, as if killed, before this one of the renames. Nothing is tidied up afterwards."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interruption):
        patch.setattr(Path, "rename", interrupting(Path.rename, rename))
        patch.setattr(replacing.shutil, "rmtree", lambda *args, **kwargs: None)
        yield


@pytest.mark.parametrize(("number", "survivor"), [(0, "old"), (1, "old"), (2, "new")])
@pytest.mark.parametrize("then", ["load", "save"])
def test_whatever_rename_a_save_is_cut_off_at_one_whole_tree_is_there(
    number: int,
    survivor: str,
    then: str,
    subspace: SharedSubspace,
    newer: SharedSubspace,
    tree: Path,
    notes: Path,
) -> None:
    with cut_off(number):
        newer.save_pretrained(tree)
    assert tree.exists() == (number != 1)
    if then == "load":
        found = SharedSubspace.from_pretrained(tree)
        assert_same_state(found.state, (subspace if survivor == "old" else newer).state)
    else:
        newer.save_pretrained(tree)
        assert_same_state(SharedSubspace.from_pretrained(tree).state, newer.state)
        assert notes.read_text() == "mine"


def test_what_a_cut_off_save_left_is_tidied_up_by_the_next(newer: SharedSubspace, tree: Path, notes: Path) -> None:
    (tree / "mine").mkdir()
    (tree / "mine" / "data.bin").write_bytes(b"data")
    with cut_off(2):
        newer.save_pretrained(tree)
    assert not notes.exists()
    assert siblings(tree) == [".tree.share_hf", "tree"]
    newer.save_pretrained(tree)
    assert notes.read_text() == "mine"
    assert (tree / "mine" / "data.bin").read_bytes() == b"data"
    assert siblings(tree) == ["tree"]


# ---- Processes ------------------------------------------------------------------------------------------------------


def _save_for_ever(one: SharedSubspace, other: SharedSubspace, folder: Path) -> None:
    while True:
        one.save_pretrained(folder)
        other.save_pretrained(folder)


@needs_fork
def test_a_process_that_is_killed_while_it_saves_leaves_a_whole_tree(
    subspace: SharedSubspace, newer: SharedSubspace, tree: Path, notes: Path
) -> None:
    started = time.monotonic()
    subspace.save_pretrained(tree)
    one_save = time.monotonic() - started
    for number in range(10):
        saved = tree.stat().st_ino
        process = multiprocessing.get_context("fork").Process(target=_save_for_ever, args=(newer, subspace, tree))
        process.start()
        deadline = time.monotonic() + 30
        while tree.exists() and tree.stat().st_ino == saved and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(one_save * 0.2 * number)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        found = SharedSubspace.from_pretrained(tree)
        assert_same_state(found.state, (newer if "rte" in found.tasks else subspace).state)
    newer.save_pretrained(tree)
    assert notes.read_text() == "mine"
    assert siblings(tree) == ["tree"]


@needs_fork
def test_a_tree_can_be_read_while_another_process_saves_it(
    subspace: SharedSubspace, newer: SharedSubspace, tree: Path, notes: Path
) -> None:
    process = multiprocessing.get_context("fork").Process(target=_save_for_ever, args=(newer, subspace, tree))
    process.start()
    try:
        for _ in range(60):
            found = SharedSubspace.from_pretrained(tree)
            assert found.tasks in (subspace.tasks, newer.tasks)
        assert process.is_alive()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    newer.save_pretrained(tree)
    assert notes.read_text() == "mine"
    assert siblings(tree) == ["tree"]
