"""What the tests of streams share: small tasks that can be learned, their trainers, and comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from share_hf import ShareConfig, SharedSubspace, ShareTrainer, ShareTrainingArguments
from share_hf.state import SubspaceState


K, P = 12, 4
BERT_TARGETS = ["query", "value"]
LLAMA_TARGETS = ["q_proj", "v_proj"]
LENGTH = 6

# Tasks of the classification stream with their numbers of labels. The model has 3 labels.
LABELS = {"colors": 2, "shapes": 3, "sizes": 2, "sounds": 3}


def classification_task(
    seed: int, num_labels: int, rows: int = 32, names: tuple[str, ...] | None = None
) -> DatasetDict:
    """A task in which the first token determines the label, by a rule of its own."""
    splits = {}
    for i, split in enumerate(("train", "test")):
        generator = torch.Generator().manual_seed(100 * seed + i)
        labels = torch.arange(rows) % num_labels
        ids = torch.randint(3, 64, (rows, LENGTH), generator=generator)
        ids[:, 0] = 3 + (5 * labels + 7 * seed) % 61
        splits[split] = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
        if names is not None:
            splits[split] = splits[split].cast_column("labels", ClassLabel(names=list(names)))
    return DatasetDict(splits)


def language_task(seed: int, rows: int = 24) -> DatasetDict:
    """A task in which each token follows from the one before it, by a step of its own."""
    splits = {}
    for i, split in enumerate(("train", "validation")):
        start = torch.randint(0, 61, (rows, 1), generator=torch.Generator().manual_seed(100 * seed + i))
        ids = (3 + (start + (seed + 2) * torch.arange(LENGTH)) % 61).tolist()
        splits[split] = Dataset.from_dict({"input_ids": ids, "labels": ids})
    return DatasetDict(splits)


def classification_tasks(*names: str) -> dict[str, DatasetDict]:
    return {name: classification_task(list(LABELS).index(name), LABELS[name]) for name in names or LABELS}


def language_tasks(*names: str) -> dict[str, DatasetDict]:
    return {name: language_task(seed) for seed, name in enumerate(names)}


def arguments(output_dir: Path, **overrides: Any) -> ShareTrainingArguments:
    """Arguments for three steps per phase on the CPU, without output and checkpoints."""
    values: dict[str, Any] = dict(
        output_dir=str(output_dir),
        max_steps=3,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=32,
        learning_rate=5e-3,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        num_init_tasks=1,
    )
    return ShareTrainingArguments(**{**values, **overrides})


def config(targets: list[str], **overrides: Any) -> ShareConfig:
    return ShareConfig(**{**dict(num_components=K, pseudo_rank=P, target_modules=targets), **overrides})


def classifier_trainer(
    model: PreTrainedModel,
    output_dir: Path,
    tasks: Mapping[str, Any] | None = None,
    *,
    share: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    **overrides: Any,
) -> ShareTrainer:
    """Make a trainer of classification tasks on the tiny BERT."""
    return ShareTrainer(
        model,
        arguments(output_dir, **overrides),
        config(BERT_TARGETS, **(share or {})),
        tasks,
        **(trainer or {}),
    )


def assert_same_tasks(found: SharedSubspace | SubspaceState, expected: SharedSubspace | SubspaceState) -> None:
    """Assert that bases, coefficients, drift and heads are identical, bit by bit."""
    one, other = (each.state if isinstance(each, SharedSubspace) else each for each in (found, expected))
    assert list(one.tasks) == list(other.tasks)
    assert one.layers.keys() == other.layers.keys()
    for module, layer in one.layers.items():
        same = other.layers[module]
        assert layer.tasks == same.tasks
        for name in ("basis_out", "basis_in", "coefficients_out", "coefficients_in"):
            assert torch.equal(getattr(layer, name), getattr(same, name)), (module, name)
        for name in ("norms", "rank_errors", "drift_bounds", "drift_estimates"):
            assert torch.equal(getattr(layer.records, name), getattr(same.records, name)), (module, name)
    for task, info in one.tasks.items():
        assert info.learned_by == other.tasks[task].learned_by
        assert_same_tensors(info.head, other.tasks[task].head)


def assert_same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def updates(subspace: SharedSubspace, task: str) -> dict[str, Tensor]:
    """Return the updates (n, d) of a task by module, as stored."""
    return {module: layer.update_of(task).dense() for module, layer in subspace.state.layers_of(task).items()}


@torch.no_grad()
def logits(model: torch.nn.Module, data: Dataset) -> Tensor:
    return model.eval()(input_ids=torch.tensor(data["input_ids"][:])).logits


class Interruption(Exception):
    """Raised to stop a stream from within."""


class At(TrainerCallback):
    """Calls a function at an event of a Trainer."""

    def __init__(self, event: str, action: Callable[..., None]) -> None:
        setattr(self, event, lambda args, state, control, **kwargs: action(args, state, **kwargs))
