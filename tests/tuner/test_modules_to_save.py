"""Classification heads are trained as a whole, and kept with their task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import DistilBertConfig, DistilBertForSequenceClassification, PreTrainedModel

from share_hf import SharedSubspace
from share_hf.tuner import share_layers
from share_hf.tuner.transfer import state_of
from tests.trees import edit_tensors

from .cases import (
    BERT,
    LLAMA,
    K,
    P,
    assert_close,
    assert_differ,
    gradients,
    learn,
    logits,
    snapshot,
    trainable,
    with_tasks,
)


WAYS = [{"task_type": "SEQ_CLS"}, {"modules_to_save": ["classifier"]}]

each_way = pytest.mark.parametrize("way", WAYS, ids=["task_type", "modules_to_save"])


def a_classifier(base: PreTrainedModel, *tasks: str, way: dict[str, object]) -> PeftModel:
    """A model with tasks that were each trained for a few steps on their own labels."""
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


@pytest.fixture
def with_running_means(tiny_model: Callable[[str], PreTrainedModel]) -> Callable[[], PreTrainedModel]:
    """Make a model with a head that is a module of modules, with buffers."""

    def build() -> PreTrainedModel:
        base = tiny_model("bert")
        torch.manual_seed(0)
        layers = torch.nn.Linear(64, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 3)
        base.classifier = torch.nn.Sequential(*layers)
        return base.eval()

    return build


@each_way
def test_a_head_of_modules_is_kept_with_its_buffers(
    way: dict[str, object], with_running_means: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    model = a_classifier(with_running_means(), "one", "two", way=way)
    SharedSubspace(state_of(model)).save_pretrained(tmp_path)
    saved = SharedSubspace.from_pretrained(tmp_path)
    assert "classifier.1.running_mean" in saved.state.tasks["two"].head
    applied = saved.apply(with_running_means())
    loaded = PeftModel.from_pretrained(with_running_means(), tmp_path / "tasks" / "two", adapter_name="two")
    for task in ("one", "two"):
        model.set_adapter(task)
        applied.set_adapter(task)
        assert_close(logits(applied, BERT.batch()), logits(model, BERT.batch()))
    assert_close(logits(loaded, BERT.batch()), logits(model, BERT.batch()))


@pytest.mark.parametrize("change", ["bias-is-gone", "layer-is-gone", "other-shape", "other-module"])
def test_a_head_that_is_not_the_models_is_refused_by_name(
    change: str, with_running_means: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    a_classifier(with_running_means(), "one", way=WAYS[1]).save_pretrained(tmp_path)
    prefix = "base_model.model.classifier"

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        if change == "bias-is-gone":
            del tensors[f"{prefix}.2.bias"]
        elif change == "layer-is-gone":
            for name in [name for name in tensors if name.startswith(f"{prefix}.1.")]:
                del tensors[name]
        elif change == "other-shape":
            tensors[f"{prefix}.1.weight"] = tensors[f"{prefix}.1.weight"][:8].clone()
        else:
            tensors[f"{prefix}.3.weight"] = torch.ones(3, 3)

    edit_tensors(tmp_path / "one" / "adapter_model.safetensors", edit)
    base = with_running_means()
    before = snapshot(base)
    with pytest.raises(
        ValueError, match=r"'classifier\.[123]\.\w+' is(?! unexpected)|its 'classifier\.[12]\.\w+' is not"
    ):
        PeftModel.from_pretrained(base, tmp_path / "one")
    assert snapshot(base) == before


def test_a_module_is_kept_whole_or_adapted_and_never_both_by_two_tasks(
    tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    ways = {"adapts": {"target_modules": ["q_proj", "lm_head"]}, "keeps": {"modules_to_save": ["lm_head"]}}
    folders = {}
    for task, way in ways.items():
        model = get_peft_model(
            tiny_model("llama"), LoraConfig(**{"target_modules": ["q_proj"], "init_lora_weights": False, **way})
        )
        folders[task] = tmp_path / task
        model.save_pretrained(folders[task], save_embedding_layers=False)
    subspace = SharedSubspace.from_adapters(folders, num_components=K, pseudo_rank=P, progress=False)
    subspace.save_pretrained(tmp_path / "tree")
    base = tiny_model("llama")
    before = snapshot(base)
    with pytest.raises(ValueError, match="modules_to_save has 'lm_head', but 'lm_head' is adapted too"):
        subspace.apply(base)
    assert snapshot(base) == before
    for task in ways:
        alone = subspace.apply(tiny_model("llama"), [task])
        plain = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "tree" / "tasks" / task)
        assert_close(logits(plain, LLAMA.batch()), logits(alone, LLAMA.batch()))


def test_a_head_takes_modules_along_whose_names_end_alike(tmp_path: Path) -> None:
    def build() -> DistilBertForSequenceClassification:
        torch.manual_seed(0)
        sizes = dict(vocab_size=64, dim=32, hidden_dim=48, n_layers=1, n_heads=2, max_position_embeddings=32)
        return DistilBertForSequenceClassification(DistilBertConfig(**sizes, num_labels=3)).eval()

    config = BERT.config(target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(build(), config, adapter_name="one")
    assert not any("classifier" in name for name in share_layers(model))
    learn(model, BERT.batch(), steps=3)
    subspace = SharedSubspace(state_of(model))
    subspace.export_lora("one", tmp_path / "lora")
    assert set(subspace.state.tasks["one"].head) == {
        f"{module}.{leaf}" for module in ("pre_classifier", "classifier") for leaf in ("weight", "bias")
    }
    for loaded in (subspace.apply(build()), PeftModel.from_pretrained(build(), tmp_path / "lora").eval()):
        assert_close(logits(loaded, BERT.batch()), logits(model, BERT.batch()))
