"""The baselines for continual learning with Share: other ways to learn the same tasks under the same conditions.

    lora        a separate LoRA for each task: nothing is forgotten, nothing is shared
    sequential  one LoRA, trained on the tasks one after the other
    replay-2    like sequential, but each later task also trains on 2 % of the training examples of each earlier task
    replay-5    the same with 5 %
    olora       O-LoRA: adds a LoRA for each task, orthogonal to those of earlier tasks, and sums all of them
    osf         PEFT's OSF: trains the weights themselves, outside the directions that matter most to earlier tasks
    joint       one LoRA, trained on all tasks at once: not continual

All methods have a separate head for each task, adapt the same layers, and use the same arguments of the Trainer. Seeds
depend only on a task's position in the stream. A task's head, its LoRA and the order of its examples are those of
`ShareTrainer` at the same seed, so that a difference between methods does not come from random numbers.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from _baselines_adapters import Adapters, BaselineSettings, LoraPerTask, OLora, OneLora, Osf
from _baselines_heads import HeadedModel, Task, inputs_of, prepare
from _report import seconds_of
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import SaveStrategy

from share_hf.continual import ContinualMetrics
from share_hf.continual.progress import StreamProgressCallback


HEAD_FILE = "head.safetensors"  # in the folder of a saved LoRA


@dataclass(frozen=True)
class Method:
    """A way to learn a stream.

    Args:
        adapters: Class of the adapters that it trains in addition to the heads.
        replayed: Fraction of each earlier task's training examples to train on again with each later task.
        together: Whether all tasks are learned at once.
    """

    adapters: type[Adapters]
    replayed: float = 0.0
    together: bool = False


METHODS = {
    "lora": Method(LoraPerTask),
    "sequential": Method(OneLora),
    "replay-2": Method(OneLora, replayed=0.02),
    "replay-5": Method(OneLora, replayed=0.05),
    "olora": Method(OLora),
    "osf": Method(Osf),
    "joint": Method(OneLora, together=True),
}


@dataclass(frozen=True)
class Step:
    """A training run on one task, or on all tasks together.

    Args:
        tasks: Names of the tasks that were learned.
        examples: Number of training examples by task, including replayed examples of earlier tasks.
        adapter_parameters: Number of trained parameters in the backbone.
        head_parameters: Number of trained parameters in the heads.
        seconds: Wall-clock time of training, without scoring.
    """

    tasks: tuple[str, ...]
    examples: dict[str, int]
    adapter_parameters: int
    head_parameters: int
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """The result of learning a stream.

    Args:
        metrics: Main metric of each task learned so far, after each step.
        scores: All metrics of each task at the end, by task and name.
        predictions: Outputs (examples, num_labels) for the scored examples of each task at the end.
        steps: Training runs.
        bytes_of_tasks: Size of a float32 safetensors file with the tensors that only one task needs, including its
            head, by task.
        bytes_shared: Size of such a file with the tensors that all tasks need, or 0 if there are none.
    """

    metrics: ContinualMetrics
    scores: dict[str, dict[str, float]]
    predictions: dict[str, np.ndarray]
    steps: tuple[Step, ...]
    bytes_of_tasks: dict[str, int]
    bytes_shared: int

    @property
    def bytes_in_all(self) -> int:
        """Bytes to keep for running all tasks, in addition to the base model."""
        return self.bytes_shared + sum(self.bytes_of_tasks.values())


class BaselineTrainer(Trainer):
    """A Trainer that adds a penalty to the training loss and predicts in the order of the data.

    Args:
        penalty: Function called at each training step. It returns a scalar, or None for no penalty.
        head_learning_rate: Learning rate of the heads. None means the learning rate of the arguments.
    """

    def __init__(
        self,
        *args: Any,
        penalty: Callable[[], Tensor | None],
        head_learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._penalty = penalty
        self._head_learning_rate = head_learning_rate

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._head_learning_rate is None:
            return optimizer
        heads = {id(parameter) for parameter in self.model.heads.parameters()}
        for group in list(optimizer.param_groups):
            own = [parameter for parameter in group["params"] if id(parameter) in heads]
            if own:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in heads]
                options = {name: value for name, value in group.items() if name not in ("params", "initial_lr")}
                optimizer.add_param_group({**options, "params": own, "lr": self._head_learning_rate})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        penalty = self._penalty() if model.training else None
        if penalty is not None:
            loss = loss + penalty
        return (loss, outputs) if return_outputs else loss

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        # The Trainer's own data loader shuffles the examples to predict if training groups its batches by length.
        loader = DataLoader(
            test_dataset,
            batch_size=self.args.eval_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)


def train(
    method: str,
    model: PreTrainedModel,
    tasks: Mapping[str, Task],
    settings: BaselineSettings,
    *,
    keep_in: Path | None = None,
) -> Outcome:
    """Learn a stream of tasks with one of the methods, and score the tasks after each step.

    Args:
        method: Key of `METHODS`.
        model: Base model, which is not changed. Its classifier only serves as the template of the heads.
        tasks: Stream of tasks, in order.
        settings: Settings that all methods share.
        keep_in: Folder to save the LoRAs of the method `lora` in, each in PEFT's format with its head beside it.

    Raises:
        ValueError: If the method is unknown, or the model or a task does not suit a stream. Nothing has been trained
            then.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    if not tasks:
        raise ValueError("tasks is empty, expected at least one task")
    if settings.args.label_smoothing_factor:
        raise ValueError(f"label_smoothing_factor is {settings.args.label_smoothing_factor}, expected 0")
    stream = _Stream(method, model, tasks, settings)
    metrics = ContinualMetrics(score=_score_name(tasks))
    metrics.add_tasks(list(tasks))
    steps: list[Step] = []
    for group in [list(tasks)] if METHODS[method].together else [[name] for name in tasks]:
        steps.append(stream.learn(group))
        predictions = stream.predictions()
        scores = {name: _scores(tasks[name], outputs) for name, outputs in predictions.items()}
        main = [scores[name][task.metrics[0]] if name in scores else None for name, task in tasks.items()]
        metrics.add_row(main, len(group))
        if stream.progress is not None:
            stream.progress.task_line(metrics, method, steps[-1].seconds)
    if keep_in is not None:
        stream.keep(keep_in)
    return Outcome(
        metrics=metrics,
        scores=scores,
        predictions=predictions,
        steps=tuple(steps),
        bytes_of_tasks={name: file_size(stream.tensors_of(name)) for name in tasks},
        bytes_shared=file_size(stream.adapters.shared_tensors()),
    )


