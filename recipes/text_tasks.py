"""Turns users' data for text classification, regression and multi-label classification into tasks with metrics.

The problem type of a task follows from its data: integers and strings are classes, floating-point numbers are values
to predict, and lists are several labels of one text. Texts are single or in pairs. If the data is ambiguous, the error
says which option resolves it.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, get_args

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Value
from datasets import Sequence as ListOf
from task_data import evaluation_of, first_examples, load_splits, with_scored_split, without_unlabelled
from transformers import EvalPrediction, PreTrainedTokenizerBase
from transformers.utils import logging

from share_hf.continual.problems import CLASSES, MULTI_LABEL, REGRESSION, ProblemType


try:
    from scipy import stats
    from sklearn import metrics as sk
except ImportError as error:
    raise ImportError(
        f"{error}: text tasks are scored with scikit-learn and scipy, pip install 'share-hf[metrics]' or scikit-learn"
    ) from error

logger = logging.get_logger(__name__)

LABEL_COLUMNS = ("label", "labels", "score")
TEXT_COLUMNS = (
    *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence")),
    *(("question", "answer"), ("question", "passage"), ("question", "context"), ("text1", "text2")),
    *(("text_a", "text_b"), ("query", "passage"), ("text",), ("sentence",)),
)

# The metrics of GLUE's tasks, https://gluebenchmark.com/tasks; the first one is the score.
GLUE_METRICS = {
    "cola": ("matthews_correlation",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"),
}
DEFAULT_METRICS: dict[ProblemType, tuple[str, ...]] = {
    CLASSES: ("accuracy",),
    REGRESSION: ("pearson", "spearman"),
    MULTI_LABEL: ("f1",),
}


@dataclass(frozen=True)
class TextTask:
    """A tokenized task, with its examples in the order of the data.

    Args:
        name: Name of the task.
        data: Splits `train`, and `validation` or `test` or both. The column `label` holds a class number, a value, or
            a list of zeros and ones.
        problem_type: Kind of the labels.
        labels: Names of the labels; the name of their column for a regression.
        metrics: Names of the metrics. The first one is the score.
        text_columns: Columns that the texts come from.
    """

    name: str
    data: DatasetDict
    problem_type: ProblemType
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    text_columns: tuple[str, ...] = ()

    @property
    def num_labels(self) -> int:
        """Number of outputs of the task's head."""
        return len(self.labels)

    @property
    def scored(self) -> Dataset:
        """Split that the task is scored on."""
        return evaluation_of(self.data)

    @property
    def _scored_split(self) -> str:
        return "test" if "test" in self.data else "validation"

    @property
    def summary(self) -> str:
        """One line about what was found in the data."""
        kind = {
            CLASSES: f"{self.num_labels} classes ({_shortened(self.labels)})",
            REGRESSION: f"values of {self.labels[0]!r} (regression)",
            MULTI_LABEL: f"several of {self.num_labels} labels ({_shortened(self.labels)})",
        }[self.problem_type]
        names = dict(zip(self.metrics, self.metrics, strict=True))
        if "f1" in names and self.problem_type == CLASSES:
            names["f1"] = f"f1 of {self.labels[positive_class(self.labels)]!r}"
        return (
            f"{self.name}: {kind} from {' + '.join(self.text_columns)}, {len(self.data['train'])} to train, "
            f"{', '.join(names.values())} on {len(self.scored)} of {self._scored_split}"
        )

    def scores(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        """Return the metrics of predictions, the score first.

        Args:
            predictions: Logits or values (N, num_labels).
            references: Class numbers or values (N,), or zeros and ones (N, num_labels).
        """
        predictions, references = np.asarray(predictions, dtype=np.float64), np.asarray(references)
        if self.problem_type == REGRESSION:
            predicted = predictions.reshape(-1)
        else:
            predicted = predictions.argmax(-1) if self.problem_type == CLASSES else (predictions > 0).astype(int)
        functions = METRICS[self.problem_type]
        return {metric: float(functions[metric](references, predicted, self.labels)) for metric in self.metrics}

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return the metrics, in the form of a Trainer's `compute_metrics`."""
        outputs = prediction.predictions
        return self.scores(outputs[0] if isinstance(outputs, tuple) else outputs, prediction.label_ids)


def load_text_task(
    name: str,
    place: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_columns: Sequence[str] | None = None,
    problem_type: str | None = None,
    metrics: Sequence[str] | None = None,
    max_length: int = 64,
    train_examples: int | None = None,
) -> TextTask:
    """Load a task and find its text columns, problem type and metrics.

    Args:
        name: Name of the task.
        place: Path of a jsonl or csv file, of a folder of splits, or a `datasets` id (`id:configuration` if the data
            set has several configurations).
        tokenizer: Tokenizer of the model.
        text_columns: One column of texts, or two for pairs. None means to find them by usual names.
        problem_type: Kind of the labels. None means to find it from their type.
        metrics: Metrics of the task, the score first. None means the metrics of the GLUE task with this name, or the
            default of the problem type.
        max_length: Maximum number of tokens in a text or a pair.
        train_examples: Number of training examples to use, the first ones. None means all.

    Raises:
        ValueError: If columns, labels or metrics are missing, ambiguous, or do not fit. The error names them and the
            task.
    """
    splits = load_splits(place)
    column = _label_column(name, splits["train"].column_names)
    splits = without_unlabelled(name, splits, column)
    _check_labels(name, splits, column)
    splits = with_scored_split(splits)
    columns = tuple(text_columns) if text_columns is not None else _found_text_columns(name, splits["train"], column)
    _check_text_columns(name, splits, columns)
    kind, labels = _found_labels(name, splits["train"], column, problem_type)
    chosen = _checked_metrics(name, metrics or _default_metrics(name, kind, labels), kind, labels)
    encode = _LabelEncoder(name, column, kind, labels, splits["train"])
    splits = first_examples(splits, train_examples)

    def encoded(batch: Mapping[str, list[Any]], split: str) -> dict[str, Any]:
        texts = tokenizer(*(batch[text] for text in columns), truncation=True, max_length=max_length)
        return {**texts, "label": [encode(label, split) for label in batch[column]]}

    data = DatasetDict()
    for split, examples in splits.items():
        examples = examples.map(
            encoded,
            batched=True,
            fn_kwargs={"split": split},
            remove_columns=examples.column_names,
            desc=f"Tokenizing {name}",
        )
        data[split] = examples.cast_column("label", encode.feature)
    return TextTask(name, data, kind, labels, chosen, columns)


# ---- Columns --------------------------------------------------------------------------------------------------------


def _label_column(task: str, columns: Sequence[str]) -> str:
    found = ["label"] if "label" in columns else [name for name in LABEL_COLUMNS if name in columns]
    if len(found) != 1:
        raise ValueError(
            f"task {task!r} has columns {columns}, expected one of {LABEL_COLUMNS}: rename the one with its labels"
        )
    return found[0]


def _found_text_columns(task: str, data: Dataset, label: str) -> tuple[str, ...]:
    columns = [column for column in data.column_names if column != label]
    found = [names for names in TEXT_COLUMNS if set(names) <= set(columns)]
    found = [names for names in found if not any(set(names) < set(others) for others in found)]
    if len(found) != 1:
        several = f", of which {' and '.join('+'.join(names) for names in found)} may be its texts" if found else ""
        raise ValueError(
            f"task {task!r} has columns {columns} beside {label!r}{several}, expected one of "
            f"{['+'.join(names) for names in TEXT_COLUMNS]}: name its texts with --text_columns {task}=column or "
            f"{task}=first,second"
        )
    return found[0]


def _check_text_columns(task: str, splits: DatasetDict, columns: Sequence[str]) -> None:
    if not 1 <= len(columns) <= 2:
        raise ValueError(f"task {task!r} has text columns {list(columns)}, expected one, or two for pairs of texts")
    for split, data in splits.items():
        for column in columns:
            if column not in data.column_names:
                raise ValueError(f"task {task!r} has columns {data.column_names} in {split}, expected {column!r} too")
            empty = sum(not isinstance(text, str) for text in data[column])
            if empty:
                raise ValueError(
                    f"task {task!r} has {empty} of {len(data)} examples in {split} whose {column!r} is not text, "
                    f"expected text: its type is {data.features[column]}"
                )


# ---- Labels ---------------------------------------------------------------------------------------------------------


def _check_labels(task: str, splits: DatasetDict, column: str) -> None:
    for split, data in splits.items():
        if missing := sum(label is None for label in data[column]):
            raise ValueError(f"task {task!r} has {missing} of {len(data)} examples in {split} without {column!r}")


def _found_labels(
    task: str, train: Dataset, column: str, asked_for: str | None
) -> tuple[ProblemType, tuple[str, ...]]:
    """Return the problem type and the names of the labels in the training data.

    Raises:
        ValueError: If the labels are ambiguous, or not of the kind that was asked for.
    """
    if asked_for is not None and asked_for not in get_args(ProblemType):
        near = get_close_matches(asked_for, get_args(ProblemType), cutoff=0.3)
        raise ValueError(
            f"--problem_types has {asked_for!r} for task {task!r}, expected one of {near or get_args(ProblemType)}"
        )
    feature, labels = train.features[column], train[column][:]
    inner = getattr(feature, "feature", None)
    if isinstance(labels[0], list) != (asked_for == MULTI_LABEL) and asked_for is not None:
        raise ValueError(
            f"task {task!r} has label {labels[0]!r}, expected {'a list' if asked_for == MULTI_LABEL else 'one'}, "
            f"because --problem_types says {asked_for}"
        )
    if isinstance(labels[0], list):
        if isinstance(inner, ClassLabel):
            return MULTI_LABEL, tuple(inner.names)
        if _are_flags(task, labels):
            return MULTI_LABEL, tuple(str(number) for number in range(len(labels[0])))
        return MULTI_LABEL, _names(label for row in labels for label in row)
    if asked_for == REGRESSION:
        return REGRESSION, (column,)
    if isinstance(feature, ClassLabel):
        return CLASSES, tuple(feature.names)
    if isinstance(labels[0], float) and asked_for is None:
        if all(label.is_integer() for label in labels):
            raise ValueError(
                f"task {task!r} has floating-point labels that are whole numbers, such as {labels[0]!r}, expected "
                f"--problem_types {task}={REGRESSION} or {task}={CLASSES}: they may be values or classes"
            )
        return REGRESSION, (column,)
    return CLASSES, _names(labels)


def _are_flags(task: str, rows: Sequence[list[Any]]) -> bool:
    """Return whether lists hold a zero or one for each label, instead of the labels that a text has.

    Raises:
        ValueError: If they may be either.
    """
    width = len(rows[0])
    if any(len(row) != width or not all(flag in (0, 1) for flag in row) for row in rows):
        return False
    if width == 1 or (all(sum(row) == 1 for row in rows) and width == 2):
        raise ValueError(
            f"task {task!r} has labels such as {rows[0]}, which may be numbers of labels or a zero or one for each "
            "label, expected names of labels"
        )
    return True


def _names(labels: Iterable[Any]) -> tuple[str, ...]:
    """Return the names of labels in sorted order; numbers are sorted by value, not by their digits."""
    return tuple(_name(label) for label in sorted(set(labels)))


def _name(label: Any) -> str:
    return str(int(label)) if isinstance(label, (bool, float)) and float(label).is_integer() else str(label)


class _LabelEncoder:
    """Converts labels to numbers, or raises an error for labels that do not fit.

    Args:
        task: Name of the task.
        column: Name of the column of labels.
        kind: Problem type of the labels.
        names: Names of the labels, from the training data.
        train: Training data.
    """

    def __init__(self, task: str, column: str, kind: ProblemType, names: tuple[str, ...], train: Dataset) -> None:
        self._task, self._column, self._kind, self._names = task, column, kind, names
        self._numbers = {name: number for number, name in enumerate(names)}
        inner = getattr(train.features[column], "feature", train.features[column])
        self._class_names = list(inner.names) if isinstance(inner, ClassLabel) else None
        self._holds_numbers = not (isinstance(inner, Value) and inner.dtype.endswith("string"))
        of_names = kind != MULTI_LABEL or self._class_names is not None
        self._holds_flags = not of_names and _are_flags(task, train[column][:])
        self.feature = {
            CLASSES: ClassLabel(names=list(names)),
            REGRESSION: Value("float64"),
            MULTI_LABEL: ListOf(Value("float32"), length=len(names)),
        }[kind]

    def __call__(self, label: Any, split: str) -> int | float | list[float]:
        if self._kind == CLASSES:
            return self._number(label, split)
        if self._kind == REGRESSION:
            return self._value(label, split)
        if not isinstance(label, list):
            raise self._refused(label, split, "a list of labels")
        if self._holds_flags:
            if len(label) != len(self._names) or not set(label) <= {0, 1}:
                raise self._refused(label, split, f"a list of {len(self._names)} zeros and ones")
            return [float(flag) for flag in label]
        chosen = {self._number(each, split) for each in label}
        return [float(number in chosen) for number in range(len(self._names))]

    def _number(self, label: Any, split: str) -> int:
        name = self._named(label)
        if name not in self._numbers:
            raise self._refused(name, split, f"one of those it is trained on: {list(self._names)}")
        return self._numbers[name]

    def _value(self, label: Any, split: str) -> float:
        try:
            value = float(self._named(label) if self._class_names is not None else label)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise self._refused(label, split, "a number for a regression")
        return value

    def _named(self, label: Any) -> str:
        if self._class_names is not None and isinstance(label, int) and 0 <= label < len(self._class_names):
            return self._class_names[label]
        return _name(label) if self._holds_numbers else str(label)

    def _refused(self, label: Any, split: str, expected: str) -> ValueError:
        return ValueError(f"task {self._task!r} has {self._column} {label!r} in {split}, expected {expected}")


# ---- Metrics --------------------------------------------------------------------------------------------------------


def positive_class(labels: Sequence[str]) -> int:
    """Return the positive class for F1: the one whose name the other negates (`not_x`, `unx`), or else the second."""
    denied = [re.sub(r"^(not|non|no|un)[ _-]?", "", label.lower()) for label in labels]
    return 0 if denied[1] == labels[0].lower() != labels[1].lower() else 1


def _f1_of_positive(references: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> float:
    positive = positive_class(labels)
    return sk.f1_score(references == positive, predicted == positive, zero_division=0)


def _f1(average: str) -> Callable[[np.ndarray, np.ndarray, Sequence[str]], float]:
    return lambda references, predicted, labels: sk.f1_score(references, predicted, average=average, zero_division=0)


def _correlation(function: Callable[..., Any]) -> Callable[[np.ndarray, np.ndarray, Sequence[str]], float]:
    """Make a correlation metric that is 0 if one side is constant, because that says nothing about the other."""

    def correlation(references: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            warnings.simplefilter("ignore", stats.NearConstantInputWarning)
            found = function(references, predicted).statistic
        return 0.0 if math.isnan(found) else found

    return correlation


def _without_names(function: Callable[..., float]) -> Callable[[np.ndarray, np.ndarray, Sequence[str]], float]:
    return lambda references, predicted, labels: function(references, predicted)


# Metrics by problem type and name: functions of references, predictions and label names. Higher is better.
METRICS: dict[ProblemType, dict[str, Callable[[np.ndarray, np.ndarray, Sequence[str]], float]]] = {
    CLASSES: {
        "accuracy": _without_names(sk.accuracy_score),
        "balanced_accuracy": _without_names(sk.balanced_accuracy_score),
        "f1": _f1_of_positive,
        "f1_macro": _f1("macro"),
        "f1_weighted": _f1("weighted"),
        "matthews_correlation": _without_names(sk.matthews_corrcoef),
    },
    REGRESSION: {
        "pearson": _correlation(stats.pearsonr),
        "spearman": _correlation(stats.spearmanr),
        "r2": _without_names(sk.r2_score),
    },
    MULTI_LABEL: {
        "f1": _f1("micro"),
        "f1_macro": _f1("macro"),
        "accuracy": _without_names(sk.accuracy_score),
    },
}


def _default_metrics(task: str, kind: ProblemType, labels: Sequence[str]) -> tuple[str, ...]:
    of_glue = GLUE_METRICS.get(re.sub("[-_]", "", task.lower()), ())
    fitting = all(metric in METRICS[kind] for metric in of_glue) and not ("f1" in of_glue and len(labels) != 2)
    return of_glue if of_glue and fitting else DEFAULT_METRICS[kind]


def _checked_metrics(task: str, metrics: Sequence[str], kind: ProblemType, labels: Sequence[str]) -> tuple[str, ...]:
    for metric in metrics:
        if metric not in METRICS[kind]:
            near = get_close_matches(metric, METRICS[kind])
            raise ValueError(
                f"--metrics has {metric!r} for task {task!r}, which is {kind}, expected one of "
                f"{list(METRICS[kind])}{f': {near[0]!r}?' if near else ''}"
            )
        if metric == "f1" and kind == CLASSES and len(labels) != 2:
            raise ValueError(
                f"--metrics has 'f1' for task {task!r}, which has {len(labels)} classes, expected 'f1_macro' or "
                "'f1_weighted': f1 is for one class of two"
            )
    return tuple(dict.fromkeys(metrics))


def _shortened(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
