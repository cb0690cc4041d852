"""Dividing modules among the processes of a launcher, each of which gets the results of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from accelerate import PartialState

from ..subspace import Purpose, RunHere, working_by
from .processes import of_each_process


Result = TypeVar("Result")


class Division:
    """Work that all processes do together, and that fails on all of them together.

    All processes meet again and again, in the same order. A process that fails in between reports its error at the
    next meeting.
    """

    def __init__(self) -> None:
        self.failed = False  # whether an error has reached all processes

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return PartialState().is_main_process

    def gather(self, compute: Callable[[], Result]) -> list[Result]:
        """Return what each process computes, as `of_each_process` does."""
        try:
            return of_each_process(compute)
        except Exception:
            self.failed = True
            raise

    def first(self, compute: Callable[[], Result]) -> Result:
        """Return what the first process computes, on every process.

        Raises:
            Exception: As in `of_each_process`.
        """
        return self.gather(compute if self.is_first else _nothing)[0]

    def meet(self) -> None:
        """Wait until all processes have come here.

        Raises:
            Exception: As in `of_each_process`.
        """
        self.gather(_nothing)

    def each_module(self, run: RunHere[Result], modules: Sequence[str], purpose: Purpose) -> Iterator[Result]:
        """Yield the result of the work on each module, in order. This process does its share of the work.

        Args:
            run: Function that works on some of the modules.
            modules: All modules, the same on every process.
            purpose: Purpose of the work, which is not used here.

        Raises:
            Exception: As in `of_each_process`.
        """
        state = PartialState()
        shares = shares_of(modules, state.num_processes)
        mine = run(shares[state.process_index])
        for number, start in enumerate(range(0, len(modules), state.num_processes)):
            part = modules[start : start + state.num_processes]
            works = _rank_at(state.process_index, -number, state.num_processes) < len(part)
            results = self.gather(mine.__next__ if works else _nothing)
            yield from (results[_rank_at(place, number, len(results))] for place in range(len(part)))


@contextmanager
def dividing_modules() -> Iterator[Division]:
    """Divide the modules of every build, merge and survey within the block among the processes of a launcher.

    All processes must do the same with the same adapters. All of them then have the same results, bit-identical to the
    results of a single process with the same number of threads. A single process works as it does without the block.

    Raises:
        Exception: The error of a process, on that process; on the others, a `RuntimeError` that names its rank.

    Example:
        ```py
        >>> with dividing_modules():
        ...     subspace = SharedSubspace.from_adapters(adapters)
        >>> if PartialState().is_main_process:
        ...     subspace.save_pretrained("share-subspace")
        ```
    """
    division = Division()
    try:
        with working_by(division.each_module):
            yield division
    except Exception as error:
        if not division.failed:
            division.gather(_raising(error))
        raise
    division.meet()


def shares_of(modules: Sequence[str], processes: int) -> list[list[str]]:
    """Return the modules of each process, by rank.

    Processes take turns in an order that shifts with each round, because modules of one kind recur periodically too.
    """
    shares: list[list[str]] = [[] for _ in range(processes)]
    for i, module in enumerate(modules):
        number, place = divmod(i, processes)
        shares[_rank_at(place, number, processes)].append(module)
    return shares


def _rank_at(place: int, number: int, processes: int) -> int:
    """Return the rank that has the module at a place of a round; with `number` negated, the place of a rank's own."""
    return (place + number) % processes


def _nothing() -> None:
    return None


def _raising(error: Exception) -> Callable[[], None]:
    def compute() -> None:
        raise error

    return compute
