"""Answers of the tasks of a subspace to texts: labels, values or generated text, a mixed batch in one pass."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from subspaces import DemoError, first_line
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedTokenizerBase,
)

from share_hf import SharedSubspace
from share_hf.format.saved_modules import num_labels_of


# Neither can be the name of a task.
ROUTER, BASE = "(router)", "__base__"
PAIR = "|||"
AFTER_TEXT = "\nAnswer:"  # as in recipes/likelihood.py
MAX_LINES, MAX_TOKENS = 64, 512
RULED_OUT = -5e3  # the bias of a label that a task does not have, though its head has an output for it, is -10,000

_CLASSES = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
}
_TYPES_OF_ARCHITECTURES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


@dataclass(frozen=True)
class Line:
    """A text and its task.

    Args:
        text: Text, or two texts with `|||` between them.
        task: Name of a task, `ROUTER` or `BASE`.
    """

    text: str
    task: str


@dataclass(frozen=True)
class Answer:
    """Answer of a task to a text. It has labels, a value or generated text.

    Args:
        task: Name of the task, `BASE` for the base model.
        labels: Labels with their probabilities, the most likely first.
        chosen: Labels that the task assigns to the text.
        value: Value that a regression predicts.
        text: Generated text.
    """

    task: str
    labels: tuple[tuple[str, float], ...] = ()
    chosen: tuple[str, ...] = ()
    value: float | None = None
    text: str | None = None

    def short(self) -> str:
        """Return the answer in a few words."""
        if self.text is not None:
            return self.text
        if self.value is not None:
            return f"{self.value:.3g}"
        return ", ".join(self.chosen) or "none of its labels"


@dataclass(frozen=True)
class Route:
    """Choice of the router for a text.

    Args:
        task: Name of the task, None if the text is like those of no task.
        nearest: The most likely tasks with their probabilities.
    """

    task: str | None
    nearest: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Answered:
    """Answers to the lines of one batch.

    Args:
        answers: Answer to each line.
        routes: Choice of the router for each line, None where the line names its task.
        seconds: Time of the pass, without that of loading the model.
    """

    answers: tuple[Answer, ...]
    routes: tuple[Route | None, ...]
    seconds: float


class Answerer:
    """The base model of a subspace with all of its tasks.

    Args:
        subspace: A subspace.
        base_model: Folder or Hub id of the base model. Empty means the one that the subspace names.

    Raises:
        DemoError: If the base model is unavailable, does not fit, or is not one that answers texts.
    """

    def __init__(self, subspace: SharedSubspace, base_model: str = "") -> None:
        base = base_model.strip() or subspace.base_model_name_or_path
        if base is None:
            raise DemoError(
                "The subspace names no base model. Enter its folder or its id on the Hub under “Model and prompt”."
            )
        self._subspace = subspace
        self._lock = threading.Lock()
        self.task_type, self.tokenizer = _task_type(subspace, base), tokenizer_of(base)
        self.model = _applied(subspace, base, self.task_type)
        config = self.model.config
        if config.pad_token_id is None:  # classifiers made of language models look for the end of a text by it
            config.pad_token_id = self.tokenizer.pad_token_id
        positions = getattr(config, "max_position_embeddings", MAX_TOKENS)
        self._room = min(self.tokenizer.model_max_length, positions, MAX_TOKENS)

    @property
    def generates(self) -> bool:
        """Whether answers are generated texts."""
        return self.task_type != "SEQ_CLS"

    def answer(self, lines: Sequence[Line], *, after_text: str | None = None, max_new_tokens: int = 32) -> Answered:
        """Answer texts in one pass, each with its own task.

        Args:
            lines: Texts with their tasks.
            after_text: What follows a text in the prompt of a language model. None means nothing where the tokenizer
                has a chat template, and `AFTER_TEXT` otherwise.
            max_new_tokens: Number of tokens that a language model generates at most, and no more than half of those
                that it takes.

        Raises:
            DemoError: If a line has no text, or a task that the subspace does not have.
        """
        if not lines:
            raise DemoError("There is no text yet. Type one.")
        if len(lines) > MAX_LINES:
            raise DemoError(f"There are {len(lines)} lines. The page answers {MAX_LINES} at once.")
        for line in lines:
            self._check(line)
        if after_text is None:
            after_text = "" if self.tokenizer.chat_template else AFTER_TEXT
        max_new_tokens = min(max_new_tokens, self._room // 2)
        prompts = [self._prompt(line.text, after_text, max_new_tokens) for line in lines]
        batch = self.tokenizer.pad(prompts, return_tensors="pt", padding_side="left" if self.generates else "right")
        batch = batch.to(self.model.device)
        started = time.perf_counter()
        try:
            with self._lock, torch.inference_mode():
                routes = self._routes(lines, batch)
                chosen = [None if route is None else route.task or BASE for route in routes]
                names = [name or line.task for name, line in zip(chosen, lines, strict=True)]
                answers = self._answers(batch, names, max_new_tokens)
        except ValueError as error:
            raise DemoError(str(error)) from error
        return Answered(tuple(answers), tuple(routes), time.perf_counter() - started)

    def _check(self, line: Line) -> None:
        if not line.text.replace(PAIR, "").strip():
            raise DemoError("There is no text yet. Type one.")
        if not line.task:
            raise DemoError("Pick a task.")
        if line.task == ROUTER and not self._subspace.routed_tasks:
            raise DemoError("This subspace has no router. Pick a task.")
        if line.task not in (ROUTER, BASE, *self._subspace.tasks):
            raise unknown_task(line.task, self._subspace)

    def _prompt(self, text: str, after_text: str, max_new_tokens: int) -> BatchEncoding:
        """Tokenize a text as recipes/text_stream.py or recipes/llama_stream.py do."""
        if not self.generates:
            parts = [part.strip() for part in text.split(PAIR, 1)]
            return self.tokenizer(*parts, truncation=True, max_length=self._room)
        room = self._room - max_new_tokens
        if self.tokenizer.chat_template:
            around = len(self._chat(after_text)["input_ids"])
            ids = self.tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
            if len(ids) > room - around:
                text = str(self.tokenizer.decode(ids[: max(0, room - around)]))
            return self._chat(text.strip() + after_text)
        if self.task_type == "SEQ_2_SEQ_LM":
            return self.tokenizer(text.rstrip() + after_text, truncation=True, max_length=room)
        tail = self.tokenizer(after_text, add_special_tokens=False)["input_ids"]
        ids = self.tokenizer(text.rstrip(), truncation=True, max_length=max(1, room - len(tail)))["input_ids"] + tail
        return BatchEncoding({"input_ids": ids, "attention_mask": [1] * len(ids)})

    def _chat(self, message: str) -> Any:
        chat = [{"role": "user", "content": message}]
        return self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)

    def _routes(self, lines: Sequence[Line], batch: BatchEncoding) -> list[Route | None]:
        asked = [i for i, line in enumerate(lines) if line.task == ROUTER]
        routes: list[Route | None] = [None] * len(lines)
        if asked:
            found = self.model.route({name: tensor[asked] for name, tensor in batch.items()})
            for i, name, likely in zip(asked, found.names, found.probabilities, strict=True):
                values, places = likely.topk(min(3, len(found.tasks)))
                nearest = zip((found.tasks[place] for place in places.tolist()), values.tolist(), strict=True)
                routes[i] = Route(name, tuple(nearest))
        return routes

    def _answers(self, batch: BatchEncoding, names: list[str], max_new_tokens: int) -> list[Answer]:
        if not self.generates:
            logits = self.model(**batch, adapter_names=names).logits.float().cpu()
            return [self._classified(name, row) for name, row in zip(names, logits, strict=True)]
        ids = self.model.generate(
            **batch,
            adapter_names=names,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        if self.task_type == "CAUSAL_LM":
            ids = ids[:, batch["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [Answer(name, text=text.strip()) for name, text in zip(names, texts, strict=True)]

    def _classified(self, task: str, logits: Tensor) -> Answer:
        info = self._subspace.state.tasks.get(task)
        kind = None if info is None else info.problem_type
        if kind == "regression" or len(logits) == 1:
            return Answer(task, value=float(logits[0]))
        known = None if info is None else info.labels
        logits = logits[logits > RULED_OUT] if known is None else logits[: len(known)]
        names = known or [self.model.config.id2label[i] for i in range(len(logits))]
        several = kind == "multi_label_classification"
        probabilities = logits.sigmoid() if several else logits.softmax(0)
        order = probabilities.argsort(descending=True).tolist()
        labels = tuple((names[i], float(probabilities[i])) for i in order)
        chosen = [name for name, probability in labels if probability >= 0.5] if several else [labels[0][0]]
        return Answer(task, labels=labels, chosen=tuple(chosen))


def parsed(text: str, subspace: SharedSubspace) -> list[Line]:
    """Return the lines of a mixed batch, each of which is `task: text`. The router takes those that name no task.

    Raises:
        DemoError: If a line names no task and there is no router.
    """
    lines = []
    for number, line in enumerate(filter(None, map(str.strip, text.splitlines())), 1):
        task, colon, rest = line.partition(":")
        if colon and task.strip() in (BASE, *subspace.tasks):
            lines.append(Line(rest.strip(), task.strip()))
        elif subspace.routed_tasks:
            lines.append(Line(line, ROUTER))
        else:
            raise DemoError(
                f"Line {number} begins with no task of this subspace, which has no router. Write it as “task: text”."
            )
    return lines


def unknown_task(task: str, subspace: SharedSubspace) -> DemoError:
    """Return the error for a task that a subspace does not have. It names the task that may be meant."""
    near = get_close_matches(task, subspace.tasks, n=1)
    return DemoError(f"There is no task “{task}”." + (f" Did you mean “{near[0]}”?" if near else ""))


def tokenizer_of(base: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base model, with a token for padding.

    Raises:
        DemoError: If there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError, KeyError) as error:
        raise _unavailable(base, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _task_type(subspace: SharedSubspace, base: str) -> str:
    """Return PEFT's type of the tasks, or that of the class that the base model was saved as."""
    found = {kind for info in subspace.state.tasks.values() if (kind := info.target.get("task_type"))}
    if not found:
        architecture = next(iter(_config_of(base).architectures or ()), "")
        found = {kind for ending, kind in _TYPES_OF_ARCHITECTURES.items() if architecture.endswith(ending)}
        found = found or {architecture or "unknown"}
    if unknown := found - _CLASSES.keys():
        raise DemoError(
            f"The tasks are of the type {sorted(unknown)[0]}. This page asks classifiers of texts and language models."
        )
    if len(found) > 1:
        raise DemoError(f"The tasks are of several types, {' and '.join(sorted(found))}. The page asks one type.")
    return found.pop()


def _config_of(base: str) -> Any:
    try:
        return AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise _unavailable(base, error) from error


def _applied(subspace: SharedSubspace, base: str, task_type: str) -> Any:
    """Load the base model with room for the labels of every task, and put all tasks into it."""
    options: dict[str, Any] = {}
    heads = [info for info in subspace.state.tasks.values() if info.head]
    if task_type == "SEQ_CLS" and heads:
        options["num_labels"] = max(num_labels_of(info.head) or 0 for info in heads)
        options["ignore_mismatched_sizes"] = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "auto" if device == "cuda" else torch.float32
    try:
        model = _CLASSES[task_type].from_pretrained(base, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        raise _unavailable(base, error) from error
    try:
        return subspace.apply(model.to(device))
    except ValueError as error:
        raise DemoError(f"{base} is not the base model of this subspace: {error}") from error


def _unavailable(base: str, error: Exception) -> DemoError:
    return DemoError(
        f"{base}: no base model that could be loaded. Enter its folder or its id on the Hub under “Model and prompt”. "
        f"({first_line(error)})"
    )
