"""A subspace of many tasks in a model: all at once, and some at run time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor
from transformers import PreTrainedModel

from share_hf import SharedSubspace
from share_hf.tuner import share_layers

from ..trees import save_adapter


Base = Callable[[str], PreTrainedModel]
LLAMA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
NARROW = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
HEADED = LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Callable[[str], Path]) -> dict[str, Path]:
    from transformers import AutoModelForCausalLM

    place = tmp_path_factory.mktemp("adapters")
    made = {}
    for i in range(6):
        base = AutoModelForCausalLM.from_pretrained(tiny_model_folder("llama"))
        made[f"task_{i}"] = save_random(base, place / f"task_{i}", NARROW if i == 4 else LLAMA, seed=i)
    return made


def save_random(base: PreTrainedModel, folder: Path, config: LoraConfig, seed: int) -> Path:
    torch.manual_seed(seed)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def subspace(folders: dict[str, Path]) -> SharedSubspace:
    return SharedSubspace.from_adapters(folders, num_components=16, pseudo_rank=4)


def output(model: PeftModel, **kwargs: object) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 15).view(2, 6), **kwargs).logits


def test_all_tasks_at_once_are_what_they_are_one_by_one(subspace: SharedSubspace, tiny_model: Base) -> None:
    together = subspace.apply(tiny_model("llama"))
    for task in subspace.tasks:
        alone = subspace.apply(tiny_model("llama"), tasks=[task])
        together.set_adapter(task)
        torch.testing.assert_close(output(together), output(alone), rtol=1e-5, atol=1e-5)
        assert together.peft_config[task].to_dict() == alone.peft_config[task].to_dict()
        expected = {name for name, layer in share_layers(alone).items() if layer.has_task(task)}
        assert {name for name, layer in share_layers(together).items() if layer.has_task(task)} == expected


def test_peft_goes_over_the_model_once_for_each_kind_of_task(
    subspace: SharedSubspace, tiny_model: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    original = BaseTuner.inject_adapter

    def inject_adapter(
        tuner: BaseTuner, model: torch.nn.Module, adapter_name: str, *args: object, **kw: object
    ) -> None:
        passes.append(adapter_name)
        original(tuner, model, adapter_name, *args, **kw)

    monkeypatch.setattr(BaseTuner, "inject_adapter", inject_adapter)
    model = subspace.apply(tiny_model("llama"))
    assert passes == ["task_0", "task_4"]
    assert list(model.peft_config)[:1] == ["task_0"] and set(model.peft_config) == set(subspace.tasks)


def test_a_model_of_many_tasks_is_saved_and_loaded_by_peft(
    subspace: SharedSubspace, tiny_model: Base, tmp_path: Path
) -> None:
    model = subspace.apply(tiny_model("llama"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "task_3", adapter_name="task_3").eval()
    model.set_adapter("task_3")
    torch.testing.assert_close(output(loaded), output(model))


def test_tasks_come_and_go_at_run_time(subspace: SharedSubspace, tiny_model: Base) -> None:
    model = subspace.apply(tiny_model("llama"), tasks=["task_0", "task_1"])
    before = output(model)
    subspace.add_task(model, "task_4")
    subspace.add_task(model, ["task_2", "task_3"])
    assert model.active_adapter == "task_0" and torch.equal(output(model), before)
    for task in ("task_2", "task_3", "task_4"):
        model.set_adapter(task)
        alone = subspace.apply(tiny_model("llama"), tasks=[task])
        torch.testing.assert_close(output(model), output(alone), rtol=1e-5, atol=1e-5)
    model.set_adapter("task_0")
    model.delete_adapter("task_2")
    with pytest.raises(ValueError, match=r"adapter_names has \['task_2'\]"):
        output(model, adapter_names=["task_0", "task_2"])
    subspace.add_task(model, "task_2")
    mixed = output(model, adapter_names=["task_2", "task_4"])
    model.set_adapter("task_2")
    torch.testing.assert_close(mixed[0], output(model)[0], rtol=1e-5, atol=1e-5)


def test_a_task_that_cannot_be_added_leaves_the_model_as_it_was(
    subspace: SharedSubspace, folders: dict[str, Path], tiny_model: Base
) -> None:
    model = subspace.apply(tiny_model("llama"), tasks=["task_0"])
    before = output(model)
    with pytest.raises(ValueError, match=r"no task 'tusk_1'.*did you mean 'task_1'"):
        subspace.add_task(model, ["task_2", "tusk_1"])
    with pytest.raises(ValueError, match="task 'task_0' is already in the model"):
        subspace.add_task(model, ["task_1", "task_0"])
    with pytest.raises(ValueError, match="model is a LlamaForCausalLM, expected one made by SharedSubspace"):
        subspace.add_task(tiny_model("llama"), "task_1")
    other = SharedSubspace.from_adapters({"task_9": folders["task_5"]}, num_components=16, pseudo_rank=4)
    with pytest.raises(ValueError, match="basis"):
        other.add_task(model, "task_9")
    assert list(model.peft_config) == ["task_0"] and torch.equal(output(model), before)


def test_heads_of_many_tasks_are_their_own(tiny_model: Base, tmp_path: Path) -> None:
    adapters = {f"task_{i}": save_adapter(tiny_model("bert"), tmp_path / str(i), HEADED, i) for i in range(4)}
    subspace = SharedSubspace.from_adapters(adapters, num_components=8, pseudo_rank=4)
    model = subspace.apply(tiny_model("bert"))
    names = ["task_3", "task_1", "__base__", "task_2"]
    ids = torch.arange(3, 27).view(4, 6)
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
        for i, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(input_ids=ids[i : i + 1]).logits
            else:
                one = subspace.apply(tiny_model("bert"), tasks=[name])
                alone = one(input_ids=ids[i : i + 1]).logits
            torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_two_threads_use_one_model_for_different_tasks(subspace: SharedSubspace, tiny_model: Base) -> None:
    model = subspace.apply(tiny_model("llama"))
    batches = [["task_0", "task_1"], ["task_5", "task_3"]]
    expected = [output(model, adapter_names=names) for names in batches]
    assert not torch.allclose(*expected)
    start, found = threading.Barrier(2), [[], []]

    def serve(place: int) -> None:
        start.wait()
        for _ in range(20):
            found[place].append(output(model, adapter_names=batches[place]))

    threads = [threading.Thread(target=serve, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place in range(2):
        assert len(found[place]) == 20
        for each in found[place]:
            assert torch.equal(each, expected[place])
