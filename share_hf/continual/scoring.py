"""Scoring tasks by the Trainer's own evaluation, or by a function that the user provides."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from peft import PeftModel
from transformers import PreTrainedModel

from .data import Data, naming_used_up_streams
from .labels import LabelMask
from .measures import MetricsByTask, measured_by_user
from .phase_trainer import PhaseTrainer


TaskScorer = Callable[[PreTrainedModel | PeftModel, str, Data], dict[str, float]]


class Scorer:
    """Scores tasks with the model of a trainer.

    Args:
        trainer: Trainer whose model has an adapter for each task.
        label_mask: Mask that rules out the labels that a task does not have.
        task_scorer: Same as in `ShareTrainer`.
        score_metric: Same as in `ShareTrainingArguments`.
    """

    def __init__(
        self,
        trainer: PhaseTrainer,
        label_mask: LabelMask,
        task_scorer: TaskScorer | None = None,
        score_metric: str | None = None,
    ) -> None:
        self._trainer = trainer
        self._label_mask = label_mask
        self._task_scorer = task_scorer
        self._score_metric = score_metric

    def metrics_of(self, task: str, data: Data, adapter: str | None = None) -> dict[str, float]:
        """Return the metrics of a task, without their prefix, with its own or another adapter.

        The active adapter does not change.
        """
        trainer = self._trainer
        active = trainer.model.active_adapter
        trainer.model.set_adapter(adapter or task)
        try:
            with self._label_mask.of_task(task), naming_used_up_streams(task), trainer.engine.inference_ready():
                if self._task_scorer is not None:
                    return self._task_scorer(trainer.model, task, data)
                prefix = f"eval_{task}"
                metrics = self._evaluate_once(data, prefix)
                return {name.removeprefix(f"{prefix}_"): value for name, value in metrics.items()}
        finally:
            if not trainer.engine.is_broken_off:
                trainer.model.set_adapter(active)

    def _evaluate_once(self, data: Data, prefix: str) -> dict[str, float]:
        # With persistent workers, the Trainer would reuse the data loader for any later data.
        args = self._trainer.args
        kept, args.dataloader_persistent_workers = args.dataloader_persistent_workers, False
        try:
            return self._trainer.evaluate(data, self._trainer.ignore_keys_for_eval, prefix)
        finally:
            args.dataloader_persistent_workers = kept

    def scores_in(self, task: str, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics of a task, starting with its score, for which higher is better.

        Raises:
            ValueError: If `score_metric` is not among the metrics, or none of them can serve as the score.
        """
        if self._score_metric is not None:
            if self._score_metric not in metrics:
                raise ValueError(f"score_metric is {self._score_metric!r}, expected one of {sorted(metrics)}")
            return {self._score_metric: float(metrics[self._score_metric]), **measured_by_user(metrics)}
        measures = measured_by_user(metrics)
        if self._task_scorer is None and isinstance(self._trainer.compute_metrics, MetricsByTask) and measures:
            return measures
        if "accuracy" in metrics:
            return {"accuracy": float(metrics["accuracy"]), **measures}
        if "loss" not in metrics:
            raise ValueError(
                f"task {task!r} has metrics {sorted(metrics)}, expected 'accuracy' or 'loss' among them, or "
                "score_metric: its evaluation data may have no labels, or be a stream that is used up"
            )
        return {"-loss": -float(metrics["loss"]), **measures}
