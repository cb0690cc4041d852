"""Finding the kind of problem of a task from its labels: classes, values, or several labels per input.

Integers are classes, floating-point numbers are values to predict (a regression), and lists of zeros and ones are
labels of which an example may have several. One stream may contain tasks of all three kinds, whatever `problem_type`
the configuration of the model has: each task uses the loss of its kind, on its own outputs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import datasets
import torch.nn.functional as F
from datasets import ClassLabel
from torch import Tensor
from transformers.utils import logging

from .data import EVALUATION_SPLITS, Data, TaskData, TaskSplits, evaluation_splits, is_iterable_only


logger = logging.get_logger(__name__)

# Names that transformers uses in the configuration of a model.
ProblemType = Literal["single_label_classification", "regression", "multi_label_classification"]
CLASSES: ProblemType = "single_label_classification"
REGRESSION: ProblemType = "regression"
MULTI_LABEL: ProblemType = "multi_label_classification"

LABEL_COLUMNS = ("label", "labels")


@dataclass(frozen=True)
class Problem:
    """The problem of a task: what it predicts.

    Args:
        problem_type: Kind of the task.
        num_labels: Number of its outputs, 1 for a regression.
        label_names: Names of its labels, if they are known.
    """

    problem_type: ProblemType
    num_labels: int
    label_names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class TaskDetails:
    """Further facts about a task of a stream.

    Args:
        selection: Data on which the task is evaluated while it trains, if it is.
        problem: Problem of the task, None if the model is not a classifier.
    """

    selection: Data | None = None
    problem: Problem | None = None


def task_details(
    name: str,
    data: TaskData,
    splits: TaskSplits,
    labels_of_model: int | None,
    *,
    selects: bool,
    label_names: Sequence[str] | None = None,
) -> TaskDetails:
    """Check a task, and return the details about it.

    Args:
        name: Name of the task.
        data: Data of the task as the user passed it.
        splits: The same data, split.
        labels_of_model: Number of labels of the model, None if it is not a classifier.
        selects: Whether the task is evaluated while it trains.
        label_names: Names of its labels, if the data does not have them.

    Raises:
        ValueError: If data for that evaluation is missing, or the labels do not fit the model.
    """
    selection = next(evaluation_splits(data, reverse=True), None) if selects else None
    if selects and selection is None:
        raise ValueError(
            f"task {name!r} has no evaluation data, expected {EVALUATION_SPLITS} in its data, or eval_dataset: "
            "eval_strategy or eval_on_start asks for evaluations during training"
        )
    if labels_of_model is None:
        return TaskDetails(selection)
    evaluations = [splits.evaluation] if selection is splits.evaluation else [selection, splits.evaluation]
    problem = problem_of(name, splits.train, [data for data in evaluations if data is not None], labels_of_model)
    return TaskDetails(selection, problem if label_names is None else _named(name, problem, label_names))


def check_label_names(names: Mapping[str, Sequence[str]], tasks: Collection[str], *, is_classifier: bool) -> None:
    """Warn about label names that belong to no known task, which may still come later, by itself.

    Args:
        names: Names of the labels of each task.
        tasks: Names of the known tasks.
        is_classifier: Whether the model is a classifier.

    Raises:
        ValueError: If there are names, but the model is not a classifier.
    """
    if names and not is_classifier:
        raise ValueError(f"labels has names for {sorted(names)}, expected none: the model is not a classifier")
    if tasks and (unknown := sorted(set(names) - set(tasks))):
        logger.warning("labels has names for %s, which are not among tasks: %s.", unknown, list(tasks))


def problem_of(task: str, train: Data, evaluations: Sequence[Data], num_labels: int) -> Problem:
    """Find what a task predicts from the labels that it is trained on.

    Torch data is read once for its labels. Data that can only be streamed must declare them in its features.

    Args:
        task: Name of the task.
        train: Data that the task is trained on.
        evaluations: Data that the task is evaluated on while it trains, and scored on, if any.
        num_labels: Number of labels of the model.

    Raises:
        ValueError: If the labels are unknown, are of several kinds or lengths, or need more outputs than the model
            has, or if the evaluation data has labels unlike those of the training data.
    """
    column = _label_column(task, train, evaluations)
    feature = (getattr(train, "features", None) or {}).get(column)
    labels = _labels(train, column)
    of_evaluation = [label for data in evaluations for label in _labels(data, column) or ()]
    if labels is None:
        problem = _of_feature(task, column, feature)
        _check_outputs(task, problem.num_labels, num_labels)
        if problem.problem_type == CLASSES:
            _check_classes(task, of_evaluation, problem.num_labels, " in its evaluation data")
        return problem
    if isinstance(labels[0], float):
        return _regression(task, labels, of_evaluation)
    if isinstance(labels[0], list):
        return _multi_label(task, labels, of_evaluation, num_labels)
    return _classes(task, labels, of_evaluation, num_labels, feature)


def loss_of(
    problem_type: ProblemType,
    logits: Tensor,
    labels: Tensor,
    num_labels: int,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Return the float32 loss of a task: cross entropy, mean squared error, or binary cross entropy of each label.

    Args:
        problem_type: Kind of the task.
        logits: Logits (samples, labels of the model). Outputs beyond the task's own labels do not count.
        labels: Class numbers or values (samples,), or zeros and ones (samples, num_labels).
        num_labels: Number of the task's outputs.
        num_items: Number that the sum over all labels is divided by. None means their number in this batch.
    """
    logits, labels = logits[..., :num_labels].float(), labels.to(logits.device)
    reduction = "mean" if num_items is None else "sum"
    if problem_type == REGRESSION:
        loss = F.mse_loss(logits.reshape(-1), labels.reshape(-1).float(), reduction=reduction)
    elif problem_type == MULTI_LABEL:
        loss = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction=reduction)
    else:
        loss = F.cross_entropy(logits.reshape(-1, num_labels), labels.reshape(-1), reduction=reduction)
    return loss if num_items is None else loss / num_items


