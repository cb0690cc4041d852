"""The data of a stream, checked: the splits of its tasks, their labels, and what a task's score is by default."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from datasets import ClassLabel, Dataset, DatasetDict
from transformers import EvalPrediction


TaskData = Dataset | DatasetDict | Mapping[str, Dataset]

TRAIN_SPLIT = "train"
EVALUATION_SPLITS = ("test", "validation", "eval")
LABEL_COLUMNS = ("label", "labels")


class TaskSplits(NamedTuple):
    """What a task is learned from, and what it is scored on after each task."""

    train: Dataset
    evaluation: Dataset | None


@dataclass(frozen=True)
class TaskDetails:
    """What else is known of a task of a stream.

    Args:
        selection: Data that it is evaluated on while it trains, if it is.
        num_labels: Number of its labels; None if it is not a classification.
        label_names: Names of its labels, if the data set knows them.
    """

    selection: Dataset | None = None
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
            "eval_strategy asks for evaluations while it trains"
        )
    if labels_of_model is None:
        return TaskDetails(selection)
    for split in (selection, splits.evaluation):
        num_labels, label_names = count_labels(name, splits.train, split, labels_of_model)
    return TaskDetails(selection, num_labels, None if label_names is None else tuple(label_names))


def split_data(name: str, data: TaskData) -> TaskSplits:
    """Training and evaluation data of a task.

    Raises:
        ValueError: If there is no training data.
    """
    if not isinstance(data, Mapping):
        data = {TRAIN_SPLIT: data}
    if TRAIN_SPLIT not in data:
        raise ValueError(f"task {name!r} has splits {sorted(data)}, expected {TRAIN_SPLIT!r} among them")
    train = data[TRAIN_SPLIT]
    if train is None or (hasattr(train, "__len__") and len(train) == 0):
        raise ValueError(f"task {name!r} has no training examples, expected at least one")
    return TaskSplits(train, next(_evaluation_splits(data), None))


def _evaluation_splits(data: TaskData, *, reverse: bool = False) -> Iterator[Dataset]:
    if isinstance(data, Mapping):
        names = reversed(EVALUATION_SPLITS) if reverse else EVALUATION_SPLITS
        yield from (data[name] for name in names if data.get(name) is not None and len(data[name]))


def count_labels(
    task: str, train: Dataset, evaluation: Dataset | None, num_labels: int
) -> tuple[int, list[str] | None]:
    """Number of labels of a classification task, and their names if the data set knows them.

    Raises:
        ValueError: If the model has fewer labels, or the evaluation data has one that is never seen in training.
    """
    column = next((name for name in LABEL_COLUMNS if name in train.column_names), None)
    if column is None:
        raise ValueError(f"task {task!r} has columns {train.column_names}, expected one of {LABEL_COLUMNS}")
    if evaluation is not None and column not in evaluation.column_names:
        raise ValueError(
            f"task {task!r} has columns {evaluation.column_names} in its evaluation data, expected {column!r}"
        )
    labels = list(train.with_format(None)[column])
    for label in labels:
        if not isinstance(label, int) or not 0 <= label < num_labels:
            raise ValueError(
                f"task {task!r} has label {label!r}, expected integers under num_labels = {num_labels} of the model"
            )
    seen = set(labels)
    if evaluation is not None and (unseen := sorted(set(evaluation.with_format(None)[column]) - seen)):
        raise ValueError(
            f"task {task!r} has label {unseen[0]!r} in its evaluation data, expected one of those it is trained on: "
            f"{sorted(seen)}"
        )
    feature = train.features[column]
    if isinstance(feature, ClassLabel):
        return len(feature.names), list(feature.names)
    return max(seen) + 1, None


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Fraction of examples whose largest logit is their label's."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}
