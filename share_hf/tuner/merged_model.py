"""A task, or a weighted sum of tasks, merged into the weights of its base model: a full model without adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers
from peft import PeftModel, TaskType
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from ..format.exports import combined_lora
from ..format.lora import lora_files
from ..format.model_classes import class_name_of, pipeline_of
from ..format.saved_modules import num_labels_of
from ..format.tree import lora_of
from ..state import SubspaceState, TaskInfo
from .renaming import named_as_in


logger = logging.get_logger(__name__)

_AUTO_CLASSES = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}


def base_model_for(
    base: str | os.PathLike[str], info: TaskInfo, *, token: str | bool | None = None
) -> PreTrainedModel:
    """Load the base model in the class and with the labels that a task needs, in the dtype that it is stored in.

    Args:
        base: Folder or Hub id of the base model.
        info: Information about the task. If it names neither a task type nor a class, the class that the model was
            saved as is used.
        token: Token for the Hub.

    Raises:
        ValueError: If there is no such model, or its class is unknown.
    """
    options: dict[str, Any] = {"token": token}
    of_labels = info.target.get("task_type") in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS) or pipeline_of(info.target)
    labels = num_labels_of(info.head) if of_labels else None
    if labels is not None:
        known = info.labels is not None and len(info.labels) == labels
        names = list(info.labels) if known else [f"LABEL_{i}" for i in range(labels)]
        options["id2label"] = dict(enumerate(names))
        options["label2id"] = {name: i for i, name in enumerate(names)}
    if info.problem_type is not None:
        options["problem_type"] = info.problem_type
    try:
        config = AutoConfig.from_pretrained(base, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"{base}: no base model that transformers can load ({error})") from error
    of_task = _AUTO_CLASSES.get(info.target.get("task_type"), class_name_of(info.target))
    classes = [of_task, *(config.architectures or ())]
    model_class = next((found for name in classes if name and (found := getattr(transformers, name, None))), None)
    if model_class is None:
        raise ValueError(
            f"{base}: its configuration names no class of transformers ({config.architectures}), expected a model "
            "that transformers loads"
        )
    # A head of the base model with other labels gives way to the task's head.
    return model_class.from_pretrained(
        base, config=config, dtype="auto", token=token, ignore_mismatched_sizes=labels is not None
    )


def merge_tasks_into(model: PreTrainedModel, state: SubspaceState, weights: Mapping[str, float]) -> PreTrainedModel:
    """Add the exact weighted sum of tasks to the weights of their base model.

    PEFT does the arithmetic, because it supports quantized layers and layers that store their weight transposed.

    Args:
        model: Base model without adapters. It is changed in place.
        state: State that holds the tasks.
        weights: Weights by task. A single task of weight 1 brings its head along.

    Raises:
        ValueError: If a module of the tasks is not in the model, or a weight would not be finite.
    """
    state = named_as_in(model, state)
    alone = next(iter(weights)) if list(weights.values()) == [1.0] else None
    adapter = lora_of(state, alone) if alone is not None else combined_lora(state, weights, None).adapter
    modules = dict(model.named_modules())
    if missing := [module for module in adapter.updates if module not in modules]:
        raise ValueError(f"the tasks adapt {missing[0]!r}, which {type(model).__name__} does not have")
    with TemporaryDirectory(prefix="share_hf-") as folder:
        for name, content in lora_files(adapter).items():
            Path(folder, name).write_bytes(content)
        return PeftModel.from_pretrained(model, folder).merge_and_unload(safe_merge=True)


def save_tokenizer_of(base: str | os.PathLike[str], folder: Path, *, token: str | bool | None = None) -> None:
    """Save the tokenizer of a base model, if it has one, next to a merged model."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, token=token)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        logger.info("%s: no tokenizer could be read from it (%s), so the merged model has none.", base, error)
        return
    # For a folder without a tokenizer, transformers makes one that knows only its special tokens.
    if not set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        tokenizer.save_pretrained(folder)
