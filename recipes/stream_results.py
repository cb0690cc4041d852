"""Results in addition to the score matrix: the answer to each example, sizes, times, and the loss on other texts."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict, load_dataset
from likelihood import LabelLikelihoodScorer
from peft import PeftModel, get_peft_model_state_dict
from task_data import FORMATS, evaluation_of
from torch.nn.functional import cross_entropy
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from share_hf.state import Phase, SubspaceReport


class Stopwatch(TrainerCallback):
    """Adds up the time that a Trainer spends on training.

    Attributes:
        seconds (`float`): Total time of all training runs.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.monotonic()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds += time.monotonic() - self._started


def texts_of(place: Path, most: int) -> list[str]:
    """Return the first texts of a jsonl or csv file with a `text` column, or the first lines of any other text file.

    Texts that are blank are left out.
    """
    if not place.is_file():
        raise ValueError(f"{place}: no such file")
    rows = load_dataset(FORMATS.get(place.suffix, "text"), data_files=str(place), split="train")
    if "text" not in rows.column_names:
        raise ValueError(f"{place}: columns {rows.column_names}, expected 'text' among them")
    texts = [text for text in rows.select(range(min(most, len(rows))))["text"] if text.strip()]
    if not texts:
        raise ValueError(f"{place}: no text in its first {most} rows, expected at least one")
    return texts


@torch.inference_mode()
def next_token_loss(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int
) -> float:
    """Return the mean loss per token in nats, over texts that are cut at `max_length` tokens and run one by one."""
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")["input_ids"]
        ids = ids.to(next(model.parameters()).device)
        if ids.shape[1] > 1:
            logits = model(input_ids=ids).logits[0, :-1].float()
            total += float(cross_entropy(logits, ids[0, 1:], reduction="sum"))
            tokens += ids.shape[1] - 1
    model.train(was_training)
    return total / tokens if tokens else math.nan


def own_losses(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    adapters: Mapping[str, str],
    max_length: int,
) -> dict[str, Any]:
    """Measure the loss on texts that belong to no task, without an adapter and with the adapter of each task.

    The difference shows what tasks do to the model's other abilities.

    Args:
        model: Model that has the adapters.
        tokenizer: Tokenizer of the model.
        texts: Texts to measure the loss on.
        adapters: Name of each task's adapter.
        max_length: Maximum number of tokens in a text.

    Returns:
        `{"texts": number of texts, "without": loss, "with": {task: loss}}`.
    """
    with model.disable_adapter():
        without = next_token_loss(model, tokenizer, texts, max_length)
    losses: dict[str, float] = {}
    for adapter in dict.fromkeys(adapters.values()):
        model.set_adapter(adapter)
        losses[adapter] = next_token_loss(model, tokenizer, texts, max_length)
    return {
        "texts": len(texts),
        "without": without,
        "with": {task: losses[adapter] for task, adapter in adapters.items()},
    }


def answers(
    scorer: LabelLikelihoodScorer,
    model: PeftModel,
    tasks: Mapping[str, DatasetDict],
    labels: Mapping[str, Sequence[str]],
    adapters: Mapping[str, str],
    *,
    scored: bool,
) -> dict[str, dict[str, Any]]:
    """Return the final answers to the examples of each task.

    Args:
        scorer: Scorer that scored the stream.
        model: Model that has the adapters.
        tasks: Stream of tasks.
        labels: Labels of each task.
        adapters: Name of each task's adapter.
        scored: Whether the scorer scored all tasks at the end of the stream. Otherwise, they are scored again.

    Returns:
        `{task: {"labels", "expected", "chosen"}}`. The last two hold the index of a label for each example, in order.
    """
    found = {}
    for task, data in tasks.items():
        if not scored or task not in scorer.chosen:
            model.set_adapter(adapters[task])
            scorer(model, task, evaluation_of(data))
        expected = list(evaluation_of(data)["label_index"])
        found[task] = {"labels": list(labels[task]), "expected": expected, "chosen": scorer.chosen[task]}
    return found


def sizes_of_subspace(report: SubspaceReport, trained: Mapping[str, int]) -> dict[str, Any]:
    """Return the bytes that all tasks share, the bytes of each task, and the number of parameters each task trained.

    Args:
        report: Report of the subspace.
        trained: Number of trained parameters by phase, from `ShareTrainer.metrics`.
    """
    finetuned = trained.get(Phase.FINETUNE, 0)
    return {
        "bytes": {"shared": report.basis_bytes, "tasks": {task.name: task.bytes for task in report.tasks}},
        "trained_parameters": {task.name: trained.get(task.learned_by, 0) + finetuned for task in report.tasks},
    }


def sizes_of_loras(model: PeftModel, adapters: Mapping[str, str]) -> dict[str, Any]:
    """Return the same for LoRAs; a LoRA that serves several tasks counts as shared."""
    tensors = {name: get_peft_model_state_dict(model, adapter_name=name).values() for name in adapters.values()}
    sizes = {name: sum(tensor.nbytes for tensor in of_lora) for name, of_lora in tensors.items()}
    numbers = {name: sum(tensor.numel() for tensor in of_lora) for name, of_lora in tensors.items()}
    is_shared = len(tensors) < len(adapters)
    return {
        "bytes": {
            "shared": sum(sizes.values()) if is_shared else 0,
            "tasks": {task: 0 if is_shared else sizes[name] for task, name in adapters.items()},
        },
        "trained_parameters": {task: numbers[name] for task, name in adapters.items()},
    }


def write_results(place: Path, results: Mapping[str, Any]) -> None:
    """Write results as JSON; after a crash, either the old or the new file is there."""
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = place.with_name(f".{place.name}.{os.getpid()}")
    draft.write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")
    draft.replace(place)
