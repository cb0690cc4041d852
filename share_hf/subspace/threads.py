"""Work on one module after another, or on several in parallel where many tasks make it worthwhile.

Modules are independent of each other, so the caller of the library may handle them in another way, such as dividing
them between processes. See `working_by`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, Protocol, TypeVar

import torch

from .factors import LowRankUpdate


# From this many tasks in a module on, modules are processed in parallel. With fewer, a module is too little work.
TASKS_AT_ONCE = 16

_Result = TypeVar("_Result")

Purpose = Literal["merge", "other"]

# Processes some of the modules in this process, and yields their results in order.
RunHere = Callable[[Sequence[str]], Iterator[_Result]]


class Way(Protocol):
    """Way to distribute the work on modules. The results do not depend on it."""

    def __call__(self, run: RunHere[_Result], modules: Sequence[str], purpose: Purpose) -> Iterator[_Result]:
        """Return the result for each module, in the order of the modules.

        Args:
            run: Function that processes some of the modules.
            modules: Names of all modules.
            purpose: Purpose of the work. The merge is the long part of a build.
        """
        ...


_WAY: ContextVar[Way | None] = ContextVar("_WAY", default=None)


@contextmanager
def working_by(way: Way | None) -> Iterator[None]:
    """Context in which this thread processes the modules of a model in the given way; None means the default."""
    token = _WAY.set(way)
    try:
        yield
    finally:
        _WAY.reset(token)


def tasks_by_module(updates: Mapping[str, Mapping[str, LowRankUpdate]]) -> dict[str, list[str]]:
    """Return the tasks that adapt each module, in the order of the tasks.

    Args:
        updates: Updates by task and module.
    """
    by_module: dict[str, list[str]] = {}
    for task, modules in updates.items():
        for module in modules:
            by_module.setdefault(module, []).append(task)
    return by_module


def for_each_module(
    work: Callable[[str], _Result], by_module: Mapping[str, Sequence[str]], purpose: Purpose = "other"
) -> Iterator[_Result]:
    """Return the result of the work on each module, in the order of the modules.

    If there are many tasks, as many modules are processed at a time as torch has threads, with one thread each. The
    result does not depend on the number of threads.

    Args:
        work: Function that is called with each module.
        by_module: Tasks of each module.
        purpose: Purpose of the work.
    """
    # This looks at all modules, so that a process with only some of them rounds like one with all of them.
    many = max(map(len, by_module.values()), default=0) >= TASKS_AT_ONCE

    def alone(module: str) -> _Result:
        with working_by(None):  # work on modules inside of a module is not distributed again
            return work(module)

    def run(modules: Sequence[str]) -> Iterator[_Result]:
        return _side_by_side(alone, modules) if many else map(alone, modules)

    way = _WAY.get()
    modules = list(by_module)
    return run(modules) if way is None else way(run, modules, purpose)


def _side_by_side(work: Callable[[str], _Result], modules: Sequence[str]) -> Iterator[_Result]:
    threads = torch.get_num_threads()
    # The consumer of the results has one thread meanwhile: more would only compete with the threads that work.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            # Submit no more than are being processed, or untaken results would pile up and errors would come late.
            waiting: deque[Future[_Result]] = deque()
            for module in modules:
                waiting.append(pool.submit(work, module))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(threads)
