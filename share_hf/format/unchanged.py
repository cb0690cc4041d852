"""Detect changes of files while they are read: adapters are mapped into memory and read only as needed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stamp:
    """State of a file when it was opened.

    Args:
        path: Path of the file.
        inode: Device and inode of the file. Another file in its place leaves mapped content as it is.
        content: Size in bytes, and time of the last write in nanoseconds.
    """

    path: Path
    inode: tuple[int, int]
    content: tuple[int, int]

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Return the stamp of a file as it is now."""
        found = os.stat(path)
        return cls(path, (found.st_dev, found.st_ino), (found.st_size, found.st_mtime_ns))

    def expect_same_file(self) -> None:
        """Refuse a file that was written, replaced or removed.

        Raises:
            ValueError: If the file has changed. The message names it.
        """
        if self._now() != self:
            raise self._changed()

    def expect_same_content(self) -> None:
        """Refuse a file that was written to. Its replacement or removal does not change what is mapped.

        Raises:
            ValueError: If the file has changed. The message names it.
        """
        try:
            found = os.stat(self.path)
        except OSError:
            return
        # This is called for every tensor, so avoid creating another stamp.
        if (found.st_size, found.st_mtime_ns) != self.content and (found.st_dev, found.st_ino) == self.inode:
            raise self._changed()

    def _now(self) -> Stamp | None:
        try:
            return Stamp.of(self.path)
        except OSError:
            return None

    def _changed(self) -> ValueError:
        return ValueError(
            f"{self.path}: changed while it was read, expected a file that is complete: wait until it is written, and "
            "try again"
        )
