"""Prompts and completions, how they are batched, and the likelihood of labels, compared with plain computations."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


RECIPES = Path(__file__).parents[2] / "recipes"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>\n' }}{% endfor %}"
    "{{ '<s>assistant\n' if add_generation_prompt else '' }}"
)
TEXT = "Felix put a basket and a letter in the box. Ben helped."
LABELS = [[5], [6, 7], [6, 8], [9, 10, 11], [9, 10]]
SINGLE_TOKENS = [[token] for token in range(20, 40)]


@pytest.fixture
def likelihood(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The recipe's module."""
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module("likelihood")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(RECIPES / "assets" / "backbone")


@pytest.fixture
def chatty(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer with a chat template."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = CHAT_TEMPLATE
    return own


def conversation(tokenizer: PreTrainedTokenizerBase, *contents: str, **options: bool) -> list[int]:
    chat = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), contents, strict=False)]
    return tokenizer.apply_chat_template(chat, return_dict=True, **options)["input_ids"]


def test_a_chat_template_gives_prompt_and_completion(likelihood: ModuleType, chatty: PreTrainedTokenizerBase) -> None:
    prompt_format = likelihood.PromptFormat.of_tokenizer(chatty, "\nIs it {labels}?", 256).naming(["one", "two"])
    prompt = prompt_format.prompt_ids(chatty, f"{TEXT} ")
    content = f"{TEXT}\nIs it one, two?"
    assert prompt == conversation(chatty, content, add_generation_prompt=True)
    whole = [*prompt, *prompt_format.label_ids(chatty, "two"), chatty.eos_token_id]
    assert whole == conversation(chatty, content, "two")[: len(whole)]


def test_a_template_that_begins_an_answer_otherwise_is_an_error(
    likelihood: ModuleType, chatty: PreTrainedTokenizerBase
) -> None:
    chatty.chat_template = CHAT_TEMPLATE.replace("'<s>assistant\n' if", "'<s>assistant says\n' if")
    with pytest.raises(ValueError, match="chat template starts an answer differently"):
        likelihood.PromptFormat.of_tokenizer(chatty, None, 256).label_ids(chatty, "two")


def test_a_long_text_is_cut_at_its_end_and_the_chat_around_it_stays(
    likelihood: ModuleType, chatty: PreTrainedTokenizerBase
) -> None:
    prompt_format = likelihood.PromptFormat.of_tokenizer(chatty, "\nHow many?", 40)
    whole = conversation(chatty, " ".join([TEXT] * 9) + "\nHow many?", add_generation_prompt=True)
    cut = prompt_format.prompt_ids(chatty, " ".join([TEXT] * 9))
    assert len(cut) == 40 < len(whole)
    assert chatty.decode(cut).replace("> ", ">").endswith("\nHow many?</s>\n<s>assistant\n")
    around = next(i for i in range(40) if cut[i:] == whole[i - 40 :])
    assert around < 30 and cut[:around] == whole[:around]


@pytest.mark.parametrize("chats", [True, False])
def test_no_room_for_a_text_is_an_error(likelihood: ModuleType, chatty: PreTrainedTokenizerBase, chats: bool) -> None:
    prompt_format = likelihood.PromptFormat.of_tokenizer(chatty, "\nHow many were in the box?", 6, chats=chats)
    with pytest.raises(ValueError, match=r"max_length is 6, expected more than the \d+ tokens around a text"):
        prompt_format.prompt_ids(chatty, TEXT)


def test_without_a_template_or_by_choice_a_prompt_ends_in_answer(
    likelihood: ModuleType, tokenizer: PreTrainedTokenizerBase, chatty: PreTrainedTokenizerBase
) -> None:
    expected = tokenizer(TEXT)["input_ids"] + tokenizer("\nAnswer:")["input_ids"]
    for of_text, chats in ((tokenizer, True), (chatty, False)):
        prompt_format = likelihood.PromptFormat.of_tokenizer(of_text, None, 256, chats=chats)
        assert prompt_format == likelihood.PromptFormat()
        assert prompt_format.prompt_ids(of_text, TEXT) == expected


