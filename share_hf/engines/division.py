"""Modules divided between the processes of a launcher; every process comes to know the results of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from accelerate import PartialState

from ..subspace import Purpose, RunHere, working_by
from .processes import of_each_process


Result = TypeVar("Result")


class Division:
    """Work that all processes do together, and fail at together.

    They meet again and again, each time all of them and in the same order; whoever fails in between says so when the
    others meet next.
    """

    def __init__(self) -> None:
        self.failed = False  # whether an error has reached all processes

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return PartialState().is_main_process

    def gather(self, compute: Callable[[], Result]) -> list[Result]:
        """What each process computes, as `of_each_process` has it."""
        try:
            return of_each_process(compute)
        except Exception:
            self.failed = True
            raise

    def first(self, compute: Callable[[], Result]) -> Result:
        """What the first process computes, on every process.

        Raises:
            Exception: As for `of_each_process`.
        """
        return self.gather(compute if self.is_first else _nothing)[0]

    def meet(self) -> None:
        """Go on when all processes have come here.

        Raises:
            Exception: As for `of_each_process`.
        """
        self.gather(_nothing)

    def each_module(self, run: RunHere[Result], modules: Sequence[str], purpose: Purpose) -> Iterator[Result]:
        """The result of the work on each module, in their order, of which this process does its share.

        Args:
            run: Works on some of the modules.
            modules: All of them; the same ones on every process.
            purpose: Does not matter.

        Raises:
            Exception: As for `of_each_process`.
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
    """Inside of it, the processes of a launcher divide the modules of every build, merge and survey between them.

    All of them must do the same with the same adapters, and all have the same results then, to the bit as one process
    has them with as many threads. With one process, nothing is different.

    Raises:
        Exception: What one of the processes raises; elsewhere a `RuntimeError` that names its rank.

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
    """The modules of each process, by rank: in turns that shift each time, as modules of a kind come in turns too."""
    shares: list[list[str]] = [[] for _ in range(processes)]
    for i, module in enumerate(modules):
        number, place = divmod(i, processes)
        shares[_rank_at(place, number, processes)].append(module)
    return shares


def _rank_at(place: int, number: int, processes: int) -> int:
    """Who has the module at a place of a turn; with the number negated, at which place a process has its own."""
    return (place + number) % processes


def _nothing() -> None:
    return None


def _raising(error: Exception) -> Callable[[], None]:
    def compute() -> None:
        raise error

    return compute
