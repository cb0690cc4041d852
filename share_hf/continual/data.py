"""Checking the data of a stream: the splits of its tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import datasets
import torch.utils.data
from transformers.trainer_utils import has_length


# Data sets that `Trainer` takes: of datasets or torch, indexed or streamed.
Data = datasets.Dataset | datasets.IterableDataset | torch.utils.data.Dataset
TaskData = Data | Mapping[str, Data]

TRAIN_SPLIT = "train"
EVALUATION_SPLITS = ("test", "validation", "eval")


class TaskSplits(NamedTuple):
    """The data that a task is learned from, and the data that it is scored on after each task."""

    train: Data
    evaluation: Data | None


def split_data(name: str, data: TaskData, *, max_steps: int) -> TaskSplits:
    """Return the training and evaluation data of a task.

    Args:
        name: Name of the task.
        data: Data set to train on, or data sets by split.
        max_steps: Length of a phase in steps. It is not positive if the length is given in epochs.

    Raises:
        ValueError: If there is no training data, the data is of an unknown kind, there are other splits but none with
            a known name, or neither the training data nor the phases have a length.
    """
    if not isinstance(data, Mapping):
        data = {TRAIN_SPLIT: data}
    if TRAIN_SPLIT not in data:
        raise ValueError(f"task {name!r} has splits {sorted(data)}, expected {TRAIN_SPLIT!r} among them")
    for split in (TRAIN_SPLIT, *EVALUATION_SPLITS):
        if data.get(split) is not None and not _is_data(data[split]):
            raise ValueError(
                f"task {name!r} has a {type(data[split]).__name__} as its {split} data, expected a data set of "
                "datasets or torch"
            )
    train = data[TRAIN_SPLIT]
    if train is None or _is_empty(train):
        raise ValueError(f"task {name!r} has no training examples, expected at least one")
    if is_streamed(train) and max_steps <= 0:
        raise ValueError(f"task {name!r} has training data without a length, expected max_steps in the arguments")
    others = sorted(set(data) - {TRAIN_SPLIT})
    if others and not set(others) & set(EVALUATION_SPLITS):
        raise ValueError(
            f"task {name!r} has splits {sorted(data)}, expected one of {EVALUATION_SPLITS} beside {TRAIN_SPLIT!r}: "
            f"give a split of another name as {{'train': data['train'], 'test': data[{others[0]!r}]}}, or 'train' "
            "alone for a task that is not scored"
        )
    return TaskSplits(train, next(evaluation_splits(data), None))


def is_streamed(data: Data) -> bool:
    """Return whether data is streamed, so that its number of examples is unknown."""
    return not has_length(data)


@contextmanager
def naming_used_up_streams(task: str) -> Iterator[None]:
    """Name the task whose data has no batch left where one is needed within the block.

    Raises:
        ValueError: If its data is used up, in place of accelerate's error, which names nothing.
    """
    try:
        yield
    except ValueError as error:
        if "does not contain any data" not in str(error):
            raise
        raise ValueError(used_up(task)) from error


def used_up(task: str) -> str:
    """Return the message about a task whose streamed data has no batch left."""
    return (
        f"task {task!r} has a stream that is used up, expected one that can be read again for each phase and "
        "evaluation"
    )


def evaluation_splits(data: TaskData, *, reverse: bool = False) -> Iterator[Data]:
    """Yield the data that a task may be evaluated on, in order of preference."""
    if isinstance(data, Mapping):
        names = reversed(EVALUATION_SPLITS) if reverse else EVALUATION_SPLITS
        yield from (data[name] for name in names if data.get(name) is not None and not _is_empty(data[name]))


def _is_data(data: object) -> bool:
    return is_iterable_only(data) or (hasattr(data, "__getitem__") and not isinstance(data, (str, bytes, Mapping)))


def is_iterable_only(data: object) -> bool:
    """Return whether data can only be read from its beginning."""
    return isinstance(data, (datasets.IterableDataset, torch.utils.data.IterableDataset))


def cannot_be_indexed(data: Data) -> bool:
    """Return whether data has no length, or has one but can only be read from its beginning."""
    return is_streamed(data) or is_iterable_only(data)


def _is_empty(data: Data) -> bool:
    return has_length(data) and len(data) == 0
