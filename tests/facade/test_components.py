"""Components of a pipeline are separate models: a subspace of all of them is applied to one of them, by prefix."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from share_hf import SharedSubspace

from ..trees import assert_close, edit_json, untouched


def small_unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers", reason="diffusers, or what it needs, is not installed")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
    ).eval()


class Denoiser(nn.Module):
    """Stands in for a UNet if diffusers is not installed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)
        self.to_q = nn.Linear(8, 8)
        self.conv_out = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Any:
        hidden = self.conv_in(sample) + timestep[:, None, None, None]
        hidden = self.to_q(hidden.movedim(1, -1)).movedim(-1, 1).tanh() * encoder_hidden_states.mean()
        return (self.conv_out(hidden),)


def small_denoiser() -> nn.Module:
    torch.manual_seed(0)
    return Denoiser().eval()


def small_text_encoder() -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    return CLIPTextModel(CLIPTextConfig(vocab_size=32, projection_dim=8, **sizes)).eval()


TARGETS = ["to_q", "to_v", "conv_in", "conv1", "conv2", "q_proj", "token_embedding"]


@torch.no_grad()
def denoised(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sample, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)
    return model.eval()(sample, torch.tensor([3, 5]), encoder_hidden_states=states)[0]


@torch.no_grad()
def encoded(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=torch.arange(3, 12)[None])[0]


def with_lora(model: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = LoraConfig(r=3, lora_alpha=4, target_modules=TARGETS, init_lora_weights=False)
    return get_peft_model(copy.deepcopy(model), config)


def saved(folder: Path, components: dict[str, nn.Module]) -> Path:
    """An adapter of the components of a pipeline, with the names of its modules starting at the pipeline."""
    tensors: dict[str, Tensor] = {}
    for prefix, model in components.items():
        model.save_pretrained(folder, save_embedding_layers=False)
        for name, tensor in load_file(folder / "adapter_model.safetensors").items():
            tensors[name.replace("base_model.model.", f"base_model.model.{prefix}.")] = tensor
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    edit_json(folder / "adapter_config.json", lambda config: config.update(base_model_name_or_path="org/pipeline"))
    return folder


@pytest.mark.parametrize("make", [small_denoiser, small_unet])
def test_each_component_computes_as_with_its_lora(make: Any, tmp_path: Path) -> None:
    unet, text_encoder = make(), small_text_encoder()
    styles = {
        name: {"unet": with_lora(unet, i), "text_encoder": with_lora(text_encoder, i)} for i, name in enumerate("ab")
    }
    folders = {name: saved(tmp_path / name, components) for name, components in styles.items()}
    folders["c"] = saved(tmp_path / "c", {"unet": with_lora(unet, 2)})
    subspace = SharedSubspace.from_adapters(folders, num_components=64, pseudo_rank=8, progress=False)
    subspace.save_pretrained(tmp_path / "tree")
    for held in (subspace, SharedSubspace.from_pretrained(tmp_path / "tree")):
        applied = held.apply(copy.deepcopy(unet), prefix="unet")
        assert list(applied.peft_config) == ["a", "b", "c"]
        of_text = held.apply(copy.deepcopy(text_encoder), prefix="text_encoder")
        assert list(of_text.peft_config) == ["a", "b"]
        for name, components in styles.items():
            applied.set_adapter(name)
            assert_close(denoised(applied), denoised(components["unet"]), tolerance=1e-4)
            of_text.set_adapter(name)
            assert_close(encoded(of_text), encoded(components["text_encoder"]), tolerance=1e-4)
    assert_close(denoised(applied.merge_and_unload()), denoised(styles["b"]["unet"]), tolerance=1e-4)


@pytest.fixture
def subspace(tmp_path: Path) -> SharedSubspace:
    folders = {
        "both": saved(
            tmp_path / "both",
            {"unet": with_lora(small_denoiser(), 0), "text_encoder": with_lora(small_text_encoder(), 0)},
        ),
        "image": saved(tmp_path / "image", {"unet": with_lora(small_denoiser(), 1)}),
    }
    return SharedSubspace.from_adapters(folders, progress=False)


def test_a_component_that_is_not_there_is_refused(subspace: SharedSubspace) -> None:
    model = small_denoiser()
    with pytest.raises(ValueError, match=r"prefix is 'transformer', .*one of \['text_encoder', 'unet'\]"):
        subspace.apply(model, prefix="transformer")
    with pytest.raises(ValueError, match=r"prefix is 'une', expected"):
        subspace.apply(model, prefix="une")
    assert untouched(model, small_denoiser())


def test_a_task_that_is_asked_for_must_be_in_it(subspace: SharedSubspace) -> None:
    model = small_text_encoder()
    with pytest.raises(ValueError, match=r"task 'image' adapts nothing in 'text_encoder', expected one of \['both'\]"):
        subspace.apply(model, ["both", "image"], prefix="text_encoder")
    assert untouched(model, small_text_encoder())


def test_a_component_is_saved_and_loaded_by_peft(subspace: SharedSubspace, tmp_path: Path) -> None:
    model = subspace.apply(small_denoiser(), ["image"], prefix="unet")
    model.save_pretrained(tmp_path / "checkpoint")
    found = PeftModel.from_pretrained(small_denoiser(), tmp_path / "checkpoint" / "image")
    assert torch.equal(denoised(found), denoised(model))


def test_the_subspace_is_as_it_was(subspace: SharedSubspace) -> None:
    before = subspace.state
    subspace.apply(small_denoiser(), prefix="unet")
    assert subspace.state is before
