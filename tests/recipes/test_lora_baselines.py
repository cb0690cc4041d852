"""The baselines of the recipes have what our tasks have: a separate head for each task."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from .test_recipes import RECIPES


@pytest.fixture(scope="module")
def recipe() -> Any:
    """The module of the recipes, imported as they import it."""
    sys.path.insert(0, str(RECIPES))
    try:
        return importlib.import_module("lora_baselines")
    finally:
        sys.path.remove(str(RECIPES))


def test_one_adapter_has_a_head_for_each_task(recipe: Any, tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = get_peft_model(tiny_model("bert"), LoraConfig(target_modules=["query"], task_type="SEQ_CLS"), "all")
    head = model.base_model.model.classifier.modules_to_save["all"]
    heads, fresh = recipe.HeadsOfTasks(model, "all"), head.weight.detach().clone()
    heads.use("first")
    with torch.no_grad():
        head.weight.fill_(1.0)
    heads.use("second")
    assert torch.equal(head.weight, fresh)
    with torch.no_grad():
        head.weight.fill_(2.0)
    heads.use("first")
    assert (head.weight == 1).all() and head.weight.requires_grad
    heads.use("second")
    assert (head.weight == 2).all()


def test_an_adapter_without_a_head_has_none_to_change(
    recipe: Any, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), "all")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    heads = recipe.HeadsOfTasks(model, "all")
    for task in ("first", "second", "first"):
        heads.use(task)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
