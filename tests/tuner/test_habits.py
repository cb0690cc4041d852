"""What PEFT's users do with any adapter, and its options: supported as for LoRA, or refused by name."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import Mamba2Config, Mamba2ForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from share_hf import ShareConfig
from share_hf.tuner import share_layers
from share_hf.tuner.config import SHARE

from .cases import GPT2, LLAMA, assert_close, learn, logits, snapshot, trainable, with_random_bases, with_tasks


Base = Callable[[str], PreTrainedModel]


@pytest.mark.parametrize("target", ["all-linear", r".*\.q_proj"])
def test_layers_to_transform_with_a_string_target_is_refused_as_for_lora(target: str) -> None:
    with pytest.raises(ValueError, match="layers_to_transform"):
        LoraConfig(target_modules=target, layers_to_transform=[0])
    with pytest.raises(ValueError, match=r"layers_to_transform \[0\], expected a list of names"):
        ShareConfig(target_modules=target, layers_to_transform=[0])


def test_the_status_of_a_model_names_the_method(tiny_model: Base) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "one", "two")
    status = model.get_model_status()
    assert status.peft_types == {"one": "SHARE", "two": "SHARE"}
    assert status.adapter_model_type == "ShareModel"
    assert status.devices == {"one": ["cpu"], "two": ["cpu"]}


def test_the_method_is_plain_text_wherever_it_is_written() -> None:
    assert (f"{SHARE}", SHARE.value, SHARE == "SHARE", hash(SHARE)) == ("SHARE", "SHARE", True, hash("SHARE"))
    assert pickle.loads(pickle.dumps(SHARE)).value == "SHARE"
    assert type(SHARE.value) is str


def test_adapters_in_a_part_of_a_model_are_saved_with_the_whole(tiny_model: Base, tmp_path: Path) -> None:
    whole = tiny_model("llama")
    whole.model = with_random_bases(get_peft_model(whole.model, LLAMA.config(task_type=None), "one"))
    whole.save_pretrained(tmp_path)
    assert (tmp_path / "subspace.safetensors").is_file()


@pytest.mark.parametrize("first", ["share", "lora"])
def test_transformers_adds_no_other_method_beside_tasks(first: str, tiny_model: Base, tmp_path: Path) -> None:
    configs = {"share": LLAMA.config(), "lora": LoraConfig(target_modules=["q_proj"])}
    model = tiny_model("llama")
    model.add_adapter(configs.pop(first), "first")
    before = snapshot(model)
    ((second, config),) = configs.items()
    with pytest.raises(ValueError, match=r"expected (only )?SHARE"):
        model.add_adapter(config, "second")
    get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path / second)
    with pytest.raises(ValueError, match=r"expected (only )?SHARE"):
        model.load_adapter(str(tmp_path / second), "second")
    assert snapshot(model)["modules"] == before["modules"]


def test_the_layers_of_mamba_that_peft_refuses_are_refused() -> None:
    config = Mamba2Config(
        vocab_size=64, hidden_size=32, state_size=8, num_heads=4, head_dim=16, n_groups=1, num_hidden_layers=1
    )
    for method in (LoraConfig, ShareConfig):
        with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba-based models"):
            get_peft_model(Mamba2ForCausalLM(config), method(target_modules=["out_proj"]))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Conv1D(48, 32), nn.Linear(48, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_a_model_with_both_layouts_of_weights_gives_no_warning(fan_in_fan_out: bool) -> None:
    base, x = Mixed(), torch.randn(3, 32)
    config = ShareConfig(
        num_components=8, pseudo_rank=4, target_modules=["first", "second"], fan_in_fan_out=fan_in_fan_out
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(base, config)
    learn_a_little(model)
    expected = model(x)
    model.merge_adapter()
    assert_close(model(x), expected)


def learn_a_little(model: PeftModel) -> None:
    for parameter in trainable(model).values():
        nn.init.normal_(parameter, std=0.1)
    model.eval()


def test_a_layout_that_no_layer_has_is_warned_of(tiny_model: Base) -> None:
    config = LLAMA.config(fan_in_fan_out=True)
    with pytest.warns(UserWarning, match="no target is a Conv1D"):
        get_peft_model(tiny_model("llama"), config)
    assert not config.fan_in_fan_out
    assert get_peft_model(tiny_model("gpt2"), GPT2.config()).peft_config["default"].fan_in_fan_out


@pytest.mark.parametrize("autocast", [True, False])
def test_the_type_of_coefficients_is_that_of_the_model_only_if_asked_for(autocast: bool, tiny_model: Base) -> None:
    expected = torch.float32 if autocast else torch.bfloat16
    model = get_peft_model(tiny_model("llama").bfloat16(), LLAMA.config(), autocast_adapter_dtype=autocast)
    assert {parameter.dtype for parameter in trainable(model).values()} == {expected}
    assert {layer.share_basis_out.dtype for layer in share_layers(model).values()} == {torch.float32}
    losses = learn(model, LLAMA.batch())
    assert losses[-1] < losses[0]


def test_a_mapping_that_renames_weights_of_a_task_is_refused(tiny_model: Base, tmp_path: Path) -> None:
    source = with_random_bases(with_tasks(tiny_model("llama"), LLAMA, "one"))
    source.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"key_mapping renames 'base_model\.model\.model\.layers"):
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "one", key_mapping={"^model": "decoder"})
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "one", key_mapping={"^visual": "model.visual"})
    assert torch.equal(logits(loaded, LLAMA.batch()), logits(source, LLAMA.batch()))


def test_a_lora_is_what_it_is_without_us(tiny_model: Base, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, config=LoraConfig(target_modules=["q_proj"]))
    assert torch.equal(logits(loaded, LLAMA.batch()), logits(model, LLAMA.batch()))
    loaded.load_adapter(tmp_path, "default")
    assert get_peft_model_state_dict(loaded).keys() == get_peft_model_state_dict(model).keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    native = tiny_model("llama")
    native.load_adapter(str(tmp_path))
    native.add_adapter(LoraConfig(target_modules=["v_proj"]), "second")
    native.set_adapter("default")
    assert torch.equal(logits(native.eval(), LLAMA.batch()), logits(model, LLAMA.batch()))


@pytest.mark.parametrize("phase", ["coefficients", "adapt", "init"])
def test_dropout_drops_inputs_of_the_update_in_training_as_loras_does(phase: str, tiny_model: Base) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "one", phase=phase, dropout=0.5)
    without = with_tasks(tiny_model("llama"), LLAMA, "one", phase=phase)
    expected = logits(without, LLAMA.batch())
    assert torch.equal(logits(model, LLAMA.batch()), expected)
    model.train()
    torch.manual_seed(0)
    first = logits(model, LLAMA.batch())
    assert not torch.equal(first, logits(model, LLAMA.batch()))
    torch.manual_seed(0)
    layer = next(iter(share_layers(model).values()))
    x = torch.randn(64, 64)
    torch.manual_seed(1)
    found = layer(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    assert_close(found, layer.base_layer(x) + dropped @ layer.factors("one").dense().T)
    with model.disable_adapter():
        assert torch.equal(layer(x), layer.base_layer(x))


def test_dropout_is_saved_with_the_adapter(tiny_model: Base, tmp_path: Path) -> None:
    with_tasks(tiny_model("llama"), LLAMA, "one", dropout=0.25).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "one", is_trainable=True)
    assert {layer.share_dropout["default"] for layer in share_layers(model).values()} == {0.25}


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_a_dropout_that_is_not_a_probability_is_refused(dropout: float) -> None:
    with pytest.raises(ValueError, match=r"dropout is .*, expected a probability"):
        ShareConfig(dropout=dropout)
