"""The coefficients of a layer's frozen tasks are one tensor; PEFT, optimizers and files see one for each task."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from share_hf.tuner import share_layers
from share_hf.tuner.rows import Rows
from share_hf.tuner.stacked import StackedParameters

from .cases import (
    BERT,
    LLAMA,
    K,
    P,
    assert_differ,
    learn,
    logits,
    randomize,
    task_parameters,
    with_tasks,
)


TASKS = ("one", "two", "three")
Base = Callable[[str], PreTrainedModel]


@pytest.fixture
def model(tiny_model: Base) -> PeftModel:
    return with_tasks(tiny_model("llama"), LLAMA, *TASKS)


def values_of(model: nn.Module, task: str) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in task_parameters(model, task).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_frozen_tasks_share_a_tensor_and_the_active_one_has_parameters(model: PeftModel) -> None:
    for layer in share_layers(model).values():
        for side in (layer.share_coefficients_out, layer.share_coefficients_in):
            assert [name for name, _ in side.named_parameters()] == ["one"]
            storages = {side[task].untyped_storage().data_ptr() for task in ("two", "three")}
            assert storages == {side.stack.untyped_storage().data_ptr()}
    expected = {task: values_of(model, task) for task in TASKS}
    for task in (*TASKS, "one"):
        model.set_adapter(task)
        assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {task}
        for other in TASKS:
            assert_same(values_of(model, other), expected[other])


@pytest.mark.parametrize("inference_mode", [False, True])
def test_another_task_is_chosen_without_a_look_at_the_others(
    inference_mode: bool, tiny_model: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    def accesses(number: int) -> list[str]:
        model = with_tasks(tiny_model("llama"), LLAMA, *(f"task_{i}" for i in range(number)))
        seen: list[str] = []
        with monkeypatch.context() as patch:
            for name in ("row_of", "own", "_write", "train_also", "_settle", "__getitem__", "__contains__"):
                original = getattr(StackedParameters, name)

                def counted(side: Any, task: str, *args: Any, original: Any = original, **kwargs: Any) -> Any:
                    seen.append(task)
                    return original(side, task, *args, **kwargs)

                patch.setattr(StackedParameters, name, counted)
            model.set_adapter("task_1", inference_mode=inference_mode)
        return seen

    few, many = accesses(3), accesses(30)
    assert set(many) == {"task_0", "task_1"} - (set() if few.count("task_1") else {"task_1"})
    assert len(many) == len(few)


def test_what_an_optimizer_holds_stays_the_parameter_that_is_trained(model: PeftModel) -> None:
    parameters = task_parameters(model, "one")
    optimizer = torch.optim.SGD(parameters.values(), lr=0.5)
    model.set_adapter("two")
    assert all(task_parameters(model, "one")[name] is parameter for name, parameter in parameters.items())
    assert not any(parameter.requires_grad for parameter in parameters.values())
    model.set_adapter("one")
    before = values_of(model, "one")
    batch = LLAMA.batch()
    model(**batch).loss.backward()
    optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in values_of(model, "one").items())
    after = values_of(model, "one")
    del optimizer, parameters
    model.zero_grad()
    model.set_adapter("two")
    assert [name for name, _ in model.named_parameters() if name.endswith(".one")] == []
    assert_same(values_of(model, "one"), after)


def test_a_gradient_is_not_lost_by_a_look_at_another_task(model: PeftModel) -> None:
    model(**LLAMA.batch()).loss.backward()
    model.set_adapter("two")
    model.set_adapter("one")
    assert all(parameter.grad is not None for parameter in task_parameters(model, "one").values())


def test_states_and_copies_have_each_task(model: PeftModel, tmp_path: Path) -> None:
    expected = {task: values_of(model, task) for task in TASKS}
    state = model.state_dict()
    for task in TASKS:
        assert_same({name: state[name] for name in expected[task]}, expected[task])
        adapter = get_peft_model_state_dict(model, adapter_name=task)
        assert sum("share_coefficients" in name for name in adapter) == len(expected[task])
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for task in TASKS:
            assert_same(values_of(copied, task), expected[task])
        randomize(copied, "two", seed=9)
        assert_same(values_of(model, "two"), expected["two"])
    save_model(model.get_base_model().model.layers[0].self_attn.q_proj, str(tmp_path / "layer.safetensors"))


def test_a_state_dict_is_loaded_into_all_tasks(model: PeftModel, tiny_model: Base) -> None:
    other = with_tasks(tiny_model("llama"), LLAMA, *TASKS)
    for i, task in enumerate(TASKS):
        randomize(other, task, seed=10 + i)
    found = model.load_state_dict(other.state_dict())
    assert not found.missing_keys and not found.unexpected_keys
    for task in TASKS:
        assert_same(values_of(model, task), values_of(other, task))
    state = other.state_dict()
    a_name = next(iter(values_of(other, "two")))
    with pytest.raises(RuntimeError, match=f"size mismatch for {a_name}"):
        model.load_state_dict({**state, a_name: torch.zeros(K + 1, P)})
    del state[a_name]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**other.state_dict(), f"{a_name}x": torch.zeros(1)})


def test_a_deleted_task_leaves_nothing_to_the_next_one(model: PeftModel) -> None:
    logits(model, LLAMA.batch(size=1), adapter_names=["one"])  # which gives the trained task a row too
    rows = model.base_model.rows.count
    model.delete_adapter("two")
    model.add_adapter("four", LLAMA.config(target_modules=["q_proj"]))
    model.set_adapter("four")
    randomize(model, "four", seed=3)
    ids = LLAMA.batch(size=2)["input_ids"]
    alone = logits(model, {"input_ids": ids})
    mixed = logits(model, {"input_ids": ids}, adapter_names=["four", "four"])
    torch.testing.assert_close(mixed, alone)
    torch.testing.assert_close(logits(model, {"input_ids": ids}, adapter_names=["four", "one"])[0], alone[0])
    assert model.base_model.rows.count == rows


def test_a_cast_of_the_model_casts_the_stack_and_new_tasks_are_exact(model: PeftModel) -> None:
    model.to(torch.bfloat16)
    assert {p.dtype for task in TASKS for p in task_parameters(model, task).values()} == {torch.bfloat16}
    exact = torch.full((K, P), 1 / 3)
    for layer in share_layers(model).values():
        layer.set_coefficients("two", exact[: layer.share_basis_out.shape[1]], exact)
    assert all(torch.equal(p, exact) for p in task_parameters(model, "two").values())
    assert {p.dtype for p in task_parameters(model, "three").values()} == {torch.bfloat16}
    ids = LLAMA.batch(size=3)["input_ids"]
    found = logits(model, {"input_ids": ids}, adapter_names=["two", "three", "two"])
    model.set_adapter("two")
    assert_differ(found[:1], found[1:2])
    torch.testing.assert_close(found[:1], logits(model, {"input_ids": ids[:1]}), rtol=0.05, atol=0.05)


def test_tasks_may_be_called_what_a_stack_has_as_attributes(tiny_model: Base) -> None:
    names = ("stack", "own", "set", "move", "one")
    model = with_tasks(tiny_model("llama"), LLAMA, *names)
    expected = {name: values_of(model, name) for name in names}
    for name in names:
        model.set_adapter(name)
        learn(model, LLAMA.batch(), steps=1)
        expected[name] = values_of(model, name)
    for name in names:
        assert_same(values_of(model, name), expected[name])
    with pytest.raises(ValueError, match="adapter name '_stack' cannot be a key"):
        model.add_adapter("_stack", LLAMA.config())


def test_heads_go_with_their_tasks_as_before(tiny_model: Base, tmp_path: Path) -> None:
    model = with_tasks(tiny_model("bert"), BERT, "one", "two", task_type="SEQ_CLS")
    learn(model, BERT.batch(), steps=2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "two", adapter_name="two")
    loaded.load_adapter(tmp_path / "one", "one")
    for task in ("one", "two"):
        model.set_adapter(task)
        loaded.set_adapter(task)
        torch.testing.assert_close(logits(loaded.eval(), BERT.batch()), logits(model.eval(), BERT.batch()))


class TestRanks:
    """Rows are as wide as the largest rank; a task is as wide as its own."""

    def stack(self) -> StackedParameters:
        side = StackedParameters(Rows(), 5)
        for task, rank in (("a", 2), ("b", 4), ("c", 1)):
            side[task] = nn.Parameter(torch.full((5, rank), float(rank)), requires_grad=False)
        return side

    def test_each_is_read_as_wide_as_it_is(self) -> None:
        side = self.stack()
        assert {task: tuple(value.shape) for task, value in side.items()} == {"a": (5, 2), "b": (5, 4), "c": (5, 1)}
        assert side.stack.shape[1:] == (5, 4)
        assert all(tensor.is_contiguous() for tensor in side.state_dict().values())
        side.train_only(["a"])
        side.train_only([])
        assert side["a"].shape == (5, 2) and side["a"].eq(2).all()

    def test_a_smaller_value_leaves_no_columns_of_the_larger_one(self) -> None:
        side = self.stack()
        side["b"] = nn.Parameter(torch.ones(5, 2), requires_grad=False)
        assert side.stack.sum() == 5 * (2 * 2 + 2 * 1 + 1)

    def test_many_are_set_at_once(self) -> None:
        side, one_by_one = self.stack(), self.stack()
        values = torch.randn(3, 5, 4)
        ranks = {"c": 3, "new": 4, "b": 2}
        for place, rank in enumerate(ranks.values()):
            values[place, :, rank:] = 0
        side.train_only(["b"])
        parameter = side["b"]
        side.set_all(values, ranks, ["b"], None)
        for place, (task, rank) in enumerate(ranks.items()):
            one_by_one[task] = nn.Parameter(values[place, :, :rank].clone(), requires_grad=False)
        assert {task: value.tolist() for task, value in side.items()} == {
            task: value.tolist() for task, value in one_by_one.items()
        }
        assert side["b"].requires_grad and side["b"] is not parameter
        assert list(side.pop("new").shape) == [5, 4] and "new" not in side

    def test_another_k_keeps_the_tasks(self) -> None:
        side = self.stack()
        side.set_components(7)
        assert {task: tuple(value.shape) for task, value in side.items()} == {"a": (7, 2), "b": (7, 4), "c": (7, 1)}


def test_a_fresh_model_has_no_rows_for_what_is_trained(tiny_model: Base) -> None:
    model = get_peft_model(tiny_model("llama"), LLAMA.config(), adapter_name="one")
    assert all(layer.share_coefficients_out.stack.numel() == 0 for layer in share_layers(model).values())