def test_columns_become_one_text(likelihood: ModuleType) -> None:
    pair = Dataset.from_dict({"sentence1": ["A cup."], "sentence2": ["A key."], "label": ["one"]})
    columns = ["sentence", "sentence1", "sentence2"]
    joined = likelihood.with_text("mrpc", DatasetDict(train=pair, test=pair), columns)
    assert joined["test"]["text"][0] == "sentence1: A cup.\nsentence2: A key."
    single = DatasetDict(train=Dataset.from_dict({"sentence": ["A cup."], "label": ["one"]}))
    assert likelihood.with_text("cola", single, columns)["train"]["text"][0] == "A cup."
    with pytest.raises(
        ValueError, match=r"task 'cola' has columns \['sentence', 'label'\], expected one of \['text'\]"
    ):
        likelihood.with_text("cola", single, ["text"])
    with pytest.raises(ValueError, match=r"columns \['sentence', 'label'\] in 'test', expected \['sentence1', "):
        likelihood.with_text("mrpc", DatasetDict(train=pair, test=single["train"]), columns)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_batch_has_the_loss_of_its_examples(
    likelihood: ModuleType,
    tokenizer: PreTrainedTokenizerBase,
    tiny_model: Callable[[str], PreTrainedModel],
    name: str,
) -> None:
    model = tiny_model(name)
    examples, losses = [], []
    for prompt, completion in (([5, 6, 7, 8, 9], [10, 2]), ([11], [12, 13, 14, 2]), ([15, 16], [17])):
        ids, labels = prompt + completion, [-100] * len(prompt) + completion
        examples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
        logits = model(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
        losses.append(cross_entropy(logits, torch.tensor(completion), reduction="none"))
    output = model(**likelihood.CompletionCollator(tokenizer, model)(examples))
    torch.testing.assert_close(output.loss, torch.cat(losses).mean())
    assert output.logits.shape[:2] == (3, 5)  # the longest completion and the position before it


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_scores_are_those_of_a_loop_over_labels_without_a_cache(
    likelihood: ModuleType,
    tokenizer: PreTrainedTokenizerBase,
    tiny_model: Callable[[str], PreTrainedModel],
    name: str,
) -> None:
    model = tiny_model(name)
    prompts = [[3, 4, 5, 6, 7, 8], [9], [10, 11, 12]]
    expected = torch.empty(len(prompts), len(LABELS))
    with torch.inference_mode():
        for i, prompt in enumerate(prompts):
            for j, label in enumerate(LABELS):
                logits = model(input_ids=torch.tensor([prompt + label])).logits[0, len(prompt) - 1 : -1]
                expected[i, j] = -cross_entropy(logits, torch.tensor(label), reduction="sum")
        scorer = likelihood.LabelLikelihoodScorer(tokenizer, {}, likelihood.PromptFormat())
        found = scorer.label_scores(model, prompts, LABELS)
    torch.testing.assert_close(found, expected)


def test_a_task_is_scored_by_the_likeliest_labels_in_the_order_of_its_examples(
    likelihood: ModuleType, tokenizer: PreTrainedTokenizerBase, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model = tiny_model("llama")
    prompts = [[3, 4, 5, 6, 7, 8], [9], [10, 11, 12], [13, 14]]
    scorer = likelihood.LabelLikelihoodScorer(tokenizer, {}, likelihood.PromptFormat(), batch_size=3)
    scorer.label_ids["task"] = SINGLE_TOKENS
    with torch.inference_mode():
        best = [int(scorer.label_scores(model, [prompt], SINGLE_TOKENS).argmax()) for prompt in prompts]
    assert len(set(best)) > 1
    answers = [best[0], best[1], best[2], (best[3] + 1) % len(SINGLE_TOKENS)]
    data = Dataset.from_dict({"prompt_ids": prompts, "label_index": answers})
    assert scorer(model.train(), "task", data) == {"accuracy": 0.75}
    assert scorer.chosen == {"task": best}
    assert model.training and scorer.seconds > 0


def test_the_end_counts_where_a_label_begins_another(
    likelihood: ModuleType, tokenizer: PreTrainedTokenizerBase
) -> None:
    labels = {"nested": ["one", "one two"], "apart": ["one", "two"]}
    scorer = likelihood.LabelLikelihoodScorer(tokenizer, labels, likelihood.PromptFormat())
    assert all(ids[-1] == tokenizer.eos_token_id for ids in scorer.label_ids["nested"])
    assert [len(ids) for ids in scorer.label_ids["apart"]] == [1, 1]
