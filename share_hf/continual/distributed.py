"""Several processes: what one of them computes or suffers, all of them know."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object


Value = TypeVar("Value")


def on_first_process(compute: Callable[[], Value]) -> Value:
    """What the first process computes, on every process; what each would for itself may differ by rounding.

    Raises:
        Exception: Whatever the first process raises, on every process; elsewhere a `RuntimeError` with its message, if
            it cannot be sent.
    """
    state = PartialState()
    if state.num_processes == 1:
        return compute()
    value, own = None, None
    if state.is_main_process:
        try:
            value = compute()
        except Exception as error:
            own = error
    value, error = broadcast_object_list([(value, own and _sendable(own))])[0]
    if error is not None:
        raise own or error
    return value


def together(act: Callable[[], object]) -> None:
    """Act on every process, and go on when all have.

    Raises:
        Exception: What one of them raises, on every process: none waits for one that failed. Elsewhere it is a
            `RuntimeError` with its message, if it cannot be sent.
    """
    own = None
    try:
        act()
    except Exception as error:
        own = error
    errors = [error for error in of_all_processes(own and _sendable(own)) if error is not None]
    if errors:
        raise own or errors[0]


def of_all_processes(value: Value) -> list[Value]:
    """What each process has here, by rank."""
    return [value] if PartialState().num_processes == 1 else gather_object([value])


def _sendable(error: Exception) -> Exception:
    """The error itself if it can be pickled; other libraries' may hold what cannot."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
