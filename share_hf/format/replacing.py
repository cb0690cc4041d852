"""Replace a folder as a whole: a crash leaves the old one or the new one, and readers see one of the two.

While somebody writes `folder`, its workshop `.<folder>.share_hf` stands beside it. The workshop holds the new folder
until it is complete, and the old one until its other content has moved over. There may be one writer at a time, who
holds the folder's lock, and any number of readers, who write nothing: between the two renames of a replacement, they
read the old folder in the workshop.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from .files import flush_folder, naming
from .lock import holding


Read = TypeVar("Read")

# Marks a workshop of ours. A folder of that name without this file belongs to somebody else.
_MARK = "share_hf.txt"
_MARK_TEXT = "share_hf keeps a folder here while it replaces it. The next save tidies up what a crash left.\n"
_ATTEMPTS = 100  # tries of a reader, each as long as a save
_NOT_RENAMED = {errno.EBUSY, errno.EXDEV}
_AT_ONCE = 8  # paths for which the disk is awaited at the same time


@contextmanager
def replacing_folder(folder: Path, written: Callable[[Path], Collection[str]]) -> Iterator[Path]:
    """Yield a scratch folder that takes the place of `folder` when the block ends without an error.

    The old folder stays until the new one is complete and on disk. Then the old folder is renamed aside, the new one
    is renamed into place, other content of the old folder moves over, and only then is the old folder deleted.

    Args:
        folder: Folder to replace, or to create.
        written: Function that returns the relative paths of the files in a folder that an earlier call wrote. These
            files are replaced or removed; all others stay.

    Raises:
        ValueError: If the folder cannot be replaced, or a file that was not written here is in the way. The message
            names it.
    """
    folder = _real(folder)
    _check_replaceable(folder)
    with naming(folder), holding(folder), _workshop(folder) as workshop:
        recover_folder(folder, written)
        scratch = Path(tempfile.mkdtemp(prefix="new-", dir=workshop))
        try:
            yield scratch
            _flush(scratch)
            _check_not_in_the_way(scratch, folder, written)
            scratch.chmod(folder.stat().st_mode & 0o7777 if folder.exists() else 0o777 & ~_umask())
            if folder.exists():
                _set_aside(folder)
            scratch.rename(folder)
            flush_folder(folder.parent)
            recover_folder(folder, written)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def recover_folder(folder: Path, written: Callable[[Path], Collection[str]]) -> None:
    """Finish or undo an interrupted replacement, losing neither what was saved nor other files in the folder.

    Args:
        folder: Folder that was being replaced. The caller must hold its lock.
        written: Same as in `replacing_folder`.
    """
    folder = _real(folder)
    if not _is_ours(workshop := _workshop_of(folder)):
        return
    for scratch in workshop.glob("new-*"):
        shutil.rmtree(scratch, ignore_errors=True)
    old = _aside(folder)
    if not old.exists():
        return
    if folder.exists():
        _move_rest(old, folder, written(old))
        _remove(old)
    else:
        old.rename(folder)


def standing_at(folder: Path) -> Path:
    """Return where a folder's content is: in its workshop during a replacement or after an interrupted one."""
    if folder.exists():
        return folder
    aside = _aside(_real(folder))
    # `folder` is checked last: in the other order, a writer could finish between the two checks.
    return aside if aside.exists() and _is_ours(aside.parent) and not folder.exists() else folder


def holds(folder: Path, name: str) -> bool:
    """Return whether a folder has a file of this name, even while a writer may be replacing the folder."""
    return _version_of(folder, name) is not None


def reading_whole(folder: Path, index: str, read: Callable[[Path], Read]) -> Read:
    """Return what a function reads from a single version of a folder that others may be replacing.

    Args:
        folder: Folder to read.
        index: Name of a file in it that differs between versions.
        read: Function that reads from the folder's current place. It is called again if the folder was replaced
            meanwhile.

    Raises:
        ValueError: If the folder is replaced each time. Errors that `read` raises for an unchanged version pass.
    """
    for _ in range(_ATTEMPTS):
        place = standing_at(folder)
        before = _identity(place / index)
        try:
            found = read(place)
        except (ValueError, OSError, RuntimeError):
            if _identity(place / index) == before == _version_of(folder, index):
                raise  # the folder was not replaced
        else:
            if _version_of(folder, index) == before:
                return found
    raise ValueError(f"{folder} was replaced {_ATTEMPTS} times while it was read; try again later")


def retrying_when_replaced(folder: Path, index: str, action: Callable[[Path], Read]) -> Read:
    """Return the result of an action that reads a folder, retrying if it failed while the folder was replaced.

    Args:
        folder: Same as in `reading_whole`, like `index`.
        action: Function that itself ensures that what it reads is of one version. It is not repeated after a success.
    """
    for _ in range(_ATTEMPTS):
        place = standing_at(folder)
        before = _identity(place / index)
        try:
            return action(place)
        except (ValueError, OSError, RuntimeError):
            if _identity(place / index) == before == _version_of(folder, index):
                raise  # the folder was not replaced
    return action(standing_at(folder))


