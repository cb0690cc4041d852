"""A lock that admits one trainer at a time to a folder, and is released however the process that holds it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from transformers.utils import logging

from ..engines import on_first_process
from ..format.lock import lock


logger = logging.get_logger(__name__)

LOCK_FILE = ".share_hf_lock"

# Descriptors of the locks that this process holds. A forked process inherits them, and would hold the locks as long as
# it lives, even after its parent was killed.
_held: set[int] = set()


class FolderInUseError(RuntimeError):
    """Raised when another trainer is at work in the folder."""


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold a folder while the block runs. With several processes, the first one holds it for all.

    Raises:
        FolderInUseError: If another process holds the folder, on every process. The message names both.
    """
    with ExitStack() as stack:

        def take() -> None:
            if (descriptor := _take(folder)) is not None:
                stack.callback(_release, descriptor)

        on_first_process(take)
        yield


def _take(folder: Path) -> int | None:
    """Lock the file in a folder. Returns its descriptor, or None where locks are not available."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT)
    is_locked = False
    try:
        is_locked = _is_locked(descriptor, folder)
    finally:
        if not is_locked:
            os.close(descriptor)
    if not is_locked:
        return None
    _held.add(descriptor)
    with suppress(OSError):  # the process id only informs others, and the disk may be full
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def _is_locked(descriptor: int, folder: Path) -> bool:
    """Lock a file, or warn if that is not possible. Returns whether the file is locked."""
    try:
        is_locked = lock(descriptor, wait=False)
    except BlockingIOError as error:
        holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
        raise FolderInUseError(
            f"{folder}: process {holder} trains a stream there, expected one trainer at a time; wait for it, or use "
            "another output_dir"
        ) from error
    if not is_locked:
        logger.warning(
            "%s: the folder cannot be locked on this file system; make sure that no other trainer uses it.", folder
        )
    return is_locked


def _release(descriptor: int) -> None:
    _held.discard(descriptor)
    with suppress(OSError):
        os.ftruncate(descriptor, 0)  # the file stays: another process may have opened it to lock it
    os.close(descriptor)


def _let_go_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
