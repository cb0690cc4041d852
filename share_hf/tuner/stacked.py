"""Coefficients of any number of tasks in one tensor, which PEFT sees as one parameter per task."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .rows import Rows


class StackedParameters(nn.ParameterDict):
    """
    The coefficients (k, p_i) of tasks on one side of a layer, by task.

    Coefficients that are not trained share one tensor (rows, k, p), padded with zeros beyond the rank of a task.
    Reading a task returns a parameter that is a view of its row. A task has a parameter of its own while it is
    trained, or as long as something else, such as an optimizer, holds the parameter, or if its dtype or device differs
    from the stack's. Such a parameter goes back into the stack with the next choice of what is trained.

    Args:
        rows: Rows of the tasks in all layers of the model.
        components: Number of components k.
    """

    # A task may have any name that begins with a letter or digit, and is looked up among the attributes of a module.
    _stack: Tensor

    def __init__(self, rows: Rows, components: int) -> None:
        super().__init__()
        self._rows = rows
        self._ranks: dict[str, int] = {}  # ranks of the tasks in the stack
        self.register_buffer("_stack", torch.zeros(0, components, 0), persistent=False)

    @property
    def stack(self) -> Tensor:
        """The coefficients (rows, k, p) of all tasks except those that have a parameter of their own."""
        return self._buffers["_stack"]  # used in each forward: an attribute lookup takes longer

    def own(self, task: str) -> nn.Parameter | None:
        """Return a task's own parameter; None if it has none."""
        if task not in self._parameters:
            return None
        return self._parameters[task]  # not by `get`: DeepSpeed's ZeRO-3 gathers parameters that are read by key

    def row_of(self, task: str) -> Tensor | None:
        """Return a view of a task's coefficients (k, p_i) in the stack; None if they are not in it."""
        if (rank := self._ranks.get(task)) is None:
            return None
        (place,) = self._rows.of([task])
        row = self._stack[place]
        return row if rank == row.shape[1] else row[:, :rank]

    def of_task(self, task: str) -> Tensor | None:
        """Return a task's coefficients (k, p_i), contiguous, from wherever they are; None if it has none."""
        return self.own(task) if (row := self.row_of(task)) is None else row.contiguous()

    def of_task_or_zeros(self, task: str) -> Tensor:
        return self.zeros if (found := self.of_task(task)) is None else found

    @property
    def zeros(self) -> Tensor:
        """Zero coefficients (k, 1), for samples without a task."""
        return self._stack.new_zeros(self._stack.shape[1], 1)

    def is_trained(self, task: str) -> bool:
        return (own := self.own(task)) is not None and own.requires_grad

    def train_only(self, tasks: Collection[str]) -> None:
        """Train these tasks and no others. Tasks without a parameter of their own are not visited."""
        wanted = set(tasks)
        for task in [task for task in self._parameters if task not in wanted]:
            self._parameters[task].requires_grad_(False)
            self._settle(task)
        for task in tasks:
            self.train_also(task)

    def train_also(self, task: str, trained: bool = True) -> None:
        """Start or stop training a task and leave the others as they are."""
        if task in self._ranks and trained:
            row = self.row_of(task).clone(memory_format=torch.contiguous_format)
            del self._ranks[task]
            self._parameters[task] = nn.Parameter(row)
        elif task in self._parameters:
            self._parameters[task].requires_grad_(trained)

    def _settle(self, task: str) -> None:
        """Move a parameter into the stack, unless it has a gradient or something else holds it."""
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
        """Place a task's coefficients (k, p_i) in the stack."""
        if not self._ranks:
            self._stack = self._stack.to(value.device, value.dtype)
        self._write(task, value)
        self._keys[task] = None
        self._ranks[task] = value.shape[1]

    def set(self, task: str, value: Tensor, *, trained: bool) -> None:
        """Give a task its coefficients (k, p_i), float32.

        Args:
            task: Name of the task. If it has a parameter of its own of this shape, that parameter takes the values; if
                it is in the stack, it stays there.
            value: Coefficients, in a tensor that nothing else uses.
            trained: Whether a parameter made for the task is trained.
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
            values: Coefficients (tasks, k, p), float32, with smaller ranks padded with zeros.
            ranks: Ranks by task, in the order of the values.
            trained: Tasks for which a new parameter is trained. See `set`.
            device: Device that the layer computes on; None if it is unknown.
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
        """Give the tasks in the stack room, filled with zeros, for another k; their values are set later."""
        if components != self._stack.shape[1]:
            self._resize(len(self._stack), components, self._stack.shape[2])

    def write_own(self) -> None:
        """Copy each task's own parameter into its row too, so that the stack has a row for every task."""
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
        """Enlarge the stack by a little more than needed, so that adding tasks one by one rarely costs a copy."""
        rows = max(rows, self._rows.count, len(self._stack))
        if rows > len(self._stack) > 0:
            rows += len(self._stack) // 8
        with torch.inference_mode(False), torch.no_grad():
            stack = torch.zeros(rows, components, rank, dtype=self._stack.dtype, device=self._stack.device)
            kept = min(components, self._stack.shape[1])
            stack[: len(self._stack), :kept, : self._stack.shape[2]] = self._stack[:, :kept]
        self._stack = stack

    def _clear(self, task: str) -> None:
        """Set the row of a task to zero. `write_own` may have given it one without it being in the stack."""
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
        """Replace what is in the stack by a parameter set as an attribute, as loaders of transformers do."""
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
        """Move the coefficients of a task; if they are in the stack, all others in it move too."""
        if task in self._ranks:
            self._stack = self._stack.to(device)
        elif task in self._parameters and not self._parameters[task].is_meta:
            self[task] = self._parameters[task].to(device)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        """Save a tensor for every task; stacked ones are copied, because safetensors refuses views of one tensor."""
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