def _version_of(folder: Path, index: str) -> tuple[int, ...] | None:
    """Return what distinguishes a folder's version from all others, wherever it is; None if there is no such file."""
    places = (folder, _aside(_real(folder)), folder)  # a writer may finish between the first look and the second
    return next((found for place in places if (found := _identity(place / index)) is not None), None)


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _check_replaceable(folder: Path) -> None:
    if Path.cwd().is_relative_to(folder):
        raise ValueError(f"{folder} is or contains the current folder and would be replaced, expected another folder")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, expected a folder, or nothing there yet")
    if os.path.ismount(folder):
        raise ValueError(_mounted(folder))


def _mounted(folder: Path) -> str:
    return f"{folder} is a mount point, which cannot be replaced as a whole, expected a folder in it"


def _check_not_in_the_way(scratch: Path, folder: Path, written: Callable[[Path], Collection[str]]) -> None:
    if not folder.exists():
        return
    ours = set(written(folder))
    for name, entry in _entries_in(scratch):
        if name not in ours and entry.is_file() and os.path.lexists(folder / name):
            raise ValueError(
                f"{folder / name} is in the way and was not written by share_hf, expected another folder, or that "
                "file moved elsewhere"
            )


def _entries_in(folder: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield the entries of a folder and its subfolders with their relative paths, without following links."""
    waiting = [""]
    while waiting:
        within = waiting.pop()
        with os.scandir(folder / within) as entries:
            for entry in entries:
                name = f"{within}{entry.name}"
                yield name, entry
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(f"{name}/")


def _set_aside(folder: Path) -> None:
    try:
        folder.rename(_aside(folder))
    except OSError as error:
        if error.errno in _NOT_RENAMED:  # a mount of the same file system cannot be detected earlier
            raise ValueError(_mounted(folder)) from error
        raise


def _move_rest(old: Path, new: Path, ours: Collection[str]) -> None:
    """Move everything that is not ours from the old folder to the new one."""
    ours, mixed = set(ours), set()
    for name in ours:
        while (name := name.rpartition("/")[0]) and name not in mixed:
            mixed.add(name)
    waiting = [""]
    while waiting:
        within = waiting.pop()
        with os.scandir(old / within) as entries:
            found = list(entries)
        for entry in found:
            name = f"{within}{entry.name}"
            if entry.is_dir(follow_symlinks=False) and (name in mixed or (new / name).is_dir()):
                waiting.append(f"{name}/")
            elif name not in ours and not os.path.lexists(new / name):
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                Path(entry.path).rename(new / name)


@contextmanager
def _workshop(folder: Path) -> Iterator[Path]:
    """Yield the workshop of a folder, and remove it afterwards unless something of value is left in it."""
    workshop = _workshop_of(folder)
    workshop.mkdir(exist_ok=True)
    if not _is_ours(workshop) and any(workshop.iterdir()):
        raise ValueError(f"{workshop} is in the way and was not made by share_hf, expected no folder of this name")
    try:
        (workshop / _MARK).write_text(_MARK_TEXT, encoding="utf-8")
        yield workshop
    finally:
        if {path.name for path in workshop.iterdir()} <= {_MARK}:
            with suppress(OSError):
                (workshop / _MARK).unlink(missing_ok=True)
                workshop.rmdir()


def _is_ours(workshop: Path) -> bool:
    return (workshop / _MARK).is_file()


def _workshop_of(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.share_hf"  # also valid for the file system's root, which has no name


def _aside(folder: Path) -> Path:
    return _workshop_of(folder) / "old"


def _real(folder: Path) -> Path:
    """Resolve links and relative paths, which gives a folder with a name and a parent."""
    return Path(os.path.realpath(folder))


def _flush(folder: Path) -> None:
    written = (entry for _, entry in _entries_in(folder) if entry.is_file(follow_symlinks=False))
    # A linked file is on disk already.
    _for_each(_flush_file, [path for entry in written if (path := Path(entry.path)).stat().st_nlink == 1])


def _flush_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _remove(folder: Path) -> None:
    """Remove a folder, beginning with the many folders that a tree has in one of its folders."""
    _for_each(shutil.rmtree, (path for path in folder.glob("*/*") if path.is_dir() and not path.is_symlink()))
    shutil.rmtree(folder)


def _for_each(action: Callable[[Path], None], paths: Iterable[Path]) -> None:
    """Run a disk-bound action on the paths, a few at a time: one by one, a thousand paths take many seconds."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(action, paths):
            pass  # this raises the first error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
