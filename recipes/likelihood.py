"""Text tasks with labels for causal LMs: trained as prompt and completion, scored by the likelihood of the labels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset, DatasetDict
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PromptFormat:
    """How an example becomes a prompt and its label a completion.

    Args:
        after_text: What stands between the text and the label.
        before_label: What the completion starts with.
        max_length: Tokens of a prompt at most; a longer text is cut at its end.
    """

    after_text: str = "\nAnswer:"
    before_label: str = " "
    max_length: int = 256

    def prompt_ids(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        """Tokens of the prompt, `max_length` of them at most, with the tokenizer's own start."""
        tail = tokenizer(self.after_text, add_special_tokens=False)["input_ids"]
        budget = self.max_length - len(tail)
        return tokenizer(text.rstrip(), truncation=True, max_length=budget)["input_ids"] + tail

    def label_ids(self, tokenizer: PreTrainedTokenizerBase, label: str) -> list[int]:
        """Tokens of the completion."""
        return tokenizer(f"{self.before_label}{label}", add_special_tokens=False)["input_ids"]


def prompt_completion_task(
    task: str, data: DatasetDict, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat
) -> tuple[DatasetDict, list[str]]:
    """Tokenize a task of `text` and `label` columns.

    Returns:
        The data with `input_ids`, `attention_mask`, `labels` (-100 on the prompt) for training, and `prompt_ids`,
        `label_index` for scoring; and the labels, those of the training data.

    Raises:
        ValueError: If a column is missing, or another split has a label that is never seen in training.
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

    def tokenize(example: Mapping[str, str]) -> dict[str, list[int] | int]:
        prompt = prompt_format.prompt_ids(tokenizer, example["text"])
        completion = [*prompt_format.label_ids(tokenizer, str(example["label"])), tokenizer.eos_token_id]
        return {
            "input_ids": prompt + completion,
            "attention_mask": [1] * (len(prompt) + len(completion)),
            "labels": [-100] * len(prompt) + completion,
            "prompt_ids": prompt,
            "label_index": labels.index(str(example["label"])),
        }

    columns = data["train"].column_names
    return data.map(tokenize, remove_columns=columns, desc=f"Tokenizing {task}"), labels


class LabelLikelihoodScorer:
    """Accuracy of picking the label with the highest likelihood after the prompt.

    Each prompt is run once; labels of several tokens continue from its cache.

    Args:
        tokenizer: Gives padding and label tokens.
        labels: By task, the labels to choose from.
        prompt_format: As for training.
        batch_size: Prompts at a time.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        labels: Mapping[str, Sequence[str]],
        prompt_format: PromptFormat,
        batch_size: int = 32,
    ) -> None:
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.batch_size = batch_size
        self.label_ids = {
            task: [prompt_format.label_ids(tokenizer, label) for label in names] for task, names in labels.items()
        }

    @torch.inference_mode()
    def __call__(self, model: PeftModel | nn.Module, task: str, data: Dataset) -> dict[str, float]:
        """Score a task with the model as it is; data as from `prompt_completion_task`."""
        was_training = model.training
        model.eval()
        # Prompts of like length share a batch, so that little is padded.
        order = sorted(range(len(data)), key=lambda i: len(data[i]["prompt_ids"]))
        correct = 0
        for start in range(0, len(order), self.batch_size):
            batch = data.select(order[start : start + self.batch_size])
            scores = self.label_scores(model, batch["prompt_ids"], self.label_ids[task])
            correct += int((scores.argmax(-1).cpu() == torch.tensor(batch["label_index"])).sum())
        model.train(was_training)
        return {"accuracy": correct / len(data)}

    def label_scores(
        self, model: PeftModel | nn.Module, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
    ) -> Tensor:
        """Log-likelihood (prompts, labels) of each label after each prompt."""
        device = next(model.parameters()).device
        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[self.pad] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        output = model(**_with_positions(model, mask, input_ids=ids), use_cache=True)
        first = output.logits[:, -1].float().log_softmax(-1)
        scores = first[:, [label[0] for label in labels]]
        longest = max(len(label) for label in labels)
        if longest == 1:
            return scores
        rest = torch.tensor([list(label) + [self.pad] * (longest - len(label)) for label in labels], device=device)
        valid = torch.tensor([[i < len(label) for i in range(longest)] for label in labels], device=device)
        cache = output.past_key_values
        cache.batch_repeat_interleave(len(labels))
        tiled = rest.repeat(len(prompts), 1)
        tiled_mask = torch.cat([mask.repeat_interleave(len(labels), 0), valid.repeat(len(prompts), 1)[:, :-1]], dim=1)
        inputs = _with_positions(model, tiled_mask, input_ids=tiled[:, :-1])
        logits = model(**inputs, past_key_values=cache).logits.float().log_softmax(-1)
        following = logits.gather(-1, tiled[:, 1:, None]).squeeze(-1) * valid.repeat(len(prompts), 1)[:, 1:]
        return scores + following.sum(-1).view(len(prompts), len(labels))


def _with_positions(model: PeftModel | nn.Module, mask: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
    """Inputs of a forward of left-padded prompts, with the positions of their tokens where the model takes them."""
    inputs = {"input_ids": input_ids, "attention_mask": mask.long()}
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if "position_ids" in inspect.signature(base.forward).parameters:
        positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
        inputs["position_ids"] = positions[:, -input_ids.shape[1] :]
    return inputs
