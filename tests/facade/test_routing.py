"""`learn_route` and `route` of a subspace: from texts or batches, preserved by saving, applying and the Hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from share_hf import SharedSubspace
from tests.hub_server.fixtures import Hub
from tests.routes import assert_same_routes
from tests.trees import files_of


REPO = "org/share-subspace"
WORDS = {"mrpc": "alpha beta gamma delta", "sst2": "one two three four"}

TinyModel = Callable[[str], PreTrainedModel]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer in which a word is a token. Pairs are joined by a token that no text has."""
    words = ["<pad>", "<unk>", "</s>", "<sep>", *" ".join(WORDS.values()).split()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A <sep> $B </s>", special_tokens=[("</s>", 2), ("<sep>", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")


def texts_of(task: str, count: int = 60, seed: int = 0) -> list[str]:
    words = WORDS[task].split()
    picks = torch.randint(0, len(words), (count, 8), generator=torch.Generator().manual_seed(seed))
    return [" ".join(words[i] for i in row[: 4 + row[0] % 4].tolist()) for row in picks]


def learned(subspace: SharedSubspace, model: Any) -> SharedSubspace:
    for task in subspace.tasks:
        subspace.learn_route(task, model, ({"text": text} for text in texts_of(task)), tokenizer=word_tokenizer())
    return subspace


def test_texts_find_their_task_before_and_after_a_save(
    subspace: SharedSubspace, tiny_model: TinyModel, tmp_path: Path
) -> None:
    base, asked = tiny_model("llama"), [*texts_of("mrpc", 20, seed=1), *texts_of("sst2", 20, seed=2)]
    assert subspace.routed_tasks == ()
    found = learned(subspace, base).route(asked, base, word_tokenizer(), false_rejects=None)
    assert found.names == (*["mrpc"] * 20, *["sst2"] * 20)
    subspace.save_pretrained(tmp_path / "tree")
    loaded = SharedSubspace.from_pretrained(tmp_path / "tree")
    model = loaded.apply(tiny_model("llama"))
    again = loaded.route(asked, model, word_tokenizer(), false_rejects=None, batch_size=7)
    assert again.names == found.names
    torch.testing.assert_close(again.probabilities, found.probabilities, rtol=1e-3, atol=1e-4)
    batch = word_tokenizer()(asked, padding=True, return_tensors="pt")
    assert model.route(**batch, false_rejects=None).names == found.names


def test_the_order_in_which_routes_are_learned_makes_no_difference(
    subspace: SharedSubspace, tiny_model: TinyModel
) -> None:
    base, states = tiny_model("llama"), []
    for order in (("mrpc", "sst2"), ("sst2", "mrpc")):
        held = SharedSubspace(subspace.state)
        for task in order:
            held.learn_route(task, base, ({"text": text} for text in texts_of(task)), tokenizer=word_tokenizer())
        states.append(held.state)
    assert_same_routes(*states)


def test_a_model_in_use_gets_the_route_that_it_teaches(subspace: SharedSubspace, tiny_model: TinyModel) -> None:
    model = subspace.apply(tiny_model("llama"))
    assert model.router is None
    batches = [dict(word_tokenizer()(texts_of("mrpc"), padding=True, return_tensors="pt"))]
    subspace.learn_route("mrpc", model, batches)
    assert model.route(batches[0], false_rejects=None).names == ("mrpc",) * 60


def test_pairs_are_joined_as_the_tokenizer_joins_them(subspace: SharedSubspace, tiny_model: TinyModel) -> None:
    base, seen = tiny_model("llama"), []
    base.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    examples = [
        {"sentence1": a, "sentence2": b, "label": "x"} for a, b in zip(texts_of("mrpc"), texts_of("sst2"), strict=True)
    ]
    subspace.learn_route("mrpc", base, examples, tokenizer=word_tokenizer(), batch_size=60)
    pairs = word_tokenizer()(texts_of("mrpc"), texts_of("sst2"), padding=True, return_tensors="pt")["input_ids"]
    assert torch.equal(seen[0], pairs)
    asked = list(zip(texts_of("mrpc", 3), texts_of("sst2", 3), strict=True))
    assert subspace.route(asked, base, word_tokenizer(), false_rejects=None).names == ("mrpc",) * 3


