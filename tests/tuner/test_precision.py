"""What is float32 and what is not: half-precision base models, autocast, and casts that the tuner does not see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from share_hf.tuner import share_layers

from .cases import (
    LLAMA,
    Case,
    an_adapted_layer,
    assert_close,
    each_architecture,
    gradients,
    learn,
    logits,
    task_parameters,
    trainable,
    update_by_hand,
    with_random_bases,
    with_tasks,
)


half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@each_architecture
@half
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_on_a_half_precision_base_the_basis_is_float32_and_what_is_trained_as_peft_is_told(
    case: Case, dtype: torch.dtype, autocast_adapter_dtype: bool, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    base = tiny_model(case.architecture).to(dtype)
    model = get_peft_model(base, case.config(phase="adapt"), autocast_adapter_dtype=autocast_adapter_dtype)
    trained = torch.float32 if autocast_adapter_dtype else dtype
    assert {parameter.dtype for parameter in trainable(model).values()} == {trained}
    for layer in share_layers(model).values():
        assert layer.share_basis_out.dtype == layer.share_basis_in.dtype == torch.float32
        assert layer.get_base_weight().dtype == dtype


@each_architecture
@pytest.mark.parametrize("phase", ["coefficients", "adapt", "init"])
def test_on_a_bfloat16_base_output_is_bfloat16_and_gradients_float32(
    case: Case, phase: str, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    reference = with_tasks(tiny_model(case.architecture), case, "one", phase=phase)
    model = with_tasks(tiny_model(case.architecture).to(torch.bfloat16), case, "one", phase=phase)
    found = logits(model, case.batch())
    assert found.dtype == torch.bfloat16
    assert_close(found, logits(reference, case.batch()), tolerance=0.05)
    found_gradients = gradients(model, case.batch())
    assert {gradient.dtype for gradient in found_gradients.values()} == {torch.float32}
    for name, gradient in gradients(reference, case.batch()).items():
        assert (found_gradients[name] - gradient).norm() < 0.3 * gradient.norm(), name


@each_architecture
def test_autocast_computes_in_bfloat16_and_trains_in_float32(
    case: Case, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model = with_tasks(tiny_model(case.architecture), case, "one")
    expected, expected_gradients = logits(model, case.batch()), gradients(model, case.batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.eval()
        found = logits(model, case.batch())
        found_gradients = gradients(model, case.batch())
    assert found.dtype == torch.bfloat16
    assert_close(found, expected, tolerance=0.05)
    for name, gradient in expected_gradients.items():
        assert found_gradients[name].dtype == torch.float32
        assert (found_gradients[name] - gradient).norm() < 0.3 * gradient.norm(), name


def test_factors_are_float32_under_autocast_too(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    layer = an_adapted_layer(with_tasks(tiny_model("llama"), LLAMA, "one"))
    expected = layer.factors("one")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer.factors("one")
    assert torch.equal(found.out_factor, expected.out_factor)
    assert torch.equal(found.in_factor, expected.in_factor)


def test_an_evaluation_under_autocast_leaves_no_rounded_factors_behind(
    tiny_model: Callable[[str], PreTrainedModel],
) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "one")
    expected = logits(model, LLAMA.batch())
    model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits(model, LLAMA.batch())
    assert torch.equal(logits(model, LLAMA.batch()), expected)


@half
def test_casting_the_model_does_not_round_the_basis(
    dtype: torch.dtype, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    model = with_random_bases(with_tasks(tiny_model("llama"), LLAMA, "one"))
    bases = {name: layer.share_basis_out.clone() for name, layer in share_layers(model).items()}
    model.to(dtype)
    for name, layer in share_layers(model).items():
        assert torch.equal(layer.share_basis_out, bases[name])
    assert logits(model, LLAMA.batch()).dtype == dtype
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama").to(dtype), tmp_path / "one")
    assert_close(logits(loaded, LLAMA.batch()), logits(model, LLAMA.batch()), tolerance=0.02)


@pytest.mark.parametrize("phase", ["coefficients", "adapt", "init"])
def test_trained_parameters_that_a_trainer_cast_to_bfloat16_still_train(
    phase: str, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "one", phase=phase)
    expected = logits(model, LLAMA.batch())
    for parameter in task_parameters(model, "one").values():
        parameter.data = parameter.data.to(torch.bfloat16)
    assert_close(logits(model, LLAMA.batch()), expected, tolerance=0.02)
    losses = learn(model, LLAMA.batch(), steps=5)
    assert losses[-1] < losses[0]
    if phase == "coefficients":
        mixed = logits(model, LLAMA.batch(), adapter_names=["one"] * 4)
        assert_close(mixed, logits(model, LLAMA.batch()))


@half
def test_a_merge_into_a_half_precision_weight_rounds_the_sum_once(
    dtype: torch.dtype, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model = with_tasks(tiny_model("llama").to(dtype), LLAMA, "one")
    layer = an_adapted_layer(model)
    exact = layer.get_base_weight().double() + update_by_hand(layer, "one")
    layer.merge()
    error = (layer.get_base_weight().double() - exact).abs()
    assert layer.get_base_weight().dtype == dtype
    assert (error <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-7).all()
