"""Files of plain LoRAs as PEFT has written them since 0.3, and as libraries that build on PEFT write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from share_hf import SharedSubspace
from share_hf.format.lora import LoraAdapter, read_lora
from tests.hub_server.fixtures import Hub
from tests.tree_fixtures import SaveLora
from tests.trees import assert_close, edit_json, edit_tensors, logits, lora_config


# Everything that PEFT 0.3 wrote to `adapter_config.json`.
FIELDS_OF_0_3 = (
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "target_modules",
    "task_type",
)

WRAPPED: dict[str, Callable[[str], str]] = {
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled-base": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod.", 1),
    "compiled-layers": lambda key: key.replace(".self_attn", "._orig_mod.self_attn"),
    "fsdp": lambda key: "_fsdp_wrapped_module." + key.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
    "fsdp-of-torch-1": lambda key: key.replace(".self_attn", "._fsdp_wrapped_module._fpw_module.self_attn"),
    "checkpointed": lambda key: key.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
    "ddp": lambda key: f"module.{key}",
    "deepspeed-of-compiled": lambda key: f"module._orig_mod.{key}",
    "peft-of-peft": lambda key: f"base_model.model.{key}",
    "peft-of-ddp-of-peft": lambda key: f"base_model.model.module.{key}",
    "no-prefix": lambda key: key.removeprefix("base_model.model."),
    "state-dict": lambda key: key.replace(".weight", ".default.weight"),
}


def pickled(folder: Path) -> Path:
    """An adapter whose weights are in `adapter_model.bin`, as PEFT wrote them up to 0.6."""
    safe = folder / "adapter_model.safetensors"
    weights = {name: torch.nn.Parameter(tensor) for name, tensor in load_file(safe).items()}
    torch.save(weights, folder / "adapter_model.bin")
    safe.unlink()
    return folder


def renamed(folder: Path, name: Callable[[str], str]) -> Path:
    def change(tensors: dict[str, Tensor]) -> None:
        new = {name(key): tensor for key, tensor in tensors.items()}
        tensors.clear()
        tensors.update(new)

    edit_tensors(folder / "adapter_model.safetensors", change)
    return folder


def assert_same_adapter(found: LoraAdapter, expected: LoraAdapter) -> None:
    assert found.updates.keys() == expected.updates.keys()
    for module, update in found.updates.items():
        assert torch.equal(update.out_factor, expected.updates[module].out_factor)
        assert torch.equal(update.in_factor, expected.updates[module].in_factor)
    assert found.head.keys() == expected.head.keys()
    for name, weight in found.head.items():
        assert torch.equal(weight, expected.head[name])


def test_an_adapter_of_peft_0_3_is_read_as_it_is(save_classifier: SaveLora, copy_of: Callable[[Path], Path]) -> None:
    today = save_classifier("today", 2, modules_to_save=["classifier"])
    old = pickled(copy_of(today))
    path = old / "adapter_config.json"
    path.write_text(json.dumps({name: json.loads(path.read_text())[name] for name in FIELDS_OF_0_3}))
    assert_same_adapter(read_lora(old), read_lora(today))
    assert SharedSubspace.from_adapters({"old": old}, pseudo_rank=4, progress=False).tasks == ("old",)


def test_an_adapter_that_transformers_saved_without_a_peft_model_is_read(
    tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    model.add_adapter(lora_config())
    model.save_pretrained(tmp_path / "native")
    subspace = SharedSubspace.from_adapters([tmp_path / "native"], num_components=8, pseudo_rank=4, progress=False)
    assert_close(logits(subspace.apply(tiny_model("llama"))), logits(model.eval()))


def test_safetensors_are_read_where_a_folder_has_both(save_lora: SaveLora) -> None:
    folder = save_lora("both")
    expected = read_lora(folder)
    torch.save({}, folder / "adapter_model.bin")
    assert_same_adapter(read_lora(folder), expected)


def test_pickled_weights_of_a_repository_are_read(
    hub: Hub, save_lora: SaveLora, copy_of: Callable[[Path], Path]
) -> None:
    folder = save_lora("old")
    expected = read_lora(folder)
    hub.api.create_repo("org/old-lora")
    hub.api.upload_folder(repo_id="org/old-lora", folder_path=pickled(copy_of(folder)), allow_patterns="adapter_*")
    assert_same_adapter(read_lora("org/old-lora"), expected)


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_names_are_those_of_the_base_model_whatever_wrapped_it(
    wrapper: str, save_lora: SaveLora, copy_of: Callable[[Path], Path]
) -> None:
    folder = save_lora("plain", alpha_pattern={"layers.1.self_attn.q_proj": 3})
    assert_same_adapter(read_lora(renamed(copy_of(folder), WRAPPED[wrapper])), read_lora(folder))


def test_a_scale_is_found_by_the_wrapped_name_it_was_given_under(
    save_lora: SaveLora, copy_of: Callable[[Path], Path]
) -> None:
    folder = save_lora("plain", alpha_pattern={"model.layers.1.self_attn.q_proj": 3})
    wrapped = renamed(copy_of(folder), WRAPPED["compiled-layers"])
    pattern = {"model.layers.1._orig_mod.self_attn.q_proj": 3}
    edit_json(wrapped / "adapter_config.json", lambda config: config.update(alpha_pattern=pattern))
    assert_same_adapter(read_lora(wrapped), read_lora(folder))


def test_the_head_in_a_state_dict_is_the_trained_one(
    save_classifier: SaveLora, copy_of: Callable[[Path], Path]
) -> None:
    folder = save_classifier("two", 2, modules_to_save=["classifier"])

    def as_state_dict(key: str) -> str:
        key = key.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
        return key.replace("model.classifier.", "model.classifier.modules_to_save.default.")

    whole = renamed(copy_of(folder), as_state_dict)
    original = {
        "base_model.model.classifier.original_module.weight": torch.zeros(2, 64),
        "base_model.model.classifier.original_module.bias": torch.zeros(2),
    }
    edit_tensors(whole / "adapter_model.safetensors", lambda tensors: tensors.update(original))
    assert_same_adapter(read_lora(whole), read_lora(folder))


LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (f"_orig_mod.{LORA_A}", "is a second tensor called 'model.layers.0.self_attn.q_proj.lora_A.weight'"),
        (LORA_A.replace("weight", "default.weight"), "is a second tensor called"),
        ("base_model.model.lm_head.original_module.weight", "'lm_head.weight' is there only as the base model has it"),
    ],
)
def test_tensors_of_one_name_and_heads_never_trained_are_refused(more: str, message: str, save_lora: SaveLora) -> None:
    folder = save_lora("twice")
    edit_tensors(folder / "adapter_model.safetensors", lambda tensors: tensors.update({more: tensors[LORA_A].clone()}))
    with pytest.raises(ValueError, match=message):
        read_lora(folder)


def test_a_state_dict_of_two_adapters_is_refused(save_lora: SaveLora) -> None:
    folder = renamed(save_lora("two"), lambda key: key.replace(".weight", f".{'a' if '.0.' in key else 'b'}.weight"))
    with pytest.raises(ValueError, match=r"has weights of the adapters \['a', 'b'\], expected those of one"):
        read_lora(folder)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_bias_to_train_does_not_matter_if_the_model_has_none(
    bias: str, save_lora: SaveLora, copy_of: Callable[[Path], Path]
) -> None:
    folder = save_lora("plain")
    asked = copy_of(folder)
    edit_json(asked / "adapter_config.json", lambda config: config.update(bias=bias))
    assert_same_adapter(read_lora(asked), read_lora(folder))


def test_the_targets_that_unsloth_writes_are_taken(save_lora: SaveLora) -> None:
    pattern = (
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj))"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.self_attn\.(?:q_proj|v_proj))"
    )
    folder = save_lora("unsloth", target_modules=pattern, base="unsloth/tiny-unsloth-bnb-4bit")
    edit_json(
        folder / "adapter_config.json",
        lambda config: config.update(auto_mapping={"parent_library": "transformers", "unsloth_fixed": True}),
    )
    assert len(read_lora(folder).updates) == 4


def _with_experts(folder: Path, library: str | None) -> Path:
    renamed(folder, lambda key: key.replace("self_attn.q_proj", "mlp.experts.0.gate_proj"))
    auto_mapping = None if library is None else {"base_model_class": "Moe", "parent_library": library}
    edit_json(folder / "adapter_config.json", lambda config: config.update(auto_mapping=auto_mapping))
    return folder


@pytest.mark.parametrize("library", [None, "transformers.models.qwen2_moe.modeling_qwen2_moe"])
def test_single_experts_of_transformers_4_are_refused_when_they_come(library: str | None, save_lora: SaveLora) -> None:
    folder = _with_experts(save_lora("moe"), library)
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.experts.0.gate_proj', one of the experts that transf"):
        read_lora(folder)


def test_single_experts_of_a_custom_model_are_layers_like_others(save_lora: SaveLora) -> None:
    folder = _with_experts(save_lora("moe"), "transformers_modules.org.moe")
    assert "model.layers.0.mlp.experts.0.gate_proj" in read_lora(folder).updates
