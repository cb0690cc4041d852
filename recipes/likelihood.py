"""Labelled text tasks for causal LMs, trained as prompt and completion and scored by the likelihood of the labels."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from datasets import Dataset, DatasetDict
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PromptFormat:
    """How an example becomes a prompt and its label becomes a completion.

    Args:
        after_text: String between the text and the label; `{labels}` in it stands for the labels of the task.
        before_label: String at the start of the completion, used without a chat template.
        max_length: Maximum number of tokens in a prompt; a longer text is cut at its end.
        chat_template: Whether to use the tokenizer's chat template: the user says the text and `after_text`, and the
            assistant answers with the label.
    """

    after_text: str = "\nAnswer:"
    before_label: str = " "
    max_length: int = 256
    chat_template: bool = False

    @classmethod
    def of_tokenizer(
        cls, tokenizer: PreTrainedTokenizerBase, after_text: str | None, max_length: int, *, chats: bool = True
    ) -> PromptFormat:
        """Return a chat format if the tokenizer has a template and `chats` allows it, otherwise text and "Answer:"."""
        if chats and tokenizer.chat_template:
            return cls(after_text or "", max_length=max_length, chat_template=True)
        return cls(cls.after_text if after_text is None else after_text, max_length=max_length)

    def naming(self, labels: Sequence[str]) -> PromptFormat:
        """Return this format with `{labels}` replaced by the labels of a task."""
        return replace(self, after_text=self.after_text.replace("{labels}", ", ".join(labels)))

    def prompt_ids(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        """Return the tokens of the prompt, at most `max_length`, including the tokenizer's own special tokens.

        Raises:
            ValueError: If the tokens around a text leave no room for it.
        """
        if self.chat_template:
            return self._chat_ids(tokenizer, text.rstrip())
        tail = tokenizer(self.after_text, add_special_tokens=False)["input_ids"]
        room = self._room_before(tail, start=tokenizer.num_special_tokens_to_add())
        return tokenizer(text.rstrip(), truncation=True, max_length=room)["input_ids"] + tail

    def _chat_ids(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        ids = self._rendered(tokenizer, text)
        if len(ids) <= self.max_length:
            return ids
        # The part after the text must stay. It is the common ending of two chats that differ only in their text.
        one, other = self._rendered(tokenizer, "a"), self._rendered(tokenizer, "b")
        tail = _common_start(one[::-1], other[::-1])[::-1]
        return ids[: self._room_before(tail, start=len(_common_start(one, other)))] + tail

    def _rendered(self, tokenizer: PreTrainedTokenizerBase, text: str, answer: str | None = None) -> list[int]:
        chat = [{"role": "user", "content": text + self.after_text}]
        if answer is not None:
            chat.append({"role": "assistant", "content": answer})
        return tokenizer.apply_chat_template(chat, add_generation_prompt=answer is None, return_dict=True)["input_ids"]

    def _room_before(self, tail: Sequence[int], *, start: int) -> int:
        room = self.max_length - len(tail)
        if room <= start:
            raise ValueError(
                f"max_length is {self.max_length}, expected more than the {start + len(tail)} tokens around a text"
            )
        return room

    def label_ids(self, tokenizer: PreTrainedTokenizerBase, label: str) -> list[int]:
        """Return the tokens of the completion, without the tokens that end it.

        Raises:
            ValueError: If the chat template starts an answer differently from the way it ends a prompt.
        """
        if not self.chat_template:
            return tokenizer(f"{self.before_label}{label}", add_special_tokens=False)["input_ids"]
        # Some tokenizers encode a word on its own differently from the same word after the template's last line.
        prompt = self._rendered(tokenizer, "a")
        answers = [self._rendered(tokenizer, "a", answer) for answer in (label, "a", "b")]
        if any(answer[: len(prompt)] != prompt for answer in answers):
            raise ValueError(
                "the chat template starts an answer differently from the way it ends a prompt "
                "(add_generation_prompt=True), expected the same; pass --chat_template never to do without it"
            )
        end = len(_common_start(answers[1][::-1], answers[2][::-1]))
        return answers[0][len(prompt) : len(answers[0]) - end]


def with_text(task: str, data: DatasetDict, columns: Sequence[str]) -> DatasetDict:
    """Join the named columns that a task has into one `text` column.

    Args:
        task: Name of the task.
        data: Splits of the task.
        columns: Names of columns, such as "sentence1" and "sentence2". If the task has several of them, the text has
            one line for each, which starts with the column's name.

    Raises:
        ValueError: If the task has none of the columns, or not the same ones in all splits.
    """
    found = [name for name in columns if name in data["train"].column_names]
    if not found:
        raise ValueError(
            f"task {task!r} has columns {data['train'].column_names}, expected one of {list(columns)} among them"
        )
    for split, rows in data.items():
        if missing := [name for name in found if name not in rows.column_names]:
            raise ValueError(
                f"task {task!r} has columns {rows.column_names} in {split!r}, expected {missing} as in 'train'"
            )
    if found == ["text"]:
        return data

    def join(example: Mapping[str, str]) -> dict[str, str]:
        if len(found) == 1:
            return {"text": example[found[0]]}
        return {"text": "\n".join(f"{name}: {example[name]}" for name in found)}

    return data.map(join, desc=f"Joining columns of {task}")


def prompt_completion_task(
    task: str, data: DatasetDict, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat
) -> tuple[DatasetDict, list[str]]:
    """Tokenize a task with the columns `text` and `label`.

    Returns:
        The data with the columns `input_ids`, `attention_mask` and `labels` (-100 on the prompt) for training and
        `prompt_ids` and `label_index` for scoring, and the sorted labels of the training data.

    Raises:
        ValueError: If a column is missing, or another split has a label that never occurs in the training data.
    """
    for split, rows in data.items():
        if not {"text", "label"} <= set(rows.column_names):
            raise ValueError(
                f"task {task!r} has columns {rows.column_names} in {split!r}, expected 'text' and 'label'"
            )
    labels = sorted({str(label) for label in data["train"]["label"]})
    for split, rows in data.items():
        if unseen := sorted({str(label) for label in rows["label"]} - set(labels)):
            raise ValueError(
                f"task {task!r} has label {unseen[0]!r} in {split!r}, expected one of those it is trained on: {labels}"
            )

    prompt_format = prompt_format.naming(labels)
    completions = [[*prompt_format.label_ids(tokenizer, label), tokenizer.eos_token_id] for label in labels]

    def tokenize(example: Mapping[str, str]) -> dict[str, list[int] | int]:
        prompt = prompt_format.prompt_ids(tokenizer, example["text"])
        label_index = labels.index(str(example["label"]))
        completion = completions[label_index]
        return {
            "input_ids": prompt + completion,
            "attention_mask": [1] * (len(prompt) + len(completion)),
            "labels": [-100] * len(prompt) + completion,
            "prompt_ids": prompt,
            "label_index": label_index,
        }

    columns = data["train"].column_names
    return data.map(tokenize, remove_columns=columns, desc=f"Tokenizing {task}"), labels


class CompletionCollator:
    """Collates prompts and completions into batches that are padded on the left.

    All completions then end at the same position, and a model that takes `logits_to_keep` computes logits for the
    completions only, which are few of a batch's tokens. With a large vocabulary, this saves a fifth of a small model's
    time and most of its memory.

    Args:
        tokenizer: Tokenizer that defines the padding.
        model: Base model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> None:
        self.pad = padding_of(tokenizer)
        self.takes = frozenset(inspect.signature(model.forward).parameters)

    def __call__(self, examples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask` and `labels` (batch, tokens), and optional inputs that the model takes.

        With `logits_to_keep`, `labels` covers only the positions whose logits are kept.
        """
        rows = [list(example["input_ids"]) for example in examples]
        width = max(map(len, rows))
        mask = _left_padded([[1] * len(row) for row in rows], 0)
        labels = _left_padded([list(example["labels"]) for example in examples], -100)
        batch = {"input_ids": _left_padded(rows, self.pad), "attention_mask": mask, "labels": labels}
        if "position_ids" in self.takes:
            batch["position_ids"] = _positions(mask)
        if "logits_to_keep" in self.takes:
            # The logits that predict a token are at the position before it.
            first = max(int((labels != -100).any(0).int().argmax()) - 1, 0)
            batch["labels"] = labels[:, first:]
            batch["logits_to_keep"] = torch.arange(first, width)
        return batch


class LabelLikelihoodScorer:
    """Scores a task by the accuracy of picking the label with the highest likelihood after the prompt.

    The model runs each prompt once, and labels of several tokens continue from its cache. If one label of a task is
    the beginning of another one, the end-of-text token counts as the last token of each label.

    Args:
        tokenizer: Tokenizer of the prompts and labels, which also defines the padding.
        labels: Labels to choose from, by task.
        prompt_format: Format of the prompts, the same as for training.
        batch_size: Number of prompts in a batch.

    Attributes:
        metrics (`tuple[str, ...]`): Names of the metrics of a task.
        chosen (`dict[str, list[int]]`): Indices of the labels that were picked when a task was last scored, by task.
        seconds (`float`): Total time spent on scoring.
    """

    metrics = ("accuracy",)

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        labels: Mapping[str, Sequence[str]],
        prompt_format: PromptFormat,
        batch_size: int = 32,
    ) -> None:
        self.pad = padding_of(tokenizer)
        self.batch_size = batch_size
        self.chosen: dict[str, list[int]] = {}
        self.seconds = 0.0
        self.label_ids = {}
        for task, names in labels.items():
            ids = [prompt_format.label_ids(tokenizer, label) for label in names]
            ambiguous = any(a != b and b[: len(a)] == a for a in ids for b in ids)
            self.label_ids[task] = [[*label, tokenizer.eos_token_id] for label in ids] if ambiguous else ids

    @torch.inference_mode()
    def __call__(self, model: PeftModel | nn.Module, task: str, data: Dataset) -> dict[str, float]:
        """Score a task, whose data comes from `prompt_completion_task`, with the model in its present state."""
        started, was_training = time.monotonic(), model.training
        model.eval()
        prompts, answers = data["prompt_ids"], data["label_index"]
        chosen = [0] * len(data)
        # Prompts of similar length share a batch, so that there is little padding.
        order = sorted(range(len(data)), key=[len(prompt) for prompt in prompts].__getitem__)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            scores = self.label_scores(model, [prompts[i] for i in rows], self.label_ids[task])
            for i, label in zip(rows, scores.argmax(-1).tolist(), strict=True):
                chosen[i] = label
        model.train(was_training)
        self.chosen[task] = chosen
        self.seconds += time.monotonic() - started
        return {"accuracy": sum(a == b for a, b in zip(chosen, answers, strict=True)) / len(data)}

    def label_scores(
        self, model: PeftModel | nn.Module, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
    ) -> Tensor:
        """Return the log-likelihood (prompts, labels) of each label after each prompt."""
        device = next(model.parameters()).device
        mask = _left_padded([[1] * len(prompt) for prompt in prompts], 0).to(device)
        ids = _left_padded(prompts, self.pad).to(device)
        output = model(**_inputs(model, ids, mask, logits=1), use_cache=True)
        scores = output.logits[:, -1].float().log_softmax(-1)[:, [label[0] for label in labels]]
        # Labels that differ only in their last token, such as "very good" and "very bad", share a forward pass.
        continued: dict[tuple[int, ...], list[int]] = {}
        for number, label in enumerate(labels):
            if len(label) > 1:
                continued.setdefault(tuple(label[:-1]), []).append(number)
        for beginning, numbers in continued.items():
            rest = torch.tensor(beginning, device=device).expand(len(prompts), -1)
            inputs = _inputs(model, rest, torch.cat([mask, torch.ones_like(rest)], dim=1), logits=len(beginning))
            # A forward pass extends the cache that it is given, so it gets a copy.
            logits = model(**inputs, past_key_values=copy.deepcopy(output.past_key_values)).logits
            following = logits.float().log_softmax(-1)
            for number in numbers:
                tokens = torch.tensor(labels[number][1:], device=device)
                scores[:, number] += following[:, range(len(tokens)), tokens].sum(-1)
        return scores


def padding_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that pads rows; attention masks always hide it."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def _common_start(one: Sequence[int], other: Sequence[int]) -> list[int]:
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]


def _left_padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[fill] * (width - len(row)) + list(row) for row in rows])


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)


def _inputs(model: PeftModel | nn.Module, input_ids: Tensor, mask: Tensor, *, logits: int) -> dict[str, Tensor]:
    """Return the inputs of a forward pass over left-padded tokens.

    They include the positions of the tokens and of the logits to keep if the model takes them.

    Args:
        model: Model that takes the inputs.
        input_ids: Tokens (rows, new).
        mask: Mask (rows, cached + new) of the tokens that are not padding.
        logits: Number of the last tokens that need logits.
    """
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    takes = inspect.signature(base.forward).parameters
    new = input_ids.shape[1]
    if "position_ids" in takes:
        inputs["position_ids"] = _positions(mask)[:, -new:]
    if "logits_to_keep" in takes:
        # Positions instead of a count, for which the model would take a slice: a slice is not contiguous, and
        # bfloat16 on the CPU takes 70 times as long with it.
        inputs["logits_to_keep"] = torch.arange(new - logits, new, device=input_ids.device)
    return inputs