def test_two_writers_of_a_repository_teach_each_other_their_routes(
    hub: Hub, subspace: SharedSubspace, save_lora: Callable[..., Path], tiny_model: TinyModel
) -> None:
    base = tiny_model("llama")
    learned(subspace, base).push_to_hub(REPO)
    writers = [SharedSubspace.from_pretrained(REPO) for _ in range(2)]
    for seed, (writer, task) in enumerate(zip(writers, ("rte", "cola"), strict=True)):
        writer.add_adapters({task: save_lora(task, seed=20 + seed)}, progress=False)
        examples = ({"text": text} for text in texts_of("mrpc", seed=9 + seed))
        writer.learn_route(task, base, examples, tokenizer=word_tokenizer())
        writer.push_to_hub(REPO)
    pulled = SharedSubspace.from_pretrained(REPO)
    assert pulled.routed_tasks == ("mrpc", "sst2", "rte", "cola")
    assert_same_routes(pulled.state, writers[1].state)
    assert pulled.state.router.scatter.degrees == 4 * 59
    writers[0].update_from(pulled)
    assert_same_routes(writers[0].state, pulled.state)
    one = SharedSubspace.from_pretrained(REPO, revision="sst2")
    assert one.routed_tasks == pulled.routed_tasks
    asked = texts_of("sst2", 4, seed=3)
    assert one.route(asked, base, word_tokenizer(), false_rejects=None).names == ("sst2",) * 4


@pytest.mark.parametrize(
    ("task", "data", "options", "message"),
    [
        ("mrcp", [], {}, "no task 'mrcp' in the subspace.*did you mean 'mrpc'"),
        ("mrpc", [], {}, "task 'mrpc': 0 inputs to learn a route from, expected at least 3"),
        ("mrpc", [{"text": 1}], {"tokenizer": True}, r"text columns \[\], expected one, or two that form a pair"),
        ("mrpc", [{"a": "x", "b": "y", "c": "z"}], {"tokenizer": True}, r"text columns \['a', 'b', 'c'\]"),
        ("mrpc", [{"input_ids": torch.ones(3, 4).long()}], {"layers": [-1]}, r"layers is \[-1\], expected indices"),
        ("mrpc", [{"input_ids": torch.ones(3, 4).long()}], {"layers": [7]}, "expected those of 7 layers"),
    ],
)
def test_what_cannot_be_learned_changes_nothing(
    subspace: SharedSubspace,
    tiny_model: TinyModel,
    task: str,
    data: list[dict[str, Any]],
    options: dict[str, Any],
    message: str,
) -> None:
    before = subspace.state
    if options.pop("tokenizer", False):
        options["tokenizer"] = word_tokenizer()
    with pytest.raises(ValueError, match=message):
        subspace.learn_route(task, tiny_model("llama"), data, **options)
    assert subspace.state is before


def test_routes_of_other_layers_are_refused(subspace: SharedSubspace, tiny_model: TinyModel) -> None:
    base = tiny_model("llama")

    def batches() -> Iterator[dict[str, Tensor]]:
        yield {"input_ids": torch.randint(3, 64, (8, 5))}

    subspace.learn_route("mrpc", base, batches(), layers=[2])
    with pytest.raises(ValueError, match=r"layers is \[1\], expected \[2\] as in the existing routes"):
        subspace.learn_route("sst2", base, batches(), layers=[1])
    subspace.learn_route("sst2", base, batches())
    assert subspace.state.router.layers == (2,)


def test_a_route_of_another_base_model_is_refused(subspace: SharedSubspace, tiny_model: TinyModel) -> None:
    learned(subspace, tiny_model("llama"))
    other = tiny_model("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    before = subspace.state
    with pytest.raises(ValueError, match=r"task 'sst2' has features of cosine .* another base model"):
        subspace.learn_route("sst2", other, ({"text": text} for text in texts_of("sst2")), tokenizer=word_tokenizer())
    assert subspace.state is before
    with pytest.raises(ValueError, match="another base model"):
        subspace.route(["alpha"], other, word_tokenizer())


def test_asking_without_routes_or_texts_is_refused(subspace: SharedSubspace, tiny_model: TinyModel) -> None:
    base = tiny_model("llama")
    with pytest.raises(ValueError, match="the subspace has no routes"):
        subspace.route(["alpha"], base, word_tokenizer())
    learned(subspace, base)
    with pytest.raises(ValueError, match="texts is empty"):
        subspace.route([], base, word_tokenizer())
    with pytest.raises(ValueError, match="expected texts alone, or pairs alone"):
        subspace.route(["alpha", ("alpha", "beta")], base, word_tokenizer())


def test_a_save_of_a_routed_subspace_is_small(subspace: SharedSubspace, tiny_model: TinyModel, tmp_path: Path) -> None:
    learned(subspace, tiny_model("llama")).save_pretrained(tmp_path / "tree")
    sizes = {name: len(content) for name, content in files_of(tmp_path / "tree").items() if "router" in name}
    assert max(size for name, size in sizes.items() if name.startswith("tasks/")) < 4096
