"""Metrics of a task's predictions, from the user's function for the task or from the task's kind."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from numbers import Real

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction
from transformers.utils import logging

from .arguments import ShareTrainingArguments
from .problems import CLASSES, MULTI_LABEL, REGRESSION, Problem, ProblemType, TaskDetails


logger = logging.get_logger(__name__)

MetricFunction = Callable[..., dict[str, float]]

# Metrics that `Trainer.evaluate` adds to the metrics of the predictions.
_OF_TRAINER = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


class MetricsByTask:
    """Measures the predictions of an evaluation with the function of the current task, or else by the task's kind.

    Args:
        functions: Function of each task, as a Trainer takes it in `compute_metrics`.
        task: Function that returns the current task.
        problem: Function that returns what a task predicts, or None if the model is not a classifier.
    """

    def __init__(
        self,
        functions: Mapping[str, MetricFunction],
        task: Callable[[], str],
        problem: Callable[[str], Problem | None],
    ) -> None:
        self._functions = dict(functions)
        self._task = task
        self._problem = problem

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        task = self._task()
        problem = self._problem(task)
        by_kind = None if problem is None else _BY_KIND[problem.problem_type]
        function = self._functions.get(task, by_kind)
        return {} if function is None else function(prediction)


def check_functions(functions: object, tasks: Collection[str], args: ShareTrainingArguments) -> None:
    """Refuse functions by task that cannot measure their tasks, and warn about functions for unknown tasks.

    Args:
        functions: Value of `compute_metrics`.
        tasks: Names of the known tasks. Others may come one by one.
        args: Arguments of the stream.

    Raises:
        ValueError: If it is a dict of anything other than functions, or the arguments ask for metrics batch by batch.
    """
    if not isinstance(functions, Mapping):
        return
    if args.batch_eval_metrics:
        raise ValueError(
            "batch_eval_metrics is True, expected compute_metrics with it, as one function for all tasks: the default "
            "metrics need all batches at once"
        )
    for task, function in functions.items():
        if not callable(function):
            raise ValueError(f"compute_metrics has {function!r} for task {task!r}, expected a function")
    if tasks and (unknown := sorted(set(functions) - set(tasks))):
        logger.warning("compute_metrics has functions for %s, which are not among tasks: %s.", unknown, list(tasks))


def check_score_metric(
    score_metric: str | None, task: str, details: TaskDetails, functions: object, task_scorer: object
) -> None:
    """Refuse a `score_metric` that an evaluation of a task will not have, before the task is trained.

    What a function or a scorer of the user returns is known only after it was called.

    Args:
        score_metric: Same as in `ShareTrainingArguments`.
        task: Name of the task.
        details: Details of the task.
        functions: Value of `compute_metrics`.
        task_scorer: Same as in `ShareTrainer`.

    Raises:
        ValueError: If the metric is not among those that are known. Names these.
    """
    if score_metric is None or task_scorer is not None or callable(functions):
        return
    if isinstance(functions, Mapping) and task in functions:
        return
    of_kind = [] if details.problem is None else [_BY_KIND[details.problem.problem_type].__name__]
    if score_metric not in (*of_kind, *_OF_TRAINER) and not score_metric.startswith("mem_"):
        raise ValueError(
            f"score_metric is {score_metric!r}, expected one of {[*of_kind, 'loss']}, which task {task!r} has, or a "
            "function for it in compute_metrics"
        )


def measured_by_user(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the numbers among the metrics of an evaluation, in order, without those that the Trainer adds."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if is_number(value) and name not in _OF_TRAINER and not name.startswith("mem_")
    }


def is_number(value: object) -> bool:
    """Return whether a metric is a number, including numpy numbers and scalar tensors, but not booleans."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.dtype.is_complex and value.dtype != torch.bool
    return isinstance(value, Real) and not isinstance(value, (bool, np.bool_))


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the fraction of examples whose largest logit is that of their label."""
    return {"accuracy": float(np.concatenate([_are_right(*batch) for batch in _batches(prediction)]).mean())}


def pearson(prediction: EvalPrediction) -> dict[str, float]:
    """Return the correlation of predicted and true values; 0 if either is constant, and so says nothing."""
    batches = [(np.ravel(logits), np.ravel(labels)) for logits, labels in _batches(prediction)]
    values, labels = (part - part.mean() for part in np.concatenate(batches, axis=1).astype(np.float64))
    norm = np.linalg.norm(values) * np.linalg.norm(labels)
    return {"pearson": float(values @ labels / norm) if norm else 0.0}


def f1(prediction: EvalPrediction) -> dict[str, float]:
    """Return the F1 score over all labels of all examples. A label is predicted where its logit is above 0."""
    right = predicted = true = 0
    for logits, labels in _batches(prediction):
        chosen = logits > 0
        right, predicted, true = right + (chosen & (labels > 0)).sum(), predicted + chosen.sum(), true + labels.sum()
    return {"f1": float(2 * right / (predicted + true)) if predicted + true else 0.0}


_BY_KIND: dict[ProblemType, MetricFunction] = {CLASSES: accuracy, REGRESSION: pearson, MULTI_LABEL: f1}


def _batches(prediction: EvalPrediction) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return pairs of logits and labels: one for each batch with `eval_do_concat_batches=False`, else a single one."""
    predictions, labels = prediction.predictions, prediction.label_ids
    if not isinstance(predictions, list):
        predictions, labels = [predictions], [labels]
    logits = [batch[0] if isinstance(batch, tuple) else batch for batch in predictions]
    return list(zip(logits, labels, strict=True))


def _are_right(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    # `preprocess_logits_for_metrics` may already have chosen the labels.
    return (logits if logits.shape == labels.shape else logits.argmax(-1)) == labels
