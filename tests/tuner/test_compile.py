"""torch.compile, with the whole graph if there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from share_hf import ShareConfig

from .cases import (
    BERT,
    GPT2,
    LLAMA,
    Case,
    assert_close,
    assert_differ,
    gradients,
    learn,
    logits,
    randomize,
    trainable,
    with_tasks,
)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small_network(*tasks: str, phase: str = "coefficients") -> PeftModel:
    """Two adapted layers, quick to compile."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10))
    config = dict(num_components=6, pseudo_rank=2, num_temporary=3, target_modules=["0", "2"], phase=phase)
    model = get_peft_model(base, ShareConfig(**config), adapter_name=tasks[0])
    for task in tasks[1:]:
        model.add_adapter(task, ShareConfig(**config))
    for i, task in enumerate(tasks):
        randomize(model, task, seed=i)
    return model.eval()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("phase", ["coefficients", "adapt", "init"])
def test_a_compiled_network_computes_the_same(phase: str, mode: Callable[[], Any]) -> None:
    model = small_network("one", phase=phase)
    compiled = torch.compile(model.get_base_model(), backend="eager", fullgraph=True)
    x = torch.randn(5, 12)
    with mode():
        expected = model(x)
        assert_close(compiled(x), expected, tolerance=1e-6)
        assert_close(model(x), expected, tolerance=1e-6)


@pytest.mark.parametrize("phase", ["coefficients", "adapt", "init"])
def test_a_compiled_network_has_the_same_gradients(phase: str) -> None:
    model = small_network("one", phase=phase).train()
    compiled = torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=True)
    x, found, expected = torch.randn(5, 12), {}, {}
    for gradient_of, network in ((expected, model), (found, compiled)):
        model.zero_grad()
        network(x).square().sum().backward()
        gradient_of.update({name: parameter.grad.clone() for name, parameter in trainable(model).items()})
    assert expected
    for name, gradient in expected.items():
        assert_close(found[name], gradient, tolerance=1e-5)


def test_a_compiled_network_follows_its_parameters() -> None:
    model = small_network("one")
    compiled = torch.compile(model.get_base_model(), backend="eager", fullgraph=True)
    x = torch.randn(5, 12)
    with torch.no_grad():
        before = compiled(x)
        for parameter in trainable(model).values():
            parameter.mul_(-1.3)
        assert_differ(compiled(x), before)
        assert_close(compiled(x), model(x), tolerance=1e-6)


def test_a_compiled_network_follows_set_adapter_and_goes_through_train_and_eval() -> None:
    model = small_network("one", "two")
    compiled = torch.compile(model.get_base_model(), backend="eager", fullgraph=True)
    x = torch.randn(5, 12)
    outputs = {}
    for _ in range(2):
        for task in ("one", "two"):
            for mode in (model.eval, model.train):
                model.set_adapter(task)
                mode()
                outputs[task] = model(x)
                assert_close(compiled(x), outputs[task], tolerance=1e-6)
    assert_differ(outputs["one"], outputs["two"])
    with model.disable_adapter():
        assert_close(compiled(x), model(x), tolerance=1e-6)


def test_a_compiled_network_takes_autocast() -> None:
    model = small_network("one")
    compiled = torch.compile(model.get_base_model(), backend="eager", fullgraph=True)
    x = torch.randn(5, 12)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(x)
        found = compiled(x)
    assert found.dtype == torch.bfloat16
    assert_close(found, expected, tolerance=0.02)


@pytest.mark.parametrize("names", [["one", "two", "__base__", "one"], ["two"] * 4])
def test_a_compiled_model_takes_a_mixed_batch(names: list[str]) -> None:
    model = small_network("one", "two")
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(4, 12)
    with torch.no_grad():
        assert_close(compiled(x, adapter_names=names), model(x, adapter_names=names), tolerance=1e-6)


def test_other_tasks_in_a_mixed_batch_are_not_a_reason_to_compile_again() -> None:
    model = small_network("one", "two", "three")
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(4, 12)
    batches = [["one", "two", "__base__", "one"], ["three"] * 4, ["two", "one", "three", "__base__"], ["one"] * 4]
    with torch.no_grad():
        compiled(x, adapter_names=batches[0])
        with torch.compiler.set_stance("fail_on_recompile"):
            for names in batches:
                assert_close(compiled(x, adapter_names=names), model(x, adapter_names=names), tolerance=1e-6)


@pytest.mark.parametrize(
    "case",
    [BERT, pytest.param(LLAMA, marks=pytest.mark.slow), pytest.param(GPT2, marks=pytest.mark.slow)],
    ids=lambda case: case.architecture,
)
def test_a_compiled_transformer_computes_and_trains_the_same(
    case: Case, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model = with_tasks(tiny_model(case.architecture), case, "one")
    compiled = torch.compile(with_tasks(tiny_model(case.architecture), case, "one"), backend="aot_eager")
    assert_close(logits(compiled, case.batch()), logits(model, case.batch()))
    expected, found = gradients(model, case.batch()), gradients(compiled, case.batch())
    for name, gradient in expected.items():
        assert_close(found[f"_orig_mod.{name}"], gradient)


def test_a_model_compiled_in_place_is_trained_and_saved(
    tiny_model: Callable[[str], PreTrainedModel], tmp_path: Any
) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "one")
    model.compile(backend="eager")
    losses = learn(model, LLAMA.batch(), steps=2)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "one")
    assert_close(logits(loaded, LLAMA.batch()), logits(model, LLAMA.batch()))
