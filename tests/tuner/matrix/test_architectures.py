"""What PEFT's users do with an adapter, on every architecture and in every phase of a task."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    save_as_lora,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from share_hf.tuner import share_layers

from ..cases import assert_close, assert_differ, trainable
from .architectures import Architecture, names
from .models import adapted, fill, first_tensor, output, parameters_of, values, with_head, with_task_in_weights


Base = Callable[[], PreTrainedModel]

each_name = pytest.mark.parametrize("name", names())
each_phase = pytest.mark.parametrize("phase", ["coefficients", "adapt", "init"])
each_generator = pytest.mark.parametrize("name", names(lambda architecture: architecture.generates))


@each_phase
@each_name
class TestOneTask:
    def test_computes_what_weights_with_its_update_do(
        self, architecture: Architecture, base: Base, phase: str
    ) -> None:
        inputs = architecture.inputs()
        without = output(base(), inputs)
        model = adapted(base(), architecture, "one", phase=phase)
        found = output(model, inputs)
        assert_close(found, output(with_task_in_weights(base(), model, "one"), inputs))
        assert_differ(found, without)
        with model.disable_adapter():
            assert_close(output(model, inputs), without, tolerance=1e-5)
        assert torch.equal(output(model, inputs), found)
        with_head_alone = output(with_head(base(), model, "one"), inputs)  # which PEFT keeps
        assert_close(output(model.unload(), inputs), with_head_alone, tolerance=1e-5)

    def test_is_merged_and_unmerged(self, architecture: Architecture, base: Base, phase: str) -> None:
        inputs = architecture.inputs()
        model = adapted(base(), architecture, "one", phase=phase)
        expected = output(model, inputs)
        model.merge_adapter(safe_merge=True)
        merged = output(model, inputs)
        assert_close(merged, expected)
        with pytest.warns(UserWarning, match="All adapters are already merged"):
            model.merge_adapter()
        assert torch.equal(output(model, inputs), merged)
        model.unmerge_adapter()
        assert_close(output(model, inputs), expected)
        model = model.merge_and_unload()
        assert_close(output(model, inputs), expected)
        assert type(model) is type(base())
        assert not share_layers(model)

    def test_is_saved_without_the_base_model_and_loaded(
        self, architecture: Architecture, base: Base, phase: str, tmp_path: Path
    ) -> None:
        inputs = architecture.inputs()
        model = adapted(base(), architecture, "one", phase=phase)
        model.save_pretrained(tmp_path)
        stored = load_file(tmp_path / "one" / "adapter_model.safetensors")
        assert stored.keys() == get_peft_model_state_dict(model, adapter_name="one").keys()
        kept = tuple(model.peft_config["one"].modules_to_save or [])  # PEFT compares the ends of names
        assert all(".share_" in key or any(part.endswith(kept) for part in key.split(".")) for key in stored)
        for low_cpu_mem_usage in (False, True):
            loaded = PeftModel.from_pretrained(base(), tmp_path / "one", low_cpu_mem_usage=low_cpu_mem_usage)
            assert torch.equal(output(loaded, inputs), output(model, inputs))
            assert not trainable(loaded)
        loaded = PeftModel.from_pretrained(base(), tmp_path / "one", is_trainable=True)
        assert len(trainable(loaded)) == len(trainable(model))

    def test_is_alone_trained_with_checkpointing_and_without(
        self, architecture: Architecture, base: Base, phase: str
    ) -> None:
        found = []
        for checkpointing in (None, False, True):
            model = adapted(base(), architecture, "one", "two", phase=phase)
            if checkpointing is not None:
                if not model.get_base_model().supports_gradient_checkpointing:
                    continue
                model.enable_input_require_grads()
                model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            found.append(_gradients_after_a_step(model, architecture))
        for others in found[1:]:
            for parameter, gradient in found[0].items():
                assert_close(others[parameter], gradient)

    def test_is_moved_by_state_dicts(self, architecture: Architecture, base: Base, phase: str) -> None:
        inputs = architecture.inputs()
        source = adapted(base(), architecture, "one", phase=phase)
        expected = output(source, inputs)
        target = get_peft_model(base(), architecture.share_config(phase=phase), "other").eval()
        result = set_peft_model_state_dict(target, get_peft_model_state_dict(source, adapter_name="one"), "other")
        assert not result.unexpected_keys
        assert torch.equal(output(target, inputs), expected)
        target = get_peft_model(base(), architecture.share_config(phase=phase), "one").eval()
        target.load_state_dict(source.state_dict())
        assert torch.equal(output(target, inputs), expected)

    def test_is_copied_and_pickled_with_its_model(self, architecture: Architecture, base: Base, phase: str) -> None:
        inputs = architecture.inputs()
        model = adapted(base(), architecture, "one", phase=phase)
        expected = output(model, inputs)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(output(copied, inputs), expected)
            fill(copied, "one", seed=5)
            assert_differ(output(copied, inputs), expected)
            assert torch.equal(output(model, inputs), expected)

    def test_is_injected_without_a_wrapper(self, architecture: Architecture, base: Base, phase: str) -> None:
        inputs = architecture.inputs()
        config = architecture.share_config(phase=phase, task_type=None)
        model = inject_adapter_in_model(config, base(), "one").eval()
        fill(model, "one")
        assert type(model) is type(base())
        assert_close(output(model, inputs), output(with_task_in_weights(base(), model, "one"), inputs))
        state = get_peft_model_state_dict(model, adapter_name="one")
        again = inject_adapter_in_model(config, base(), "one", low_cpu_mem_usage=True).eval()
        set_peft_model_state_dict(again, state, "one", low_cpu_mem_usage=True)
        assert torch.equal(output(again, inputs), output(model, inputs))

    def test_is_used_by_transformers_own_methods(
        self, architecture: Architecture, base: Base, phase: str, tmp_path: Path
    ) -> None:
        inputs = architecture.inputs()
        without = output(base(), inputs)
        model = base()
        model.add_adapter(architecture.share_config(phase=phase, task_type=None), "one")
        model.add_adapter(architecture.share_config(phase=phase, task_type=None), "two")
        model.eval()
        for seed, task in enumerate(("one", "two")):
            fill(model, task, seed)
        found = {}
        for task in ("two", "one"):
            model.set_adapter(task)
            assert model.active_adapters() == [task]
            found[task] = output(model, inputs)
            assert_close(found[task], output(with_task_in_weights(base(), model, task), inputs))
        model.disable_adapters()
        assert_close(output(model, inputs), without, tolerance=1e-5)
        model.enable_adapters()
        assert torch.equal(output(model, inputs), found["one"])
        model.save_pretrained(tmp_path)
        loaded = base()
        loaded.load_adapter(str(tmp_path), "again")
        assert torch.equal(output(loaded.eval(), inputs), found["one"])

    def test_computes_in_bfloat16_on_a_base_in_bfloat16(
        self, architecture: Architecture, base: Base, phase: str
    ) -> None:
        inputs = {
            key: value.bfloat16() if value.is_floating_point() else value
            for key, value in architecture.inputs().items()
        }
        model = adapted(base().bfloat16(), architecture, "one", phase=phase)
        found = output(model, inputs)
        dense = with_task_in_weights(base().bfloat16(), model, "one")
        # Weights that were rounded together with their update differ by a few units in the last place.
        assert found.dtype == output(dense, inputs).dtype
        assert_close(found, output(dense, inputs), tolerance=0.2)

    def test_is_a_lora_when_it_is_converted(
        self, architecture: Architecture, base: Base, phase: str, tmp_path: Path
    ) -> None:
        if architecture.has_nested_head:
            pytest.skip("PEFT converts no head of several modules, SharedSubspace.export_lora does")
        inputs = architecture.inputs()
        model = adapted(base(), architecture, "one", phase=phase)
        save_as_lora(tmp_path, model, rank=1.0, adapter_name="one")
        loaded = PeftModel.from_pretrained(base(), tmp_path)
        assert loaded.peft_config["default"].peft_type == "LORA"
        assert_close(output(loaded, inputs), output(model, inputs), tolerance=1e-3)

    def test_is_counted(self, architecture: Architecture, base: Base, phase: str, capsys: Any) -> None:
        model = adapted(base(), architecture, "one", phase=phase)
        count = sum(parameter.numel() for parameter in parameters_of(model, "one").values())
        assert model.get_nb_trainable_parameters()[0] == count
        model.print_trainable_parameters()
        assert f"trainable params: {count:,} ||" in capsys.readouterr().out
        layers = [status for status in model.get_layer_status() if "Linear" in status.module_type]
        assert {layer.name.removeprefix("model.") for layer in layers} == share_layers(model).keys()
        assert all(layer.requires_grad == {"one": True} for layer in layers)


@each_phase
@each_name
class TestSeveralTasks:
    def test_compute_what_each_does_alone_and_are_deleted(
        self, architecture: Architecture, base: Base, phase: str
    ) -> None:
        inputs = architecture.inputs()
        model = adapted(base(), architecture, "one", "two", "three", phase=phase)
        expected = {}
        for task in ("one", "two", "three"):
            expected[task] = output(with_task_in_weights(base(), model, task), inputs)
            model.set_adapter(task)
            assert model.active_adapter == task
            assert_close(output(model, inputs), expected[task])
        model.delete_adapter("one")
        assert_close(output(model, inputs), expected["three"])
        with pytest.warns(UserWarning, match="three was active which is now deleted"):
            model.delete_adapter("three")
        assert_close(output(model, inputs), expected["two"])
        assert not parameters_of(model, "one") and not parameters_of(model, "three")

    def test_are_saved_those_that_are_selected_and_loaded_side_by_side(
        self, architecture: Architecture, base: Base, phase: str, tmp_path: Path
    ) -> None:
        inputs = architecture.inputs()
        model = adapted(base(), architecture, "default", "two", "three", phase=phase)
        model.save_pretrained(tmp_path, selected_adapters=["default", "three"])
        assert not (tmp_path / "two").exists()
        loaded = PeftModel.from_pretrained(base(), tmp_path)
        loaded.load_adapter(tmp_path / "three", "three")
        for task in ("default", "three"):
            model.set_adapter(task)
            loaded.set_adapter(task)
            assert torch.equal(output(loaded, inputs), output(model, inputs))

    def test_add_up_where_both_are_active(self, architecture: Architecture, base: Base, phase: str) -> None:
        inputs = architecture.inputs()
        model = adapted(base(), architecture, "one", "two", phase=phase)
        if model.peft_config["one"].modules_to_save:
            pytest.skip("heads do not add up, in PEFT neither")
        model.base_model.set_adapter(["one", "two"])
        both = with_task_in_weights(with_task_in_weights(base(), model, "one"), model, "two")
        assert_close(output(model, inputs), output(both, inputs))
        model.merge_adapter()
        assert_close(output(model, inputs), output(both, inputs))

    def test_are_trained_that_are_asked_for(self, architecture: Architecture, base: Base, phase: str) -> None:
        model = adapted(base(), architecture, "one", "two", phase=phase)
        model.set_requires_grad("two")
        expected = parameters_of(model, "one").keys() | parameters_of(model, "two").keys()
        assert trainable(model).keys() == expected
        model.set_requires_grad(["one", "two"], requires_grad=False)
        assert not trainable(model)


@each_name
def test_samples_of_a_batch_have_their_own_tasks(architecture: Architecture, base: Base) -> None:
    inputs = architecture.inputs(4)
    model = adapted(base(), architecture, "one", "two")
    tasks = ["two", "__base__", "one", "two"]
    lora_config = LoraConfig(target_modules=list(architecture.target_modules), task_type=architecture.task_type)
    lora = get_peft_model(base(), lora_config, "one").eval()
    lora.add_adapter("two", lora_config)
    try:
        output(lora, inputs, adapter_names=tasks)
    except ValueError:  # samples are not the rows of a layer
        with pytest.raises(ValueError, match="expected one for each sample"):
            output(model, inputs, adapter_names=tasks)
        return
    except TypeError as error:  # LoRA's heads are single layers
        assert "Mixed batching is only supported" in str(error)
    found = output(model, inputs, adapter_names=tasks)
    for i, task in enumerate(tasks):
        alone = base() if task == "__base__" else with_task_in_weights(base(), model, task)
        assert_close(found[i], output(alone, inputs)[i])


@each_generator
def test_generated_text_is_that_of_weights_with_the_update(architecture: Architecture, base: Base) -> None:
    ids = architecture.inputs()["input_ids"]
    options: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
    }
    model = adapted(base(), architecture, "one")
    expected = with_task_in_weights(base(), model, "one").generate(**options)
    assert torch.equal(model.generate(**options), expected)
    assert not torch.equal(base().generate(**options), expected)
    assert torch.equal(model.merge_and_unload().generate(**options), expected)


TARGETS: dict[str, dict[str, Any]] = {
    "list": {},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.(q|q_proj|query|query_key_value|c_attn|in_proj|W?qkv(_proj)?|query_proj|q_lin)"},
    "layer": {"layers_to_transform": 0},
    "layers-in": {"layers_to_transform": [0], "layers_pattern": ["layers", "layer", "h", "blocks"]},
    "excluded": {
        "target_modules": "all-linear",
        "exclude_modules": r".*(v_proj|value|\.v|c_proj|out_proj|x_proj|dt_proj|Wo)",
    },
}


@pytest.mark.parametrize("form", TARGETS)
@each_name
def test_all_that_lora_would_adapt_is_adapted(architecture: Architecture, base: Base, form: str) -> None:
    config = {"target_modules": list(architecture.target_modules), **TARGETS[form]}
    try:
        expected = get_peft_model(base(), LoraConfig(**config)).targeted_module_names
    except ValueError as error:
        with pytest.raises(type(error), match=r"not found in the base|is incompatible|reads its weight directly"):
            get_peft_model(base(), architecture.share_config(**config))
        return
    model = adapted(base(), architecture, "one", **{**config, "task_type": None})
    assert sorted(model.targeted_module_names) == sorted(expected)
    inputs = architecture.inputs()
    assert_close(output(model, inputs), output(with_task_in_weights(base(), model, "one"), inputs), tolerance=1e-3)


def _gradients_after_a_step(model: PeftModel, architecture: Architecture) -> dict[str, Tensor]:
    """Return gradients after a step that changed the first task, and nothing else."""
    own, everything = parameters_of(model, "one"), dict(model.named_parameters())
    assert trainable(model).keys() == own.keys()
    before = values(everything)
    model.train()
    optimizer = torch.optim.SGD(own.values(), lr=0.1)
    _loss(model, architecture).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in own.items()}
    assert all(gradient.any() for gradient in gradients.values())
    assert not [name for name, parameter in everything.items() if name not in own and parameter.grad is not None]
    optimizer.step()
    changed = {name for name, value in before.items() if not torch.equal(everything[name], value)}
    assert changed == own.keys()
    return gradients


def _loss(model: nn.Module, architecture: Architecture) -> Tensor:
    torch.manual_seed(0)  # of dropout
    found = first_tensor(model(**architecture.inputs())).float()
    return (found - torch.linspace(-1, 1, found.numel()).view_as(found)).square().mean()
