"""Work on one module after another, side by side where many tasks make it worth a thread.

Modules are independent of each other, so who runs the library may have another way with them, such as to divide them
between processes: `working_by`.
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


# From so many tasks in a module on, modules are worked on side by side: before, one has too little work for that.
TASKS_AT_ONCE = 16

_Result = TypeVar("_Result")

Purpose = Literal["merge", "other"]

# Works on some of the modules here and now: their results, in their order.
RunHere = Callable[[Sequence[str]], Iterator[_Result]]


class Way(Protocol):
    """How the work on modules is done; the results do not depend on it."""

    def __call__(self, run: RunHere[_Result], modules: Sequence[str], purpose: Purpose) -> Iterator[_Result]:
        """The result of the work on each module, in their order.

        Args:
            run: Works on some of the modules.
            modules: All of them.
            purpose: What the results are; those of a merge are the long work of a build.
        """
        ...


_WAY: ContextVar[Way | None] = ContextVar("_WAY", default=None)


@contextmanager
def working_by(way: Way | None) -> Iterator[None]:
    """Inside of it, this thread works on the modules of a model in another way."""
    token = _WAY.set(way)
    try:
        yield
    finally:
        _WAY.reset(token)


def tasks_by_module(updates: Mapping[str, Mapping[str, LowRankUpdate]]) -> dict[str, list[str]]:
    """The tasks that adapt each module, in the order of the tasks.

    Args:
        updates: By task and module.
    """
    by_module: dict[str, list[str]] = {}
    for task, modules in updates.items():
        for module in modules:
            by_module.setdefault(module, []).append(task)
    return by_module


def for_each_module(
    work: Callable[[str], _Result], by_module: Mapping[str, Sequence[str]], purpose: Purpose = "other"
) -> Iterator[_Result]:
    """The result of the work on each module, in their order.

    Many tasks are worked on with as many modules at a time as torch has threads, and one thread each: what comes out
    does not depend on how many there are.

    Args:
        work: Called with each module.
        by_module: The tasks of each module.
        purpose: What the results are.
    """
    # Asked of all modules: who works on some of them must round as one who works on all.
    many = max(map(len, by_module.values()), default=0) >= TASKS_AT_ONCE

    def alone(module: str) -> _Result:
        with working_by(None):  # modules inside of a module are nobody else's
            return work(module)

    def run(modules: Sequence[str]) -> Iterator[_Result]:
        return _side_by_side(alone, modules) if many else map(alone, modules)

    way = _WAY.get()
    modules = list(by_module)
    return run(modules) if way is None else way(run, modules, purpose)


def _side_by_side(work: Callable[[str], _Result], modules: Sequence[str]) -> Iterator[_Result]:
    threads = torch.get_num_threads()
    # Whoever takes the results has one thread meanwhile: threads of its own would wait for it beside those that work.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            # No more than are worked on: results that nobody has taken yet would pile up, and errors would wait.
            waiting: deque[Future[_Result]] = deque()
            for module in modules:
                waiting.append(pool.submit(work, module))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(threads)
