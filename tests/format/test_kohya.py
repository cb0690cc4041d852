"""Names that kohya's trainer flattens are read only if there is exactly one way to read them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from share_hf.format.kohya import TEXT_ENCODER, TRANSFORMER, UNET, Vocabulary, dotted_names, is_of_flux


VOCABULARIES = {"unet": UNET, "transformer": TRANSFORMER, "text_encoder": TEXT_ENCODER}

# A small SDXL: its three levels, with and without attention, and its conditions beside the text.
SDXL = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "attention_head_dim": (2, 4, 4),
    "cross_attention_dim": 32,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
    "use_linear_projection": True,
}


def names_of(vocabulary: Vocabulary) -> st.SearchStrategy[str]:
    numbered = st.builds("{}.{}".format, st.sampled_from(sorted(vocabulary.lists)), st.integers(0, 70))
    parts = st.lists(st.sampled_from(sorted(vocabulary.parts)) | numbered, min_size=1, max_size=12)
    return parts.map(".".join)


@pytest.mark.parametrize("component", VOCABULARIES)
@given(data=st.data())
def test_no_two_names_of_known_parts_flatten_to_one(component: str, data: st.DataObject) -> None:
    name = data.draw(names_of(VOCABULARIES[component]))
    assert dotted_names(name.replace(".", "_"), component) == (name,)


@pytest.mark.parametrize(
    ("component", "flat", "names"),
    [
        ("unet", "down_blocks_0_attentions_1_proj_in", "down_blocks.0.attentions.1.proj_in"),
        (
            "unet",
            "mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0",
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
        ),
        ("unet", "input_blocks_0_0", "conv_in"),
        ("unet", "out_2", "conv_out"),
        ("unet", "label_emb_0_2", "add_embedding.linear_2"),
        ("unet", "input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("unet", "input_blocks_4_0_emb_layers_1", "down_blocks.1.resnets.0.time_emb_proj"),
        (
            "unet",
            "input_blocks_8_1_transformer_blocks_9_ff_net_0_proj",
            "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj",
        ),
        ("unet", "middle_block_2_out_layers_3", "mid_block.resnets.1.conv2"),
        ("unet", "middle_block_1_proj_out", "mid_block.attentions.0.proj_out"),
        ("unet", "output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        ("unet", "output_blocks_2_1_conv", "up_blocks.0.upsamplers.0.conv"),
        ("unet", "output_blocks_5_0_skip_connection", "up_blocks.1.resnets.2.conv_shortcut"),
        (
            "unet",
            "output_blocks_3_1_transformer_blocks_1_attn1_to_k",
            "up_blocks.1.attentions.0.transformer_blocks.1.attn1.to_k",
        ),
        (
            "transformer",
            "double_blocks_7_txt_attn_qkv",
            "transformer_blocks.7.attn.add_q_proj transformer_blocks.7.attn.add_k_proj "
            "transformer_blocks.7.attn.add_v_proj",
        ),
        ("transformer", "double_blocks_0_img_mod_lin", "transformer_blocks.0.norm1.linear"),
        ("transformer", "single_blocks_37_linear2", "single_transformer_blocks.37.proj_out"),
        ("transformer", "single_blocks_0_modulation_lin", "single_transformer_blocks.0.norm.linear"),
        ("text_encoder", "text_model_encoder_layers_11_mlp_fc1", "text_model.encoder.layers.11.mlp.fc1"),
        (
            "text_encoder_2",
            "text_model_encoder_layers_0_self_attn_out_proj",
            "text_model.encoder.layers.0.self_attn.out_proj",
        ),
        (
            "text_encoder_3",
            "encoder_block_3_layer_1_DenseReluDense_wi_0",
            "encoder.block.3.layer.1.DenseReluDense.wi_0",
        ),
    ],
)
def test_names_are_read_as_models_have_them(component: str, flat: str, names: str) -> None:
    assert dotted_names(flat, component) == tuple(names.split())


@pytest.mark.parametrize(
    ("component", "flat"),
    [
        ("unet", "down_blocks_0_somewhere_else"),
        ("unet", "down_blocks_attentions_0"),
        ("unet", "input_blocks_3_0_unknown"),
        ("unet", "input_blocks_1_1_transformer_blocks_0_unknown"),
        ("unet", "text_model_encoder_layers_0_mlp_fc1"),
        ("unet", ""),
        ("unet", "_"),
        ("transformer", "double_blocks_0_img_attn_norm"),
        ("transformer", "joint_blocks_0_x_block_attn_qkv"),
        ("text_encoder", "model_layers_0_mlp_gate_proj"),
    ],
)
def test_a_name_of_unknown_parts_is_none(component: str, flat: str) -> None:
    assert dotted_names(flat, component) == ()


def test_a_very_long_name_takes_no_time() -> None:
    start = time.perf_counter()
    for part in ("ff_", "conv_", "down_blocks_0_", "to_"):
        assert dotted_names(part * 10**5 + "ff", "unet") == ()
    assert time.perf_counter() - start < 2


def test_blocks_of_flux_are_known_by_their_names() -> None:
    assert is_of_flux("single_blocks_0_linear1")
    assert not is_of_flux("down_blocks_0_resnets_0_conv1")


def linear_and_convolutional(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            yield name


def models() -> dict[str, tuple[str, nn.Module]]:
    with torch.device("meta"):
        clip = CLIPTextModelWithProjection(CLIPTextConfig(num_hidden_layers=2))
        t5 = T5EncoderModel(T5Config(num_layers=2, d_model=64, d_ff=96, feed_forward_proj="gated-gelu"))
    return {"clip": ("text_encoder_2", clip), "t5": ("text_encoder_3", t5)}


def models_of_diffusers() -> dict[str, tuple[str, nn.Module]]:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        sd = diffusers.UNet2DConditionModel(block_out_channels=(32, 64, 64, 64), attention_head_dim=8)
        sdxl = diffusers.UNet2DConditionModel(**SDXL)
        flux = diffusers.FluxTransformer2DModel(
            num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, guidance_embeds=True
        )
        sd3 = diffusers.SD3Transformer2DModel(num_layers=2, attention_head_dim=16, num_attention_heads=2)
    return {
        "sd": ("unet", sd),
        "sdxl": ("unet", sdxl),
        "flux": ("transformer", flux),
        "sd3": ("transformer", sd3),
    }


@pytest.mark.parametrize("library", [models, models_of_diffusers], ids=["transformers", "diffusers"])
def test_every_module_of_the_models_is_read_back(library: object) -> None:
    for component, model in library().values():  # type: ignore[operator]
        names = list(linear_and_convolutional(model))
        assert len(names) > 10
        assert [dotted_names(name.replace(".", "_"), component) for name in names] == [(name,) for name in names]


def names_by_stability_ai(levels: int, attention: set[int], depth: dict[int, int]) -> Iterator[str]:
    """Flattened names of the modules of an SDXL with two layers per level, as its authors build it."""
    yield from ("input_blocks_0_0", "out_2", "time_embed_0", "time_embed_2", "label_emb_0_0", "label_emb_0_2")
    for level in range(levels):
        for layer in range(2):
            yield from block(f"input_blocks_{1 + 3 * level + layer}", level in attention, depth.get(level, 0))
        if level < levels - 1:
            yield f"input_blocks_{3 * level + 3}_0_op"
    yield from resnet("middle_block_0")
    yield from transformer("middle_block_1", depth[levels - 1])
    yield from resnet("middle_block_2")
    for place in range(levels):
        level = levels - 1 - place
        for layer in range(3):
            name = f"output_blocks_{3 * place + layer}"
            yield from block(name, level in attention, depth.get(level, 0))
            if layer == 2 and level:
                yield f"{name}_{1 + (level in attention)}_conv"


def block(name: str, attention: bool, depth: int) -> Iterator[str]:
    yield from resnet(f"{name}_0")
    if attention:
        yield from transformer(f"{name}_1", depth)


def resnet(name: str) -> Iterator[str]:
    yield from (f"{name}_{part}" for part in ("in_layers_2", "emb_layers_1", "out_layers_3", "skip_connection"))


def transformer(name: str, depth: int) -> Iterator[str]:
    yield from (f"{name}_proj_in", f"{name}_proj_out")
    for i in range(depth):
        for attention in ("attn1", "attn2"):
            for part in ("to_q", "to_k", "to_v", "to_out_0"):
                yield f"{name}_transformer_blocks_{i}_{attention}_{part}"
        yield from (f"{name}_transformer_blocks_{i}_ff_net_{part}" for part in ("0_proj", "2"))


def test_names_by_stability_ai_are_those_of_diffusers_all_of_them() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        expected = set(linear_and_convolutional(diffusers.UNet2DConditionModel(**SDXL)))
    found = [dotted_names(flat, "unet") for flat in names_by_stability_ai(3, {1, 2}, {1: 2, 2: 3})]
    names = [name for (name,) in found]
    assert len(set(names)) == len(names)
    assert expected <= set(names)
    # Only some of the ResNets change the number of channels, by a convolution that all of them may have.
    assert all(name.endswith("conv_shortcut") for name in set(names) - expected)
