"""Tasks into weights and out again, and tasks as plain LoRAs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, convert_to_lora, get_peft_model, save_as_lora
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from share_hf.tuner import share_layers

from ..trees import files_of
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


def with_a_negative_zero(base: PreTrainedModel, case: Case) -> PreTrainedModel:
    """Return the model with a weight of -0 in each adapted layer: equal to 0, but with other bits."""
    for name, module in base.named_modules():
        if name.endswith(case.target_modules):
            module.weight.data[0, 0] = -0.0
    return base


def bits_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return all that a state dict of the model has, as bytes."""
    return {name: tensor.flatten().view(torch.uint8).clone() for name, tensor in model.state_dict().items()}


def is_adapted(name: str) -> bool:
    return name.endswith(".base_layer.weight")


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def pickled(model: PeftModel) -> PeftModel:
    return pickle.loads(pickle.dumps(model))


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


class TestACopyOfTheWeights:
    @each_architecture
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("keep_base", [True, "cpu"])
    def test_unmerging_restores_the_base_to_the_bit_whatever_was_merged_in_how_many_steps(
        self, case: Case, dtype: torch.dtype, keep_base: bool | str, tiny_model: Callable[[str], PreTrainedModel]
    ) -> None:
        model = with_tasks(with_a_negative_zero(tiny_model(case.architecture).to(dtype), case), case, "one", "two")
        before, expected = bits_of(model), logits(model, case.batch())
        model.merge_adapter(["two"], keep_base=keep_base)
        with pytest.warns(UserWarning, match="additionally merging one"):
            model.merge_adapter(["one"])
        assert all(not torch.equal(bits, before[name]) for name, bits in bits_of(model).items() if is_adapted(name))
        model.unmerge_adapter()
        assert_same(bits_of(model), before)
        assert torch.equal(logits(model, case.batch()), expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_without_one_the_base_comes_back_up_to_rounding(
        self, dtype: torch.dtype, tiny_model: Callable[[str], PreTrainedModel]
    ) -> None:
        model = with_tasks(tiny_model("llama").to(dtype), LLAMA, "one")
        before = base_weights(model)
        model.merge_adapter()
        highest = {name: weight.abs().max() for name, weight in base_weights(model).items()}
        model.unmerge_adapter()
        errors = {name: (weight - before[name]).abs().max() for name, weight in base_weights(model).items()}
        assert any(errors.values())
        assert all(errors[name] <= torch.finfo(dtype).eps * (highest[name] + 1) for name in errors)

    def test_one_cannot_be_made_of_a_weight_that_has_a_task_in_it(
        self, tiny_model: Callable[[str], PreTrainedModel]
    ) -> None:
        model = with_tasks(tiny_model("llama"), LLAMA, "one", "two")
        model.add_adapter("three", LLAMA.config(target_modules=["k_proj"]))
        model.merge_adapter(["one"])
        before = bits_of(model)
        with pytest.raises(ValueError, match=r"\['one'\] are merged already, without a copy .* call unmerge_adapter"):
            model.merge_adapter(["two", "three"], keep_base=True)
        assert_same(bits_of(model), before)
        model.merge_adapter(["three"])
        assert {tuple(layer.merged_adapters) for layer in share_layers(model).values()} == {("one",), ("three",)}

    @pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged")
    def test_what_takes_merged_tasks_out_puts_it_back(self, tiny_model: Callable[[str], PreTrainedModel]) -> None:
        model = with_tasks(tiny_model("llama"), LLAMA, "one", "two")
        before = bits_of(model)
        model.merge_adapter(keep_base=True)
        with model.disable_adapter():
            logits(model, LLAMA.batch())
            assert_same(bits_of(model), before)
        model.merge_adapter(keep_base=True)
        model.set_adapter("two")
        assert_same(bits_of(model), before)
        model.merge_adapter()  # no copy of which is kept: the earlier ones are gone
        with pytest.raises(ValueError, match=r"\['two'\] are merged already, without a copy"):
            model.merge_adapter(["one"], keep_base=True)

    def test_a_task_that_is_merged_cannot_be_deleted_and_comes_out_afterwards(
        self, tiny_model: Callable[[str], PreTrainedModel]
    ) -> None:
        model = with_tasks(tiny_model("llama"), LLAMA, "one", "two")
        before = bits_of(model)
        model.merge_adapter(["one", "two"], keep_base=True)
        with pytest.raises(ValueError, match="Cannot delete"):
            model.delete_adapter("two")
        model.unmerge_adapter()
        model.delete_adapter("two")
        assert_same({name: bits for name, bits in before.items() if not name.endswith(".two")}, bits_of(model))

    @pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
    def test_it_follows_in_a_copy_of_the_model(
        self, copied: Callable[[PeftModel], PeftModel], tiny_model: Callable[[str], PreTrainedModel]
    ) -> None:
        model = with_tasks(tiny_model("llama"), LLAMA, "one")
        before = bits_of(model)
        model.merge_adapter(keep_base=True)
        merged = bits_of(model)
        other = copied(model)
        model.unmerge_adapter()
        assert_same(bits_of(other), merged)
        other.unmerge_adapter()
        assert_same(bits_of(other), before)
        assert_same(bits_of(model), before)

    def test_it_is_in_no_state_dict_and_no_file(
        self, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
    ) -> None:
        model = with_tasks(tiny_model("llama"), LLAMA, "one", "two")
        names = set(model.state_dict()), {name for name, _ in model.named_modules()}
        model.save_pretrained(tmp_path / "before")
        model.merge_adapter(keep_base=True)
        assert (set(model.state_dict()), {name for name, _ in model.named_modules()}) == names
        assert not any("kept" in name for name, _ in [*model.named_parameters(), *model.named_buffers()])
        model.save_pretrained(tmp_path / "merged")
        assert files_of(tmp_path / "merged") == files_of(tmp_path / "before")

    def test_it_comes_back_in_the_type_that_the_model_has_been_cast_to(
        self, tiny_model: Callable[[str], PreTrainedModel]
    ) -> None:
        model = with_tasks(tiny_model("llama"), LLAMA, "one")
        expected = {name: weight.bfloat16() for name, weight in base_weights(model).items()}
        model.merge_adapter(keep_base=True)
        model.bfloat16()
        model.unmerge_adapter()
        assert_same(base_weights(model), expected)

    def test_a_model_is_unloaded_with_what_is_merged(self, tiny_model: Callable[[str], PreTrainedModel]) -> None:
        model = with_tasks(tiny_model("llama"), LLAMA, "one", "two")
        model.merge_adapter(["one"], keep_base=True)
        expected = base_weights(model)
        with pytest.warns(UserWarning, match="already merged"):
            merged = model.merge_and_unload()
        assert merged.state_dict().keys() == tiny_model("llama").state_dict().keys()
        assert_same({name: merged.get_submodule(name).weight for name in expected}, expected)

    @pytest.mark.parametrize("keep_base", ["cuda", None, 2])
    def test_where_it_may_be_is_known(self, keep_base: object, tiny_model: Callable[[str], PreTrainedModel]) -> None:
        model = with_tasks(tiny_model("llama"), LLAMA, "one")
        with pytest.raises(ValueError, match=rf"keep_base is {keep_base!r}, expected False, True or 'cpu'"):
            model.merge_adapter(keep_base=keep_base)
        assert not an_adapted_layer(model).merged


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_safe_merge_that_is_refused_by_the_last_layer_changes_none(
    merge: str, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "one")
    name, last = list(share_layers(model).items())[-1]
    last.share_coefficients_out["one"].data[0, 0] = torch.inf
    before = bits_of(model)
    with pytest.raises(ValueError, match=rf"'{name}': NaNs detected .* adapter one seems to be broken"):
        getattr(model, merge)(safe_merge=True)
    assert_same(bits_of(model), before)
    assert not any(layer.merged for layer in share_layers(model).values())


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_tasks_that_a_model_does_not_have_are_all_named(
    merge: str, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "one", "two")
    before = bits_of(model)
    with pytest.raises(ValueError, match=r"\['typo', 'three'\], expected names among \['one', 'two'\]"):
        getattr(model, merge)(adapter_names=["one", "typo", "three"])
    with pytest.raises(TypeError, match="should be a list of strings, got 'one'"):
        getattr(model, merge)(adapter_names="one")
    assert_same(bits_of(model), before)


def test_a_task_that_is_named_twice_is_merged_once(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "one")
    expected = logits(model, LLAMA.batch())
    model.merge_adapter(["one", "one"])
    assert_close(logits(model, LLAMA.batch()), expected)
    assert an_adapted_layer(model).merged_adapters == ["one"]


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
