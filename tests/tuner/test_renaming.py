"""Tasks are injected into the modules that they have, by the names that these have in the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from share_hf import SharedSubspace
from share_hf.tuner import share_layers
from tests.llava import TARGETS, as_before_4_52, tiny_llava
from tests.trees import (
    assert_close,
    edit_json,
    edit_tensors,
    logits,
    lora_config,
    named,
    plain_logits,
    save_adapter,
    untouched,
)


@pytest.fixture(scope="module")
def llava() -> LlavaForConditionalGeneration:
    return tiny_llava()


@pytest.fixture
def old_adapter(llava: LlavaForConditionalGeneration, tmp_path: Path) -> Path:
    """A LoRA of LLaVA as an older transformers saved it."""
    folder = save_adapter(named(copy.deepcopy(llava)), tmp_path / "old", lora_config(target_modules=TARGETS), 1)
    path = folder / "adapter_model.safetensors"
    save_file({as_before_4_52(key): value for key, value in load_file(path).items()}, path)
    return folder


def subspace_of(*folders: Path) -> SharedSubspace:
    return SharedSubspace.from_adapters(list(folders), num_components=8, pseudo_rank=4, progress=False)


def test_an_adapter_of_an_older_transformers_computes_what_peft_makes_of_it(
    llava: LlavaForConditionalGeneration, old_adapter: Path
) -> None:
    expected = plain_logits(copy.deepcopy(llava), old_adapter)
    subspace = subspace_of(old_adapter)
    model = subspace.apply(copy.deepcopy(llava))
    assert_close(logits(model), expected)
    assert (expected - logits(llava)).abs().max() > 1e-3
    assert all(name.startswith("language_model.model.layers") for name in subspace.state.layers)
    assert all(name.startswith("model.language_model.layers") for name in share_layers(model))


def test_a_head_of_an_older_transformers_is_loaded_too(llava: LlavaForConditionalGeneration, tmp_path: Path) -> None:
    config = lora_config(target_modules=TARGETS, modules_to_save=["lm_head"])
    folder = save_adapter(named(copy.deepcopy(llava)), tmp_path / "with-head", config, 1)
    expected = plain_logits(copy.deepcopy(llava), folder)
    path = folder / "adapter_model.safetensors"

    def old(key: str) -> str:
        return as_before_4_52(key).replace("model.lm_head", "model.language_model.lm_head")

    save_file({old(key): value for key, value in load_file(path).items()}, path)
    assert_close(logits(subspace_of(folder).apply(copy.deepcopy(llava))), expected)


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_the_loaders_of_peft_and_transformers_rename_too(
    saved: list[str] | None, llava: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    folders = []
    for seed, name in enumerate(("one", "two")):
        config = lora_config(target_modules=TARGETS, modules_to_save=saved)
        folders.append(save_adapter(named(copy.deepcopy(llava)), tmp_path / name, config, seed))
    expected = [plain_logits(copy.deepcopy(llava), folder) for folder in folders]
    for path in (folder / "adapter_model.safetensors" for folder in folders):
        old = {
            as_before_4_52(key).replace("model.lm_head", "model.language_model.lm_head"): key
            for key in load_file(path)
        }
        save_file({name: load_file(path)[key] for name, key in old.items()}, path)
    subspace_of(*folders).save_pretrained(tmp_path / "tree")
    model = PeftModel.from_pretrained(
        copy.deepcopy(llava), tmp_path / "tree", subfolder="tasks/one", adapter_name="one"
    ).eval()
    assert_close(logits(model), expected[0])
    model.load_adapter(tmp_path / "tree" / "tasks" / "two", "two")
    model.set_adapter("two")
    assert_close(logits(model), expected[1])
    model.load_adapter(tmp_path / "tree" / "tasks" / "two", "two")
    assert_close(logits(model), expected[1])
    by_transformers = copy.deepcopy(llava)
    by_transformers.load_adapter(str(tmp_path / "tree" / "tasks" / "one"), "one")
    assert_close(logits(by_transformers), expected[0])


def test_what_the_model_has_no_name_for_is_refused(
    llava: LlavaForConditionalGeneration, old_adapter: Path, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"adapts 'language_model.model.layers.0.*', which LlamaForCausalLM does not"):
        subspace_of(old_adapter).apply(model)
    assert untouched(model, tiny_model("llama"))


def test_tasks_are_injected_where_they_have_coefficients_and_nowhere_else(
    tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    base = named(tiny_model("llama"))
    whole = save_adapter(copy.deepcopy(base), tmp_path / "whole", lora_config(), 1)
    part = save_adapter(copy.deepcopy(base), tmp_path / "part", lora_config(), 2)
    edit_tensors(
        part / "adapter_model.safetensors",
        lambda tensors: [tensors.pop(key) for key in list(tensors) if "layers.1" in key],
    )
    subspace = subspace_of(whole, part)
    model = subspace.apply(tiny_model("llama"))
    subspace.save_pretrained(tmp_path / "tree")
    loaded = PeftModel.from_pretrained(
        tiny_model("llama"), tmp_path / "tree", subfolder="tasks/part", adapter_name="part"
    )
    for adapted in (model, loaded):
        with_part = {name for name, layer in share_layers(adapted).items() if layer.has_task("part")}
        assert with_part == {f"model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj")}


def test_modules_are_those_in_the_file_where_the_targets_say_otherwise(
    tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    folder = save_adapter(named(tiny_model("llama")), tmp_path / "one", lora_config(), 1)
    expected = plain_logits(tiny_model("llama"), folder)
    edit_json(folder / "adapter_config.json", lambda config: config.update(target_modules=["q_proj", "o_proj"]))
    subspace = subspace_of(folder)
    assert_close(logits(subspace.apply(tiny_model("llama"))), expected)
    subspace.export_lora("one", tmp_path / "exported")
    assert_close(plain_logits(tiny_model("llama"), tmp_path / "exported"), expected)


def test_a_stored_task_is_not_loaded_in_part(tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    subspace_of(save_adapter(named(tiny_model("llama")), tmp_path / "one", lora_config(), 1)).save_pretrained(
        tmp_path / "tree"
    )
    smaller = tiny_model("llama")
    smaller.model.layers = smaller.model.layers[:1]
    with pytest.raises(ValueError, match=r"has coefficients for 'model.layers.1.*of 4 modules 2 are missing"):
        PeftModel.from_pretrained(smaller, tmp_path / "tree", subfolder="tasks/one")
    assert not share_layers(smaller)


def test_layers_that_are_wrapped_one_by_one_are_adapted_by_their_own_names(
    tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    folder = save_adapter(named(tiny_model("llama")), tmp_path / "one", lora_config(), 1)
    subspace = subspace_of(folder)
    wrapped = tiny_model("llama")
    for i, layer in enumerate(wrapped.model.layers):
        wrapped.model.layers[i] = torch.compile(layer, backend="eager")
    model = subspace.apply(wrapped)
    assert share_layers(model).keys() == subspace.state.layers.keys()
    assert_close(logits(model), plain_logits(tiny_model("llama"), folder))
    subspace.save_pretrained(tmp_path / "tree")
    again = tiny_model("llama")
    again.model.layers[1] = torch.compile(again.model.layers[1], backend="eager")
    with pytest.raises(ValueError, match=r"'model.layers.1._orig_mod.* inside a compiled module"):
        PeftModel.from_pretrained(again, tmp_path / "tree", subfolder="tasks/one")
    assert not share_layers(again)
