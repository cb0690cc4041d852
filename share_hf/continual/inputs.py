"""What a stream is given, checked: its data, its configuration, and what its scores are by default."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from datasets import Dataset, DatasetDict
from peft import TaskType
from torch import nn
from transformers import EvalPrediction
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from ..shared_subspace import SharedSubspace
from ..tuner import ShareConfig
from ..tuner.state import share_config_for


TaskData = Dataset | DatasetDict | Mapping[str, Dataset]

TRAIN_SPLIT = "train"
EVALUATION_SPLITS = ("test", "validation", "eval")


class TaskSplits(NamedTuple):
    """What a task is learned from, and what it is scored on after each task."""

    train: Dataset
    evaluation: Dataset | None


def config_for(model: nn.Module, share_config: ShareConfig | None, subspace: SharedSubspace | None) -> ShareConfig:
    """The configuration of new tasks: the given one, or that of the subspace's newest task.

    Raises:
        ValueError: If it contradicts the subspace.
    """
    if share_config is not None:
        config = copy.deepcopy(share_config)
    elif subspace is not None and subspace.tasks:
        config = share_config_for(subspace.state, subspace.tasks[-1], trainable=True)
    else:
        config = ShareConfig()
    if subspace is not None:
        # Centering is a property of a subspace that was made with it; a configuration has no say in it.
        settings = config.subspace_settings(center=subspace.settings.center)
        if settings != subspace.settings:
            raise ValueError(f"share_config has {settings}, the subspace has {subspace.settings}")
    if config.task_type is None:
        config.task_type = _task_type_of(model)
    return config


def _task_type_of(model: nn.Module) -> TaskType | None:
    name = type(model).__name__
    if name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        return TaskType.SEQ_CLS
    return TaskType.CAUSAL_LM if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() else None


def split_data(name: str, data: TaskData) -> TaskSplits:
    """Training and evaluation data of a task.

    Raises:
        ValueError: If there is no training data.
    """
    if not isinstance(data, Mapping):
        data = {TRAIN_SPLIT: data}
    if TRAIN_SPLIT not in data:
        raise ValueError(f"task {name!r} has splits {sorted(data)}, expected {TRAIN_SPLIT!r} among them")
    train = data[TRAIN_SPLIT]
    if train is None or (hasattr(train, "__len__") and len(train) == 0):
        raise ValueError(f"task {name!r} has no training examples, expected at least one")
    return TaskSplits(train, next(_evaluation_splits(data), None))


def selection_data(data: TaskData) -> Dataset | None:
    """What a task is evaluated on while it trains, so that its test data need not choose the best checkpoint."""
    return next(_evaluation_splits(data, reverse=True), None)


def _evaluation_splits(data: TaskData, *, reverse: bool = False) -> Iterator[Dataset]:
    if isinstance(data, Mapping):
        names = reversed(EVALUATION_SPLITS) if reverse else EVALUATION_SPLITS
        yield from (data[name] for name in names if data.get(name) is not None and len(data[name]))


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Fraction of examples whose largest logit is their label's."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}
