"""Rows of tasks in the stacks of layers, and the rows that the samples of a mixed batch need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


BASE = "__base__"  # PEFT's name for a sample without a task


class Rows:
    """
    The row of each task in the stacks of all layers of a model. A mixed batch therefore needs one index rather than
    one for each layer.

    Row 0 belongs to no task. It is zero in every stack, as is the row of a task in a layer that it does not adapt, so
    neither adds anything.
    """

    def __init__(self) -> None:
        self._of: dict[str, int] = {}
        self._free: list[int] = []
        self.count = 1  # includes row 0 and rows that were given back
        self._latest: MixedBatch | None = None
        self._trained: MixedBatch | None = None

    def take(self, task: str) -> int:
        """Return the row of a task, assigning one if it has none."""
        if task not in self._of:
            if self._free:
                self._of[task] = self._free.pop()
            else:
                self._of[task] = self.count
                self.count += 1
        return self._of[task]

    def of(self, tasks: Iterable[str]) -> list[int]:
        """Return the rows of tasks; 0 for a task without a row."""
        return [self._of.get(task, 0) for task in tasks]

    def give_back(self, task: str) -> None:
        """Free the row of a task that no layer has any more, for use by another task."""
        if task in self._of:
            self._free.append(self._of.pop(task))

    @contextmanager
    def mixing(self, batch: MixedBatch, *, training: bool) -> Iterator[None]:
        """Make the layers of the model compute a mixed batch, in this thread and within the block.

        Args:
            batch: Tasks of the batch's samples.
            training: Whether a backward pass may recompute layers, as with gradient checkpointing.
        """
        token, outer = _CURRENT.set(batch), self._latest
        self._latest, self._trained = batch, batch if training else None
        try:
            yield
        finally:
            self._latest = outer
            _CURRENT.reset(token)

    def current(self) -> MixedBatch | None:
        """The mixed batch being computed; None if there is none."""
        if torch.compiler.is_compiling():  # the compiler does not support context variables
            return self._latest
        batch = _CURRENT.get()
        if batch is None and self._trained is not None and torch._C._current_graph_task_id() != -1:
            return self._trained
        return batch if batch is not None and batch.rows is self else None


class MixedBatch:
    """
    The tasks of the samples of a batch.

    Args:
        names: Names of the tasks, one for each sample.
        rows: Rows of the model's tasks.
        beams: Number of times that generation repeats each sample.
    """

    def __init__(self, names: Sequence[str], rows: Rows, beams: int = 1) -> None:
        self.rows = rows
        self.names = list(names)
        self.tasks = [name for name in dict.fromkeys(names) if name != BASE]
        self.only_task = self.tasks[0] if len(self.tasks) == 1 and BASE not in names else None
        self._repeats = {len(self.names) * beams: beams, len(self.names): 1}
        place = {name: i for i, name in enumerate(self.tasks)}
        self._places = torch.tensor([place.get(name, len(self.tasks)) for name in names], dtype=torch.long)
        self._task_rows = torch.tensor([*rows.of(self.tasks), 0])
        self._indices: dict[tuple[int, torch.device], Indices] = {}

    def indices(self, samples: int, device: torch.device) -> Indices:
        """Return the indices by which a layer looks up the coefficients of its samples.

        Args:
            samples: Size of the batch that the layer receives: with beams or, in an encoder, without.
            device: Device that the layer computes on.

        Raises:
            ValueError: If the size does not match the batch.
        """
        if (known := self._indices.get((samples, device))) is None:
            places = self._places.repeat_interleave(self._check_size(samples)).to(device)
            task_rows = self._task_rows.to(device)
            known = self._indices[samples, device] = Indices(task_rows[places], task_rows, places)
        return known

    def names_of(self, samples: int) -> list[str]:
        """Return the name for each sample that a module receives. Argument and errors are those of `indices`."""
        repeats = self._check_size(samples)
        return [name for name in self.names for _ in range(repeats)]

    def _check_size(self, samples: int) -> int:
        if (repeats := self._repeats.get(samples)) is None:
            raise ValueError(f"{len(self.names)} adapter_names for a batch of {samples}, expected one for each sample")
        return repeats


@dataclass(frozen=True)
class Indices:
    """
    Indices by which a layer looks up the coefficients of its samples, on its device, all int64.

    Args:
        rows: Row of each sample's task, (samples,).
        task_rows: Row of each task of the batch, and row 0 for samples without a task, (tasks + 1,).
        places: Position of each sample's task in `task_rows`, (samples,).
    """

    rows: Tensor
    task_rows: Tensor
    places: Tensor


@dataclass(frozen=True)
class BatchCoefficients:
    """
    The coefficients of a mixed batch in one layer.

    Args:
        out: Output-side coefficients (tasks, k_out, p) of each task of the batch, and zeros for samples without one.
        in_: Input-side coefficients (tasks, k_in, p), in the same order.
        places: Position of each sample's task in them, (samples,), int64.
    """

    out: Tensor
    in_: Tensor
    places: Tensor

    def fold_pays(self, tokens: int) -> bool:
        """Return whether forming each task's factors first takes fewer products than applying the bases to each token.

        With T tokens over all samples, ``2 T k (n + d)`` become ``2 T p (n + d)``, and ``2 k p (n + d)`` are added for
        each task.
        """
        tasks, k, p = max(self.out.shape, self.in_.shape)
        return len(self.places) * tokens * (k - p) > tasks * k * p

    def folded(self, basis_in: Tensor, basis_out: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors A (samples, p, d) and B^T (samples, p, n) of each sample's task."""
        down, up = (
            (side.mT.flatten(0, 1) @ basis.T).view(len(side), -1, len(basis))
            for side, basis in ((self.in_, basis_in), (self.out, basis_out))
        )
        return down[self.places], up[self.places]

    def of_samples(self) -> tuple[Tensor, Tensor]:
        """Return the coefficients (samples, k_out, p), (samples, k_in, p) of each sample's task."""
        return self.out[self.places], self.in_[self.places]


_CURRENT: ContextVar[MixedBatch | None] = ContextVar("_CURRENT", default=None)
