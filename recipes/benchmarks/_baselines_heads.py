"""One backbone with a head for each task, and data in the form it takes, whatever tasks a batch is of."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed
from transformers.modeling_outputs import SequenceClassifierOutput


ProblemType = Literal["single_label_classification", "regression", "multi_label_classification"]
PROBLEM_TYPES: tuple[ProblemType, ...] = ("single_label_classification", "regression", "multi_label_classification")
CLASSIFIERS = ("classifier", "score")


class Task(Protocol):
    """A task as the baselines take it: tokenized data with a column `label`, and how predictions are scored."""

    data: DatasetDict
    problem_type: ProblemType
    metrics: tuple[str, ...]

    @property
    def num_labels(self) -> int:
        """Number of outputs of its head."""

    @property
    def scored(self) -> Dataset:
        """The split that it is scored on."""

    def scores(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        """Its metrics by name, of outputs (examples, num_labels) against labels."""


class HeadedModel(nn.Module):
    """A backbone shared by all tasks, with one output layer for each task.

    Args:
        model: A model for sequence or image classification, which is copied. Copies of its classifier become the
            heads, and nothing takes its place in the backbone.
        tasks: All tasks of the stream, by name.
        seed: Seed of the first task's head; that of each later one is higher by 2, as the recipes have it.

    Raises:
        ValueError: If the model has no classifier, or layers beside it that were not pretrained with its body.
    """

    # The loss is the mean of a batch: the Trainer is to divide it by the steps that gradients are accumulated over.
    accepts_loss_kwargs = False

    def __init__(self, model: PreTrainedModel, tasks: Mapping[str, Task], seed: int) -> None:
        super().__init__()
        classifier = getattr(model, _classifier_name(model))
        self.backbone: nn.Module = without_classifier(model)
        std = getattr(model.config, "initializer_range", 0.02)
        self.problem_types = [task.problem_type for task in tasks.values()]
        self.num_labels = [task.num_labels for task in tasks.values()]
        self.heads = nn.ModuleList()
        for position, outputs in enumerate(self.num_labels):
            set_seed(seed + 2 * position)
            self.heads.append(head_like(classifier, outputs, std))

    def forward(self, task: Tensor, labels: Tensor | None = None, **inputs: Tensor) -> SequenceClassifierOutput:
        """The mean loss of the samples, each by the kind of its task, and their outputs.

        Args:
            task: Position in the stream of each sample's task, (samples,), int64.
            labels: Labels of the samples, (samples, width), float32: a class, or as many numbers as the task has
                outputs, and then padding.
            inputs: What the backbone takes.

        Returns:
            Outputs (samples, outputs of the widest task), zero past those of a sample's own task.
        """
        features = self.backbone(**inputs).logits.float()
        widest = max(self.num_labels)
        rows, outputs, losses = [], [], []
        for position in task.unique().tolist():
            own = (task == position).nonzero().squeeze(1)
            logits = self.heads[position](features[own])
            rows.append(own)
            outputs.append(F.pad(logits, (0, widest - logits.shape[-1])))
            if labels is not None:
                losses.append(_losses(self.problem_types[position], logits.float(), labels[own]))
        logits = torch.cat(outputs)[torch.cat(rows).argsort()]
        return SequenceClassifierOutput(loss=torch.cat(losses).mean() if losses else None, logits=logits)


def inputs_of(model: PreTrainedModel) -> set[str]:
    """Names of the columns that a model takes, labels aside."""
    return set(inspect.signature(model.forward).parameters) - {"labels", "task"}


def prepare(tasks: Mapping[str, Task], inputs: set[str]) -> dict[str, DatasetDict]:
    """The splits `train` and `scored` of each task, with the columns that `HeadedModel` takes and no other.

    Columns have the same form in all tasks, so that examples of different tasks may share a batch.

    Args:
        tasks: The stream.
        inputs: Names of the columns that the backbone takes.

    Raises:
        ValueError: If a task is of no known kind, lacks data or columns, or has labels that are not of its kind.
    """
    width = max(_label_width(name, task) for name, task in tasks.items())
    prepared = {}
    for position, (name, task) in enumerate(tasks.items()):
        if "train" not in task.data:
            raise ValueError(f"task {name!r} has the splits {sorted(task.data)}, expected 'train' among them")
        splits = {"train": task.data["train"], "scored": task.scored}
        prepared[name] = DatasetDict(
            {split: _prepare_split(name, task, data, inputs, position, width) for split, data in splits.items()}
        )
    first, *others = prepared
    for name in others:
        expected, found = (sorted(prepared[task]["train"].column_names) for task in (first, name))
        if found != expected:
            raise ValueError(f"task {name!r} has the columns {found}, expected those of {first!r}, {expected}")
    return prepared


def _prepare_split(name: str, task: Task, data: Dataset, inputs: set[str], position: int, width: int) -> Dataset:
    kept = [column for column in data.column_names if column in inputs]
    if not kept or "label" not in data.column_names or not len(data):
        raise ValueError(
            f"task {name!r} has a split of {len(data)} examples with the columns {data.column_names}, "
            f"expected examples with 'label' and some of what the model takes, {sorted(inputs)}"
        )
    labels = _labels(name, task, list(data["label"]))
    labels = np.pad(labels, ((0, 0), (0, width - labels.shape[1])))
    data = data.select_columns(kept).add_column("labels", labels.tolist())
    return data.add_column("task", [position] * len(data))


def _labels(name: str, task: Task, labels: Sequence[Any]) -> np.ndarray:
    """Labels of a task's examples, (examples, numbers of a label), checked against the kind of the task."""
    expected = _label_width(name, task)
    try:
        numbers = np.asarray(labels, dtype=np.float32).reshape(len(labels), -1)
    except (TypeError, ValueError):
        raise ValueError(
            f"task {name!r} has labels such as {labels[0]!r}, expected numbers, {expected} a label"
        ) from None
    if numbers.shape[1] != expected:
        raise ValueError(f"task {name!r} has labels of {numbers.shape[1]} numbers, expected {expected}")
    if task.problem_type == "single_label_classification":
        allowed, wanted = np.isin(numbers, range(task.num_labels)), f"whole numbers from 0 to {task.num_labels - 1}"
    elif task.problem_type == "multi_label_classification":
        allowed, wanted = (numbers >= 0) & (numbers <= 1), "numbers from 0 to 1"
    else:
        allowed, wanted = np.isfinite(numbers), "finite numbers"
    if not allowed.all():
        raise ValueError(f"task {name!r} has the label {numbers[~allowed][0]:g}, expected {wanted}")
    return numbers


