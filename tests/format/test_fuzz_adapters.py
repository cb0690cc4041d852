"""An adapter that is accepted, however strange, can be saved, loaded and exported. Any other is refused."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from share_hf import SharedSubspace
from tests.trees import assert_same_state


pytestmark = pytest.mark.filterwarnings("ignore")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FIELDS = sorted(LoraConfig().to_dict())

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([0, 1, 2, 4, 1e-320, 1e30, 1e308, float("nan"), float("inf"), -1.0])
    | st.sampled_from(["", "q_proj", "all-linear", "(a+)+$", "(", "none", "all", "\ud800", "é", "a\x1b[2Jb", "../x"])
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
of_config = st.tuples(st.sampled_from([*FIELDS, "unknown_field"]), values)


@dataclass(frozen=True)
class TensorChange:
    """One tensor, found by counting, that is scaled, of another type or shape, or under another name."""

    number: int
    kind: str
    exponent: int

    def __call__(self, tensors: dict[str, Tensor]) -> None:
        name = sorted(tensors)[self.number % len(tensors)]
        tensor = tensors.pop(name)
        match self.kind:
            case "drop":
                return
            case "rename":
                name = name.replace("q_proj", "Ｑ_proj").replace("v_proj", "w_proj")
            case "cut":
                tensor = tensor[: tensor.shape[0] // 2].clone()
            case "one":
                tensor[0, 0] = 10.0**self.exponent
            case "nan":
                tensor[-1, -1] = float("nan")
            case "half":
                tensor = tensor.half()
            case "scale":
                tensor = tensor * 10.0**self.exponent
            case "zero":
                tensor = torch.zeros_like(tensor)
        tensors[name] = tensor


of_tensors = st.builds(
    TensorChange,
    st.integers(0, 50),
    st.sampled_from(["drop", "rename", "cut", "one", "nan", "half", "scale", "zero"]),
    st.integers(-45, 38),
)
slow = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("cases", [60, pytest.param(800, marks=slow)])
def test_what_is_taken_is_saved_loaded_and_exported(
    cases: int, loras: dict[str, Path], pristine_models: dict[str, PreTrainedModel], tmp_path: Path
) -> None:
    there = SharedSubspace.from_adapters({"mrpc": loras["mrpc"]}, num_components=6, pseudo_rank=2, progress=False)
    taken = 0

    @settings(
        max_examples=cases, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(config=st.lists(of_config, max_size=2), tensors=st.lists(of_tensors, max_size=2), alone=st.booleans())
    def check(config: list[tuple[str, Any]], tensors: list[TensorChange], alone: bool) -> None:
        nonlocal taken
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        folder = _changed(loras["sst2"], tmp_path / "changed", dict(config), tensors)
        subspace = SharedSubspace(there.state)
        try:
            if alone:
                subspace = SharedSubspace.from_adapters({"new": folder}, pseudo_rank=2, progress=False)
            else:
                subspace.add_adapters({"new": folder}, progress=False)
        except ValueError:
            assert subspace.state is there.state
            return
        taken += 1
        subspace.save_pretrained(tmp_path / "tree")
        assert_same_state(SharedSubspace.from_pretrained(tmp_path / "tree").state, subspace.state)
        if alone and any(change.kind == "cut" for change in tensors):
            return  # the adapter of a model with smaller layers
        _is_loaded_by_peft(subspace, tmp_path / "exported", lambda: copy.deepcopy(pristine_models["llama"]))

    check()
    assert taken > cases / 10


def _changed(adapter: Path, folder: Path, config: dict[str, Any], changes: list[TensorChange]) -> Path:
    """Return a copy of an adapter with other fields and tensors."""
    folder.mkdir()
    tensors = load_file(adapter / WEIGHTS)
    for change in changes:
        change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    fields = {**json.loads((adapter / CONFIG).read_text()), **config}
    (folder / CONFIG).write_text(json.dumps(fields))
    return folder


def _is_loaded_by_peft(subspace: SharedSubspace, folder: Path, base: Callable[[], PreTrainedModel]) -> None:
    """Assert that PEFT can load the export of the new task into its model."""
    subspace.export_lora("new", folder)
    loaded = PeftModel.from_pretrained(base(), folder)
    stored = load_file(folder / WEIGHTS)
    assert any(torch.equal(parameter, stored[next(iter(stored))]) for parameter in loaded.parameters())
