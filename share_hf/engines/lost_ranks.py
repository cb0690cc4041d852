"""Naming the rank of a run that ended before the others.

Some launchers do not name it, and neither do the libraries that wait for it.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

from accelerate import PartialState
from transformers.utils import logging

from .processes import leave_to_gloo, of_all_processes


logger = logging.get_logger(__name__)

SECONDS_TO_END = 2.0  # a process closes its connections a moment before it ends


@contextmanager
def naming_lost_ranks(advice: str = "resume_from_checkpoint=True continues it") -> Iterator[None]:
    """Name a rank that ends within the block at once, on each other rank of its machine (Linux only).

    Args:
        advice: Advice on what to do then, for the message.

    Raises:
        RuntimeError: If a rank ends, in place of the error that communication with it raises. The message names the
            rank.
    """
    others = _others_on_this_machine()
    if others:
        with _watching(others, advice):
            yield
    else:
        yield
    PartialState().wait_for_everyone()  # no rank is watched any more: one that ends from here on is not lost
    leave_to_gloo()


def _others_on_this_machine() -> dict[int, str]:
    """Return the names of the other ranks, by descriptors that become readable when their processes end."""
    machine = _machine()
    ranks = of_all_processes((PartialState().process_index, os.getpid(), machine))
    others = {}
    for rank, pid, its_machine in ranks:
        if pid != os.getpid() and its_machine == machine is not None:
            with suppress(OSError):  # some containers do not allow it
                others[os.pidfd_open(pid)] = f"rank {rank} (process {pid} on {socket.gethostname()})"
    return others


def _machine() -> tuple[str, str] | None:
    """Return an identity shared by processes that see each other's ids, or None where they cannot be watched."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


@contextmanager
def _watching(others: Mapping[int, str], advice: str) -> Iterator[None]:
    done, set_done = os.pipe()
    lost: list[str] = []

    def watch() -> None:
        poll = select.poll()
        for descriptor in (done, *others):
            poll.register(descriptor, select.POLLIN)
        ended = [descriptor for descriptor, _ in poll.poll()]
        if done not in ended:
            names = " and ".join(others[descriptor] for descriptor in ended)
            lost.append(f"{names} ended during the run; {advice}")
            logger.error(lost[0])

    # This is a thread because a launcher that sees a rank end soon stops the others, whatever they are doing.
    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except RuntimeError as error:
        watcher.join(SECONDS_TO_END)
        if lost:
            raise RuntimeError(lost[0]) from error
        raise
    finally:
        os.write(set_done, b".")  # closing it would not do: data loading workers may hold it too
        watcher.join()
        for descriptor in (done, set_done, *others):
            os.close(descriptor)
