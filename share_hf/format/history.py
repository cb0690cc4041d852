"""Predecessors of a tree on this machine, which make it possible to undo a step.

`.<tree>.history` is a folder beside a tree whose history is kept on request. It has a numbered folder for each
predecessor, whose files are links to those that the tree had, so that only changes take space. No push reads it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .files import json_bytes, read_json, write_atomically
from .index import INDEX_FILE, read_index
from .originals import originals_file
from .replacing import replacing_folder
from .tree import written_files


_SETTINGS = "history.json"
_ORIGINALS = ".originals.json"  # copy, in a predecessor's folder, of the file beside the tree


def history_of(tree: Path) -> Path:
    """Return the folder beside a tree that keeps its predecessors."""
    real = Path(os.path.realpath(tree))
    return real.parent / f".{real.name}.history"


def begin_history(tree: Path, steps: int) -> None:
    """Keep this many predecessors of a tree from now on. 0 keeps none and deletes the existing ones.

    Raises:
        ValueError: If `steps` is not a non-negative integer.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"history is {steps!r}, expected a number of steps, or 0 for none")
    folder = history_of(tree)
    if not steps:
        shutil.rmtree(folder, ignore_errors=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / _SETTINGS, json_bytes({"steps": steps}).decode())


def keep_predecessor(tree: Path) -> None:
    """Keep the tree that is about to be replaced, if it has a history. A crash leaves the copy whole or absent."""
    folder = history_of(tree)
    if not (folder / _SETTINGS).is_file() or not (tree / INDEX_FILE).is_file():
        return
    steps = read_json(folder / _SETTINGS).get("steps")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{folder / _SETTINGS}: steps is {steps!r}, expected a number of at least 1")
    entries = _entries(folder)
    if entries and _is_same(entries[-1], tree):
        return
    scratch = folder / "new"
    shutil.rmtree(scratch, ignore_errors=True)
    _link_files(tree, scratch)
    if (originals := originals_file(tree)).is_file():
        shutil.copy2(originals, scratch / _ORIGINALS)
    number = int(entries[-1].name) + 1 if entries else 1
    scratch.rename(folder / f"{number:06d}")
    for old in _entries(folder)[:-steps]:
        shutil.rmtree(old)


def step_back(tree: Path) -> None:
    """Put a tree's predecessor in its place, byte for byte. A crash leaves either the one or the other.

    Args:
        tree: Folder of the tree. The caller must hold its lock.

    Raises:
        ValueError: If no predecessor is kept.
    """
    folder = history_of(tree)
    entries = _entries(folder)
    while entries and _is_same(entries[-1], tree):  # left by an interrupted step back, or a save without a step
        shutil.rmtree(entries.pop())
    if not entries:
        raise ValueError(
            f"{tree}: no earlier version of it is kept, expected it to be saved with history= (share-hf: --history) "
            "before the step to undo"
        )
    read_index(entries[-1])
    with replacing_folder(tree, written_files) as scratch:
        _link_files(entries[-1], scratch)
    if (originals := entries[-1] / _ORIGINALS).is_file():  # for a replaced task, it names the earlier adapter
        originals.replace(originals_file(tree))
    shutil.rmtree(entries[-1])


def _entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[0-9]*") if path.is_dir() and path.name.isdigit())


def _is_same(entry: Path, tree: Path) -> bool:
    """Return whether two trees are at the same step. The index tells: it has the checksums of all other files."""
    return (tree / INDEX_FILE).is_file() and (entry / INDEX_FILE).read_bytes() == (tree / INDEX_FILE).read_bytes()


def _link_files(tree: Path, folder: Path) -> None:
    """Link the files of a tree into a folder, or copy them where links are unavailable."""
    folder.mkdir(exist_ok=True)
    for name in sorted(written_files(tree)):
        source, target = tree / name, folder / name
        if not source.is_file():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)
