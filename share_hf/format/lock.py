"""One writer at a time: a lock on a folder, which a dead process does not keep."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from io import FileIO
from pathlib import Path


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Answers of a file system without locks, such as some network file systems.
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}

# Folders that this thread holds. Whoever holds a folder may ask for it again.
_HELD: ContextVar[frozenset[Path]] = ContextVar("_HELD", default=frozenset())


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold a folder, existing or not, against other writers, and wait for another holder to finish.

    The lock is a file beside the folder, which is removed when nobody holds it. If the platform or the file system
    has no locks, nothing is held.

    Raises:
        OSError: If the file cannot be written.
    """
    folder = Path(os.path.realpath(folder))
    if fcntl is None or folder in _HELD.get():
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.share_hf.lock")
    with _locked(path) as file:
        token = _HELD.set(_HELD.get() | {folder})
        try:
            yield
        finally:
            _HELD.reset(token)
            with suppress(OSError):
                if not os.fstat(file.fileno()).st_size:  # a file with content is not ours
                    path.unlink()


def lock(descriptor: int, *, wait: bool) -> bool:
    """Lock an open file for as long as it stays open.

    Args:
        descriptor: Descriptor of the open file.
        wait: Whether to wait for another holder.

    Returns:
        False if the platform or the file system has no locks, else True.

    Raises:
        BlockingIOError: If somebody else holds the lock and `wait` is False.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True


def _locked(path: Path) -> FileIO:
    """Lock the file that is there now. Its last holder may have removed the one that was waited for.

    Return an object rather than a descriptor: whatever an interruption leaves of it is closed and does not keep the
    lock.
    """
    while True:
        file = FileIO(path, "a+")
        try:
            if not lock(file.fileno(), wait=True):
                return file
        except OSError:
            file.close()
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()
