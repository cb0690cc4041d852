"""A person who ends a stream is told how it goes on; the signal does what it does."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from accelerate import PartialState
from transformers.utils import logging


logger = logging.get_logger(__name__)


@contextmanager
def telling_how_to_resume(advice: Callable[[], str | None]) -> Iterator[None]:
    """Inside of it, one line is logged when Ctrl-C or SIGTERM ends the process.

    Ctrl-C is raised on. SIGTERM, where it would end the process at once, still does, after the line: nothing is saved
    first, as the stream can be resumed from any moment. Handlers of others stay as they are. With several processes
    their launcher tells of SIGTERM: one that waits for the others would not come to do it.

    Args:
        advice: The line; None if there is nothing to resume.
    """

    def tell() -> None:
        if PartialState().is_main_process and (line := advice()) is not None:
            logger.warning(line)

    with _before_sigterm(tell):
        try:
            yield
        except KeyboardInterrupt:
            tell()
            raise


@contextmanager
def _before_sigterm(act: Callable[[], None]) -> Iterator[None]:
    """Act before SIGTERM ends this process by its default; elsewhere, and in forked processes, change nothing."""
    is_main_thread = threading.current_thread() is threading.main_thread()
    if (
        not is_main_thread
        or PartialState().num_processes > 1
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        try:
            if os.getpid() == process:
                act()
        finally:
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is end:  # a callback may have set its own meanwhile
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
