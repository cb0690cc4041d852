"""The data of a stream, checked: the splits of its tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import datasets
import torch.utils.data
from transformers.trainer_utils import has_length


# What `Trainer` takes: of datasets or torch, to be indexed or streamed.
Data = datasets.Dataset | datasets.IterableDataset | torch.utils.data.Dataset
TaskData = Data | Mapping[str, Data]

TRAIN_SPLIT = "train"
EVALUATION_SPLITS = ("test", "validation", "eval")


class TaskSplits(NamedTuple):
    """What a task is learned from, and what it is scored on after each task."""

    train: Data
    evaluation: Data | None


def split_data(name: str, data: TaskData, *, max_steps: int) -> TaskSplits:
    """Training and evaluation data of a task.

    Args:
        name: The task's name.
        data: A data set to train on, or data sets by split.
        max_steps: Length of a phase in steps; not positive if it is given in epochs.

    Raises:
        ValueError: If there is no training data, data of another kind, or none of the other splits has a known name;
            or if the training data has no length, and the phases have none either.
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
            f"give one of another name as {{'train': data['train'], 'test': data[{others[0]!r}]}}, or 'train' alone "
            "for a task that is not scored"
        )
    return TaskSplits(train, next(evaluation_splits(data), None))


def is_streamed(data: Data) -> bool:
    """Whether data comes one example after the other, from nobody knows how many."""
    return not has_length(data)


@contextmanager
def naming_used_up_streams(task: str) -> Iterator[None]:
    """Within the block, data that should give a batch and has none left is told by its task.

    Raises:
        ValueError: Instead of accelerate's, which names nothing.
    """
    try:
        yield
    except ValueError as error:
        if "does not contain any data" not in str(error):
            raise
        raise ValueError(used_up(task)) from error


def used_up(task: str) -> str:
    """What is said of a stream that has no batch left."""
    return f"task {task!r} has a stream that is used up, expected one that can be read for each phase and evaluation"


def evaluation_splits(data: TaskData, *, reverse: bool = False) -> Iterator[Data]:
    """The data that a task may be evaluated on, in the order in which one is taken to score it."""
    if isinstance(data, Mapping):
        names = reversed(EVALUATION_SPLITS) if reverse else EVALUATION_SPLITS
        yield from (data[name] for name in names if data.get(name) is not None and not _is_empty(data[name]))


def _is_data(data: object) -> bool:
    return is_iterable_only(data) or (hasattr(data, "__getitem__") and not isinstance(data, (str, bytes, Mapping)))


def is_iterable_only(data: object) -> bool:
    """Whether data can only be read from its beginning."""
    return isinstance(data, (datasets.IterableDataset, torch.utils.data.IterableDataset))


def cannot_be_indexed(data: Data) -> bool:
    """Whether data has no length, or has one and can only be read from its beginning all the same."""
    return is_streamed(data) or is_iterable_only(data)


def _is_empty(data: Data) -> bool:
    return has_length(data) and len(data) == 0
