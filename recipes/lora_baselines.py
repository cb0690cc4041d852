"""The baselines of the recipes: a separate LoRA for each task, or one LoRA trained on all tasks in their order."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from task_data import evaluation_of
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import ProgressCallback

from share_hf.continual import ContinualMetrics
from share_hf.continual.labels import LabelMask
from share_hf.continual.progress import StreamProgressCallback


def classifier_loras(
    model: PreTrainedModel,
    args: TrainingArguments,
    lora_config: LoraConfig,
    tasks: Mapping[str, DatasetDict],
    num_labels: Mapping[str, int],
    measure: Callable[[str, np.ndarray, np.ndarray], float],
    *,
    sequential: bool,
    loss: Callable[[str, Tensor, Tensor, Tensor | None], Tensor] | None = None,
    **options: Any,
) -> ContinualMetrics:
    """Train the baselines on a classifier whose tasks use only some of its outputs; the rest are masked as in Share.

    Args:
        model: Base model.
        args: Training arguments of every task.
        lora_config: Configuration of every LoRA.
        tasks: Stream of tasks.
        num_labels: Number of labels of each task.
        measure: Function that takes a task, its outputs (examples, num_labels) and its labels, and returns its score.
        sequential: Whether to train one LoRA on all tasks. Each task still has its own head.
        loss: Function that takes a task, logits, labels and the divisor of the summed loss. None means the model's own
            loss.
        options: Further arguments of `train_loras`.
    """
    at_work: list[str] = []

    def prepare(peft_model: PeftModel, task: str) -> None:
        if not at_work:
            LabelMask(peft_model, lambda adapter: num_labels[at_work[-1]])
        at_work[:] = [task]

    def score(trainer: Trainer, task: str, data: Dataset) -> float:
        prediction = trainer.predict(data)
        return measure(task, prediction.predictions[:, : num_labels[task]], prediction.label_ids)

    def loss_at_work(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        return loss(at_work[-1], outputs["logits"], labels, num_items_in_batch)

    if loss is not None:
        options["compute_loss_func"] = loss_at_work
    return train_loras(model, args, lora_config, tasks, score, sequential=sequential, prepare=prepare, **options)


class HeadsOfTasks:
    """Gives an adapter that learns several tasks a separate head for each, as tasks have in the other methods.

    Args:
        model: Model that has the adapter.
        adapter: Name of the adapter. Each task starts from its present head.
    """

    def __init__(self, model: PeftModel, adapter: str) -> None:
        wrappers = (module for module in model.modules() if isinstance(module, ModulesToSaveWrapper))
        self._modules = [wrapper.modules_to_save[adapter] for wrapper in wrappers]
        self._fresh = self._copies()
        self._learned: dict[str, list[dict[str, Tensor]]] = {}
        self._task: str | None = None

    def use(self, task: str) -> None:
        """Store the head of the previous task and switch to the head of this one."""
        if self._task is not None:
            self._learned[self._task] = self._copies()
        for module, tensors in zip(self._modules, self._learned.get(task, self._fresh), strict=True):
            module.load_state_dict(tensors)
        self._task = task

    def _copies(self) -> list[dict[str, Tensor]]:
        return [copy.deepcopy(module.state_dict()) for module in self._modules]


def train_loras(
    model: PreTrainedModel,
    args: TrainingArguments,
    lora_config: LoraConfig,
    tasks: Mapping[str, DatasetDict],
    score: Callable[[Trainer, str, Dataset], float],
    *,
    sequential: bool,
    prepare: Callable[[PeftModel, str], None] = lambda model, task: None,
    score_names: Mapping[str, str] | None = None,
    finish: Callable[[PeftModel, Mapping[str, str]], None] = lambda model, names: None,
    **trainer_kwargs: Any,
) -> ContinualMetrics:
    """Train a separate LoRA for each task, or one LoRA on all tasks in their order.

    Args:
        model: Base model.
        args: Training arguments of every task.
        lora_config: Configuration of every LoRA.
        tasks: Stream of tasks.
        score: Function that scores the active adapter on a task.
        sequential: Whether to train one LoRA on all tasks. Each task still has its own head.
        prepare: Function called before a task is trained or scored.
        score_names: Name of the metric that scores each task. None means accuracy.
        finish: Function called at the end with the model and the name of each task's adapter.
        trainer_kwargs: Further arguments of the Trainer.
    """
    metrics = ContinualMetrics(score_names=dict(score_names or {}), tasks=list(tasks), baseline=[None] * len(tasks))
    names = {task: "sequential" if sequential else task for task in tasks}
    first = names[next(iter(tasks))]
    peft_model = get_peft_model(model, copy.deepcopy(lora_config), adapter_name=first)
    heads = HeadsOfTasks(peft_model, first) if sequential else None
    for position, (task, data) in enumerate(tasks.items()):
        started = time.monotonic()
        set_seed(args.seed + 2 * position)
        if names[task] not in peft_model.peft_config:
            peft_model.add_adapter(names[task], copy.deepcopy(lora_config))
        peft_model.set_adapter(names[task])
        if heads is not None:
            heads.use(task)
        prepare(peft_model, task)
        trainer = Trainer(model=peft_model, args=args, train_dataset=data["train"], **trainer_kwargs)
        progress = StreamProgressCallback()
        progress.title = f"{task} [lora]"
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(progress)
        trainer.train()
        row: list[float | None] = [None] * len(tasks)
        for j, seen in enumerate(list(tasks)[: position + 1]):
            if not sequential and j < position:  # its LoRA has not changed since
                row[j] = metrics.matrix[-1][j]
                continue
            peft_model.set_adapter(names[seen])
            if heads is not None:
                heads.use(seen)
            prepare(peft_model, seen)
            row[j] = score(trainer, seen, evaluation_of(tasks[seen]))
        metrics.matrix.append(row)
        progress.task_line(metrics, "sequential" if sequential else "lora", time.monotonic() - started)
    finish(peft_model, names)
    return metrics
