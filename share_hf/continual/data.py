"""The data of a stream, checked: the splits of its tasks, their labels, and what a task's score is by default."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch.utils.data
from datasets import ClassLabel
from transformers import EvalPrediction
from transformers.trainer_utils import has_length


# What `Trainer` takes: of datasets or torch, to be indexed or streamed.
Data = datasets.Dataset | datasets.IterableDataset | torch.utils.data.Dataset
TaskData = Data | Mapping[str, Data]

TRAIN_SPLIT = "train"
EVALUATION_SPLITS = ("test", "validation", "eval")
LABEL_COLUMNS = ("label", "labels")


class TaskSplits(NamedTuple):
    """What a task is learned from, and what it is scored on after each task."""

    train: Data
    evaluation: Data | None


@dataclass(frozen=True)
class TaskDetails:
    """What else is known of a task of a stream.

    Args:
        selection: Data that it is evaluated on while it trains, if it is.
        num_labels: Number of its labels; None if it is not a classification.
        label_names: Names of its labels, if the data set knows them.
    """

    selection: Data | None = None
    num_labels: int | None = None
    label_names: tuple[str, ...] | None = None


def task_details(
    name: str, data: TaskData, splits: TaskSplits, *, selects: bool, labels_of_model: int | None
) -> TaskDetails:
    """Check what is known of a task.

    Args:
        name: The task's name.
        data: Data of the task as it was given.
        splits: The same data, split.
        selects: Whether the task is evaluated while it trains.
        labels_of_model: Number of labels of the model; None if the stream is not one of classifications.

    Raises:
        ValueError: If data for that evaluation is missing, or the labels are not those of a task of this model.
    """
    selection = next(_evaluation_splits(data, reverse=True), None) if selects else None
    if selects and selection is None:
        raise ValueError(
            f"task {name!r} has no evaluation data, expected {EVALUATION_SPLITS} in its data, or eval_dataset: "
            "eval_strategy or eval_on_start asks for evaluations while it trains"
        )
    if labels_of_model is None:
        return TaskDetails(selection)
    for split in (selection, splits.evaluation):
        num_labels, label_names = count_labels(name, splits.train, split, labels_of_model)
    return TaskDetails(selection, num_labels, None if label_names is None else tuple(label_names))


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
    return TaskSplits(train, next(_evaluation_splits(data), None))


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


def _evaluation_splits(data: TaskData, *, reverse: bool = False) -> Iterator[Data]:
    if isinstance(data, Mapping):
        names = reversed(EVALUATION_SPLITS) if reverse else EVALUATION_SPLITS
        yield from (data[name] for name in names if data.get(name) is not None and not _is_empty(data[name]))


def _is_data(data: object) -> bool:
    return _is_iterable_only(data) or (hasattr(data, "__getitem__") and not isinstance(data, (str, bytes, Mapping)))


def _is_iterable_only(data: object) -> bool:
    return isinstance(data, (datasets.IterableDataset, torch.utils.data.IterableDataset))


def _is_empty(data: Data) -> bool:
    return has_length(data) and len(data) == 0


def count_labels(task: str, train: Data, evaluation: Data | None, num_labels: int) -> tuple[int, list[str] | None]:
    """Number of labels of a classification task, and their names if the data set knows them.

    Data of torch is read once for its labels. Data that cannot be read twice has to tell them.

    Raises:
        ValueError: If the labels are not known, the model has fewer of them, or the evaluation data has one that is
            never seen in training.
    """
    columns = _columns(task, train)
    column = next((name for name in LABEL_COLUMNS if name in columns), None)
    if column is None:
        raise ValueError(f"task {task!r} has columns {columns}, expected one of {LABEL_COLUMNS}")
    if evaluation is not None and column not in _columns(task, evaluation):
        raise ValueError(
            f"task {task!r} has columns {_columns(task, evaluation)} in its evaluation data, expected {column!r}"
        )
    feature = (getattr(train, "features", None) or {}).get(column)
    names = list(feature.names) if isinstance(feature, ClassLabel) else None
    labels = _labels(train, column)
    if labels is None and names is None:
        raise ValueError(
            f"task {task!r} is streamed, so that its labels cannot be counted, expected features with a "
            f"datasets.ClassLabel for {column!r}"
        )
    labels = range(len(names)) if labels is None else labels
    for label in labels:
        if not isinstance(label, int) or not 0 <= label < num_labels:
            raise ValueError(
                f"task {task!r} has label {label!r}, expected integers under num_labels = {num_labels} of the model"
            )
    seen = set(labels)
    of_evaluation = _labels(evaluation, column) if evaluation is not None else None
    if unseen := sorted(set(of_evaluation or ()) - seen):
        raise ValueError(
            f"task {task!r} has label {unseen[0]!r} in its evaluation data, expected one of those it is trained on: "
            f"{sorted(seen)}"
        )
    return (len(names), names) if names is not None else (max(seen) + 1, None)


def _columns(task: str, data: Data) -> list[str]:
    """Names of what an example has.

    Raises:
        ValueError: If examples are no mappings.
    """
    if (columns := getattr(data, "column_names", None)) is not None:
        return list(columns)
    example = next(iter(data)) if _is_iterable_only(data) else data[0]
    if not isinstance(example, Mapping):
        raise ValueError(
            f"task {task!r} has a {type(example).__name__} as an example, expected a mapping with one of "
            f"{LABEL_COLUMNS}, so that its labels can be counted"
        )
    return list(example)


def _labels(data: Data, column: str) -> list[Any] | None:
    """The labels of all examples, None if they cannot be read ahead."""
    if _is_iterable_only(data):
        return None
    if isinstance(data, datasets.Dataset):
        return list(data.with_format(None)[column])
    labels = (data[i][column] for i in range(len(data)))
    return [label.item() if getattr(label, "ndim", None) == 0 else label for label in labels]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Fraction of examples whose largest logit is their label's."""
    predictions, labels = prediction.predictions, prediction.label_ids
    if not isinstance(predictions, list):
        predictions, labels = [predictions], [labels]
    # Of each batch, with `eval_do_concat_batches=False`.
    right = [_are_right(*batch) for batch in zip(predictions, labels, strict=True)]
    return {"accuracy": float(np.concatenate(right).mean())}


def _are_right(predictions: np.ndarray | tuple[np.ndarray, ...], labels: np.ndarray) -> np.ndarray:
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    # `preprocess_logits_for_metrics` may have chosen the labels already.
    return (logits if logits.shape == labels.shape else logits.argmax(-1)) == labels
