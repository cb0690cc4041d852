"""Tasks on quantized base models, on the CPU: bitsandbytes, and the quantizers below that are installed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, QuantoConfig, TorchAoConfig

from share_hf.tuner import share_layers

from .cases import (
    LLAMA,
    P,
    assert_differ,
    gradients,
    learn,
    logits,
    task_parameters,
    trainable,
    update_by_hand,
    with_random_bases,
    with_tasks,
)


@dataclass(frozen=True)
class Quantization:
    """A way to quantize, what it makes of a layer, and how close that is to the dequantized weight (relative).

    Attributes:
        library: Library that it needs.
        options: Options of the library.
        kind: Classes of a layer and of its weight.
        error: Relative error of the forward pass.
        refuses_merges_as: If merges are refused, the name of what refuses them.
    """

    library: str
    options: dict[str, Any]
    kind: tuple[str, str]
    error: float
    refuses_merges_as: str | None = None

    def load(self, folder: Path) -> PreTrainedModel:
        """Load the model in the folder with quantized layers."""
        if self.library == "gptqmodel":
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
            for name, module in list(model.model.named_modules()):
                if isinstance(module, nn.Linear):
                    model.model.set_submodule(name, _packed_by_gptqmodel(module, self.kind[0]))
            return model.eval()
        if self.library == "hqq":  # transformers 5 does not load HQQ
            from hqq.core.quantize import BaseQuantizeConfig
            from hqq.models.hf.base import AutoHQQHFModel

            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            config = BaseQuantizeConfig(**self.options)
            AutoHQQHFModel.quantize_model(model, config, compute_dtype=torch.float32, device="cpu")
            return model.eval()
        if self.library == "torchao":
            import torchao.quantization

            config = TorchAoConfig(getattr(torchao.quantization, self.options["scheme"])())
        else:
            config = {"bitsandbytes": BitsAndBytesConfig, "optimum.quanto": QuantoConfig}[self.library](**self.options)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()


def _packed_by_gptqmodel(linear: nn.Linear, class_name: str) -> nn.Module:
    """Return the layer in 4 bits, rounded to nearest in groups of 32: a calibration would need a real model."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    layer = {"TorchLinear": TorchLinear, "AwqTorchLinear": AwqTorchLinear}[class_name](
        bits=4,
        group_size=32,
        sym=True,
        desc_act=False,
        in_features=linear.in_features,
        out_features=linear.out_features,
        bias=False,
    )
    scales = linear.weight.detach().float().unflatten(1, (-1, 32)).abs().amax(2) / 7
    groups = [torch.arange(linear.in_features, dtype=torch.int32) // 32] if class_name == "TorchLinear" else []
    layer.pack(linear, scales, torch.full_like(scales, 8), *groups)
    layer.optimized = True  # otherwise it is compiled
    layer.post_init()
    return layer


QUANTIZATIONS = {
    "nf4": Quantization(
        "bitsandbytes",
        dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
        ("Linear4bit", "Params4bit"),
        0.02,
    ),
    "fp4-nested-bfloat16": Quantization(
        "bitsandbytes",
        dict(load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16),
        ("Linear4bit", "Params4bit"),
        0.05,
    ),
    "int8": Quantization("bitsandbytes", dict(load_in_8bit=True), ("Linear8bitLt", "Int8Params"), 0.1),
    "torchao-int8": Quantization("torchao", dict(scheme="Int8WeightOnlyConfig"), ("Linear", "Int8Tensor"), 0.01),
    "torchao-float8": Quantization("torchao", dict(scheme="Float8WeightOnlyConfig"), ("Linear", "Float8Tensor"), 0.01),
    "hqq": Quantization("hqq", dict(nbits=4, group_size=32), ("HQQLinear", "NoneType"), 0.01),
    "gptq": Quantization("gptqmodel", {}, ("TorchLinear", "_LinearWeightMetadata"), 0.05, "gptq"),
    "awq": Quantization("gptqmodel", {}, ("AwqTorchLinear", "NoneType"), 0.05, "gptq"),  # PEFT calls both gptq
    "quanto-int8": Quantization(
        "optimum.quanto", dict(weights="int8"), ("QLinear", "WeightQBytesTensor"), 0.01, "QLinear"
    ),
}


def is_installed(library: str) -> bool:
    try:
        return find_spec(library) is not None
    except ModuleNotFoundError:  # not even the package that it is part of
        return False


def parameter(name: str) -> Any:
    """Return a quantization as a parameter of tests, which are skipped if its library is not installed."""
    library = QUANTIZATIONS[name].library
    is_missing = pytest.mark.skipif(not is_installed(library), reason=f"{library} is not installed")
    return pytest.param(QUANTIZATIONS[name], id=name, marks=is_missing)


def _parametrized(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("quantization", [parameter(name) for name in names])


each_quantization = _parametrized(*QUANTIZATIONS)
each_merged = _parametrized(*(name for name, each in QUANTIZATIONS.items() if each.refuses_merges_as is None))
each_unmerged = _parametrized(*(name for name, each in QUANTIZATIONS.items() if each.refuses_merges_as is not None))
four_bit = _parametrized("nf4", "fp4-nested-bfloat16")


@pytest.fixture
def load(tiny_model_folder: Callable[[str], Path]) -> Callable[[Quantization], PreTrainedModel]:
    def load(quantization: Quantization) -> PreTrainedModel:
        model = quantization.load(tiny_model_folder("llama"))
        assert kind_of(model.model.layers[0].self_attn.o_proj) == quantization.kind
        return model

    return load


def kind_of(layer: nn.Module) -> tuple[str, str]:
    return type(layer).__name__, type(getattr(layer, "weight", None)).__name__


def dequantized_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights that a quantized model represents, by the name of their module in the base model."""
    weights = {}
    for name, module in model.named_modules():
        if name.endswith("lm_head"):
            continue
        match kind_of(module):
            case ("Linear4bit", _):
                from bitsandbytes.functional import dequantize_4bit

                weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            case ("Linear8bitLt", _):
                from bitsandbytes.functional import int8_vectorwise_dequant

                scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
                weight = int8_vectorwise_dequant(module.weight.data, scales)
            case ("HQQLinear", _):
                weight = module.dequantize()
            case ("TorchLinear" | "AwqTorchLinear", _):
                weight = module(torch.eye(module.in_features, dtype=torch.bfloat16)).T
            case (_, "Int8Tensor" | "Float8Tensor" | "WeightQBytesTensor"):
                weight = module.weight.dequantize()
            case _:
                continue
        weights[name.removesuffix(".base_layer")] = weight.detach().float().clone()
    return weights


def assert_near(found: Tensor, expected: Tensor, error: float) -> None:
    """Assert closeness in norm; an unrelated tensor would be off by 1 and more."""
    assert (found - expected).norm() <= error * expected.norm()


@each_quantization
@pytest.mark.parametrize("phase", ["coefficients", "adapt", "init"])
@pytest.mark.parametrize("evaluated", ["never", "before-it-was-adapted", "since-it-was-adapted"])
def test_output_and_gradients_are_those_of_the_dequantized_model_even_after_an_evaluation(
    quantization: Quantization,
    phase: str,
    evaluated: str,
    load: Callable[[Quantization], PreTrainedModel],
    tiny_model: Callable[[str], PreTrainedModel],
) -> None:
    base, plain = load(quantization), tiny_model("llama")
    loaded = dequantized_weights(base)
    if evaluated == "before-it-was-adapted":
        logits(base, LLAMA.batch())
    model = with_tasks(base, LLAMA, "one", phase=phase)
    for name, weight in dequantized_weights(base).items():
        assert_near(weight, loaded[name], 0.005)  # bitsandbytes may have rounded the scales
        plain.get_submodule(name).weight.data = weight
    reference = with_tasks(plain, LLAMA, "one", phase=phase)
    if evaluated == "since-it-was-adapted":
        logits(model, LLAMA.batch())
    expected = gradients(reference, LLAMA.batch())
    found = gradients(model, LLAMA.batch())
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert_near(gradient, expected[name], 3 * quantization.error)
    assert_near(logits(model.eval(), LLAMA.batch()), logits(reference.eval(), LLAMA.batch()), quantization.error)


@each_quantization
def test_evaluations_before_and_after_training_agree_with_what_was_trained(
    quantization: Quantization, load: Callable[[Quantization], PreTrainedModel]
) -> None:
    model = get_peft_model(load(quantization), LLAMA.config(), adapter_name="one").eval()
    first = logits(model, LLAMA.batch())
    before = dequantized_weights(model)
    losses = learn(model, LLAMA.batch(), steps=8)
    assert losses[-1] < losses[0]
    second = logits(model, LLAMA.batch())
    assert_differ(second, first)
    model.train()
    assert_near(logits(model, LLAMA.batch()), second, quantization.error)  # int8 rounds differently in train mode
    with model.eval().disable_adapter():
        assert torch.equal(logits(model, LLAMA.batch()), first)
    for name, weight in dequantized_weights(model).items():
        assert torch.equal(weight, before[name])


@each_quantization
def test_what_is_trained_and_the_basis_are_float32(
    quantization: Quantization, load: Callable[[Quantization], PreTrainedModel]
) -> None:
    model = get_peft_model(load(quantization), LLAMA.config(phase="adapt"), adapter_name="one")
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    assert set(trainable(model)) == set(task_parameters(model, "one"))
    assert {layer.share_basis_out.dtype for layer in share_layers(model).values()} == {torch.float32}
    assert all(layer.quantization_backend is not None for layer in share_layers(model).values())


@each_merged
@pytest.mark.parametrize("safe_merge", [False, True])
def test_a_merge_requantizes_the_sum_of_weight_and_update(
    quantization: Quantization, safe_merge: bool, load: Callable[[Quantization], PreTrainedModel]
) -> None:
    model = with_tasks(load(quantization), LLAMA, "one", "two")
    logits(model, LLAMA.batch())
    sums = {
        name: layer.get_base_weight().double() + update_by_hand(layer, "one") + update_by_hand(layer, "two")
        for name, layer in share_layers(model).items()
    }
    merged = model.merge_and_unload(safe_merge=safe_merge, adapter_names=["one", "two"])
    assert not share_layers(merged)
    kept = with_tasks(merged, LLAMA, "probe")
    for name, layer in share_layers(kept).items():
        assert kind_of(layer.base_layer) == quantization.kind
        assert_near(layer.get_base_weight().double(), sums[name], 0.15)
    assert torch.isfinite(logits(kept, LLAMA.batch())).all()


@each_merged
def test_unmerging_comes_back_up_to_quantization(
    quantization: Quantization, load: Callable[[Quantization], PreTrainedModel]
) -> None:
    model = with_tasks(load(quantization), LLAMA, "one")
    before = {name: layer.get_base_weight().clone() for name, layer in share_layers(model).items()}
    model.merge_adapter()
    model.unmerge_adapter()
    for name, layer in share_layers(model).items():
        assert_near(layer.get_base_weight(), before[name], 0.25)


@each_merged
@pytest.mark.parametrize("keep_base", [True, "cpu"])
@pytest.mark.parametrize("evaluated", [False, True])
def test_a_copy_restores_the_very_same_packed_weights(
    quantization: Quantization,
    keep_base: bool | str,
    evaluated: bool,
    load: Callable[[Quantization], PreTrainedModel],
) -> None:
    model = with_tasks(load(quantization), LLAMA, "one", "two")
    if evaluated:
        logits(model, LLAMA.batch())
    before = packed_weights(model)
    dense = {name: layer.get_base_weight().clone() for name, layer in share_layers(model).items()}
    model.merge_adapter(["one"], keep_base=keep_base)
    expected = logits(model, LLAMA.batch())
    with pytest.warns(UserWarning, match="additionally merging two"):
        model.merge_adapter(["two"])
    assert any(not torch.equal(tensor, before[name]) for name, tensor in packed_weights(model).items())
    copied = copy.deepcopy(model)
    for each in (model, copied):
        each.unmerge_adapter()
        assert_same_tensors(packed_weights(each), before)
        for name, layer in share_layers(each).items():
            assert torch.equal(layer.get_base_weight(), dense[name])
            assert kind_of(layer.base_layer) == quantization.kind
    model.merge_adapter(["one"], keep_base=keep_base)
    assert torch.equal(logits(model, LLAMA.batch()), expected)
    with model.disable_adapter():
        logits(model, LLAMA.batch())
    assert_same_tensors(packed_weights(model), before)


def packed_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return what the layers' weights are packed in, with their scales, by name."""
    packed = {}
    for module_name, layer in share_layers(model).items():
        module = layer.get_base_layer()
        match kind_of(module):
            case ("Linear8bitLt", _):
                scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
                tensors = {"weight": module.weight.data, "scales": scales}
            case (_, "Int8Tensor" | "Float8Tensor"):
                tensors = {"weight": module.weight.qdata, "scales": module.weight.scale}
            case _:
                tensors = module.state_dict()
        of_layer = {f"{module_name}.{name}": t for name, t in tensors.items() if isinstance(t, Tensor)}
        packed |= {name: tensor.detach().clone() for name, tensor in of_layer.items()}
    return packed


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@each_merged
def test_a_safe_merge_of_a_broken_task_leaves_the_quantized_weights(
    quantization: Quantization, load: Callable[[Quantization], PreTrainedModel]
) -> None:
    model = with_tasks(load(quantization), LLAMA, "one")
    before = {name: layer.get_base_weight().clone() for name, layer in share_layers(model).items()}
    next(iter(task_parameters(model, "one").values())).data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="The adapter one seems to be broken"):
        model.merge_adapter(safe_merge=True)
    for name, layer in share_layers(model).items():
        assert torch.equal(layer.get_base_weight(), before[name])


@each_unmerged
def test_layers_that_cannot_be_merged_into_are_refused_by_name_before_any_is(
    quantization: Quantization,
    load: Callable[[Quantization], PreTrainedModel],
    tiny_model: Callable[[str], PreTrainedModel],
) -> None:
    base = load(quantization)
    base.model.layers[0] = tiny_model("llama").model.layers[0].to(base.dtype)
    model = with_tasks(base, LLAMA, "one")
    before = logits(model, LLAMA.batch())
    message = rf"'model.layers.1.self_attn.q_proj' cannot be merged into: .* {quantization.refuses_merges_as} layers"
    with pytest.raises(TypeError, match=message):
        model.merge_adapter()
    with pytest.raises(TypeError, match=message):
        model.merge_and_unload()
    assert torch.equal(logits(model, LLAMA.batch()), before)
    with model.disable_adapter():
        assert_differ(logits(model, LLAMA.batch()), before)


@each_quantization
def test_unloading_gives_the_quantized_model_back(
    quantization: Quantization, load: Callable[[Quantization], PreTrainedModel]
) -> None:
    base = load(quantization)
    before = logits(base, LLAMA.batch())
    unloaded = with_tasks(base, LLAMA, "one").unload()
    assert kind_of(unloaded.model.layers[0].self_attn.q_proj) == quantization.kind
    assert_near(logits(unloaded, LLAMA.batch()), before, quantization.error)


@each_quantization
def test_a_task_is_saved_and_loaded_on_a_quantized_base(
    quantization: Quantization, load: Callable[[Quantization], PreTrainedModel], tmp_path: Path
) -> None:
    model = with_random_bases(with_tasks(load(quantization), LLAMA, "one"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(quantization), tmp_path / "one")
    assert torch.equal(logits(loaded, LLAMA.batch()), logits(model, LLAMA.batch()))


@each_quantization
def test_a_mixed_batch_on_a_quantized_base_gives_each_sample_its_task(
    quantization: Quantization, load: Callable[[Quantization], PreTrainedModel]
) -> None:
    model = with_tasks(load(quantization), LLAMA, "one", "two")
    names = ["two", "__base__", "one", "two"]
    found = logits(model, LLAMA.batch(), adapter_names=names)
    for i, name in enumerate(names):
        alone = {"input_ids": LLAMA.batch()["input_ids"][i : i + 1]}
        if name == "__base__":
            with model.disable_adapter():
                expected = logits(model, alone)
        else:
            model.set_adapter(name)
            expected = logits(model, alone)
        assert_near(found[i : i + 1], expected, quantization.error)


@each_quantization
def test_a_model_prepared_for_k_bit_training_trains_with_checkpointing(
    quantization: Quantization, load: Callable[[Quantization], PreTrainedModel]
) -> None:
    base = prepare_model_for_kbit_training(load(quantization), gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(base, LLAMA.config(phase="adapt"))
    losses = learn(model, LLAMA.batch(), steps=8)
    assert losses[-1] < losses[0]


@four_bit
def test_no_4bit_layer_of_the_model_repacks_its_weight_in_an_evaluation(
    quantization: Quantization, load: Callable[[Quantization], PreTrainedModel]
) -> None:
    base = load(quantization)
    weights = {
        name: module.weight.data.clone()
        for name, module in base.named_modules()
        if kind_of(module) == quantization.kind
    }
    model = get_peft_model(base, LLAMA.config(target_modules=["q_proj"], pseudo_rank=P)).eval()
    logits(model, LLAMA.batch())
    found = copy.deepcopy(model).unload()
    for name, weight in weights.items():
        assert torch.equal(found.get_submodule(name).weight.data, weight)
