"""A weighted sum of tasks lies in their subspace: exact there, then the best of rank p."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from share_hf.tuner import share_layers

from .cases import LLAMA, P, assert_close, logits, snapshot, trainable, update_by_hand, with_tasks


Base = Callable[[str], PreTrainedModel]


@pytest.fixture
def model(tiny_model: Base) -> PeftModel:
    return with_tasks(tiny_model("llama"), LLAMA, "one", "two", "three")


@pytest.mark.parametrize("combination", ["linear", "svd", "cat"])
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -2.0), (1.0, 0.0)])
def test_it_is_the_best_of_rank_p(combination: str, weights: tuple[float, float], model: PeftModel) -> None:
    model.add_weighted_adapter(["one", "two"], list(weights), "sum", combination_type=combination)
    for layer in share_layers(model).values():
        exact = weights[0] * update_by_hand(layer, "one") + weights[1] * update_by_hand(layer, "two")
        left, singular_values, right = torch.linalg.svd(exact, full_matrices=False)
        assert_close(update_by_hand(layer, "sum"), (left[:, :P] * singular_values[:P]) @ right[:P])


def test_the_others_and_what_is_active_and_trained_stay_as_they_were(model: PeftModel) -> None:
    expected, trained = logits(model, LLAMA.batch()), set(trainable(model))
    model.add_weighted_adapter(["two", "three"], [0.5, 0.5], "sum")
    assert (model.active_adapter, set(trainable(model))) == ("one", trained)
    assert torch.equal(logits(model, LLAMA.batch()), expected)


def test_a_task_that_is_named_twice_counts_twice(model: PeftModel) -> None:
    model.add_weighted_adapter(["one", "one"], [0.5, 0.5], "sum")
    for layer in share_layers(model).values():
        assert_close(update_by_hand(layer, "sum"), update_by_hand(layer, "one"))


def test_it_is_saved_and_loaded_like_any_task(model: PeftModel, tiny_model: Base, tmp_path: Path) -> None:
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "sum")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "sum")
    assert torch.equal(logits(loaded, LLAMA.batch()), logits(model, LLAMA.batch()))


def test_tasks_may_adapt_different_modules(model: PeftModel) -> None:
    model.add_adapter("narrow", LLAMA.config(target_modules=["q_proj"]))
    model.add_weighted_adapter(["narrow", "one"], [1.0, 1.0], "sum")
    assert all(layer.has_task("sum") for layer in share_layers(model).values())


@pytest.mark.parametrize(
    ("adapters", "weights", "combination", "message"),
    [
        (["one"], [1.0], "dare_ties", "combination_type is 'dare_ties', expected one of .*export_lora"),
        (["one", "two"], [1.0], "svd", "2 adapters and 1 weights"),
        ([], [], "svd", "0 adapters and 0 weights"),
        (["one", "none"], [1.0, 1.0], "svd", "'none' is not there, expected names among"),
        (["one", "young"], [1.0, 1.0], "svd", "'young' is in phase 'adapt', expected a merged task"),
        (["one", "headed"], [1.0, 1.0], "svd", r"'headed' has modules_to_save = \['lm_head'\]"),
    ],
)
def test_what_has_no_sum_is_refused(
    adapters: list[str], weights: list[float], combination: str, message: str, model: PeftModel
) -> None:
    model.add_adapter("young", LLAMA.config(phase="adapt"))
    model.add_adapter("headed", LLAMA.config(modules_to_save=["lm_head"]))
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(adapters, weights, "sum", combination_type=combination)
    assert snapshot(model) == before