def _named(task: str, problem: Problem, names: Sequence[str]) -> Problem:
    if isinstance(names, str) or len(names) != problem.num_labels or len(set(names)) != len(names):
        raise ValueError(
            f"labels has {names!r} for task {task!r}, expected {problem.num_labels} different names, one for each of "
            "its labels"
        )
    return replace(problem, label_names=tuple(names))


def _classes(task: str, labels: Sequence[Any], of_evaluation: Sequence[Any], num_labels: int, feature: Any) -> Problem:
    _check_classes(task, labels, num_labels)
    seen = set(labels)
    if unseen := sorted({label for label in of_evaluation if label not in seen}, key=str):
        raise ValueError(
            f"task {task!r} has label {unseen[0]!r} in its evaluation data, expected one of those it is trained on: "
            f"{sorted(seen)}"
        )
    if isinstance(feature, ClassLabel):
        _check_outputs(task, len(feature.names), num_labels)
        return Problem(CLASSES, len(feature.names), tuple(feature.names))
    return Problem(CLASSES, max(seen) + 1)


def _check_outputs(task: str, of_task: int, of_model: int) -> None:
    if of_task > of_model:
        _check_classes(task, [of_task - 1], of_model)


def _check_classes(task: str, labels: Sequence[Any], num_labels: int, where: str = " of the model") -> None:
    for label in labels:
        if not isinstance(label, int) or not 0 <= label < num_labels:
            raise ValueError(
                f"task {task!r} has label {label!r}, expected integers under num_labels = {num_labels}{where}"
            )


def _regression(task: str, labels: Sequence[Any], of_evaluation: Sequence[Any]) -> Problem:
    for where, values in (("", labels), (" in its evaluation data", of_evaluation)):
        for value in values:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(
                    f"task {task!r} has label {value!r}{where}, expected finite numbers: its first label, "
                    f"{labels[0]!r}, is the value of a regression"
                )
    return Problem(REGRESSION, 1)


def _multi_label(task: str, labels: Sequence[Any], of_evaluation: Sequence[Any], num_labels: int) -> Problem:
    width = len(labels[0])
    if not 0 < width <= num_labels:
        raise ValueError(
            f"task {task!r} has {width} labels, expected at least one and at most num_labels = {num_labels} of the "
            "model"
        )
    for where, rows in (("", labels), (" in its evaluation data", of_evaluation)):
        for row in rows:
            if not isinstance(row, list) or len(row) != width or not set(row) <= {0, 1}:
                raise ValueError(
                    f"task {task!r} has label {row!r}{where}, expected a list of {width} zeros and ones, as long as "
                    "its first"
                )
    return Problem(MULTI_LABEL, width)


def _of_feature(task: str, column: str, feature: Any) -> Problem:
    """Find what a task predicts from the declared feature of its labels, as streamed data requires."""
    if isinstance(feature, ClassLabel):
        return Problem(CLASSES, len(feature.names), tuple(feature.names))
    if str(getattr(feature, "dtype", "")).startswith("float"):
        return Problem(REGRESSION, 1)
    if (length := getattr(feature, "length", -1)) > 0 and hasattr(feature, "feature"):
        return Problem(MULTI_LABEL, length)
    raise ValueError(
        f"task {task!r} is streamed, so its labels cannot be counted, expected features with a datasets.ClassLabel "
        f"for {column!r}, a float for the value of a regression, or a list of known length for several labels"
    )


def _label_column(task: str, train: Data, evaluations: Sequence[Data]) -> str:
    columns = _columns(task, train)
    column = next((name for name in LABEL_COLUMNS if name in columns), None)
    if column is None:
        raise ValueError(f"task {task!r} has columns {columns}, expected one of {LABEL_COLUMNS}")
    for evaluation in evaluations:
        if column not in (columns := _columns(task, evaluation)):
            raise ValueError(f"task {task!r} has columns {columns} in its evaluation data, expected {column!r}")
    return column


def _columns(task: str, data: Data) -> list[str]:
    """Return the names of the columns of an example.

    Raises:
        ValueError: If examples are not mappings.
    """
    if (columns := getattr(data, "column_names", None)) is not None:
        return list(columns)
    example = next(iter(data)) if is_iterable_only(data) else data[0]
    if not isinstance(example, Mapping):
        raise ValueError(
            f"task {task!r} has a {type(example).__name__} as an example, expected a mapping with one of "
            f"{LABEL_COLUMNS}, because its labels are counted"
        )
    return list(example)


def _labels(data: Data, column: str) -> list[Any] | None:
    """Return the labels of all examples as Python objects, or None if they cannot be read ahead."""
    if is_iterable_only(data):
        return None
    if isinstance(data, datasets.Dataset):
        return list(data.with_format(None)[column])
    labels = (data[i][column] for i in range(len(data)))
    return [label.tolist() if hasattr(label, "tolist") else label for label in labels]
