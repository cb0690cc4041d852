"""One writer at a time: a lock on a folder that a dead process does not keep."""

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

# What a file system answers that knows no locks, such as some network ones.
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}

# Folders that this thread holds: whoever holds one may ask for it again.
_HELD: ContextVar[frozenset[Path]] = ContextVar("_HELD", default=frozenset())


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold a folder, there or not, against other writers; wait for one that holds it.

    The lock is a file beside the folder, which is gone when nobody holds it. Where the platform or the file system
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
                if not os.fstat(file.fileno()).st_size:  # one that has content is not ours
                    path.unlink()


def lock(descriptor: int, *, wait: bool) -> bool:
    """Lock an open file, for as long as it is open.

    Args:
        descriptor: The open file.
        wait: Whether to wait for who holds it.

    Returns:
        False where the platform or the file system has no locks.

    Raises:
        BlockingIOError: If somebody else holds it, unless it is waited for.
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
    """The file that is there now, locked; its last holder may have removed the one waited for.

    An object and no descriptor: whatever an interruption leaves of it is closed, and does not keep the lock.
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
