"""Fixtures with small streams of tasks on tiny models."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel, TrainerCallback

from share_hf import ShareConfig, ShareTrainer, ShareTrainingArguments

from .cases import classifier_trainer


LABELS = {"a": 3, "b": 2, "c": 3}

Make = Callable[..., ShareTrainer]
MakeTrainer = Callable[..., ShareTrainer]


@pytest.fixture(scope="package", autouse=True)
def short_garbage_collection() -> Iterator[None]:
    """Keep garbage collection short: every phase collects garbage, including all that the imports have made."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def without_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide matplotlib, which takes most of the time of a save, unless a test asks for it."""
    if "with_figures" not in request.fixturenames:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


@pytest.fixture
def with_figures() -> None:
    """Draw figures, in the tests that are about them."""


def classification_data(num_labels: int, seed: int, examples: int = 24) -> Dataset:
    """Sequences of 6 tokens, the first of which determines the label."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 63, (examples, 6), generator=generator)
    tokens[:, 0] = 3 + torch.arange(examples) % num_labels
    labels = (torch.arange(examples) % num_labels).tolist()
    return Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": [[1] * 6] * examples, "label": labels})


def language_data(shift: int, examples: int = 16) -> Dataset:
    """Sequences that count up by `shift`."""
    rows = [[3 + (start + shift * i) % 60 for i in range(8)] for start in range(examples)]
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 8] * examples, "labels": rows})


@pytest.fixture(scope="session")
def classification_tasks() -> dict[str, DatasetDict]:
    return {
        name: DatasetDict(
            train=classification_data(num_labels, seed), test=classification_data(num_labels, seed + 10, examples=12)
        )
        for seed, (name, num_labels) in enumerate(LABELS.items())
    }


@pytest.fixture(scope="session")
def language_tasks() -> dict[str, DatasetDict]:
    return {
        f"shift{shift}": DatasetDict(train=language_data(shift), test=language_data(shift, examples=4))
        for shift in (1, 2, 5)
    }


@pytest.fixture
def make_trainer(
    tiny_model: Callable[[str], PreTrainedModel], classification_tasks: dict[str, DatasetDict], tmp_path: Path
) -> MakeTrainer:
    """Make a trainer of the classification stream with a few steps per task. Keywords change its arguments."""

    def make(
        *,
        folder: str = "out",
        tasks: Any = classification_tasks,
        model: str = "bert",
        config: ShareConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        subspace: Any = None,
        adapters: Any = None,
        task_scorer: Any = None,
        **arguments: Any,
    ) -> ShareTrainer:
        values = {
            "per_device_train_batch_size": 8,
            "num_train_epochs": 2,
            "learning_rate": 5e-3,
            "num_init_tasks": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            **arguments,
        }
        targets = ["query", "value"] if model == "bert" else ["q_proj", "v_proj"]
        return ShareTrainer(
            tiny_model(model),
            ShareTrainingArguments(str(tmp_path / folder), **values),
            config or ShareConfig(num_components=8, pseudo_rank=2, num_temporary=4, target_modules=targets),
            tasks,
            subspace=subspace,
            adapters=adapters,
            task_scorer=task_scorer,
            callbacks=callbacks,
        )

    return make


def coefficients(trainer: ShareTrainer) -> dict[str, torch.Tensor]:
    """Return everything that a stream learned, by name: coefficients, bases and heads."""
    state = trainer.subspace.state
    tensors = {}
    for module, layer in state.layers.items():
        tensors |= {f"{module}.beta": layer.basis_out, f"{module}.alpha": layer.basis_in}
        for i, task in enumerate(layer.tasks):
            tensors[f"{module}.{task}.out"] = layer.coefficients_out[i]
            tensors[f"{module}.{task}.in"] = layer.coefficients_in[i]
    for task, info in state.tasks.items():
        tensors |= {f"{task}.{name}": tensor for name, tensor in info.head.items()}
    return tensors


def assert_same_to_the_bit(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


@pytest.fixture
def make(tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path) -> Make:
    """Make a trainer of classification tasks in a folder of its own."""

    def trainer(tasks: Any = None, folder: str = "out", **options: Any) -> ShareTrainer:
        return classifier_trainer(tiny_model("bert"), tmp_path / folder, tasks, **options)

    return trainer
