"""A Trainer of phases that can train several tasks at once, each as it would be trained alone on its samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers.trainer_utils import TrainOutput

from ..tuner.together import trained_by_task
from .arguments import ShareTrainingArguments
from .data import Data
from .group_data import TASK_NUMBERS, GroupCollator, GroupData, GroupSampler
from .group_steps import (
    TaskLosses,
    TaskSchedules,
    divide_among_tasks,
    items_of_samples,
    scale_by_task,
    schedule_of,
)
from .phase_trainer import PhaseTrainer
from .together import check_optimizer


# Largest number of tasks whose single loss curves are logged. Beyond it, `metrics` and the tree still have each task.
MOST_LOGGED_TASKS = 50


class _Group:
    """The tasks that a phase trains at once.

    Args:
        data: Training data of the tasks.

    Attributes:
        parameters (`dict[str, list[Parameter]]`): Trained parameters of each task.
        numbers (`list[int]`): Task of each sample in the current batch, by its place in `tasks`.
        items (`Tensor`): Number of items (tasks,) that the losses of a step count for each task, over all processes.
        sampler (`GroupSampler`): Order of the examples, available once the phase has begun.
    """

    parameters: Mapping[str, list[nn.Parameter]]
    sampler: GroupSampler

    def __init__(self, data: GroupData) -> None:
        self.data = data
        self.tasks = data.tasks
        self.losses = TaskLosses(len(self.tasks))
        self.numbers: list[int] = []
        self.items = torch.ones(len(self.tasks))

    @property
    def names(self) -> list[str]:
        """Name of the task of each sample in the current batch."""
        return [self.tasks[number] for number in self.numbers]


class GroupTrainer(PhaseTrainer):
    """
    Trains one adapter after the other, or several in one optimizer run.

    In the latter case, a batch mixes samples of several tasks. The mean of the loss, gradient clipping and the
    schedule apply to each task separately, so that the result is, up to rounding, that of training each task alone on
    the samples that it saw.

    Args:
        model ([`~peft.PeftModel`]): Model with Share adapters.
        args ([`ShareTrainingArguments`]): Arguments that all runs have in common.
        **kwargs: Same as in [`~transformers.Trainer`].
    """

    args: ShareTrainingArguments

    _group: _Group | None = None

    def run_group(self, args: ShareTrainingArguments, data: Mapping[str, Data], resumed: Path | None) -> TrainOutput:
        """
        Train the active tasks of the model at once, in one optimizer run.

        Args:
            args: Arguments of this run.
            data: Training data of each task.
            resumed: Same as in `run_phase`.

        Returns:
            `TrainOutput`: Number of steps, and mean loss.
        """
        group = _Group(GroupData(data))
        with self._training(group):
            return self.run_phase(args, group.data, resumed)

    @contextmanager
    def _training(self, group: _Group) -> Iterator[None]:
        self._group = group
        # Otherwise the Trainer would divide once more by the number of accumulated batches.
        self.loss_is_scaled_for_ga = True
        collator, self.data_collator = self.data_collator, self._group_collator()
        try:
            yield
        finally:
            self._group, self.data_collator = None, collator
            del self.loss_is_scaled_for_ga

    def _group_collator(self) -> GroupCollator:
        return GroupCollator(self._get_collator_with_removed_columns(self.data_collator, description="Training"))

    # ---- Data ------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Data | None = None) -> Sampler | None:
        if self._group is None:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._group.sampler = GroupSampler(
            self._group.data, self.args.samples_per_task, seed, epoch=lambda: int(self.state.epoch or 0)
        )
        return self._group.sampler

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        group = self._group
        if group is None or not batches:
            return batches, items
        counts = torch.zeros(len(group.tasks), dtype=torch.int64, device=device)
        for batch in batches:
            numbers = batch[TASK_NUMBERS].to(device)
            counts.index_add_(0, numbers, self._items_of(batch, len(numbers)).to(device))
        group.items = self.accelerator.reduce(counts, "sum").float()
        return batches, group.items.sum()

    def _items_of(self, batch: Mapping[str, Any], samples: int) -> Tensor:
        return items_of_samples(batch.get("labels"), samples, are_shifted=self._loss_shifts_labels)

    # ---- Loss ------------------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        group = self._group
        if group is None:
            return super().training_step(model, inputs, num_items_in_batch)
        group.numbers = inputs[TASK_NUMBERS].tolist()
        # The hooks stay on during the backward pass, in which checkpointed layers run forward again.
        with self.model.base_model._enable_peft_forward_hooks(adapter_names=group.names):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        group = self._group
        if group is None or TASK_NUMBERS not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        numbers, labels = inputs.pop(TASK_NUMBERS), inputs.get("labels")
        items = self._items_of(inputs, len(numbers)).to(numbers.device)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        divides = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        if not divides and self.label_smoother is None:
            loss = loss * (items.sum() / num_items_in_batch)
        if not (divides and self.args.average_tokens_across_devices):
            loss = loss * self.accelerator.num_processes  # DDP takes the mean over the processes
        if labels is not None and self.compute_loss_func is None:
            logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[1]
            group.losses.add(logits.detach(), labels, group.numbers, items, are_shifted=self._loss_shifts_labels)
        return (loss, outputs) if return_outputs else loss

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        if self._group is None:
            return super()._clip_grad_norm(model)
        return self._finish_gradients(self._group, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float:
        if self._group is None or grad_norm is not None:
            return super()._get_grad_norm(model, grad_norm)
        return self._finish_gradients(self._group, math.inf)

    def _finish_gradients(self, group: _Group, max_norm: float) -> Tensor:
        """Scale each task's gradients to its own mean loss, and clip them. Returns the largest norm of a task."""
        self.accelerator.unscale_gradients()
        factors = group.items.sum() / group.items.clamp(min=1)
        return scale_by_task(list(group.parameters.values()), factors, max_norm).max()

    # ---- Optimizer -------------------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        decayed = super().get_decay_parameter_names(model)
        if self._group is None:
            return decayed
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        matrices = {name for name, parameter in model.named_parameters() if name in trained and parameter.ndim > 1}
        return decayed + sorted(matrices - set(decayed))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        is_made = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if self._group is not None and not is_made:
            check_optimizer(optimizer)
            self._group.parameters = trained_by_task(self.model, self._group.tasks)
            divide_among_tasks(optimizer, self._group.parameters)
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        group = self._group
        if group is None:
            return super().create_scheduler(num_training_steps, optimizer)
        step, processes = self.get_total_train_batch_size(self.args), self.args.world_size
        steps = group.sampler.steps_of_tasks(
            num_training_steps,
            step=step,
            process=step // (processes * self.args.gradient_accumulation_steps),
            processes=processes,
        )
        schedules = {
            task: schedule_of(self.args, max(count, 1))
            for task, count in zip(group.tasks, steps.tolist(), strict=True)
        }
        self.lr_scheduler = TaskSchedules(optimizer if optimizer is not None else self.optimizer, schedules)
        return self.lr_scheduler

    # ---- Logs and checkpoints --------------------------------------------------------------------------------------

    def log(self, logs: Mapping[str, float], start_time: float | None = None) -> None:
        if self._group is not None and "loss" in logs:
            losses = self._group.losses.take(lambda sums: self.accelerator.reduce(sums.to(self.args.device)))
            logs = {**logs, **_logged(self._group.tasks, losses)}
        super().log(logs, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._group is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        tasks = self._group.tasks
        for task in tasks:
            folder = resume_from_checkpoint if task == "default" else str(Path(resume_from_checkpoint, task))
            self.model.load_adapter(folder, task, is_trainable=True)
        self.model.base_model.set_adapter(tasks)


def _logged(tasks: Sequence[str], losses: Sequence[float | None]) -> dict[str, float]:
    """Return losses by task for the log; for many tasks, their mean and extremes."""
    known = {task: loss for task, loss in zip(tasks, losses, strict=True) if loss is not None}
    if len(tasks) <= MOST_LOGGED_TASKS or not known:
        return {f"share/loss/{task}": loss for task, loss in known.items()}
    values = list(known.values())
    return {
        "share/loss_mean": sum(values) / len(values),
        "share/loss_min": min(values),
        "share/loss_max": max(values),
    }
