"""Subspaces with coefficients in bfloat16 and 4 bits: saved, loaded by every loader, extended, pushed, trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, load_peft_weights
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from share_hf import SharedSubspace
from share_hf.state import Phase, TaskInfo, with_learned_coefficients
from tests.tree_fixtures import SaveLora
from tests.trees import assert_same_state, edit_tensors, files_of, logits


FEW_BITS = ("bfloat16", "4bit")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def loras(save_lora: SaveLora) -> dict[str, Path]:
    return {name: save_lora(name, seed=i, r=3 + i) for i, name in enumerate(("mrpc", "sst2", "rte"))}


@pytest.fixture(params=FEW_BITS)
def small(request: pytest.FixtureRequest, loras: dict[str, Path]) -> SharedSubspace:
    """A subspace of mrpc and sst2 in few bits."""
    places = {task: loras[task] for task in ("mrpc", "sst2")}
    return SharedSubspace.from_adapters(
        places, num_components=7, pseudo_rank=4, coefficient_dtype=request.param, progress=False
    )


def test_what_is_saved_is_loaded_to_the_bit(small: SharedSubspace, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path / "tree")
    index = json.loads((tmp_path / "tree" / "share_config.json").read_text())
    assert index["format_version"] == 3
    assert index["settings"]["coefficient_dtype"] == small.settings.coefficient_dtype
    loaded = SharedSubspace.from_pretrained(tmp_path / "tree")
    assert_same_state(loaded.state, small.state)
    loaded.save_pretrained(tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "tree")


def test_the_report_has_the_bytes_of_the_tensors(small: SharedSubspace, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path / "tree")
    for task in small.report().tasks:
        tensors = load_file(tmp_path / "tree" / "tasks" / task.name / WEIGHTS)
        assert task.bytes == sum(tensor.nbytes for name, tensor in tensors.items() if "fingerprint" not in name)


def test_a_merge_after_loading_is_that_before(small: SharedSubspace, loras: dict[str, Path], tmp_path: Path) -> None:
    small.save_pretrained(tmp_path / "tree")
    loaded = SharedSubspace.from_pretrained(tmp_path / "tree")
    for subspace in (small, loaded):
        subspace.add_adapters({"rte": loras["rte"]}, progress=False)
        subspace.remove_task("mrpc")
    # Steps have ids of their own.
    assert loaded.state.layers.keys() == small.state.layers.keys()
    for module, layer in small.state.layers.items():
        assert torch.equal(loaded.state.layers[module].coefficients_out, layer.coefficients_out)
        assert loaded.state.layers[module].records.rows == layer.records.rows
    loaded.save_pretrained(tmp_path / "tree")
    assert SharedSubspace.from_pretrained(tmp_path / "tree").tasks == ("sst2", "rte")


def test_peft_loads_what_apply_does(
    small: SharedSubspace, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    small.save_pretrained(tmp_path / "tree")
    applied = small.apply(tiny_model("llama"))
    model = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "tree", subfolder="tasks/mrpc").eval()
    assert torch.equal(logits(model), logits(applied))
    model.load_adapter(tmp_path / "tree", "sst2", subfolder="tasks/sst2")
    for loaded in (model, applied):
        loaded.set_adapter("sst2")
    assert torch.equal(logits(model), logits(applied))


def test_weights_that_peft_reads_alone_are_numbers(
    small: SharedSubspace, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    small.save_pretrained(tmp_path / "tree")
    model, task = small.apply(tiny_model("llama"), ["mrpc"]), tmp_path / "tree" / "tasks" / "mrpc"
    expected = logits(model)
    weights = load_peft_weights(task, device="cpu")
    set_peft_model_state_dict(model, weights, adapter_name="mrpc")
    assert torch.equal(logits(model), expected)


def test_a_checkpoint_of_the_model_has_plain_numbers(
    small: SharedSubspace, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    model = small.apply(tiny_model("llama"), ["mrpc"])
    model.save_pretrained(tmp_path / "checkpoint")
    tensors = load_file(tmp_path / "checkpoint" / "mrpc" / WEIGHTS)
    assert all(tensor.dtype == torch.float32 for name, tensor in tensors.items() if "coefficients" in name)
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "checkpoint" / "mrpc").eval()
    assert torch.equal(logits(again), logits(model))


def test_what_is_learned_inside_the_basis_is_rounded_before_it_is_saved(small: SharedSubspace, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    coefficients = {
        module: tuple(torch.randn(k, 4, generator=generator) for k in layer.num_components)
        for module, layer in small.state.layers.items()
    }
    state = with_learned_coefficients(
        small.state, {"cola": coefficients}, {"cola": TaskInfo(learned_by=Phase.COEFFICIENTS)}
    )
    learned = SharedSubspace(state)
    learned.save_pretrained(tmp_path / "tree")
    assert_same_state(SharedSubspace.from_pretrained(tmp_path / "tree").state, state)
    assert all(layer.records.drift_bounds[layer.index("cola")] > 0 for layer in state.layers.values())


def _drop_scales(tensors: dict[str, Tensor]) -> None:
    del tensors[next(name for name in tensors if name.endswith("_scales"))]


def _zero_code(tensors: dict[str, Tensor]) -> None:
    tensors[next(name for name in tensors if name.endswith("_codes"))].zero_()


def _as_numbers(tensors: dict[str, Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("_codes"))
    tensors[name] = tensors[name].float()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_scales, "share_coefficients_in_scales' is missing, expected codes and scales"),
        (_zero_code, r"share_coefficients_in': (codes have a 0|scales are)"),
        (_as_numbers, r"share_coefficients_in': codes and scales are torch\.float32"),
    ],
)
def test_damaged_codes_are_named(
    change: Callable[[dict[str, Tensor]], None],
    message: str,
    loras: dict[str, Path],
    tiny_model: Callable[[str], PreTrainedModel],
    tmp_path: Path,
) -> None:
    subspace = SharedSubspace.from_adapters(
        {"mrpc": loras["mrpc"]}, num_components=7, pseudo_rank=4, coefficient_dtype="4bit", progress=False
    )
    subspace.save_pretrained(tmp_path / "tree")
    edit_tensors(tmp_path / "tree" / "tasks" / "mrpc" / WEIGHTS, change)
    with pytest.raises(ValueError, match=rf"tasks/mrpc/{WEIGHTS}: .*{message}"):
        SharedSubspace.from_pretrained(tmp_path / "tree")
    with pytest.raises(ValueError, match=rf"tasks/mrpc/{WEIGHTS}: .*{message}"):
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "tree", subfolder="tasks/mrpc")


def test_float32_numbers_in_a_tree_of_bfloat16_are_named(loras: dict[str, Path], tmp_path: Path) -> None:
    subspace = SharedSubspace.from_adapters(
        {"mrpc": loras["mrpc"]}, num_components=7, pseudo_rank=4, coefficient_dtype="bfloat16", progress=False
    )
    subspace.save_pretrained(tmp_path / "tree")
    edit_tensors(
        tmp_path / "tree" / "tasks" / "mrpc" / WEIGHTS,
        lambda tensors: tensors.update({name: t.float() for name, t in tensors.items() if "coefficients" in name}),
    )
    with pytest.raises(ValueError, match=r"is torch\.float32, expected torch\.bfloat16"):
        SharedSubspace.from_pretrained(tmp_path / "tree")


def test_plain_trees_are_of_the_version_that_older_libraries_read(loras: dict[str, Path], tmp_path: Path) -> None:
    subspace = SharedSubspace.from_adapters(loras, num_components=7, pseudo_rank=4, progress=False)
    subspace.save_pretrained(tmp_path / "tree")
    index = json.loads((tmp_path / "tree" / "share_config.json").read_text())
    assert index["format_version"] == 2
    assert "coefficient_dtype" not in index["settings"]
    config = json.loads((tmp_path / "tree" / "tasks" / "mrpc" / "adapter_config.json").read_text())
    assert "coefficient_dtype" not in config


def test_two_writers_are_merged(small: SharedSubspace, loras: dict[str, Path], tmp_path: Path) -> None:
    small.save_pretrained(tmp_path / "tree")
    first, second = (SharedSubspace.from_pretrained(tmp_path / "tree") for _ in range(2))
    first.add_adapters({"rte": loras["rte"]}, progress=False)
    second.add_adapters({"other": loras["rte"]}, progress=False)
    first.save_pretrained(tmp_path / "tree")
    second.save_pretrained(tmp_path / "tree")
    merged = SharedSubspace.from_pretrained(tmp_path / "tree")
    assert merged.tasks == ("mrpc", "sst2", "rte", "other")
    assert merged.settings == small.settings
