"""Classification heads: trained as a whole, and kept with their task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedModel

from share_hf.tuner import share_layers

from .cases import BERT, LLAMA, K, P, assert_close, assert_differ, gradients, learn, logits, trainable, with_tasks


WAYS = [{"task_type": "SEQ_CLS"}, {"modules_to_save": ["classifier"]}]

each_way = pytest.mark.parametrize("way", WAYS, ids=["task_type", "modules_to_save"])


def a_classifier(base: PreTrainedModel, *tasks: str, way: dict[str, object]) -> PeftModel:
    """A model with tasks that were each trained for a few steps, each on its own labels."""
    model = with_tasks(base, BERT, *tasks, **way)
    for i, task in enumerate(tasks):
        model.set_adapter(task)
        learn(model, BERT.batch(seed=i), steps=4)
    model.set_adapter(tasks[0])
    return model


@each_way
def test_the_head_is_trained_with_the_coefficients(
    way: dict[str, object], tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model = get_peft_model(tiny_model("bert"), BERT.config(**way), adapter_name="one")
    heads = {name for name in trainable(model) if ".share_" not in name}
    assert heads == {
        "base_model.model.classifier.modules_to_save.one.weight",
        "base_model.model.classifier.modules_to_save.one.bias",
    }
    head = 3 * 64 + 3
    assert model.get_nb_trainable_parameters()[0] == head + len(share_layers(model)) * 2 * K * P
    assert all(gradients(model, BERT.batch())[name].abs().max() > 0 for name in heads)
    losses = learn(model, BERT.batch(), steps=10)
    assert losses[-1] < 0.9 * losses[0]


@each_way
def test_heads_belong_to_their_tasks(way: dict[str, object], tiny_model: Callable[[str], PreTrainedModel]) -> None:
    base = tiny_model("bert")
    original = base.classifier.weight.clone()
    model = a_classifier(base, "one", "two", way=way)
    first = logits(model, BERT.batch())
    model.set_adapter("two")
    assert_differ(logits(model, BERT.batch()), first)
    assert {name.split(".")[-2] for name in trainable(model) if "modules_to_save" in name} == {"two"}
    learn(model, BERT.batch(), steps=2)
    model.set_adapter("one")
    assert torch.equal(logits(model, BERT.batch()), first)
    with model.disable_adapter():
        assert torch.equal(logits(model, BERT.batch()), logits(tiny_model("bert"), BERT.batch()))
    assert torch.equal(model.base_model.model.classifier.original_module.weight, original)


@each_way
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_heads_are_saved_and_loaded_with_their_tasks(
    way: dict[str, object], low_cpu_mem_usage: bool, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    model = a_classifier(tiny_model("bert"), "one", "two", way=way)
    expected = {}
    for task in ("one", "two"):
        model.set_adapter(task)
        expected[task] = logits(model, BERT.batch())
    model.save_pretrained(tmp_path)
    heads = {name for name in load_file(tmp_path / "one" / "adapter_model.safetensors") if ".share_" not in name}
    assert heads == {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}

    options = {"low_cpu_mem_usage": low_cpu_mem_usage}
    loaded = PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "one", adapter_name="one", **options)
    loaded.load_adapter(tmp_path / "two", "two", **options)
    for task in ("two", "one"):
        loaded.set_adapter(task)
        assert torch.equal(logits(loaded, BERT.batch()), expected[task])


def test_transformers_loads_the_head_too(tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    model = a_classifier(tiny_model("bert"), "one", way=WAYS[0])
    model.save_pretrained(tmp_path)
    base = tiny_model("bert")
    base.load_adapter(str(tmp_path / "one"), adapter_name="one")
    assert torch.equal(logits(base, BERT.batch()), logits(model, BERT.batch()))


def test_merging_takes_the_head_along(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = a_classifier(tiny_model("bert"), "one", "two", way=WAYS[0])
    expected = logits(model, BERT.batch())
    merged = model.merge_and_unload()
    assert isinstance(merged.classifier, torch.nn.Linear)
    assert_close(logits(merged, BERT.batch()), expected)


def test_deleting_a_task_deletes_its_head(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = a_classifier(tiny_model("bert"), "one", "two", way=WAYS[0])
    expected = logits(model, BERT.batch())
    model.delete_adapter("two")
    assert list(model.base_model.model.classifier.modules_to_save) == ["one"]
    assert torch.equal(logits(model, BERT.batch()), expected)


def test_a_head_of_a_language_model_can_be_trained_as_a_whole(
    tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    model = get_peft_model(tiny_model("llama"), LLAMA.config(modules_to_save=["lm_head"]), adapter_name="one")
    learn(model, LLAMA.batch(), steps=3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "one")
    assert torch.equal(logits(loaded, LLAMA.batch()), logits(model, LLAMA.batch()))
    assert_differ(logits(model, LLAMA.batch()), logits(tiny_model("llama"), LLAMA.batch()))
