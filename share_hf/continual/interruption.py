"""Telling a person who interrupts a stream how to resume it, without changing the effect of the signal."""

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
    """Log one line when Ctrl-C or SIGTERM ends the process within the block.

    The exception of Ctrl-C propagates. SIGTERM still ends the process if that is its default, after the line. Nothing
    is saved first, because the stream can be resumed from any moment. Existing handlers of the signal stay in place.
    With several processes, it is up to their launcher to report SIGTERM: a process that waits for the others would
    never run the handler.

    Args:
        advice: Function that returns the line, or None if there is nothing to resume.
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
    """Act before SIGTERM ends this process by default. In other cases, and in forked processes, change nothing."""
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
        if signal.getsignal(signal.SIGTERM) is end:  # a callback may have set its own handler meanwhile
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
