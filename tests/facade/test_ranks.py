"""Subspaces whose tasks have individual ranks: (k, p_i) in files and state dicts, and in every loader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from share_hf import SharedSubspace
from share_hf.tuner import share_layers
from share_hf.tuner.transfer import state_of
from tests.tree_fixtures import SaveLora
from tests.trees import INPUT_IDS, assert_close, assert_same_state, edit_tensors, files_of, logits


WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def loras(save_lora: SaveLora) -> dict[str, Path]:
    """LoRAs of ranks 1, 4 and 6."""
    return {name: save_lora(name, seed=i, r=r) for i, (name, r) in enumerate({"mrpc": 1, "sst2": 4, "rte": 6}.items())}


@pytest.fixture(params=["float32", "4bit"])
def ranked(request: pytest.FixtureRequest, loras: dict[str, Path]) -> SharedSubspace:
    return SharedSubspace.from_adapters(
        loras, num_components=12, pseudo_rank=6, tolerance=0.3, coefficient_dtype=request.param, progress=False
    )


def ranks_in(tensors: dict[str, Tensor]) -> set[int]:
    return {tensor.shape[1] for name, tensor in tensors.items() if "share_coefficients" in name}


def test_files_hold_the_rank_of_each_task_in_each_layer(ranked: SharedSubspace, tmp_path: Path) -> None:
    ranked.save_pretrained(tmp_path / "tree")
    index = json.loads((tmp_path / "tree" / "share_config.json").read_text())
    assert (index["format_version"], index["settings"]["tolerance"]) == (3, 0.3)
    found = {}
    for task in ranked.report().tasks:
        tensors = load_file(tmp_path / "tree" / "tasks" / task.name / WEIGHTS)
        stored = {name: tensor for name, tensor in tensors.items() if "coefficients" in name}
        assert task.bytes == sum(tensor.nbytes for tensor in stored.values())
        if ranked.settings.coefficient_dtype == "float32":
            assert task.parameters == sum(tensor.numel() for tensor in stored.values())
            found[task.name] = ranks_in(tensors)
    if found:
        assert found["mrpc"] == {1}
        assert max(found["rte"]) > 1
    loaded = SharedSubspace.from_pretrained(tmp_path / "tree")
    assert_same_state(loaded.state, ranked.state)
    loaded.save_pretrained(tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "tree")


def test_a_merge_keeps_the_ranks(loras: dict[str, Path], save_lora: SaveLora, tmp_path: Path) -> None:
    subspace = SharedSubspace.from_adapters(loras, num_components=32, pseudo_rank=6, tolerance=0.3, progress=False)
    before = {module: layer.ranks.tolist() for module, layer in subspace.state.layers.items()}
    subspace.save_pretrained(tmp_path / "tree")
    subspace = SharedSubspace.from_pretrained(tmp_path / "tree")
    subspace.add_adapters({"cola": save_lora("cola", seed=9, r=2)}, progress=False)
    for module, layer in subspace.state.layers.items():
        assert layer.ranks.tolist()[:3] == before[module]
        assert layer.ranks.tolist()[3] <= 2


def test_every_loader_computes_the_same(
    ranked: SharedSubspace, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    ranked.save_pretrained(tmp_path / "tree")
    applied = ranked.apply(tiny_model("llama"))
    loaded = PeftModel.from_pretrained(
        tiny_model("llama"), tmp_path / "tree", subfolder="tasks/mrpc", adapter_name="mrpc"
    ).eval()
    quick = PeftModel.from_pretrained(
        tiny_model("llama"), tmp_path / "tree", subfolder="tasks/mrpc", adapter_name="mrpc", low_cpu_mem_usage=True
    ).eval()
    own = tiny_model("llama")
    own.load_adapter(str(tmp_path / "tree" / "tasks" / "mrpc"), "mrpc")
    for task in ("sst2", "rte"):
        for model in (loaded, quick):
            model.load_adapter(tmp_path / "tree", task, subfolder=f"tasks/{task}")
        own.load_adapter(str(tmp_path / "tree" / "tasks" / task), task)
    for task in ("mrpc", "rte", "sst2"):
        for model in (applied, loaded, quick, own):
            model.set_adapter(task)
        expected = logits(applied)
        for model in (loaded, quick, own.eval()):
            assert torch.equal(logits(model), expected)
        ranked.export_lora(task, tmp_path / task)
        lora = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / task).eval()
        assert_close(logits(lora), expected)


def test_a_mixed_batch_is_that_of_each_task(
    ranked: SharedSubspace, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model = ranked.apply(tiny_model("llama"))
    names = ["mrpc", "rte", "sst2", "__base__"]
    ids = INPUT_IDS[:1].repeat(4, 1)
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
        for i, task in enumerate(names[:3]):
            model.set_adapter(task)
            assert_close(mixed[i], model(input_ids=ids[:1]).logits[0])


def test_a_state_dict_has_the_ranks_and_is_loaded_back(
    ranked: SharedSubspace, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    model = ranked.apply(tiny_model("llama"))
    weights = {name: t.clone() for name, t in get_peft_model_state_dict(model, adapter_name="mrpc").items()}
    assert ranks_in(weights) == {1}
    model.save_pretrained(tmp_path / "checkpoint")
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "checkpoint" / "mrpc").eval()
    model.set_adapter("mrpc")
    assert torch.equal(logits(again), logits(model))
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = ranked.apply(tiny_model("llama"))
    for layer in share_layers(other).values():
        for task in ranked.tasks:
            shapes = [layer.share_coefficients_out[task].shape[0], layer.share_coefficients_in[task].shape[0]]
            layer.set_coefficients(task, *(torch.zeros(k, 6) for k in shapes))
    other.load_state_dict(whole)
    other.set_adapter("mrpc")
    assert torch.equal(logits(other), logits(model))


def test_a_weighted_sum_has_room_for_more_than_the_rank_of_the_first(
    ranked: SharedSubspace, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model = ranked.apply(tiny_model("llama"))
    model.add_weighted_adapter(["mrpc", "sst2"], [1.0, 0.5], "both")
    for name, layer in share_layers(model).items():
        summed = layer.factors("mrpc").dense() + 0.5 * layer.factors("sst2").dense()
        assert_close(layer.factors("both").dense(), summed), name


def test_a_model_becomes_a_subspace_again(
    ranked: SharedSubspace, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    state = state_of(ranked.apply(tiny_model("llama")))
    for module, layer in ranked.state.layers.items():
        assert torch.equal(state.layers[module].coefficients_out, layer.coefficients_out)


def test_two_writers_do_not_cut_twice(loras: dict[str, Path], save_lora: SaveLora, tmp_path: Path) -> None:
    subspace = SharedSubspace.from_adapters(
        {"mrpc": loras["mrpc"]}, num_components=32, pseudo_rank=6, tolerance=0.5, progress=False
    )
    subspace.save_pretrained(tmp_path / "tree")
    first, second = (SharedSubspace.from_pretrained(tmp_path / "tree") for _ in range(2))
    first.add_adapters({"cola": save_lora("cola", seed=9, r=2)}, progress=False)
    second.add_adapters({"rte": loras["rte"]}, progress=False)
    before = second.state
    first.save_pretrained(tmp_path / "tree")
    second.save_pretrained(tmp_path / "tree")
    for module, layer in second.state.layers.items():
        old = before.layers[module]
        assert layer.ranks[layer.index("rte")] == old.ranks[old.index("rte")]
        assert_close(layer.update_of("rte").dense(), old.update_of("rte").dense(), 1e-4)
    assert second.settings.tolerance == 0.5


def _narrower(tensors: dict[str, Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("coefficients_in"))
    tensors[name] = tensors[name][:, :0].clone()


def _wider(tensors: dict[str, Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("coefficients_out"))
    tensors[name] = torch.ones(len(tensors[name]), 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_narrower, r"has shape \(\d+, 0\), expected \(\d+, \d\)"),
        (_wider, r"is \(\d+, 7\), expected a matrix of 1 to 6"),
    ],
)
def test_a_rank_that_no_task_has_is_named(
    change: Callable[[dict[str, Tensor]], None],
    message: str,
    loras: dict[str, Path],
    tiny_model: Callable[[str], PreTrainedModel],
    tmp_path: Path,
) -> None:
    subspace = SharedSubspace.from_adapters(loras, num_components=12, pseudo_rank=6, tolerance=0.3, progress=False)
    subspace.save_pretrained(tmp_path / "tree")
    edit_tensors(tmp_path / "tree" / "tasks" / "sst2" / WEIGHTS, change)
    with pytest.raises(ValueError, match=rf"tasks/sst2/{WEIGHTS}: .*{message}"):
        SharedSubspace.from_pretrained(tmp_path / "tree")
    with pytest.raises(ValueError, match=rf"tasks/sst2/{WEIGHTS}: .*{message}"):
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "tree", subfolder="tasks/sst2")
