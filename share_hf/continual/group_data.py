"""The data of tasks that are learned together: one data set, batches that mix tasks, and the steps of each task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.utils.data

from .data import Data


# Key of a batch for the number of each sample's task among those that are learned together, (samples,) int64.
TASK_NUMBERS = "share_task_numbers"


class GroupData(torch.utils.data.Dataset):
    """The concatenated training data of several tasks. An example is the number of its task, and its row.

    Args:
        data: Data of each task, which must have a length.
    """

    def __init__(self, data: Mapping[str, Data]) -> None:
        self.tasks = list(data)
        self.lengths = np.array([len(each) for each in data.values()])
        self._data = list(data.values())
        self._ends = self.lengths.cumsum()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> tuple[int, Any]:
        number = int(self.numbers_of(index))
        return number, self._data[number][int(index - self._ends[number] + self.lengths[number])]

    def numbers_of(self, indices: np.ndarray | int) -> np.ndarray:
        """Return the numbers of the tasks that examples belong to."""
        return np.searchsorted(self._ends, indices, side="right")


class GroupSampler(torch.utils.data.Sampler[int]):
    """Samples each example of each task once per epoch, in an order that depends only on the seed and the epoch.

    Examples of a task come in runs, so that a batch has that many samples of each task in it. The runs of all tasks
    come in random order, followed by what is left of each task. A task with more examples takes more steps.

    Args:
        data: Data to sample from.
        samples_per_task: Length of a run.
        seed: Seed of the order.
        epoch: Function that returns the number of the epoch that begins, from 0.
    """

    def __init__(self, data: GroupData, samples_per_task: int, seed: int, epoch: Callable[[], int]) -> None:
        self._data = data
        self._run = samples_per_task
        self._seed = seed
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[int]:
        yield from self._order(self._epoch()).tolist()

    def steps_of_tasks(self, total: int, *, step: int, process: int, processes: int = 1) -> np.ndarray:
        """Return the number of optimizer steps that each task takes part in, (tasks,).

        Args:
            total: Number of optimizer steps.
            step: Number of samples of a step, over all processes.
            process: Number of samples of a batch on one process.
            processes: Number of processes. With several, samples from the beginning fill up the last batches.
        """
        steps, epoch = np.zeros(len(self._data.tasks), dtype=np.int64), 0
        while total > 0:
            order = self._order(epoch)
            if processes > 1:
                order = np.resize(order, math.ceil(len(order) / (process * processes)) * process * processes)
            numbers = self._data.numbers_of(order[: total * step])
            pairs = np.unique(np.arange(len(numbers)) // step * len(steps) + numbers)
            steps += np.bincount(pairs % len(steps), minlength=len(steps))
            total -= math.ceil(len(order) / step)
            epoch += 1
        return steps

    def _order(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self._seed, epoch])
        runs, rests, begin = [], [], 0
        for length in self._data.lengths:
            shuffled = begin + generator.permutation(length)
            whole = length // self._run * self._run
            runs.append(shuffled[:whole].reshape(-1, self._run))
            rests.append(shuffled[whole:])
            begin += length
        mixed = generator.permutation(np.concatenate(runs)).ravel()
        return np.concatenate([mixed, *(rests[i] for i in generator.permutation(len(rests)))])


@dataclass
class GroupCollator:
    """Collates examples of `GroupData` into a batch.

    Args:
        collate: Function that collates the rows.
    """

    collate: Callable[[list[Any]], Any]

    def __call__(self, examples: Sequence[tuple[int, Any]]) -> Any:
        numbers, rows = zip(*examples, strict=True)
        batch = self.collate(list(rows))
        batch[TASK_NUMBERS] = torch.tensor(numbers)
        return batch
