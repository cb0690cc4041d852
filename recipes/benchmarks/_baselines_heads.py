"""One backbone with a head for each task, and data in a form that lets a batch mix any of the tasks."""

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
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


ProblemType = Literal["single_label_classification", "regression", "multi_label_classification"]
PROBLEM_TYPES: tuple[ProblemType, ...] = ("single_label_classification", "regression", "multi_label_classification")
CLASSIFIERS = ("classifier", "score")


class Task(Protocol):
    """A task of the baselines: tokenized data with a column `label`, and a way to score predictions."""

    data: DatasetDict
    problem_type: ProblemType
    metrics: tuple[str, ...]

    @property
    def num_labels(self) -> int:
        """Number of outputs of the task's head."""

    @property
    def scored(self) -> Dataset:
        """Split that the task is scored on."""

    def scores(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        """Return the metrics by name, from outputs (examples, num_labels) and labels."""


class HeadedModel(nn.Module):
    """A backbone shared by all tasks, with one output layer for each task.

    Args:
        model: Model for sequence or image classification, which is copied. The heads are copies of its classifier,
            with the outputs that a task needs, and an identity takes the classifier's place in the backbone.
        tasks: All tasks of the stream, by name.

    Raises:
        ValueError: If the model has no classifier, or has other layers outside its pretrained body.
    """

    # The loss is the mean over a batch, so the Trainer has to divide it by the number of gradient accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, model: PreTrainedModel, tasks: Mapping[str, Task]) -> None:
        super().__init__()
        classifier = getattr(model, _classifier_name(model))
        self.backbone: nn.Module = without_classifier(model)
        self.problem_types = [task.problem_type for task in tasks.values()]
        self.num_labels = [task.num_labels for task in tasks.values()]
        self.heads = nn.ModuleList(head_like(classifier, outputs) for outputs in self.num_labels)

    def forward(self, task: Tensor, labels: Tensor | None = None, **inputs: Tensor) -> SequenceClassifierOutput:
        """Compute the outputs of the samples and their mean loss, with the loss of each sample's problem type.

        Args:
            task: Position in the stream of each sample's task (samples,), int64.
            labels: Labels of the samples (samples, width), float32: a class, or one number for each output of the
                task, followed by padding.
            inputs: Inputs of the backbone.

        Returns:
            The loss, or None without labels, and the outputs (samples, outputs of the widest task), which are zero
            past the outputs of a sample's own task.
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
    """Return the names of the columns that a model takes, except labels."""
    return set(inspect.signature(model.forward).parameters) - {"labels", "task"}


def prepare(tasks: Mapping[str, Task], inputs: set[str]) -> dict[str, DatasetDict]:
    """Return the splits `train` and `scored` of each task, with only the columns that `HeadedModel` takes.

    Columns have the same form in all tasks, so that examples of different tasks can share a batch.

    Args:
        tasks: Stream of tasks.
        inputs: Names of the columns that the backbone takes.

    Raises:
        ValueError: If a task has an unknown problem type, lacks data or columns, or has labels that do not fit its
            problem type.
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
    """Return the labels of a task's examples (examples, numbers in a label), checked against its problem type."""
    expected = _label_width(name, task)
    try:
        numbers = np.asarray(labels, dtype=np.float32).reshape(len(labels), -1)
    except (TypeError, ValueError):
        raise ValueError(
            f"task {name!r} has labels such as {labels[0]!r}, expected numbers, {expected} per label"
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
    """Return how many numbers a label of a task consists of."""
    if task.problem_type not in PROBLEM_TYPES:
        raise ValueError(f"task {name!r} has problem type {task.problem_type!r}, expected one of {PROBLEM_TYPES}")
    return 1 if task.problem_type == "single_label_classification" else task.num_labels


def _losses(problem_type: ProblemType, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of each sample of one task (samples,)."""
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits, labels[:, 0].long(), reduction="none")
    labels = labels[:, : logits.shape[-1]]
    if problem_type == "regression":
        return F.mse_loss(logits, labels, reduction="none").mean(-1)
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)


def _classifier_name(model: PreTrainedModel) -> str:
    """Return the name of a model's classifier, and check that nothing else lies outside its pretrained body."""
    name = next((name for name in CLASSIFIERS if isinstance(getattr(model, name, None), nn.Module)), None)
    if name is None or not any(isinstance(module, nn.Linear) for module in getattr(model, name).modules()):
        raise ValueError(f"{type(model).__name__} has no dense classifier, expected one as {' or '.join(CLASSIFIERS)}")
    known = (f"{model.base_model_prefix}.", f"{name}.")
    others = [parameter for parameter, _ in model.named_parameters() if not parameter.startswith(known)]
    if others:
        raise ValueError(
            f"{type(model).__name__} has {others[0]!r} outside its body and its classifier, expected nothing there: "
            "it would keep its random values"
        )
    return name


def without_classifier(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model whose outputs are the inputs of its classifier."""
    backbone = copy.deepcopy(model)
    setattr(backbone, _classifier_name(model), nn.Identity())
    return backbone


def kept_head(model: PreTrainedModel, outputs: int, path: Path) -> nn.Module:
    """Load a saved head with this many outputs, for a model like the one it was trained with."""
    head = head_like(getattr(model, _classifier_name(model)), outputs)
    head.load_state_dict(safetensors.torch.load_file(path))
    return head


def head_like(classifier: nn.Module, outputs: int) -> nn.Module:
    """Return a float32 copy of a classifier that has only its first outputs.

    In Share, too, each task's head starts as the classifier of the base model, and uses its first outputs.

    Raises:
        ValueError: If the classifier has fewer outputs.
    """
    head = nn.Sequential(copy.deepcopy(classifier)).float()
    *_, (path, last) = ((path, module) for path, module in head.named_modules() if isinstance(module, nn.Linear))
    if outputs > last.out_features:
        raise ValueError(f"the model's classifier has {last.out_features} outputs, expected {outputs}, as a task has")
    kept = nn.Linear(last.in_features, outputs, bias=last.bias is not None)
    with torch.no_grad():
        for parameter, of_all in zip(kept.parameters(), last.parameters(), strict=True):
            parameter.copy_(of_all[:outputs])
    head.set_submodule(path, kept)
    return head
