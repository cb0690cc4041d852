"""Layers that only look like dense ones, and quantized layers that PEFT does not know."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrize
from transformers import BitNetQuantConfig, PreTrainedModel
from transformers.integrations.bitnet import AutoBitLinear, BitLinear
from transformers.integrations.compressed_tensors import CompressedTensorsFP8Linear
from transformers.integrations.finegrained_fp8 import FP8Linear
from transformers.integrations.gemma_quant import QuantizedLinear

from share_hf.tuner import share_layers

from .cases import LLAMA, assert_close, assert_differ, gradients, learn, logits, snapshot, with_tasks


SCALE = 0.01


def bitnet(linear: nn.Linear) -> AutoBitLinear:
    """Weights of the checkpoint times a scale."""
    layer = AutoBitLinear(linear.in_features, linear.out_features, bias=False)
    layer.weight.data = linear.weight.data / SCALE
    layer.weight_scale.fill_(SCALE)
    return layer


def gemma_8bit(linear: nn.Linear) -> QuantizedLinear:
    layer = QuantizedLinear(linear.in_features, linear.out_features, num_bits=8)
    layer.weight_scale.data.fill_(SCALE)
    layer.weight.data = (linear.weight.data / SCALE).round().clamp(-128, 127).to(torch.int8)
    return layer


def float8_blocks(linear: nn.Linear) -> FP8Linear:
    return FP8Linear(linear.in_features, linear.out_features, block_size=(32, 32))


def float8_rows(linear: nn.Linear) -> CompressedTensorsFP8Linear:
    layer = CompressedTensorsFP8Linear(linear.in_features, linear.out_features)
    layer.weight.data = (linear.weight.data / SCALE).to(layer.weight.dtype)
    layer.weight_scale.data.fill_(SCALE)
    return layer


def with_values(model: PreTrainedModel, replace: Callable[[nn.Linear], nn.Module]) -> PreTrainedModel:
    """Return the model with other layers as value projections; `q_proj`, which is merged first, stays dense."""
    for layer in model.model.layers:
        layer.self_attn.v_proj = replace(layer.self_attn.v_proj)
    return model.requires_grad_(False)


@pytest.mark.parametrize("replace", [bitnet, gemma_8bit])
def test_layers_with_a_weight_that_is_not_theirs_as_it_stands_are_adapted_as_any(
    replace: Callable[[nn.Linear], nn.Module], tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    base = with_values(tiny_model("llama"), replace)
    before = logits(base, LLAMA.batch())
    model = get_peft_model(base, LLAMA.config(phase="adapt"), adapter_name="one").eval()
    losses = learn(model, LLAMA.batch())
    assert losses[-1] < losses[0]
    assert all(gradient.any() for gradient in gradients(model, LLAMA.batch()).values())
    model.eval()
    assert_differ(logits(model, LLAMA.batch()), before)
    assert torch.equal(logits(model.unload(), LLAMA.batch()), before)


@pytest.mark.parametrize("replace", [bitnet, gemma_8bit, float8_blocks, float8_rows])
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_merge_into_layers_with_a_weight_that_is_not_theirs_is_refused_before_any_layer_is_merged(
    replace: Callable[[nn.Linear], nn.Module], merge: str, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model = with_tasks(with_values(tiny_model("llama"), replace), LLAMA, "one")
    dense = [layer for name, layer in share_layers(model).items() if not name.endswith("v_proj")]
    before = [layer.get_base_weight().clone() for layer in dense]
    found = type(share_layers(model)["model.layers.0.self_attn.v_proj"].base_layer).__name__
    with pytest.raises(
        TypeError, match=rf"'model.layers.0.self_attn.v_proj' cannot be merged into: .* {found} layers"
    ):
        getattr(model, merge)()
    assert not any(layer.merged for layer in share_layers(model).values())
    assert all(torch.equal(layer.get_base_weight(), weight) for layer, weight in zip(dense, before, strict=True))


class Router(nn.Linear):
    """A dense layer with a forward of its own, as some models have it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).to(x.dtype)


def test_a_subclass_of_linear_that_computes_with_its_weight_is_merged_into(
    tiny_model: Callable[[str], PreTrainedModel],
) -> None:
    def router(linear: nn.Linear) -> Router:
        layer = Router(linear.in_features, linear.out_features, bias=False)
        layer.weight = linear.weight
        return layer

    model = with_tasks(with_values(tiny_model("llama"), router), LLAMA, "one")
    expected = logits(model, LLAMA.batch())
    assert_close(logits(model.merge_and_unload(), LLAMA.batch()), expected)


def test_a_layer_whose_weight_is_computed_is_not_merged_into(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    base = with_values(tiny_model("llama"), nn.utils.parametrizations.weight_norm)
    model = with_tasks(base, LLAMA, "one")
    assert parametrize.is_parametrized(share_layers(model)["model.layers.0.self_attn.v_proj"].base_layer)
    with pytest.raises(TypeError, match="ParametrizedLinear layers"):
        model.merge_and_unload()


def test_a_quantized_layer_that_peft_does_not_know_is_refused_by_name_and_the_model_stays(
    tiny_model: Callable[[str], PreTrainedModel],
) -> None:
    base = with_values(tiny_model("llama"), lambda linear: BitLinear(linear.in_features, linear.out_features, False))
    base.config.quantization_config = BitNetQuantConfig()
    before = snapshot(base)
    with pytest.raises(
        TypeError,
        match=r"'model.layers.0.self_attn.v_proj' is a BitLinear of the quantizer 'bitnet', expected torch.nn.Linear",
    ):
        get_peft_model(base, LLAMA.config())
    assert snapshot(base) == before


def test_a_layer_whose_weight_is_still_compressed_is_refused_by_name(
    tiny_model: Callable[[str], PreTrainedModel],
) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config
    from compressed_tensors.quantization.quant_args import QuantizationArgs

    base = tiny_model("llama")
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=4, strategy="channel"))
    config = QuantizationConfig(config_groups={"all": scheme}, format="pack-quantized")
    apply_quantization_config(base, config)
    ModelCompressor(quantization_config=config).compress_model(base)
    with pytest.raises(TypeError, match=r"'model.layers.0.self_attn.q_proj' is a Linear without a weight"):
        get_peft_model(base, LLAMA.config())


def test_training_through_a_layer_that_passes_no_gradient_is_refused_and_inference_is_not(
    tiny_model: Callable[[str], PreTrainedModel],
) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    base = tiny_model("llama")
    torchao.quantize_(base.model, torchao.Int8DynamicActivationInt8WeightConfig())
    model = with_tasks(base, LLAMA, "one")
    assert torch.isfinite(model(**LLAMA.batch()).loss)
    with pytest.raises(RuntimeError, match=r"no gradient flows through Linear\(.*Int8Tensor"):
        gradients(model, LLAMA.batch())
    with pytest.raises(TypeError, match=r"torchao \(quantized without a TorchAoConfig\) layers"):
        model.merge_and_unload()


def test_a_merge_into_a_layer_of_hqq_keeps_its_bias(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    hqq = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")

    def quantized(linear: nn.Linear) -> nn.Module:
        linear.bias = nn.Parameter(torch.randn(linear.out_features))
        config = hqq.BaseQuantizeConfig(nbits=8, group_size=32)
        return hqq.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")

    model = with_tasks(with_values(tiny_model("llama"), quantized), LLAMA, "one")
    expected = logits(model, LLAMA.batch())
    assert_close(logits(model.merge_and_unload(), LLAMA.batch()), expected, 0.05)
