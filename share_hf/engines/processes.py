"""Communication of several processes, which share their results and their errors."""

from __future__ import annotations

import io
import pickle
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor


SECONDS_FOR_GLOO = 0.2

Value = TypeVar("Value")


def on_first_process(compute: Callable[[], Value], *, known: object = None) -> Value:
    """Return what the first process computes, on every process. Separate computations might differ by rounding.

    Tensors are sent without pickling them.

    Args:
        compute: Function that is called on the first process.
        known: Value that all processes have, such as the state that `compute` starts from. Its tensors are not sent
            where the result contains them too.

    Raises:
        Exception: Any error of the first process, on every process. Where it cannot be sent, the other processes
            raise a `RuntimeError` with its message.
    """
    state = PartialState()
    if state.num_processes == 1:
        return compute()
    sent, own = (None, []), None
    shared = _taken_apart(known)[1]
    if state.is_main_process:
        try:
            sent = _taken_apart(compute(), shared)
        except Exception as error:
            own = error
    content, tensors = sent
    layouts = [(tensor.shape, tensor.dtype, tensor.device.type) for tensor in tensors]
    content, layouts, error = broadcast_object_list([(content, layouts, own and _sendable(own))])[0]
    if error is not None:
        raise own or error
    if not state.is_main_process:
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype, _ in layouts]
    tensors = [_broadcast(tensor, kind) for tensor, (_, _, kind) in zip(tensors, layouts, strict=True)]
    return _put_together(content, shared + tensors)


def of_each_process(compute: Callable[[], Value]) -> list[Value]:
    """Return what each process computes, by rank, on every process. Tensors are sent without pickling them.

    Args:
        compute: Function that is called on every process. An error on one process is raised on all.

    Raises:
        Exception: The error of this process. If another process failed, a `RuntimeError` that names its rank and its
            error.
    """
    state = PartialState()
    if state.num_processes == 1:
        return [compute()]
    content, tensors, own = b"", [], None
    try:
        content, tensors = _taken_apart(compute())
    except Exception as error:
        own = error
    layouts = [(tensor.shape, tensor.dtype, tensor.device.type) for tensor in tensors]
    found = gather_object([(content, layouts, None if own is None else _told(own))])
    if own is not None:
        raise own
    for rank, (_, _, error) in enumerate(found):
        if error is not None:
            raise RuntimeError(f"rank {rank}: {error}")
    values = []
    for rank, (theirs, layouts, _) in enumerate(found):
        mine = rank == state.process_index
        parts = tensors if mine else [torch.empty(shape, dtype=dtype) for shape, dtype, _ in layouts]
        sent = [_broadcast(part, kind, rank) for part, (_, _, kind) in zip(parts, layouts, strict=True)]
        values.append(_put_together(theirs, sent))
    return values


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, (ValueError, OSError, RuntimeError)) and str(error) else repr(error)


def _taken_apart(value: object, shared: list[Tensor] | None = None) -> tuple[bytes, list[Tensor]]:
    """Separate a value from its tensors. Returns the pickled rest, and the tensors that are not already shared."""
    file = io.BytesIO()
    pickler = _TensorPickler(file, shared or [])
    pickler.dump(value)
    return file.getvalue(), pickler.found


def _put_together(content: bytes, tensors: list[Tensor]) -> Any:
    return _TensorUnpickler(io.BytesIO(content), tensors).load()


class _TensorPickler(pickle.Pickler):
    """Writes numbers in place of tensors: first the shared ones, then others in the order in which they are found."""

    def __init__(self, file: io.BytesIO, shared: list[Tensor]) -> None:
        super().__init__(file)
        self.found: list[Tensor] = []
        self._numbers = {id(tensor): number for number, tensor in enumerate(shared)}

    def persistent_id(self, value: object) -> int | None:
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._numbers)
            self.found.append(value)
        return self._numbers[id(value)]


class _TensorUnpickler(pickle.Unpickler):
    """Puts tensors back in place of their numbers."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self._tensors[number]


def _broadcast(tensor: Tensor, kind: str, rank: int = 0) -> Tensor:
    """Return a tensor of one process on every process, on the kind of device where it was, such as the CPU."""
    on_device = tensor.detach().to(PartialState().device).contiguous()
    dist.broadcast(on_device, src=rank)
    return tensor if PartialState().process_index == rank else on_device.to(kind)


def leave_to_gloo() -> None:
    """Give the threads of gloo a moment to drop the tensors that were sent last, before the program may end.

    A thread that still holds a tensor needs the interpreter's lock to drop it. A program that ends at that moment
    waits forever for the thread, in a destructor that keeps the lock, or aborts (pytorch/pytorch#56297 and #179291). A
    barrier does not help, because it holds what was sent before it.
    """
    if PartialState().num_processes > 1 and dist.get_backend() == "gloo":
        time.sleep(SECONDS_FOR_GLOO)


def together(act: Callable[[], object]) -> None:
    """Act on every process, and return when all have acted.

    Raises:
        Exception: The error of one process, on every process, so that none waits for a process that failed. Where it
            cannot be sent, the other processes raise a `RuntimeError` with its message.
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
    """Return the value that each process passes, by rank."""
    return [value] if PartialState().num_processes == 1 else gather_object([value])


def _sendable(error: Exception) -> Exception:
    """Return the error itself if it can be pickled, else a substitute: errors may hold objects that cannot."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
