"""Tasks into weights and out again, and tasks as plain LoRAs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, convert_to_lora, get_peft_model, save_as_lora
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from share_hf.tuner import share_layers

from .cases import (
    BERT,
    LLAMA,
    Case,
    K,
    P,
    an_adapted_layer,
    assert_close,
    assert_differ,
    each_architecture,
    learn,
    logits,
    randomize,
    task_parameters,
    trainable,
    update_by_hand,
    with_random_bases,
    with_tasks,
    with_updates_in_weights,
)


each_phase = pytest.mark.parametrize("phase", ["coefficients", "adapt", "init"])


def base_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: layer.get_base_weight().clone() for name, layer in share_layers(model).items()}


def sum_of_updates(model: torch.nn.Module, *tasks: str) -> dict[str, Tensor]:
    return {name: sum(update_by_hand(layer, task) for task in tasks) for name, layer in share_layers(model).items()}


@each_architecture
@each_phase
@pytest.mark.parametrize("safe_merge", [False, True])
def test_a_merged_and_unloaded_model_is_a_base_model_that_computes_the_same(
    case: Case, phase: str, safe_merge: bool, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    base = tiny_model(case.architecture)
    model = with_tasks(base, case, "one", phase=phase)
    expected = logits(model, case.batch())
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert type(merged) is type(base)
    assert merged.state_dict().keys() == tiny_model(case.architecture).state_dict().keys()
    assert_close(logits(merged, case.batch()), expected)


@each_architecture
def test_merging_adds_and_unmerging_subtracts(case: Case, tiny_model: Callable[[str], PreTrainedModel]) -> None:
    base = tiny_model(case.architecture)
    model = with_tasks(copy.deepcopy(base), case, "one", "two")
    expected, before = logits(model, case.batch()), base_weights(model)
    model.merge_adapter()
    assert all(layer.merged_adapters == ["one"] for layer in share_layers(model).values())
    dense = with_updates_in_weights(base, sum_of_updates(model, "one"))
    for name, weight in base_weights(model).items():
        assert_close(weight, dense.get_submodule(name).weight, tolerance=1e-6)
    assert_close(logits(model, case.batch()), expected)
    model.unmerge_adapter()
    for name, weight in base_weights(model).items():
        assert_close(weight, before[name], tolerance=1e-6)
    assert_close(logits(model, case.batch()), expected)


def test_several_tasks_merge_at_once_or_one_after_the_other(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    base = tiny_model("llama")
    model = with_tasks(copy.deepcopy(base), LLAMA, "one", "two", "three")
    expected = logits(with_updates_in_weights(base, sum_of_updates(model, "one", "three")), LLAMA.batch())

    model.merge_adapter(["one", "three"])
    assert_close(logits(model, LLAMA.batch()), expected)
    model.unmerge_adapter()

    model.merge_adapter(["three"])
    with pytest.warns(UserWarning, match="Already following adapters were merged three"):
        model.merge_adapter(["one"])
    assert_close(logits(model, LLAMA.batch()), expected)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter(["one"])
    assert_close(logits(model, LLAMA.batch()), expected)
    assert_close(logits(model.merge_and_unload(adapter_names=["one", "three"]), LLAMA.batch()), expected)


def test_merging_skips_layers_that_a_task_does_not_adapt(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    base = tiny_model("llama")
    model = with_tasks(copy.deepcopy(base), LLAMA, "one", target_modules=["q_proj"])
    model.add_adapter("two", LLAMA.config(target_modules=["k_proj"]))
    randomize(model, "two")
    model.set_adapter("two")
    expected = logits(model, LLAMA.batch())
    merged = model.merge_and_unload()
    assert_close(logits(merged, LLAMA.batch()), expected)
    for theirs, ours in zip(base.model.layers, merged.model.layers, strict=True):
        assert torch.equal(theirs.self_attn.q_proj.weight, ours.self_attn.q_proj.weight)
        assert not torch.equal(theirs.self_attn.k_proj.weight, ours.self_attn.k_proj.weight)


@each_architecture
def test_unloading_gives_the_base_model_back(case: Case, tiny_model: Callable[[str], PreTrainedModel]) -> None:
    base = tiny_model(case.architecture)
    expected = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    found = with_tasks(base, case, "one", "two").unload().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_merged_and_unloaded_model_can_be_saved_and_adapted_again(
    tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    merged = with_tasks(tiny_model("llama"), LLAMA, "one").merge_and_unload()
    expected = logits(merged, LLAMA.batch())
    merged.save_pretrained(tmp_path)
    assert not (tmp_path / "subspace.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, LLAMA.batch()), expected)
    again = get_peft_model(loaded, LLAMA.config(), adapter_name="two")
    assert torch.equal(logits(again, LLAMA.batch()), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_safe_merge_of_a_broken_task_raises_and_leaves_the_weights(
    value: float, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    base = tiny_model("llama")
    expected = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = with_tasks(base, LLAMA, "one")
    next(iter(task_parameters(model, "one").values())).data[0, 0] = value
    with pytest.raises(ValueError, match="The adapter one seems to be broken"):
        model.merge_and_unload(safe_merge=True)
    found = model.unload().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_safe_merge_of_a_sound_and_a_broken_task_leaves_the_weights_of_the_layer(
    tiny_model: Callable[[str], PreTrainedModel],
) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "sound", "broken")
    layer = an_adapted_layer(model)
    layer.share_coefficients_in["broken"].data[0, 0] = torch.nan
    before = layer.get_base_weight().clone()
    with pytest.raises(ValueError, match="The adapter broken seems to be broken"):
        layer.merge(safe_merge=True, adapter_names=["sound", "broken"])
    assert torch.equal(layer.get_base_weight(), before)
    assert not layer.merged


def test_disabling_takes_merged_tasks_out(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    base = tiny_model("llama")
    expected = logits(base, LLAMA.batch())
    model = with_tasks(base, LLAMA, "one")
    adapted = logits(model, LLAMA.batch())
    model.merge_adapter()
    with model.disable_adapter():
        assert_close(logits(model, LLAMA.batch()), expected)
    assert_close(logits(model, LLAMA.batch()), adapted)


def test_choosing_another_task_takes_merged_ones_out(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "one", "two")
    model.set_adapter("two")
    expected = logits(model, LLAMA.batch())
    model.set_adapter("one")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("two")
    assert not an_adapted_layer(model).merged
    assert_close(logits(model, LLAMA.batch()), expected)


def test_unmerging_what_is_not_merged_warns_and_changes_nothing(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "one")
    before = base_weights(model)
    with pytest.warns(UserWarning, match="Already unmerged. Nothing to do"):
        model.unmerge_adapter()
    assert all(torch.equal(weight, before[name]) for name, weight in base_weights(model).items())


def test_a_merged_task_cannot_be_deleted(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "one", "two")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['one'\] while they are merged"):
        model.delete_adapter("one")
    model.unmerge_adapter()
    model.delete_adapter("one")


def test_neither_basis_nor_coefficients_change_under_a_merged_task(
    tiny_model: Callable[[str], PreTrainedModel],
) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "one")
    before = base_weights(model)
    model.merge_adapter()
    layer = an_adapted_layer(model)
    with pytest.raises(ValueError, match="the basis cannot change while adapters are merged"):
        layer.set_basis(-layer.share_basis_out, layer.share_basis_in)
    with pytest.raises(ValueError, match="coefficients of 'one' cannot change while merged"):
        layer.set_coefficients("one", torch.zeros(K, P), torch.zeros(K, P))
    model.unmerge_adapter()
    for name, weight in base_weights(model).items():
        assert_close(weight, before[name], tolerance=1e-6)


class TestConversionToLora:
    @each_architecture
    @each_phase
    def test_the_lora_computes_the_same_in_plain_peft(
        self, case: Case, phase: str, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
    ) -> None:
        model = with_random_bases(with_tasks(tiny_model(case.architecture), case, "one", phase=phase))
        expected = logits(model, case.batch())
        save_as_lora(tmp_path, model, rank=P, adapter_name="one")
        assert PeftConfig.from_pretrained(tmp_path).peft_type == "LORA"
        base = tiny_model(case.architecture)
        assert_differ(logits(base, case.batch()), expected)
        assert_close(logits(PeftModel.from_pretrained(base, tmp_path), case.batch()), expected)

    def test_all_layers_say_that_they_can_be_converted(self, tiny_model: Callable[[str], PreTrainedModel]) -> None:
        model = with_tasks(tiny_model("llama"), LLAMA, "one")
        assert model.supports_lora_conversion("one")

    def test_a_float_rank_is_an_explained_variance(self, tiny_model: Callable[[str], PreTrainedModel]) -> None:
        model = with_tasks(tiny_model("llama"), LLAMA, "one")
        config, tensors = convert_to_lora(model, rank=1.0, adapter_name="one")
        assert isinstance(config, LoraConfig)
        assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} <= {P, P + 1}
        _, smaller = convert_to_lora(model, rank=0.3, adapter_name="one")
        assert {tensor.shape[0] for name, tensor in smaller.items() if "lora_A" in name} < set(range(1, P))

    def test_the_head_of_a_classifier_comes_along(
        self, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
    ) -> None:
        model = with_tasks(tiny_model("bert"), BERT, "default", task_type="SEQ_CLS")
        learn(model, BERT.batch(), steps=3)
        save_as_lora(tmp_path, model, rank=P)
        assert "base_model.model.classifier.weight" in load_file(tmp_path / "adapter_model.safetensors")
        lora = PeftModel.from_pretrained(tiny_model("bert"), tmp_path)
        assert_close(logits(lora, BERT.batch()), logits(model, BERT.batch()))

    @pytest.mark.parametrize("name", ["typo", "two"])
    def test_a_task_that_some_layer_does_not_have_is_refused(
        self, name: str, tiny_model: Callable[[str], PreTrainedModel]
    ) -> None:
        model = with_tasks(tiny_model("llama"), LLAMA, "one", target_modules=["q_proj"])
        model.add_adapter("two", LLAMA.config(target_modules=["k_proj"]))
        with pytest.raises(ValueError, match=rf"task '{name}' does not adapt this layer, expected one of \['one'\]"):
            convert_to_lora(model, rank=P, adapter_name=name)

    def test_the_lora_is_trained_like_any(self, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
        save_as_lora(tmp_path, with_tasks(tiny_model("llama"), LLAMA, "one"), rank=P, adapter_name="one")
        lora = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True)
        assert all(".lora_" in name for name in trainable(lora))
        losses = learn(lora, LLAMA.batch(), steps=10)
        assert losses[-1] < losses[0]
