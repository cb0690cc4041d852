"""Files that must not change while they are read: adapters are mapped into memory, and read as they are needed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stamp:
    """How a file was when it was opened.

    Args:
        path: The file.
        inode: Which file of the disk it was. Another one in its place leaves what is mapped as it is.
        content: Its size in bytes and when it was last written, in nanoseconds.
    """

    path: Path
    inode: tuple[int, int]
    content: tuple[int, int]

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """The stamp of a file as it is now."""
        found = os.stat(path)
        return cls(path, (found.st_dev, found.st_ino), (found.st_size, found.st_mtime_ns))

    def expect_same_file(self) -> None:
        """Refuse a file that was written, replaced or removed.

        Raises:
            ValueError: Naming it.
        """
        if self._now() != self:
            raise self._changed()

    def expect_same_content(self) -> None:
        """Refuse a file that was written to; one that took its place, or none, changes nothing that is mapped.

        Raises:
            ValueError: Naming it.
        """
        try:
            found = os.stat(self.path)
        except OSError:
            return
        # Asked for every tensor, so without another stamp.
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
