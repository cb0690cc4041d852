"""What an adapted model computes in each phase, and which of its parameters are trained."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from share_hf.tuner import share_layers
from share_hf.tuner.placeholder import placeholder_basis

from .cases import (
    BERT,
    GPT2,
    LLAMA,
    PHI,
    Case,
    K,
    P,
    an_adapted_layer,
    assert_close,
    assert_differ,
    each_architecture,
    gradients,
    learn,
    logits,
    task_parameters,
    trainable,
    update_by_hand,
    with_tasks,
    with_updates_in_weights,
)


each_phase = pytest.mark.parametrize("phase", ["coefficients", "adapt", "init"])


@each_architecture
@pytest.mark.parametrize("phase", ["coefficients", "init"])
def test_a_new_task_changes_nothing_until_it_is_trained(
    case: Case, phase: str, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    base = tiny_model(case.architecture)
    expected = logits(base, case.batch())
    model = get_peft_model(base, case.config(phase=phase))
    assert torch.equal(logits(model, case.batch()), expected)


@each_architecture
def test_only_coefficients_are_trained_and_there_are_2kp_of_them_a_layer(
    case: Case, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model = get_peft_model(tiny_model(case.architecture), case.config())
    assert set(trainable(model)) == {
        f"base_model.model.{layer}.share_coefficients_{side}.default"
        for layer in share_layers(model)
        for side in ("out", "in")
    }
    number, _ = model.get_nb_trainable_parameters()
    assert number == len(share_layers(model)) * 2 * K * P


@each_architecture
def test_the_adapt_phase_trains_phi_times_n_plus_d_plus_2p_numbers_a_layer(
    case: Case, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model = get_peft_model(tiny_model(case.architecture), case.config(phase="adapt"))
    number, _ = model.get_nb_trainable_parameters()
    assert number == sum(
        PHI * (layer.out_features + layer.in_features + 2 * P) for layer in share_layers(model).values()
    )


def test_temporary_factors_start_as_the_leading_basis_vectors(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = get_peft_model(tiny_model("llama"), LLAMA.config(phase="adapt"))
    for layer in share_layers(model).values():
        assert torch.equal(layer.share_temporary_out["default"], layer.share_basis_out[:, :PHI])
        assert torch.equal(layer.share_temporary_in["default"], layer.share_basis_in[:, :PHI])


def test_temporary_factors_may_start_as_those_of_a_lora(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    config = LLAMA.config(phase="adapt", temporary_init="random")
    torch.manual_seed(1)
    model = get_peft_model(tiny_model("llama"), config)
    torch.manual_seed(1)
    free = get_peft_model(tiny_model("llama"), LLAMA.config(phase="init"))
    expected = share_layers(free)
    for name, layer in share_layers(model).items():
        assert torch.equal(layer.share_temporary_in["default"], expected[name].share_temporary_in["default"])
        assert not layer.share_temporary_out["default"].any()
        assert "default" not in layer.share_coefficients_out


def test_temporary_factors_may_start_as_a_lora_in_the_span_of_the_basis(
    tiny_model: Callable[[str], PreTrainedModel],
) -> None:
    model = get_peft_model(tiny_model("llama"), LLAMA.config(phase="adapt", temporary_init="span"))
    free = get_peft_model(tiny_model("llama"), LLAMA.config(phase="init"))
    fresh = torch.cat([layer.share_temporary_in["default"].norm(dim=0) for layer in share_layers(free).values()])
    for layer in share_layers(model).values():
        factor_in = layer.share_temporary_in["default"]
        assert torch.allclose(factor_in, layer.share_basis_in[:, :P] / 3**0.5)
        assert factor_in.norm(dim=0).mean().item() == pytest.approx(fresh.mean().item(), rel=0.1)
        assert not layer.share_temporary_out["default"].any()
        assert "default" not in layer.share_coefficients_out


def test_where_the_span_has_fewer_directions_than_the_rank_the_rest_is_that_of_a_lora(
    tiny_model: Callable[[str], PreTrainedModel],
) -> None:
    model = get_peft_model(tiny_model("llama"), LLAMA.config(phase="adapt", temporary_init="span"))
    layer = next(iter(share_layers(model).values()))
    layer.set_basis(layer.share_basis_out[:, :1], layer.share_basis_in[:, :1])
    layer.delete_adapter("default")
    layer.update_layer("new", LLAMA.config(phase="adapt", temporary_init="span"))
    first, *others = layer.share_temporary_in["new"].T
    assert torch.allclose(first, layer.share_basis_in[:, 0] / 3**0.5)
    assert len(others) == P - 1
    assert all(other.norm().item() == pytest.approx(3**-0.5, rel=0.5) for other in others)


def test_init_std_is_the_deviation_of_new_coefficients(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    config = LLAMA.config(phase="adapt", init_std=0.3, num_components=32, pseudo_rank=32, num_temporary=31)
    model = get_peft_model(tiny_model("llama"), config)
    for layer in share_layers(model).values():
        assert layer.share_coefficients_out["default"].std().item() == pytest.approx(0.3, rel=0.15)
        assert layer.share_coefficients_in["default"].std().item() == pytest.approx(0.3, rel=0.15)


@each_architecture
@each_phase
def test_the_forward_is_the_formula_of_the_paper_computed_densely(
    case: Case, phase: str, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    base = tiny_model(case.architecture)
    model = with_tasks(copy.deepcopy(base), case, "alone", phase=phase)
    updates = {name: update_by_hand(layer, "alone") for name, layer in share_layers(model).items()}
    dense = with_updates_in_weights(base, updates)
    assert_differ(logits(dense, case.batch()), logits(base, case.batch()))
    assert_close(logits(model, case.batch()), logits(dense, case.batch()))


@each_phase
@pytest.mark.parametrize("shape", [(64,), (0, 64), (3, 64), (2, 0, 64), (2, 5, 64)])
def test_a_layer_takes_inputs_of_any_number_of_dimensions(
    shape: tuple[int, ...], phase: str, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    layer = an_adapted_layer(with_tasks(tiny_model("llama"), LLAMA, "alone", phase=phase))
    x = torch.randn(shape)
    expected = layer.base_layer(x).double() + x.double() @ update_by_hand(layer, "alone").T
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-5)


@each_architecture
@each_phase
def test_training_lowers_the_loss_and_leaves_base_and_basis_as_they_are(
    case: Case, phase: str, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    base = tiny_model(case.architecture)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    model = get_peft_model(base, case.config(phase=phase))
    basis = {name: layer.share_basis_out.clone() for name, layer in share_layers(model).items()}
    losses = learn(model, case.batch(size=8), steps=20)
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.equal(layer.share_basis_out, basis[name]) for name, layer in share_layers(model).items())
    unloaded = dict(model.unload().named_parameters())
    assert all(torch.equal(unloaded[name], parameter) for name, parameter in before.items())


@each_architecture
@pytest.mark.parametrize(("phase", "steps_before"), [("coefficients", 1), ("adapt", 0), ("init", 1)])
def test_every_trained_tensor_has_a_gradient_after_the_first_step_at_the_latest(
    case: Case, phase: str, steps_before: int, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model = get_peft_model(tiny_model(case.architecture), case.config(phase=phase))
    learn(model, case.batch(), steps=steps_before)
    found = gradients(model, case.batch())
    assert found
    assert [name for name, gradient in found.items() if not gradient.abs().max() > 0] == []


@pytest.mark.parametrize("case", [LLAMA, BERT, GPT2], ids=lambda case: case.architecture)
def test_the_init_phase_is_a_lora(case: Case, tiny_model: Callable[[str], PreTrainedModel]) -> None:
    lora = get_peft_model(
        tiny_model(case.architecture),
        LoraConfig(r=P, lora_alpha=P, target_modules=list(case.target_modules), fan_in_fan_out=case is GPT2),
    )
    model = with_tasks(tiny_model(case.architecture), case, "default", phase="init")
    for name, layer in share_layers(model).items():
        lora_layer = lora.base_model.model.get_submodule(name)
        lora_layer.lora_A["default"].weight.data.copy_(layer.share_temporary_in["default"].T)
        lora_layer.lora_B["default"].weight.data.copy_(layer.share_temporary_out["default"])
    assert_close(logits(model, case.batch()), logits(lora, case.batch()))

    lora_gradients = gradients(lora, case.batch())
    for name, gradient in gradients(model, case.batch()).items():
        module, _, tensor = name.partition(".share_temporary_")
        letter, side = ("A", gradient.T) if tensor.startswith("in") else ("B", gradient)
        assert_close(side, lora_gradients[f"{module}.lora_{letter}.default.weight"])


def test_the_init_phase_draws_its_input_factor_as_lora_draws_a(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = get_peft_model(tiny_model("llama"), LLAMA.config(phase="init"))
    for layer in share_layers(model).values():
        largest = layer.share_temporary_in["default"].abs().max().item()
        assert 0.9 * layer.in_features**-0.5 < largest <= layer.in_features**-0.5


@each_architecture
def test_the_basis_is_stored_once_and_a_further_task_costs_its_coefficients(
    case: Case, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model = get_peft_model(tiny_model(case.architecture), case.config(), adapter_name="task_0")
    layers = share_layers(model)
    bases = {name: layer.share_basis_out.data_ptr() for name, layer in layers.items()}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.numel() for buffer in model.buffers())
    for i in range(1, 11):
        model.add_adapter(f"task_{i}", case.config())
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    rows = 1 + 11 + 1  # one of zeros, and room for another task
    assert sum(buffer.numel() for buffer in model.buffers()) <= buffers + rows * len(layers) * 2 * K * P
    assert {len(layer.share_coefficients_out) for layer in layers.values()} == {11}
    assert {name: layer.share_basis_out.data_ptr() for name, layer in layers.items()} == bases


def test_the_basis_is_not_part_of_the_state_dict(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "one", "two")
    assert not [name for name in model.state_dict() if "basis" in name]
    assert [name for name, _ in model.named_buffers() if "share_basis_out" in name]


def test_a_fresh_basis_is_orthonormal_and_depends_on_the_name_of_its_module_alone(
    tiny_model: Callable[[str], PreTrainedModel],
) -> None:
    first = get_peft_model(tiny_model("llama"), LLAMA.config())
    torch.manual_seed(1)
    second = get_peft_model(tiny_model("llama"), LLAMA.config(target_modules=["v_proj"]))
    for layer in share_layers(first).values():
        for basis in (layer.share_basis_out, layer.share_basis_in):
            torch.testing.assert_close(basis.T @ basis, torch.eye(K), rtol=0, atol=1e-6)
    for name, layer in share_layers(second).items():
        assert torch.equal(layer.share_basis_in, share_layers(first)[name].share_basis_in)
    all_bases = [layer.share_basis_in for layer in share_layers(second).values()]
    assert not torch.equal(all_bases[0], all_bases[1])


def test_a_fresh_basis_does_not_depend_on_the_default_device() -> None:
    expected = placeholder_basis("layer", 16, 4, "in")
    with torch.device("meta"):
        assert torch.equal(placeholder_basis("layer", 16, 4, "in"), expected)


@each_architecture
@pytest.mark.parametrize("phase", ["coefficients", "adapt"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(
    case: Case, phase: str, use_reentrant: bool, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model = with_tasks(tiny_model(case.architecture), case, "alone", phase=phase)
    expected = gradients(model, case.batch())

    base = tiny_model(case.architecture)
    base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed = with_tasks(base, case, "alone", phase=phase)
    calls = []
    an_adapted_layer(checkpointed).register_forward_hook(lambda *_: calls.append(1))
    found = gradients(checkpointed, case.batch())
    assert len(calls) == 2, "the layer was not computed again for the backward pass"
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert_close(gradient, expected[name], tolerance=1e-5)


def test_active_tasks_add_up(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    base = tiny_model("llama")
    model = with_tasks(copy.deepcopy(base), LLAMA, "one", "two")
    updates = {
        name: update_by_hand(layer, "one") + update_by_hand(layer, "two")
        for name, layer in share_layers(model).items()
    }
    alone = logits(model, LLAMA.batch())
    model.base_model.set_adapter(["one", "two"])
    assert_differ(logits(model, LLAMA.batch()), alone)
    assert_close(logits(model, LLAMA.batch()), logits(with_updates_in_weights(base, updates), LLAMA.batch()))


def test_coefficients_that_are_set_end_the_adapt_phase(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = get_peft_model(tiny_model("llama"), LLAMA.config(phase="adapt"), adapter_name="new")
    for layer in share_layers(model).values():
        layer.set_coefficients("new", torch.ones(K, P), torch.ones(K, P))
    assert len(task_parameters(model, "new")) == 2 * len(share_layers(model))
    assert all(parameter.requires_grad for parameter in task_parameters(model, "new").values())
    layer = an_adapted_layer(model)
    assert_close(
        layer.factors("new").dense(), layer.share_basis_out @ torch.full((K, K), float(P)) @ layer.share_basis_in.T
    )


def test_a_basis_of_another_shape_than_the_layer_is_refused(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    layer = an_adapted_layer(get_peft_model(tiny_model("llama"), LLAMA.config()))
    basis = layer.share_basis_out
    with pytest.raises(ValueError, match=r"basis_in is \(63, 8\), expected \(64, k\)"):
        layer.set_basis(torch.eye(64)[:, :K], torch.eye(63)[:, :K])
    assert layer.share_basis_out is basis


def test_factors_of_a_task_that_is_not_there_are_refused(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    layer = an_adapted_layer(with_tasks(tiny_model("llama"), LLAMA, "one"))
    with pytest.raises(ValueError, match=r"'typo' does not adapt this layer, expected one of \['one'\]"):
        layer.get_delta_weight("typo")
