"""Coefficients of any number of tasks in one tensor, which PEFT sees as one parameter a task."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .rows import Rows


class StackedParameters(nn.ParameterDict):
    """
    By task, its coefficients (k, p_i) on one side of a layer.

    Those that are not trained share one tensor (rows, k, p), with zeros behind the rank of a task; what is read here
    is a parameter that shows its row. A task has a parameter of its own while it is trained, or as long as somebody
    else holds it, such as an optimizer, and where its dtype or device is another than the stack's. A parameter of its
    own goes back into the stack with the next choice of what is trained.

    Args:
        rows: The rows of the tasks in all layers of the model.
        components: k.
    """

    # A task may have any name that begins with a letter or digit, and is looked for among the attributes of a module.
    _stack: Tensor

    def __init__(self, rows: Rows, components: int) -> None:
        super().__init__()
        self._rows = rows
        self._ranks: dict[str, int] = {}  # of the tasks in the stack
        self.register_buffer("_stack", torch.zeros(0, components, 0), persistent=False)

    @property
    def stack(self) -> Tensor:
        """(rows, k, p), with the coefficients of all tasks but those that have a parameter of their own."""
        return self._buffers["_stack"]  # in each forward: a lookup as an attribute takes longer

    def own(self, task: str) -> nn.Parameter | None:
        """The parameter that a task has of its own, if it has one."""
        if task not in self._parameters:
            return None
        return self._parameters[task]  # not by `get`: ZeRO-3 of DeepSpeed gathers what is asked for by its key

    def row_of(self, task: str) -> Tensor | None:
        """A view of a task's coefficients (k, p_i) in the stack; None if they are not there."""
        if (rank := self._ranks.get(task)) is None:
            return None
        (place,) = self._rows.of([task])
        row = self._stack[place]
        return row if rank == row.shape[1] else row[:, :rank]

    def of_task(self, task: str) -> Tensor | None:
        """A task's coefficients (k, p_i), wherever they are, and contiguous; None if it has none."""
        return self.own(task) if (row := self.row_of(task)) is None else row.contiguous()

    def of_task_or_zeros(self, task: str) -> Tensor:
        return self.zeros if (found := self.of_task(task)) is None else found

    @property
    def zeros(self) -> Tensor:
        """The coefficients (k, 1) of no task."""
        return self._stack.new_zeros(self._stack.shape[1], 1)

    def is_trained(self, task: str) -> bool:
        return (own := self.own(task)) is not None and own.requires_grad

    def train_only(self, tasks: Collection[str]) -> None:
        """Train these tasks and no others; what has no parameter of its own is not looked at."""
        wanted = set(tasks)
        for task in [task for task in self._parameters if task not in wanted]:
            self._parameters[task].requires_grad_(False)
            self._settle(task)
        for task in tasks:
            self.train_also(task)

    def train_also(self, task: str, trained: bool = True) -> None:
        """Train a task, or no longer, and leave the others as they are."""
        if task in self._ranks and trained:
            row = self.row_of(task).clone(memory_format=torch.contiguous_format)
            del self._ranks[task]
            self._parameters[task] = nn.Parameter(row)
        elif task in self._parameters:
            self._parameters[task].requires_grad_(trained)

    def _settle(self, task: str) -> None:
        """Put a parameter into the stack, unless it has a gradient or somebody else holds it."""
        parameter = self._parameters[task]
        if parameter.grad is not None or not self._fits(parameter):
            return
        held, value = weakref.ref(parameter), parameter.data
        del parameter, self._parameters[task]
        if (kept := held()) is not None:
            self._parameters[task] = kept
        else:
            self._put(task, value)

    def _fits(self, value: Tensor) -> bool:
        if self._ranks:
            like = value.dtype == self._stack.dtype and value.device == self._stack.device
        else:
            like = value.dtype == torch.float32
        return like and self._has_shape(value)

    def _has_shape(self, value: Tensor) -> bool:
        return not value.is_meta and value.ndim == 2 and value.shape[0] == self._stack.shape[1]

    def _put(self, task: str, value: Tensor) -> None:
        """Give a task's coefficients (k, p_i) a place in the stack."""
        if not self._ranks:
            self._stack = self._stack.to(value.device, value.dtype)
        self._write(task, value)
        self._keys[task] = None
        self._ranks[task] = value.shape[1]

    def set(self, task: str, value: Tensor, *, trained: bool) -> None:
        """Give a task its coefficients (k, p_i) float32.

        Args:
            task: Its name. If it has a parameter of its own of this shape, that takes the values; if it is in the
                stack, it stays there.
            value: The coefficients, which nothing else uses.
            trained: Whether a parameter that is made for it is trained.
        """
        own = self.own(task)
        if own is not None and own.shape == value.shape and own.dtype == torch.float32:
            own.data.copy_(value)
        else:
            self[task] = nn.Parameter(value, requires_grad=trained and task not in self._ranks)

    def set_all(
        self, values: Tensor, ranks: Mapping[str, int], trained: Collection[str], device: torch.device | None
    ) -> None:
        """Give many tasks their coefficients, as `set` does for one.

        Args:
            values: (tasks, k, p) float32, zeros filling up smaller ranks.
            ranks: By task, its rank, in the order of the values.
            trained: As for `set`, the tasks for which it is so.
            device: Where the layer computes; None if that is not known.
        """
        device = device or self._stack.device
        if self._ranks.keys() <= ranks.keys():  # nothing else is in the stack
            self._stack = self._stack.to(device, torch.float32)
        alike = (self._stack.dtype, self._stack.device) == (torch.float32, device)
        places = []
        for place, (task, rank) in enumerate(ranks.items()):
            if task in self._parameters or task in trained or not alike:
                value = values[place, :, :rank].to(device, copy=True, memory_format=torch.contiguous_format)
                self.set(task, value, trained=task in trained)
            else:
                places.append(place)
        if not places:
            return
        tasks = list(ranks)
        self._make_room(max(map(self._rows.take, tasks)), values.shape[2])
        rows = torch.tensor(self._rows.of(tasks[place] for place in places), device=device)
        chosen = values if len(places) == len(values) else values[torch.tensor(places, device=values.device)]
        padded = nn.functional.pad(chosen, (0, self._stack.shape[2] - values.shape[2]))
        with torch.no_grad():
            self._stack.index_copy_(0, rows, padded.to(device))
        self._keys.update((tasks[place], None) for place in places)
        self._ranks.update((tasks[place], ranks[tasks[place]]) for place in places)

    def set_components(self, components: int) -> None:
        """Give the tasks in the stack room for another k, of zeros; their values are yet to come."""
        if components != self._stack.shape[1]:
            self._resize(len(self._stack), components, self._stack.shape[2])

    def write_own(self) -> None:
        """Copy what has a parameter of its own into its row too, for the stack to have a row for every task."""
        self._make_room(self._rows.count - 1, 0)
        for task, parameter in self._parameters.items():
            if self._has_shape(parameter):
                self._write(task, parameter.data)

    def _write(self, task: str, value: Tensor) -> None:
        rank = value.shape[1]
        row = self._rows.take(task)
        self._make_room(row, rank)
        with torch.no_grad():
            self._stack[row, :, :rank] = value
            self._stack[row, :, rank:] = 0

    def _make_room(self, row: int, rank: int) -> None:
        if row >= len(self._stack) or rank > self._stack.shape[2]:
            self._resize(row + 1, self._stack.shape[1], max(rank, self._stack.shape[2]))

    def _resize(self, rows: int, components: int, rank: int) -> None:
        """Make room; a little more than is needed, so that tasks that come one by one cost a copy now and then."""
        rows = max(rows, self._rows.count, len(self._stack))
        if rows > len(self._stack) > 0:
            rows += len(self._stack) // 8
        with torch.inference_mode(False), torch.no_grad():
            stack = torch.zeros(rows, components, rank, dtype=self._stack.dtype, device=self._stack.device)
            kept = min(components, self._stack.shape[1])
            stack[: len(self._stack), :kept, : self._stack.shape[2]] = self._stack[:, :kept]
        self._stack = stack

    def _clear(self, task: str) -> None:
        """Make the row of a task zero, which it may have without being in the stack, by `write_own`."""
        (row,) = self._rows.of([task])
        if 0 < row < len(self._stack):
            with torch.no_grad():
                self._stack[row] = 0

    def __getitem__(self, task: str) -> Any:
        row = self.row_of(task)
        return self._parameters[task] if row is None else nn.Parameter(row, requires_grad=False)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_ranks", ()):
            return self[name]
        return super().__getattr__(name)

    def __setitem__(self, task: str, value: Any) -> None:
        if not value.requires_grad and self._parameters.get(task) is not value and self._fits(value):
            self._parameters.pop(task, None)
            self._put(task, value.data)
            return
        self._ranks.pop(task, None)
        self._keys[task] = None
        self._parameters[task] = (
            value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=value.requires_grad)
        )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Take what is set as an attribute, as loaders of transformers do, in place of what is in the stack."""
        if name in self._ranks and param is not None:
            self[name] = param
        else:
            super().register_parameter(name, param)

    def __delitem__(self, task: str) -> None:
        del self._keys[task]
        self._ranks.pop(task, None)
        self._parameters.pop(task, None)
        self._clear(task)

    def pop(self, key: str) -> Any:
        value = self[key]
        if key in self._ranks:
            value = nn.Parameter(value.data.clone(), requires_grad=False)
        del self[key]
        return value

    def move(self, task: str, device: torch.device) -> None:
        """Move the coefficients of a task, with those of all others in the stack if it is there."""
        if task in self._ranks:
            self._stack = self._stack.to(device)
        elif task in self._parameters and not self._parameters[task].is_meta:
            self[task] = self._parameters[task].to(device)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        """Give every task a tensor; copies of what is in the stack, as safetensors refuses views of one tensor."""
        rows = self._stack.detach().unbind()
        for task, place in zip(self._keys, self._rows.of(self._keys), strict=True):
            if (rank := self._ranks.get(task)) is not None:
                destination[f"{prefix}{task}"] = rows[place][:, :rank].clone(memory_format=torch.contiguous_format)
            else:
                own = self._parameters[task]
                destination[f"{prefix}{task}"] = own if keep_vars else own.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        others: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, others, error_msgs)
        unexpected_keys.extend(name for name in others if name.removeprefix(prefix) not in self._ranks)
        for task, rank in list(self._ranks.items()):
            given = state_dict.get(name := f"{prefix}{task}")
            if given is None:
                missing_keys.append(name)
            elif tuple(given.shape) != (shape := (self._stack.shape[1], rank)):
                error_msgs.append(
                    f"size mismatch for {name}: copying a param with shape {given.shape} from checkpoint, the shape "
                    f"in current model is {torch.Size(shape)}."
                )
            elif not given.is_meta:
                self._put(task, given)

    def extra_repr(self) -> str:
        count = len(self)
        return f"{count} {'task' if count == 1 else 'tasks'}, ({self._stack.shape[1]}, {self._stack.shape[2]}) each"
