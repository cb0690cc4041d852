"""Any number of readers and writers of one folder, and whatever else its owner keeps there."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from share_hf import SharedSubspace
from share_hf.cli import main
from share_hf.format.lock import holding
from share_hf.hub.fetch import is_local
from tests.trees import assert_same_state, files_of, leave_aside


needs_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="runs forked copies of this process"
)


@pytest.fixture
def newer(subspace: SharedSubspace, loras: dict[str, Path]) -> SharedSubspace:
    """The subspace of the tree with one more task."""
    extended = SharedSubspace(subspace.state)
    extended.add_adapters({"rte": loras["rte"]}, progress=False)
    return extended


def forked(work: Callable[..., Any], *args: Any) -> multiprocessing.Process:
    """Start a process that does this work; its exit code is 1 if that fails."""
    process = multiprocessing.get_context("fork").Process(target=work, args=args)
    process.start()
    return process


def ended(process: multiprocessing.Process) -> int | None:
    process.join(60)
    return process.exitcode


def everything_below(folder: Path) -> set[tuple[str, int, int]]:
    """Return every path below a folder, with what shows whether it has been written or replaced since."""
    return {(str(path), path.lstat().st_ino, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


# ---- Readers --------------------------------------------------------------------------------------------------------


def _save_and_stop_between_the_renames(subspace: SharedSubspace, folder: Path) -> None:
    rename = Path.rename

    def rename_and_stop(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        if self == folder:
            os.kill(os.getpid(), signal.SIGSTOP)
        return moved

    Path.rename = rename_and_stop
    subspace.save_pretrained(folder)


@needs_fork
def test_readers_between_the_renames_of_a_save_see_the_old_tree_and_leave_the_save_alone(
    subspace: SharedSubspace, newer: SharedSubspace, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = forked(_save_and_stop_between_the_renames, newer, tree)
    deadline = time.monotonic() + 30
    while tree.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not tree.exists()
    before = everything_below(tree.parent)
    assert_same_state(SharedSubspace.from_pretrained(tree).state, subspace.state)
    assert main(["info", str(tree), "--quiet"]) == 0
    monkeypatch.chdir(tree.parent)
    assert is_local("tree")
    assert everything_below(tree.parent) == before
    os.kill(process.pid, signal.SIGCONT)
    assert ended(process) == 0
    assert_same_state(SharedSubspace.from_pretrained(tree).state, newer.state)
    assert list(tree.parent.iterdir()) == [tree]


def test_a_tree_that_a_crash_left_aside_is_read_and_not_written_over(
    subspace: SharedSubspace, tree: Path, tmp_path: Path, loras: dict[str, Path]
) -> None:
    leave_aside(tree)
    assert SharedSubspace.from_pretrained(tree).tasks == subspace.tasks
    with pytest.raises(ValueError, match="holds a subspace"):
        subspace.export_lora("mrpc", tree)
    assert main(["init", str(tree), f"rte={loras['rte']}", "--quiet"]) != 0
    assert main(["add", str(tree), f"rte={loras['rte']}", "--quiet"]) == 0
    assert SharedSubspace.from_pretrained(tree).tasks == (*subspace.tasks, "rte")


# ---- Writers --------------------------------------------------------------------------------------------------------


def test_a_second_save_keeps_what_another_writer_saved(tree: Path, loras: dict[str, Path]) -> None:
    first, second = SharedSubspace.from_pretrained(tree), SharedSubspace.from_pretrained(tree)
    first.add_adapters({"rte": loras["rte"]}, progress=False)
    second.add_adapters({"again": loras["mrpc"]}, progress=False)
    second.remove_task("sst2")
    first.save_pretrained(tree)
    second.save_pretrained(tree)
    assert set(second.tasks) == {"mrpc", "rte", "again"}
    assert_same_state(SharedSubspace.from_pretrained(tree).state, second.state)
    first.save_pretrained(tree)
    assert first.tasks == second.tasks


def test_a_second_save_that_cannot_be_merged_is_refused(tree: Path, loras: dict[str, Path]) -> None:
    first, second = SharedSubspace.from_pretrained(tree), SharedSubspace.from_pretrained(tree)
    first.add_adapters({"new": loras["rte"]}, progress=False)
    second.add_adapters({"new": loras["mrpc"]}, progress=False)
    first.save_pretrained(tree)
    before, state = files_of(tree), second.state
    with pytest.raises(ValueError, match=f"{tree}: somebody else has saved there since.*'new'.*another folder"):
        second.save_pretrained(tree)
    assert files_of(tree) == before
    assert second.state is state


def test_a_subspace_that_knows_nothing_of_a_folder_replaces_what_is_there(tree: Path, loras: dict[str, Path]) -> None:
    made = SharedSubspace.from_adapters({"rte": loras["rte"]}, num_components=4, pseudo_rank=2, progress=False)
    made.save_pretrained(tree)
    assert SharedSubspace.from_pretrained(tree).tasks == ("rte",)


@needs_fork
def test_commands_that_add_to_one_folder_at_once_all_arrive(
    subspace: SharedSubspace, tree: Path, loras: dict[str, Path]
) -> None:
    names = [f"new{number}" for number in range(4)]
    processes = [forked(_add, tree, f"{name}={loras['rte']}") for name in names]
    assert [ended(process) for process in processes] == [0] * len(names)
    assert set(SharedSubspace.from_pretrained(tree).tasks) == {*subspace.tasks, *names}


def _add(folder: Path, adapter: str) -> None:
    raise SystemExit(main(["add", str(folder), adapter, "--quiet"]))


@needs_fork
def test_savers_of_one_folder_take_turns(subspace: SharedSubspace, newer: SharedSubspace, tree: Path) -> None:
    processes = [forked(_save_often, saved, tree) for saved in (subspace, newer, newer)]
    assert [ended(process) for process in processes] == [0, 0, 0]
    assert SharedSubspace.from_pretrained(tree).tasks in (subspace.tasks, newer.tasks)


def _save_often(subspace: SharedSubspace, folder: Path) -> None:
    for _ in range(10):
        SharedSubspace(subspace.state).save_pretrained(folder)


def _hold(folder: Path, *, ready: Any) -> None:
    with holding(folder):
        ready.set()
        time.sleep(60)


@needs_fork
def test_a_lock_is_waited_for_and_no_dead_process_keeps_it(tmp_path: Path) -> None:
    folder, ready = tmp_path / "missing" / "folder", multiprocessing.get_context("fork").Event()
    holder = multiprocessing.get_context("fork").Process(target=_hold, args=(folder,), kwargs={"ready": ready})
    holder.start()
    assert ready.wait(30)
    waiting = forked(_take, folder)
    waiting.join(0.3)
    assert waiting.exitcode is None
    os.kill(holder.pid, signal.SIGKILL)
    assert ended(waiting) == 0
    assert list(folder.parent.iterdir()) == []


def _take(folder: Path) -> None:
    with holding(folder), holding(folder):
        pass


# ---- What the owner keeps there -------------------------------------------------------------------------------------


def test_files_of_the_owner_survive_a_save_wherever_they_are(newer: SharedSubspace, tree: Path) -> None:
    kept = [
        "notes.txt",
        "mine/deep/data.bin",
        "tasks/list.txt",
        "tasks/mrpc/log.txt",
        "tasks/sst2/plots/loss.png",
        "tasks/other/adapter_config.json",
        "tasks/other/adapter_model.safetensors",
        "figures/own.png",
        "../.tree.old/data",
        "../.tree.new-abcdefgh/data",
        "../.tree.new/data",
    ]
    for name in kept:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
    (tree / "tasks" / "link").symlink_to(tree.parent / "adapters")
    newer.remove_task("sst2")
    newer.save_pretrained(tree)
    assert all((tree / name).read_text() == name for name in kept)
    assert (tree / "tasks" / "link").is_symlink()
    assert [path.name for path in (tree / "tasks" / "sst2").iterdir()] == ["plots"]
    assert_same_state(SharedSubspace.from_pretrained(tree).state, newer.state)
    newer.save_pretrained(tree)
    assert all((tree / name).read_text() == name for name in kept)


@pytest.mark.parametrize(
    "name", ["metrics.json", "subspace.safetensors", "tasks/mrpc/metrics.json", "figures/drift.png"]
)
def test_a_file_that_no_save_wrote_is_not_written_over(
    name: str, subspace: SharedSubspace, tmp_path: Path, with_figures: None
) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "folder" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(ValueError, match=f"{path} is in the way"):
        subspace.save_pretrained(tmp_path / "folder")
    assert files_of(tmp_path / "folder") == {name: b"mine"}
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "adapters"] == ["folder"]


def test_a_new_task_does_not_take_the_place_of_an_adapter_of_the_owner(newer: SharedSubspace, tree: Path) -> None:
    path = tree / "tasks" / "rte" / "adapter_model.safetensors"
    path.parent.mkdir()
    path.write_text("mine")
    before = files_of(tree)
    with pytest.raises(ValueError, match=f"{path} is in the way"):
        newer.save_pretrained(tree)
    assert files_of(tree) == before


def test_a_folder_of_the_name_of_a_workshop_is_not_taken_for_one(subspace: SharedSubspace, tree: Path) -> None:
    workshop = tree.with_name(".tree.share_hf")
    (workshop / "old").mkdir(parents=True)
    (workshop / "old" / "data").write_text("mine")
    with pytest.raises(ValueError, match="was not made by share_hf"):
        subspace.save_pretrained(tree)
    assert (workshop / "old" / "data").read_text() == "mine"
    assert SharedSubspace.from_pretrained(tree).tasks == subspace.tasks


def test_a_mount_point_is_refused_by_name(subspace: SharedSubspace) -> None:
    mounts = [path for path in ("/dev/shm", "/proc", "/dev", "/") if os.path.ismount(path)]
    if not mounts:
        pytest.skip("no mount point is known here")
    with pytest.raises(ValueError, match=f"{mounts[0]} is a mount point.*expected a folder in it"):
        subspace.save_pretrained(mounts[0])
