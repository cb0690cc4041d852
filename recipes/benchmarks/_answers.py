"""The answers of a method to the test examples of a task, and the form in which a result stores them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


DIGITS = 4  # decimal places of a predicted value


def encoded(values: NDArray[Any]) -> str | list[float]:
    """Encode classes as a string with one digit for each example, and other values as a list of numbers.

    Args:
        values: Class numbers below 10 as integers, or values as floats.

    Raises:
        ValueError: If there are more than ten classes.
    """
    if not np.issubdtype(values.dtype, np.integer):
        return [round(float(value), DIGITS) for value in values]
    if len(values) and (values.min() < 0 or values.max() > 9):
        raise ValueError(f"classes from {values.min()} to {values.max()}, expected 0 to 9: one digit per example")
    return "".join(map(str, values))


def decoded(values: str | list[float]) -> NDArray[np.float64]:
    """Decode the result of `encoded` to floats."""
    return np.array([float(value) for value in values])


def answers_of(result: Mapping[str, Any], name: str = "answers") -> dict[str, NDArray[np.float64]]:
    """Return the answers in a result by task, or the right answers with `name="true"`."""
    return {task: decoded(values) for task, values in result[name].items()}


def chosen(logits: NDArray[Any], problem_type: str, num_labels: int) -> NDArray[Any]:
    """Return the answers to examples, from their logits.

    Args:
        logits: Logits (examples, outputs), or (examples,) for a regression.
        problem_type: Problem type, as in the configurations of transformers.
        num_labels: Number of outputs that belong to the task; a head may have more.

    Raises:
        ValueError: If the problem type is multi-label classification, which no stream of the benchmark has.
    """
    if problem_type == "regression":
        return logits.reshape(len(logits), -1)[:, 0].astype(np.float64)
    if problem_type != "single_label_classification":
        raise ValueError(f"problem type {problem_type!r}, expected 'regression' or 'single_label_classification'")
    return logits[:, :num_labels].argmax(-1)