def _label_width(name: str, task: Task) -> int:
    """How many numbers a label of a task is."""
    if task.problem_type not in PROBLEM_TYPES:
        raise ValueError(f"task {name!r} is of the kind {task.problem_type!r}, expected one of {PROBLEM_TYPES}")
    return 1 if task.problem_type == "single_label_classification" else task.num_labels


def _losses(problem_type: ProblemType, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each sample of one task, (samples,)."""
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits, labels[:, 0].long(), reduction="none")
    labels = labels[:, : logits.shape[-1]]
    if problem_type == "regression":
        return F.mse_loss(logits, labels, reduction="none").mean(-1)
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)


def _classifier_name(model: PreTrainedModel) -> str:
    """The name of a model's classifier, which alone may stand beside its pretrained body."""
    name = next((name for name in CLASSIFIERS if isinstance(getattr(model, name, None), nn.Module)), None)
    if name is None or not any(isinstance(module, nn.Linear) for module in getattr(model, name).modules()):
        raise ValueError(f"{type(model).__name__} has no dense classifier, expected one as {' or '.join(CLASSIFIERS)}")
    known = (f"{model.base_model_prefix}.", f"{name}.")
    others = [parameter for parameter, _ in model.named_parameters() if not parameter.startswith(known)]
    if others:
        raise ValueError(
            f"{type(model).__name__} has {others[0]!r} outside its body and its classifier, expected nothing there: "
            "it would stay as it was drawn"
        )
    return name


def without_classifier(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model whose outputs are what its classifier would take."""
    backbone = copy.deepcopy(model)
    setattr(backbone, _classifier_name(model), nn.Identity())
    return backbone


def kept_head(model: PreTrainedModel, outputs: int, path: Path) -> nn.Module:
    """A head that was kept, with so many outputs, for a model like the one it was trained with."""
    head = head_like(getattr(model, _classifier_name(model)), outputs, std=1.0)
    head.load_state_dict(safetensors.torch.load_file(path))
    return head


def head_like(classifier: nn.Module, outputs: int, std: float) -> nn.Module:
    """A copy of a classifier in float32 with so many outputs and weights drawn anew, as transformers draws them."""
    head = nn.Sequential(copy.deepcopy(classifier)).float()
    *_, (path, last) = ((path, module) for path, module in head.named_modules() if isinstance(module, nn.Linear))
    head.set_submodule(path, nn.Linear(last.in_features, outputs, bias=last.bias is not None))
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return head
