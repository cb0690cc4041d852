"""Tasks as adapters of a model on the device: switching, mixed batches, merged weights, torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel

from share_hf.tuner import share_layers
from tests.tuner.cases import (
    LLAMA,
    assert_close,
    assert_differ,
    gradients,
    learn,
    logits,
    on_device_of,
    update_by_hand,
    with_random_bases,
    with_tasks,
    with_updates_in_weights,
)
from tests.tuner.test_compile import _fresh_compiler, small_network  # noqa: F401


MakeModel = Callable[[str], PreTrainedModel]

TASKS = ("one", "two")


@pytest.mark.parametrize("phase", ["coefficients", "adapt", "init"])
def test_outputs_and_gradients_are_those_of_the_cpu(
    phase: str, model_on_device: MakeModel, tiny_model: MakeModel
) -> None:
    """On the CPU, the comparison is of float32 with float64."""
    model = with_tasks(model_on_device("llama"), LLAMA, "one", phase=phase)
    reference = with_tasks(tiny_model("llama").double(), LLAMA, "one", phase=phase)
    assert_close(logits(model, LLAMA.batch()).cpu(), logits(reference, LLAMA.batch()))
    found, expected = gradients(model, LLAMA.batch()), gradients(reference, LLAMA.batch())
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert_close(gradient.cpu(), expected[name])


def test_switching_gives_each_task_its_output_and_none_the_base_models(model_on_device: MakeModel) -> None:
    base = model_on_device("llama")
    expected = {"base": logits(base, LLAMA.batch())}
    model = with_tasks(base, LLAMA, *TASKS)
    for task in TASKS:
        updates = {name: update_by_hand(layer, task) for name, layer in share_layers(model).items()}
        plain = with_updates_in_weights(model_on_device("llama"), updates)
        expected[task] = logits(plain, LLAMA.batch())
        assert_differ(expected[task], expected["base"])
    for task in (*TASKS, *TASKS):  # the second time, the factors come from the cache
        model.set_adapter(task)
        assert_close(logits(model, LLAMA.batch()), expected[task])
    with model.disable_adapter():
        assert_close(logits(model, LLAMA.batch()), expected["base"])


def test_each_sample_of_a_mixed_batch_has_its_task(model_on_device: MakeModel) -> None:
    model = with_tasks(model_on_device("llama"), LLAMA, *TASKS)
    names = ["two", "__base__", "one", "two"]
    mixed = logits(model, LLAMA.batch(), adapter_names=names)
    with model.disable_adapter():
        of = {"__base__": logits(model, LLAMA.batch())}
    for task in TASKS:
        model.set_adapter(task)
        of[task] = logits(model, LLAMA.batch())
    assert_differ(of["one"], of["two"])
    for i, name in enumerate(names):
        assert_close(mixed[i], of[name][i])


def test_a_mixed_batch_is_generated_as_each_task_generates_alone(model_on_device: MakeModel) -> None:
    model = with_tasks(model_on_device("llama"), LLAMA, *TASKS)
    ids = on_device_of(model, LLAMA.batch(size=2))["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    mixed = model.generate(input_ids=ids, adapter_names=list(TASKS), **options)
    alone = []
    for task in TASKS:
        model.set_adapter(task)
        alone.append(model.generate(input_ids=ids, **options))
    assert not torch.equal(*alone)
    for i in range(2):
        assert torch.equal(mixed[i], alone[i][i])


def test_merged_and_unloaded_weights_compute_what_the_adapters_did(model_on_device: MakeModel) -> None:
    base = model_on_device("llama")
    plain = logits(base, LLAMA.batch())
    model = with_tasks(base, LLAMA, *TASKS)
    model.base_model.set_adapter(list(TASKS))
    expected = logits(model, LLAMA.batch())
    assert_differ(expected, plain)
    merged = model.merge_and_unload()
    assert not share_layers(merged)
    assert_close(logits(merged, LLAMA.batch()), expected)


@pytest.mark.parametrize("keep_base", [True, "cpu"])
def test_a_copy_of_the_weights_restores_them_to_the_bit(keep_base: bool | str, model_on_device: MakeModel) -> None:
    model = with_tasks(model_on_device("llama"), LLAMA, *TASKS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.merge_adapter(["one"], keep_base=keep_base)
    model.merge_adapter(["two"])
    assert not all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.unmerge_adapter()
    for name, tensor in model.state_dict().items():
        assert tensor.device == before[name].device
        assert torch.equal(tensor, before[name])


def test_a_task_saved_on_the_device_is_the_same_on_the_cpu(
    model_on_device: MakeModel, tiny_model: MakeModel, tmp_path: Path
) -> None:
    model = with_random_bases(with_tasks(model_on_device("llama"), LLAMA, "one"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "one", "one", torch_device="cpu")
    saved = share_layers(model)
    for name, layer in share_layers(loaded).items():
        assert layer.share_basis_out.device.type == "cpu"
        assert torch.equal(layer.share_basis_out, saved[name].share_basis_out.cpu())
        assert torch.equal(layer.share_coefficients_in["one"], saved[name].share_coefficients_in["one"].cpu())
    assert_close(logits(loaded, LLAMA.batch()), logits(model, LLAMA.batch()).cpu())


def test_a_model_moved_to_the_device_takes_its_bases_and_tasks_along(
    tiny_model: MakeModel, device: torch.device
) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, *TASKS)
    expected = logits(model, LLAMA.batch())
    model.to(device, torch.bfloat16)
    for layer in share_layers(model).values():
        assert layer.share_basis_out.device.type == layer.share_basis_in.device.type == device.type
        assert layer.share_basis_out.dtype == layer.share_basis_in.dtype == torch.float32
    assert_close(logits(model, LLAMA.batch()).cpu(), expected, tolerance=0.1)
    learn(model, LLAMA.batch(), steps=1)


def backend_of(device: torch.device) -> str:
    """Inductor on CUDA, whose kernels no other test compiles. On the CPU, it needs a C++ compiler and a long time."""
    return "inductor" if device.type == "cuda" else "aot_eager"


def test_a_compiled_network_trains_as_it_does_uncompiled(device: torch.device) -> None:
    model = small_network("one", phase="adapt").to(device)
    compiled = torch.compile(model.get_base_model(), backend=backend_of(device), fullgraph=True)
    x = torch.randn(5, 12).to(device)
    found = []
    for network in (model, compiled):
        model.zero_grad()
        network(x).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad])
    assert found[0]
    for eager, gradient in zip(*found, strict=True):
        assert_close(gradient, eager)


def test_a_compiled_network_is_not_compiled_again_for_tasks_it_has_seen(device: torch.device) -> None:
    model = small_network("one", "two").to(device)
    counter = CompileCounterWithBackend(backend_of(device))
    compiled = torch.compile(model.get_base_model(), backend=counter, fullgraph=True)
    x = torch.randn(5, 12).to(device)
    with torch.no_grad():
        compiled_for = []
        for task in (*TASKS, *TASKS, *TASKS):
            model.set_adapter(task)
            assert_close(compiled(x), model(x))
            compiled_for.append(counter.frame_count)
        outputs = [model.set_adapter(task) or model(x) for task in TASKS]
    assert_differ(*outputs)
    assert compiled_for[0] == 1
    assert compiled_for[-1] == compiled_for[1]
