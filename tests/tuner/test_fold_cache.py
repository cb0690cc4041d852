"""In eval mode, a layer keeps the factors that it folded for as long as they are right, and no longer."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from share_hf.tuner import ShareLayer, share_layers
from share_hf.tuner.layer import FOLDED_TASKS

from .cases import (
    LLAMA,
    K,
    P,
    an_adapted_layer,
    assert_close,
    assert_differ,
    learn,
    logits,
    task_parameters,
    update_by_hand,
    with_tasks,
    with_updates_in_weights,
)


@contextmanager
def counting_folds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Record the tasks whose factors were formed, once for each layer."""
    folded: list[str] = []
    original = ShareLayer.factors

    def factors(layer: ShareLayer, task: str) -> Any:
        folded.append(task)
        return original(layer, task)

    with monkeypatch.context() as patch:
        patch.setattr(ShareLayer, "factors", factors)
        yield folded


@pytest.fixture
def model(tiny_model: Callable[[str], PreTrainedModel]) -> PeftModel:
    return with_tasks(tiny_model("llama"), LLAMA, "one", "two")


def expected_logits(model: PeftModel, base: PreTrainedModel) -> Tensor:
    """Return the logits from dense weights, with nothing cached."""
    updates = {name: update_by_hand(layer, model.active_adapter) for name, layer in share_layers(model).items()}
    return logits(with_updates_in_weights(base, updates), LLAMA.batch())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_factors_are_formed_once_while_nothing_changes(
    mode: Callable[[], Any], model: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = LLAMA.batch()["input_ids"]
    with counting_folds(monkeypatch) as folded, mode():
        first = model(input_ids=ids).logits
        assert len(folded) == len(share_layers(model))
        for length in (7, 3, 1):
            assert_close(model(input_ids=ids[:, :length]).logits, first[:, :length])
        assert len(folded) == len(share_layers(model))


def test_factors_of_several_tasks_are_kept_side_by_side(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with counting_folds(monkeypatch) as folded:
        for task in ("one", "two", "one", "two"):
            model.set_adapter(task)
            logits(model, LLAMA.batch())
        assert sorted(set(folded)) == ["one", "two"]
        assert len(folded) == 2 * len(share_layers(model))


def test_nothing_is_kept_where_gradients_are_wanted(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    logits(model, LLAMA.batch())
    with counting_folds(monkeypatch) as folded:
        for _ in range(2):
            model(**LLAMA.batch()).loss.backward()
        assert len(folded) == 2 * len(share_layers(model))
    assert all(parameter.grad.abs().max() > 0 for parameter in task_parameters(model, "one").values())


def test_nothing_is_kept_in_train_mode(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model.train()
    with counting_folds(monkeypatch) as folded:
        for _ in range(2):
            logits(model, LLAMA.batch())
        assert len(folded) == 2 * len(share_layers(model))


def change_in_place(model: PeftModel) -> None:
    with torch.no_grad():
        for parameter in task_parameters(model, "one").values():
            parameter.mul_(-0.7)


def change_by_an_optimizer(model: PeftModel) -> None:
    learn(model, LLAMA.batch(), steps=2)


def change_by_an_optimizer_in_eval_mode(model: PeftModel) -> None:
    optimizer = torch.optim.AdamW(task_parameters(model, "one").values(), lr=0.05)
    model(**LLAMA.batch()).loss.backward()
    optimizer.step()


def change_by_a_fused_optimizer_in_eval_mode(model: PeftModel) -> None:
    optimizer = torch.optim.AdamW(task_parameters(model, "one").values(), lr=0.05, fused=True)
    model(**LLAMA.batch()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def write_behind_autograd(model: PeftModel) -> None:
    for parameter in task_parameters(model, "one").values():
        parameter.data.mul_(-0.7)


def write_behind_autograd_to_frozen_parameters(model: PeftModel) -> None:
    model.requires_grad_(False)
    write_behind_autograd(model)


def swap_in_an_average(model: PeftModel) -> None:
    for parameter in task_parameters(model, "one").values():
        average = torch.randn(parameter.shape) * 0.3
        parameter.data, average = average.data, parameter.data


def set_storage(model: PeftModel) -> None:
    with torch.no_grad():
        for parameter in task_parameters(model, "one").values():
            parameter.set_(torch.randn(parameter.shape) * 0.3)


def share_memory_with_numpy(model: PeftModel) -> None:
    for parameter in task_parameters(model, "one").values():
        parameter.detach().numpy()[:] *= -0.7


def change_in_inference_mode(model: PeftModel) -> None:
    with torch.inference_mode():
        for parameter in task_parameters(model, "one").values():
            parameter.mul_(-0.7)


def change_the_basis_in_place(model: PeftModel) -> None:
    for layer in share_layers(model).values():
        layer.share_basis_out.mul_(-1)


def assign_another_basis(model: PeftModel) -> None:
    for layer in share_layers(model).values():
        layer.share_basis_in = layer.share_basis_in.flip(1)


def replace_parameters(model: PeftModel) -> None:
    for layer in share_layers(model).values():
        for _ in range(3):  # the second may be given the first one's address
            layer.share_coefficients_out["one"] = nn.Parameter(torch.randn(K, P))


def replace_data(model: PeftModel) -> None:
    for parameter in task_parameters(model, "one").values():
        for _ in range(3):
            parameter.data = torch.randn(parameter.shape) * 0.3


def scaled_coefficients(model: PeftModel, factor: float) -> dict[str, Tensor]:
    """Return a model's coefficients times a factor, and the fingerprints of their bases unchanged."""
    return {
        name: factor * tensor if ".share_coefficients_" in name else tensor
        for name, tensor in model.state_dict().items()
        if ".share_" in name
    }


def load_a_state_dict(model: PeftModel) -> None:
    model.load_state_dict(scaled_coefficients(model, 0.5), strict=False)


def load_a_state_dict_by_assignment(model: PeftModel) -> None:
    model.load_state_dict(scaled_coefficients(model, -0.5), strict=False, assign=True)


def set_another_basis(model: PeftModel) -> None:
    for layer in share_layers(model).values():
        layer.set_basis(layer.share_basis_out.flip(1), layer.share_basis_in)


def set_coefficients(model: PeftModel) -> None:
    for layer in share_layers(model).values():
        layer.set_coefficients("one", torch.randn(K, P) * 0.3, torch.randn(K, P) * 0.3)


def write_behind_autograd_and_go_through_train_mode(model: PeftModel) -> None:
    model.train()
    for parameter in task_parameters(model, "one").values():
        parameter.data.mul_(-0.7)
    model.eval()


def write_behind_autograd_and_call_eval(model: PeftModel) -> None:
    for parameter in task_parameters(model, "one").values():
        parameter.data.mul_(-0.7)
    model.eval()


def delete_and_add_again(model: PeftModel) -> None:
    model.set_adapter("two")
    model.delete_adapter("one")
    model.add_adapter("one", LLAMA.config(phase="adapt"))
    model.set_adapter("one")


def cast_there_and_back(model: PeftModel) -> None:
    change_in_place(model)
    for layer in share_layers(model).values():
        for name in ("share_coefficients_out", "share_coefficients_in"):
            getattr(layer, name).to(torch.bfloat16).to(torch.float32)


CHANGES = [
    change_in_place,
    change_by_an_optimizer,
    change_by_an_optimizer_in_eval_mode,
    change_by_a_fused_optimizer_in_eval_mode,
    write_behind_autograd,
    write_behind_autograd_to_frozen_parameters,
    swap_in_an_average,
    set_storage,
    share_memory_with_numpy,
    change_in_inference_mode,
    change_the_basis_in_place,
    assign_another_basis,
    replace_parameters,
    replace_data,
    load_a_state_dict,
    load_a_state_dict_by_assignment,
    set_another_basis,
    set_coefficients,
    write_behind_autograd_and_go_through_train_mode,
    write_behind_autograd_and_call_eval,
    delete_and_add_again,
    cast_there_and_back,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_kept_is_dropped_when_it_would_be_wrong(
    change: Callable[[PeftModel], None],
    mode: Callable[[], Any],
    model: PeftModel,
    tiny_model: Callable[[str], PreTrainedModel],
) -> None:
    base, ids = tiny_model("llama"), LLAMA.batch()["input_ids"]
    with mode():
        before = model(input_ids=ids).logits
    change(model)
    with mode():
        found = model(input_ids=ids).logits
    if change is not delete_and_add_again:
        assert_differ(found, before)
    assert_close(found, expected_logits(model, base))


def test_another_input_type_is_folded_again(model: PeftModel) -> None:
    layer = an_adapted_layer(model)
    layer.base_layer = layer.base_layer.to(torch.bfloat16)
    x = torch.randn(3, 64)
    with torch.no_grad():
        bfloat16 = layer(x.bfloat16())
        layer.base_layer = layer.base_layer.float()
        float32 = layer(x)
    assert (bfloat16.dtype, float32.dtype) == (torch.bfloat16, torch.float32)
    weight = layer.get_base_weight().double() + update_by_hand(layer, "one")
    assert_close(float32, x.double() @ weight.T, tolerance=1e-5)


def test_a_copy_keeps_no_tie_to_what_it_was_copied_from(model: PeftModel) -> None:
    expected = logits(model, LLAMA.batch())
    copied = copy.deepcopy(model)
    change_in_place(copied)
    assert_differ(logits(copied, LLAMA.batch()), expected)
    assert torch.equal(logits(model, LLAMA.batch()), expected)
    change_in_place(model)
    assert torch.equal(logits(model, LLAMA.batch()), logits(copied, LLAMA.batch()))


def test_what_is_kept_of_parameters_made_in_inference_mode_is_never_stale(
    model: PeftModel, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    with torch.inference_mode():
        model.load_state_dict(scaled_coefficients(model, 0.5), strict=False, assign=True)
        logits(model, LLAMA.batch())
        for parameter in task_parameters(model, "one").values():
            assert parameter.is_inference()
            parameter.mul_(-1.5)
        found = logits(model, LLAMA.batch())
        assert_close(found, expected_logits(model, tiny_model("llama")))


def test_a_deleted_task_keeps_no_memory(model: PeftModel) -> None:
    logits(model, LLAMA.batch())
    layer = an_adapted_layer(model)
    kept = weakref.ref(layer._folded["one"].factors[0])
    model.set_adapter("two")
    model.delete_adapter("one")
    gc.collect()
    assert kept() is None


def test_a_layer_keeps_the_folded_factors_of_a_few_tasks_only(
    tiny_model: Callable[[str], PreTrainedModel],
) -> None:
    tasks = [f"task{i}" for i in range(FOLDED_TASKS + 3)]
    model = with_tasks(tiny_model("llama"), LLAMA, *tasks).eval()
    expected = {}
    with torch.no_grad():
        for task in (*tasks, *reversed(tasks), tasks[0]):
            model.set_adapter(task)
            found = logits(model, LLAMA.batch())
            assert torch.equal(expected.setdefault(task, found), found)
    for layer in share_layers(model).values():
        assert len(layer._folded) == FOLDED_TASKS
        assert list(layer._folded)[-1] == tasks[0]  # the last one that was used stays longest
        assert tasks[FOLDED_TASKS] not in layer._folded  # pushed out by the last one, which was not there any more
