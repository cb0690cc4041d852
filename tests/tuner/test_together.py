"""Several tasks of a model that are trained at once."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from transformers import PreTrainedModel, RobertaConfig, RobertaForSequenceClassification

from share_hf import ShareConfig
from share_hf.tuner import share_layers
from share_hf.tuner.together import trained_by_task

from .cases import BERT, LLAMA, assert_close, task_parameters, trainable, with_tasks


def test_only_the_tasks_of_a_batch_get_gradients(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "one", "two", "three").train()
    model.base_model.set_adapter(["one", "two", "three"])
    batch = LLAMA.batch(size=3)
    model(**batch, adapter_names=["three", "one", "three"]).loss.backward()
    for task, has_gradients in {"one": True, "two": False, "three": True}.items():
        parameters = task_parameters(model, task).values()
        assert parameters
        assert all(parameter.requires_grad for parameter in parameters)
        assert all((parameter.grad is not None) == has_gradients for parameter in parameters)


def test_each_sample_is_learned_from_with_its_own_head(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = with_tasks(tiny_model("bert"), BERT, "one", "two", modules_to_save=["classifier"]).train()
    model.base_model.set_adapter(["one", "two"])
    heads = model.get_base_model().classifier.modules_to_save
    assert all(parameter.requires_grad for parameter in heads.parameters())
    model(**BERT.batch(size=2), adapter_names=["two", "two"]).loss.backward()
    assert heads["one"].weight.grad is None
    assert heads["two"].weight.grad.abs().sum() > 0
    found = trained_by_task(model, ["one", "two"])
    assert sum(map(len, found.values())) == len(trainable(model))
    assert any(parameter is heads["two"].bias for parameter in found["two"])


def test_one_active_task_leaves_no_other_trained(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = with_tasks(tiny_model("bert"), BERT, "one", "two", "three", modules_to_save=["classifier"])
    model.base_model.set_adapter(["one", "two"])
    model.set_adapter("three")
    assert model.active_adapters == ["three"]
    assert all("three" in name.split(".") for name in trainable(model))
    assert trainable(model)


def test_heads_of_any_kind_are_mixed_and_trained() -> None:
    config = RobertaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    base = RobertaForSequenceClassification(config)
    share = ShareConfig(num_components=8, pseudo_rank=2, target_modules=["query"], task_type="SEQ_CLS")
    model = get_peft_model(base, copy.deepcopy(share), adapter_name="one")
    model.add_adapter("two", copy.deepcopy(share))
    with torch.no_grad():
        for parameter in model.get_base_model().classifier.modules_to_save["two"].parameters():
            parameter.add_(torch.randn_like(parameter))
    model.base_model.set_adapter(["one", "two"])
    model.train()
    ids, names = torch.randint(3, 64, (4, 6)), ["two", "one", "one", "two"]
    found = model(input_ids=ids, adapter_names=names).logits
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in trainable(model).values())
    for row, name in enumerate(names):
        model.set_adapter(name)
        assert_close(found[row].detach(), model(input_ids=ids[row : row + 1]).logits[0].detach())
    assert pickle.loads(pickle.dumps(model)).active_adapters == ["two"]


def test_inputs_are_dropped_as_the_task_of_each_sample_says() -> None:
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(400, 400, bias=False)),
        ShareConfig(num_components=400, pseudo_rank=400, target_modules=["0"]),
        adapter_name="kept",
    )
    for name, dropout in {"some": 0.25, "most": 0.75}.items():
        config = ShareConfig(num_components=400, pseudo_rank=400, target_modules=["0"], dropout=dropout)
        model.add_adapter(name, config)
    (layer,) = share_layers(model).values()
    layer.set_basis(torch.eye(400), torch.eye(400))
    torch.nn.init.zeros_(layer.get_base_layer().weight)
    for name in model.peft_config:
        layer.set_coefficients(name, torch.eye(400), torch.eye(400))
    model.base_model.set_adapter(["kept", "some", "most"])
    names = ["some", "kept", "most", "some"]
    with torch.no_grad():
        found = model.train()(torch.ones(4, 400), adapter_names=names)
        assert torch.equal(model.eval()(torch.ones(4, 400), adapter_names=names), torch.ones(4, 400))
    for row, kept in zip(found, [0.75, 1.0, 0.25, 0.75], strict=True):
        assert all(value == 0 or value == pytest.approx(1 / kept) for value in row.tolist())
        assert float((row > 0).float().mean()) == pytest.approx(kept, abs=0.1)
