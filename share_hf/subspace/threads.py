"""Work on one module after another, side by side where many tasks make it worth a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from .factors import LowRankUpdate


# From so many tasks in a module on, modules are worked on side by side: before, one has too little work for that.
TASKS_AT_ONCE = 16

_Result = TypeVar("_Result")


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


def for_each_module(work: Callable[[str], _Result], by_module: Mapping[str, Sequence[str]]) -> Iterator[_Result]:
    """The result of the work on each module, in their order.

    Many tasks are worked on with as many modules at a time as torch has threads, and one thread each: what comes out
    does not depend on how many there are.

    Args:
        work: Called with each module.
        by_module: The tasks of each module.
    """
    threads = torch.get_num_threads()
    if max(map(len, by_module.values()), default=0) < TASKS_AT_ONCE:
        yield from map(work, by_module)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            # No more than are worked on: results that nobody has taken yet would pile up, and errors would wait.
            waiting: deque[Future[_Result]] = deque()
            for module in by_module:
                waiting.append(pool.submit(work, module))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(threads)
