"""LoRAs of diffusion pipelines in the styles of their trainers: the same updates, whatever their names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from share_hf import SharedSubspace
from share_hf.format.lora import read_lora
from share_hf.subspace import LowRankUpdate
from share_hf.tuner import share_layers


RANK = 4
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
FLUX = "transformer_blocks.0.attn"
CLIP = "text_model.encoder.layers.0"

# By module: outputs and inputs.
UNET = {f"{BLOCK}.attn1.to_q": (32, 24), f"{BLOCK}.attn2.to_out.0": (24, 32), f"{BLOCK}.ff.net.0.proj": (64, 24)}
TEXT = {f"{CLIP}.self_attn.q_proj": (16, 16), f"{CLIP}.self_attn.out_proj": (16, 16), f"{CLIP}.mlp.fc1": (48, 16)}

Factors = dict[str, tuple[Tensor, Tensor]]


def factors_of(shapes: Mapping[str, tuple[int, int]], seed: int = 0, rank: int = RANK) -> Factors:
    """Return A (r, d) and B (n, r) by module."""
    generator = torch.Generator().manual_seed(seed)
    return {
        module: (torch.randn(rank, d, generator=generator), torch.randn(n, rank, generator=generator))
        for module, (n, d) in shapes.items()
    }


def in_peft_style(factors: Factors, prefix: str) -> dict[str, Tensor]:
    return named(factors, lambda module, side: f"{prefix}{module}.lora_{side}.weight")


def in_style_of_down_and_up(factors: Factors, prefix: str) -> dict[str, Tensor]:
    return named(factors, lambda module, side: f"{prefix}{module}.lora.{_down_or_up(side)}.weight")


def in_style_of_linear_layers(factors: Factors, prefix: str) -> dict[str, Tensor]:
    return named(factors, lambda module, side: f"{prefix}{module}.lora_linear_layer.{_down_or_up(side)}.weight")


def in_style_of_processors(factors: Factors, prefix: str) -> dict[str, Tensor]:
    def name(module: str, side: str) -> str:
        parent, _, last = module.removesuffix(".0").rpartition(".")
        if last.startswith("to_"):
            return f"{prefix}{parent}.processor.{last}_lora.{_down_or_up(side)}.weight"
        if parent.endswith("self_attn"):
            return f"{prefix}{parent}.to_{last.removesuffix('_proj')}_lora.{_down_or_up(side)}.weight"
        return f"{prefix}{module}.lora.{_down_or_up(side)}.weight"

    return named(factors, name)


def in_style_of_kohya(factors: Factors, prefix: str) -> dict[str, Tensor]:
    flat = {"unet.": "lora_unet_", "text_encoder.": "lora_te_"}[prefix]
    return named(factors, lambda module, side: f"{flat}{module.replace('.', '_')}.lora_{_down_or_up(side)}.weight")


def named(factors: Factors, name: Callable[[str, str], str]) -> dict[str, Tensor]:
    return {name(module, side): pair[side == "B"].clone() for module, pair in factors.items() for side in "AB"}


def _down_or_up(side: str) -> str:
    return {"A": "down", "B": "up"}[side]


STYLES = [
    in_peft_style,
    in_style_of_down_and_up,
    in_style_of_linear_layers,
    in_style_of_processors,
    in_style_of_kohya,
]


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> Path:
    header = {"format": "pt"}
    if metadata is not None:
        header["lora_adapter_metadata"] = json.dumps(metadata)
    save_file(dict(tensors), path, header)
    return path


def dense(update: LowRankUpdate) -> Tensor:
    return update.out_factor.double() @ update.in_factor.double().T


def assert_updates(path: Path, factors: Factors, scales: Mapping[str, float] | float = 1.0, **options: Any) -> None:
    """Assert that a file is read as the products of these factors and scales, computed in float64."""
    lora = read_lora(path, **options)
    assert lora.updates.keys() == factors.keys()
    for module, (a, b) in factors.items():
        scale = scales if isinstance(scales, float) else scales[module]
        torch.testing.assert_close(dense(lora.updates[module]), scale * b.double() @ a.double())
        assert lora.shapes[module] == (b.shape[0], a.shape[1])
    assert lora.target["target_modules"] == sorted(factors)


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.__name__)
@pytest.mark.parametrize(("component", "shapes"), [("unet", UNET), ("text_encoder", TEXT)])
def test_every_style_reads_as_the_same_updates(
    style: Callable[[Factors, str], dict[str, Tensor]],
    component: str,
    shapes: dict[str, tuple[int, int]],
    tmp_path: Path,
) -> None:
    factors = factors_of(shapes)
    path = write(tmp_path / "pytorch_lora_weights.safetensors", style(factors, f"{component}."))
    for location in (path, tmp_path):
        assert_updates(location, factors)
        assert read_lora(location).component == component


def test_attention_of_flux_in_the_style_of_diffusers_is_read(tmp_path: Path) -> None:
    parts = ("attn.to_q", "attn.add_k_proj", "attn.to_add_out", "attn.to_out.0", "norm1.linear", "ff_context.net.2")
    factors = factors_of({f"transformer_blocks.3.{part}": (24, 24) for part in parts})
    factors |= factors_of({"single_transformer_blocks.0.attn.to_v": (24, 24)})
    for style in (in_peft_style, in_style_of_down_and_up):
        assert_updates(write(tmp_path / "flux.safetensors", style(factors, "transformer.")), factors)


@pytest.mark.parametrize("suffix", [".bin", ".pt"])
def test_files_that_torch_saved_are_read(suffix: str, tmp_path: Path) -> None:
    factors = factors_of(UNET)
    path = tmp_path / f"style{suffix}"
    torch.save(in_style_of_processors(factors, "unet."), path)
    assert_updates(path, factors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_factors_of_every_type_are_read_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in in_peft_style(factors_of(UNET), "unet.").items()}
    rounded = {module: (a.to(dtype).double(), b.to(dtype).double()) for module, (a, b) in factors_of(UNET).items()}
    lora = read_lora(write(tmp_path / "style.safetensors", tensors))
    for module, (a, b) in rounded.items():
        torch.testing.assert_close(dense(lora.updates[module]), b @ a, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("saved_by", ["model", "pipeline"])
def test_what_diffusers_itself_writes_is_read(saved_by: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
    )
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_out.0", "ff.net.0.proj"],
        rank_pattern={"attn1.to_q": 2},
        alpha_pattern={"attn2.to_q": 3},
        init_lora_weights=False,
    )
    unet.add_adapter(config)
    if saved_by == "model":
        unet.save_lora_adapter(tmp_path)
    else:
        diffusers.StableDiffusionPipeline.save_lora_weights(
            tmp_path, unet_lora_layers=get_peft_model_state_dict(unet), unet_lora_adapter_metadata=config.to_dict()
        )
    lora = read_lora(tmp_path)
    expected = {
        name: module.get_delta_weight("default")
        for name, module in unet.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert lora.component == "unet"
    assert lora.updates.keys() == expected.keys()
    for module, delta in expected.items():
        torch.testing.assert_close(lora.updates[module].dense().float(), delta, rtol=1e-5, atol=1e-6)


# ---- Scales ---------------------------------------------------------------------------------------------------------


@given(
    alphas=st.lists(st.floats(0.0078125, 512, width=32) | st.none(), min_size=3, max_size=3),
    ranks=st.lists(st.integers(1, 12), min_size=3, max_size=3),
)
def test_alphas_of_kohya_over_ranks_are_the_scales(
    alphas: list[float | None], ranks: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    factors: Factors = {}
    for (module, shape), rank in zip(UNET.items(), ranks, strict=True):
        factors |= factors_of({module: shape}, rank=rank)
    tensors = in_style_of_kohya(factors, "unet.")
    scales = {}
    for module, alpha, rank in zip(UNET, alphas, ranks, strict=True):
        scales[module] = 1.0 if alpha is None else alpha / rank
        if alpha is not None:
            tensors[f"lora_unet_{module.replace('.', '_')}.alpha"] = torch.tensor(alpha)
    path = write(tmp_path_factory.mktemp("alphas") / "style.safetensors", tensors)
    assert_updates(path, factors, scales)


def test_the_configuration_in_the_header_says_the_scales(tmp_path: Path) -> None:
    factors = factors_of(UNET) | {}
    module = f"{BLOCK}.ff.net.0.proj"
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 6,
        "use_rslora": True,
        "alpha_pattern": {module: 3},
        "target_modules": sorted(UNET),
        "base_model_name_or_path": None,
    }
    tensors = in_peft_style(factors, "unet.") | in_peft_style(factors_of(TEXT, seed=1), "text_encoder.")
    header = {f"unet.{name}": value for name, value in config.items()}
    header |= {"text_encoder.lora_alpha": 2 * RANK, "text_encoder.target_modules": sorted(TEXT)}
    path = write(tmp_path / "style.safetensors", tensors, header)
    scales = {name: (3 if name == module else 6) / RANK**0.5 for name in UNET}
    assert_updates(path, factors, scales, component="unet")
    assert_updates(path, factors_of(TEXT, seed=1), 2.0, component="text_encoder")


def test_a_model_that_saved_its_own_lora_names_no_component(tmp_path: Path) -> None:
    factors = factors_of(UNET)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK / 2, "target_modules": sorted(UNET)}
    path = write(tmp_path / "style.safetensors", in_peft_style(factors, ""), config)
    assert_updates(path, factors, 0.5)
    assert_updates(path, factors, 0.5, component="unet")
    assert read_lora(path).component == "unet"


def test_layers_that_flux_joins_are_divided(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    width, alpha = 16, 2.0
    shapes = {
        "double_blocks_0_img_attn_qkv": (3 * width, width),
        "single_blocks_1_linear1": (7 * width, width),
        "single_blocks_1_linear2": (width, 5 * width),
    }
    tensors, expected = {}, {}
    for flat, (n, d) in shapes.items():
        a, b = torch.randn(RANK, d, generator=generator), torch.randn(n, RANK, generator=generator)
        tensors |= {f"lora_unet_{flat}.lora_down.weight": a, f"lora_unet_{flat}.lora_up.weight": b}
        tensors[f"lora_unet_{flat}.alpha"] = torch.tensor(alpha)
        expected[flat] = alpha / RANK * b.double() @ a.double()
    clip = f"lora_te1_{CLIP.replace('.', '_')}_mlp_fc1"
    tensors |= {f"{clip}.lora_down.weight": torch.ones(2, 3), f"{clip}.lora_up.weight": torch.ones(3, 2)}
    t5 = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    tensors |= {f"{t5}.lora_down.weight": torch.ones(2, 3), f"{t5}.lora_up.weight": torch.ones(3, 2)}
    path = write(tmp_path / "flux.safetensors", tensors)
    lora = read_lora(path, component="transformer")
    q, k, v = (f"transformer_blocks.0.attn.to_{side}" for side in "qkv")
    single = "single_transformer_blocks.1"
    joined = {
        "double_blocks_0_img_attn_qkv": (q, k, v),
        "single_blocks_1_linear1": (
            *(f"{single}.attn.to_{side}" for side in "qkv"),
            f"{single}.proj_mlp",
        ),
        "single_blocks_1_linear2": (f"{single}.proj_out",),
    }
    assert lora.updates.keys() == {module for modules in joined.values() for module in modules}
    for flat, modules in joined.items():
        found = torch.cat([dense(lora.updates[module]) for module in modules])
        torch.testing.assert_close(found, expected[flat])
    assert dense(lora.updates[q]).shape == (width, width)
    assert list(read_lora(path, component="text_encoder_2").updates) == ["encoder.block.0.layer.0.SelfAttention.q"]


# ---- Components -----------------------------------------------------------------------------------------------------


@pytest.fixture
def of_two(tmp_path: Path) -> Path:
    """A file with LoRAs of a U-Net and of a text encoder."""
    tensors = in_style_of_kohya(factors_of(UNET), "unet.") | in_style_of_kohya(factors_of(TEXT), "text_encoder.")
    return write(tmp_path / "two.safetensors", tensors)


def test_a_file_of_several_components_needs_the_name_of_one(of_two: Path) -> None:
    counts = r"text_encoder \(6 tensors\), unet \(6 tensors\)"
    with pytest.raises(ValueError, match=rf"several components, {counts}.*expected component="):
        read_lora(of_two)
    with pytest.raises(ValueError, match=rf"no weights of component 'vae', it has {counts}"):
        read_lora(of_two, component="vae")
    assert_updates(of_two, factors_of(UNET), component="unet")
    assert_updates(of_two, factors_of(TEXT), component="text_encoder")


def test_what_is_wrong_with_another_component_does_not_matter(tmp_path: Path) -> None:
    tensors = in_style_of_kohya(factors_of(UNET), "unet.")
    tensors["lora_te_unknown.lora_down.weight"] = torch.ones(2, 2)
    path = write(tmp_path / "style.safetensors", tensors)
    assert_updates(path, factors_of(UNET), component="unet")
    with pytest.raises(ValueError, match="'unknown' of text_encoder is ambiguous"):
        read_lora(path, component="text_encoder")


def test_each_component_becomes_a_subspace_of_its_own(of_two: Path, tmp_path: Path) -> None:
    subspace = SharedSubspace.from_adapters({"a": of_two}, component="unet", progress=False)
    assert subspace.state.layers.keys() == UNET.keys()
    subspace.save_pretrained(tmp_path / "tree")
    loaded = SharedSubspace.from_pretrained(tmp_path / "tree")
    loaded.export_lora("a", tmp_path / "lora")
    exported = read_lora(tmp_path / "lora")
    for module, (a, b) in factors_of(UNET).items():
        torch.testing.assert_close(dense(exported.updates[module]), b.double() @ a.double(), rtol=1e-3, atol=1e-4)
    before = loaded.state
    with pytest.raises(ValueError, match="is of component 'text_encoder', the others are of 'unet'"):
        loaded.add_adapters({"b": of_two}, component="text_encoder", progress=False)
    assert loaded.state is before


def test_adapters_of_different_components_are_not_mixed(tmp_path: Path) -> None:
    unet = write(tmp_path / "unet.safetensors", in_peft_style(factors_of(UNET), "unet."))
    text = write(tmp_path / "text.safetensors", in_peft_style(factors_of(TEXT), "text_encoder."))
    with pytest.raises(ValueError, match="adapter 'text' is of component 'text_encoder', the others are of 'unet'"):
        SharedSubspace.from_adapters([unet, text], progress=False)


def test_styles_can_be_mixed_in_a_subspace(tmp_path: Path) -> None:
    factors = {style.__name__: factors_of(UNET, seed=seed) for seed, style in enumerate(STYLES)}
    adapters = {
        style.__name__: write(tmp_path / f"{style.__name__}.safetensors", style(factors[style.__name__], "unet."))
        for style in STYLES
    }
    subspace = SharedSubspace.from_adapters(adapters, num_components=32, pseudo_rank=RANK, progress=False)
    for task, own in factors.items():
        for module, (a, b) in own.items():
            found = dense(subspace.state.layers[module].update_of(task))
            torch.testing.assert_close(found, b.double() @ a.double(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model_class", [CLIPTextModel, CLIPTextModelWithProjection])
@pytest.mark.parametrize("beginning", ["text_model.", ""])
def test_names_of_text_encoders_before_and_since_transformers_5_fit_both(
    model_class: type, beginning: str, tmp_path: Path
) -> None:
    factors = factors_of(TEXT)
    tensors = {
        name.replace("text_model.", beginning): tensor
        for name, tensor in in_peft_style(factors, "text_encoder.").items()
    }
    subspace = SharedSubspace.from_adapters(
        {"a": write(tmp_path / "style.safetensors", tensors)}, pseudo_rank=RANK, progress=False
    )
    assert subspace.state.layers.keys() == TEXT.keys()
    config = CLIPTextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=16,
    )
    model = subspace.apply(model_class(config))
    layers = {name.removeprefix("text_model."): layer for name, layer in share_layers(model).items()}
    assert layers.keys() == {name.removeprefix("text_model.") for name in TEXT}


# ---- What is refused ------------------------------------------------------------------------------------------------

_FLAT = f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_q"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {f"{_FLAT}.hada_w1_a": torch.ones(2)},
            "hada_w1_a', which is of LoHa, expected only the factors of a plain",
        ),
        ({f"{_FLAT}.lokr_w1": torch.ones(2)}, "which is of LoKr"),
        ({f"{_FLAT}.dora_scale": torch.ones(2)}, "which is of DoRA"),
        ({f"{_FLAT}.lora_mid.weight": torch.ones(2)}, "which is of a Tucker decomposition"),
        ({f"{_FLAT}.diff_b": torch.ones(2)}, "which is of whole differences of weights"),
        ({"bundle_emb.word.string_to_param.*": torch.ones(2)}, "which is of a textual inversion"),
        ({"unet.x.lora_B.bias": torch.ones(2)}, "which is of a trained bias"),
        ({"something": torch.ones(2)}, "'something', which is unexpected"),
        ({"lora_unet_what_is_this.lora_down.weight": torch.ones(2, 2)}, "'what_is_this' of unet is ambiguous"),
        ({"diffusion_model.x.lora_A.weight": torch.ones(2, 2)}, "as the model's authors name it, .*save_lora_weights"),
        ({f"unet.{BLOCK}.attn1.to_q.lora_A.weight": torch.ones(2, 2)}, "is a second tensor for"),
        ({f"{_FLAT}.lora_A.weight": torch.ones(2, 2)}, "is a second tensor for"),
        ({f"{_FLAT}.lora_down.weight": torch.ones(2)}, r"lora_down.weight' is \(2,\), expected a matrix"),
        ({f"{_FLAT}.alpha": torch.ones(2)}, r"alpha of '.*attn1.to_q' is \(2,\), expected one number"),
        ({f"{_FLAT}.alpha": torch.tensor(float("nan"))}, "has NaN or infinite entries"),
        (
            {"lora_unet_conv_in.alpha": torch.tensor(1.0)},
            "'conv_in' has only an alpha, expected the factors of a LoRA with it",
        ),
        ({"lora_unet_conv_in.lora_up.weight": torch.ones(2, 2)}, "'conv_in' has no lora_A"),
        ({"lora_unet_conv_in.lora_down.weight": torch.ones(2, 2)}, "'conv_in' has no lora_B"),
        (
            {
                "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 8),
                "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(23, 2),
            },
            "'double_blocks_0_img_attn_qkv' has 23 rows, expected 3 layers of 8",
        ),
    ],
)
def test_what_is_not_a_plain_lora_of_a_known_model_is_refused_by_name(
    change: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    tensors = in_style_of_kohya(factors_of(UNET), "unet.") | change
    with pytest.raises(ValueError, match=f"style.safetensors: .*{message}"):
        read_lora(write(tmp_path / "style.safetensors", tensors))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"unet.lora_alpha": 4, "unet.use_dora": True}, "use_dora is True, expected a plain LoRA"),
        ({"unet.lora_alpha": 4, "unet.peft_type": "LOKR"}, "peft_type is 'LOKR', expected 'LORA'"),
        ({"unet.lora_alpha": "4"}, "lora_alpha is '4', expected a number"),
        ({"unet.r": 4}, "lora_alpha is None, expected a number"),
        ({"unet.lora_alpha": 4, "unet.target_modules": [3]}, r"target_modules is \[3\]"),
        ([], "lora_adapter_metadata in its header: holds a list, expected a JSON object"),
    ],
)
def test_a_header_that_says_otherwise_is_refused(header: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "style.safetensors", in_peft_style(factors_of(UNET), "unet."), header)
    with pytest.raises(ValueError, match=message):
        read_lora(path)


_PREFIXES = ("unet.", "text_encoder.", "transformer.", "", "lora_unet_", "lora_te_", "lora_te3_", "diffusion_model.")
_MODULES = (
    f"{BLOCK}.attn1.to_q",
    f"{CLIP}.mlp.fc1",
    f"{CLIP}.self_attn",
    "double_blocks_0_img_attn_qkv",
    "single_blocks_0_linear1",
    "conv_in",
    "x",
    "",
)
_LEAVES = (
    *("lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", "lora.down.weight", "lora.up.weight"),
    *("to_q_lora.down.weight", "to_q_lora.up.weight", "alpha", "lora_A.default.weight", "weight", "lora_mid.weight"),
)


@st.composite
def files_of_tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    tensors = {}
    for _ in range(draw(st.integers(0, 6))):
        prefix, module = draw(st.sampled_from(_PREFIXES)), draw(st.sampled_from(_MODULES))
        if prefix.startswith("lora_"):
            module = module.replace(".", "_")
        leaves = draw(st.sampled_from([_LEAVES[:2], _LEAVES[2:4], _LEAVES[4:6], (draw(st.sampled_from(_LEAVES)),)]))
        rank, n, d = (draw(st.sampled_from([0, 1, 2, 8, 24])) for _ in range(3))
        usual = draw(st.booleans())
        for leaf, shape in zip(leaves, [(rank, d), (n, rank)], strict=False):
            shape = shape if usual else tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
            dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]))
            tensors[f"{prefix}{module}.{leaf}"] = torch.ones(shape).to(dtype)
    return tensors


@settings(max_examples=200, deadline=None)
@given(tensors=files_of_tensors(), component=st.sampled_from([None, "unet", "text_encoder_2"]))
def test_any_tensors_are_a_lora_or_refused_by_name(
    tensors: dict[str, Tensor], component: str | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(tmp_path_factory.mktemp("any") / "style.safetensors", tensors)
    try:
        lora = read_lora(path, component=component)
    except ValueError as error:
        assert str(path) in str(error)
        assert "expected" in str(error) or "it has" in str(error)
        return
    for module, update in lora.updates.items():
        n, d = lora.shapes[module]
        assert update.out_factor.shape[0] == n
        assert update.in_factor.shape[0] == d


def test_scales_that_are_given_twice_are_refused(tmp_path: Path) -> None:
    tensors = in_style_of_kohya(factors_of(UNET), "unet.") | {f"{_FLAT}.alpha": torch.tensor(1.0)}
    path = write(tmp_path / "style.safetensors", tensors, {"unet.lora_alpha": 4})
    with pytest.raises(ValueError, match="has alphas and lora_adapter_metadata, expected only one of the two"):
        read_lora(path)


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_a_file_of_peft_without_its_configuration_is_refused(prefix: str, tmp_path: Path) -> None:
    factors = factors_of({"model.layers.0.self_attn.q_proj": (8, 8)})
    path = write(tmp_path / "alone.safetensors", in_peft_style(factors, prefix))
    with pytest.raises(ValueError, match=r"scale, expected PEFT's adapter_config\.json beside it"):
        read_lora(path)
