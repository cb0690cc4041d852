"""What a method answers to every test example of a task, and how a result keeps that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


DIGITS = 4  # behind the point of a predicted value


def encoded(values: NDArray[Any]) -> str | list[float]:
    """Classes as a digit an example, other values as numbers.

    Args:
        values: Class numbers below 10, as integers, or values, as floats.

    Raises:
        ValueError: If there are more than ten classes.
    """
    if not np.issubdtype(values.dtype, np.integer):
        return [round(float(value), DIGITS) for value in values]
    if len(values) and (values.min() < 0 or values.max() > 9):
        raise ValueError(f"classes from {values.min()} to {values.max()}, expected 0 to 9: one digit an example")
    return "".join(map(str, values))


def decoded(values: str | list[float]) -> NDArray[np.float64]:
    """What `encoded` was given, as floats."""
    return np.array([float(value) for value in values])


def answers_of(result: Mapping[str, Any], name: str = "answers") -> dict[str, NDArray[np.float64]]:
    """By task, what a result answers; with `name="true"`, what is right."""
    return {task: decoded(values) for task, values in result[name].items()}


def chosen(logits: NDArray[Any], problem_type: str, num_labels: int) -> NDArray[Any]:
    """The answers to examples, from their logits.

    Args:
        logits: (examples, outputs), or (examples,) of a regression.
        problem_type: As of transformers' configurations.
        num_labels: How many outputs are of the task; a head may have more.

    Raises:
        ValueError: If a task has several labels at once, which the streams of the benchmark do not have.
    """
    if problem_type == "regression":
        return logits.reshape(len(logits), -1)[:, 0].astype(np.float64)
    if problem_type != "single_label_classification":
        raise ValueError(f"problem type {problem_type!r}, expected 'regression' or 'single_label_classification'")
    return logits[:, :num_labels].argmax(-1)