class _Stream:
    """A model that learns tasks with one of the methods; the arguments are those of `train`."""

    def __init__(
        self, method: str, model: PreTrainedModel, tasks: Mapping[str, Task], settings: BaselineSettings
    ) -> None:
        self.method, self.tasks, self.settings = method, tasks, settings
        self.places = {name: place for place, name in enumerate(tasks)}
        self.data = prepare(tasks, inputs_of(model))
        self.model = HeadedModel(model, tasks)
        self.adapters = METHODS[method].adapters(self.model, settings, len(tasks))
        self.learned: list[str] = []
        self.progress: StreamProgressCallback | None = None
        self._trainer: Trainer | None = None
        self._predicted: dict[str, np.ndarray] = {}

    def learn(self, group: Sequence[str]) -> Step:
        """Train on the next task, or on all of them at once."""
        place = self.places[group[0]]
        examples = self._examples(group)
        self.adapters.begin(place)
        for head, name in zip(self.model.heads, self.tasks, strict=True):
            head.requires_grad_(name in examples)
        parameters = _trained(self.model.backbone), _trained(self.model.heads)
        self._trainer = BaselineTrainer(
            model=self.model,
            args=_arguments(self.settings.args, place),
            train_dataset=concatenate_datasets(list(examples.values())),
            processing_class=self.settings.processing_class,
            data_collator=self.settings.data_collator,
            penalty=self.adapters.penalty,
            head_learning_rate=self.settings.head_learning_rate,
        )
        # Making a Trainer sets the seed. From here on, draws and the order of examples are those of Share.
        set_seed(self.settings.args.seed + 2 * place)
        self.adapters.draw()
        self.progress = _show_progress(self._trainer, f"{group[0] if len(group) == 1 else 'all'} [{self.method}]")
        seconds = seconds_of(self._trainer.train)
        self.adapters.finish()
        self.learned += group
        return Step(tuple(group), {name: len(some) for name, some in examples.items()}, *parameters, seconds)

    def predictions(self) -> dict[str, np.ndarray]:
        """Return the outputs (examples, num_labels) for the scored examples of each task learned so far."""
        for name in self.learned:
            if name in self._predicted and self.adapters.keeps_tasks:
                continue
            self.adapters.select(self.places[name])
            outputs = self._trainer.predict(self.data[name]["scored"]).predictions
            self._predicted[name] = outputs[:, : self.tasks[name].num_labels]
        return dict(self._predicted)

    def tensors_of(self, name: str) -> dict[str, Tensor]:
        """Return the tensors that only this task needs, including its head."""
        head = self.model.heads[self.places[name]].state_dict()
        return {**self.adapters.tensors_of(self.places[name]), **{f"head.{key}": value for key, value in head.items()}}

    def keep(self, folder: Path) -> None:
        """Save the LoRA of each task in PEFT's format, with its head beside it."""
        draft = folder.with_name(f"{folder.name}.{os.getpid()}")
        self.model.backbone.save_pretrained(str(draft))
        for lora, name, head in zip(self.adapters.loras, self.tasks, self.model.heads, strict=True):
            (draft / lora).rename(draft / name)
            safetensors.torch.save_file(head.state_dict(), draft / name / HEAD_FILE)
        with contextlib.suppress(OSError):  # another run may have saved the same LoRAs meanwhile
            draft.rename(folder)

    def _examples(self, group: Sequence[str]) -> dict[str, Dataset]:
        """Return the training examples by task: all examples of new tasks and the replayed ones of earlier tasks."""
        share, seed = METHODS[self.method].replayed, self.settings.args.seed
        examples = {name: self.data[name]["train"] for name in group}
        if share:
            for name in self.learned:
                examples[name] = replayed(self.data[name]["train"], share, seed + 2 * self.places[name])
        return examples


