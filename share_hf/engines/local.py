"""One process, or several under DDP: every process has the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .engine import Engine, unprepare


class LocalEngine(Engine):
    """The Trainer's own preparation of the model, undone after each phase."""

    @contextmanager
    def inference_ready(self) -> Iterator[None]:
        try:
            yield
        finally:
            unprepare(self.trainer)

    def release(self) -> None:
        unprepare(self.trainer)

    def recover(self) -> None:
        unprepare(self.trainer)