def replayed(data: Dataset, share: float, seed: int) -> Dataset:
    """Choose the examples of an earlier task to replay: a fraction of all, at least one, determined by the seed."""
    kept = np.random.default_rng(seed).choice(len(data), max(1, round(share * len(data))), replace=False)
    return data.select(np.sort(kept))


def file_size(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of a safetensors file with these tensors in float32, or 0 without tensors."""
    if not tensors:
        return 0
    return len(safetensors.torch.save({name: tensor.detach().float().cpu() for name, tensor in tensors.items()}))


def _arguments(args: TrainingArguments, position: int) -> TrainingArguments:
    """Return the training arguments of the task at a position."""
    args = copy.copy(args)
    args.seed += 2 * position
    args.save_strategy = SaveStrategy.NO
    args.remove_unused_columns = False  # `prepare` has removed them, and `task` is no input of the backbone
    return args


def _show_progress(trainer: Trainer, title: str) -> StreamProgressCallback | None:
    """Replace the Trainer's progress bar by one with a title, unless progress bars are disabled."""
    if trainer.args.disable_tqdm:
        return None
    progress = StreamProgressCallback()
    progress.title = title
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(progress)
    return progress


def _trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _scores(task: Task, predictions: np.ndarray) -> dict[str, float]:
    return task.scores(predictions, np.asarray(list(task.scored["label"])))


def _score_name(tasks: Mapping[str, Task]) -> str:
    """Return the name of the tasks' main metric, or "main metric" if it differs between tasks."""
    first, *others = dict.fromkeys(task.metrics[0] for task in tasks.values())
    return "main metric" if others else first
