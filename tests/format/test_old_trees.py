"""Trees that earlier versions wrote can be read: the files of version 1 are in `assets`, as share_hf 0.1 left them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedModel

from share_hf import SharedSubspace
from share_hf.tuner import share_layers
from tests.trees import bert_with_labels, named


VERSION_1 = Path(__file__).parent / "assets" / "tree-of-version-1"
PREFIX = "base_model.model."


@pytest.fixture
def old_tree(tmp_path: Path) -> Path:
    return Path(shutil.copytree(VERSION_1, tmp_path / "old"))


def test_a_tree_of_version_1_is_read(old_tree: Path) -> None:
    subspace = SharedSubspace.from_pretrained(old_tree)
    assert subspace.tasks == ("mrpc", "rte")
    report = subspace.report()
    assert report.tasks[0].drift == pytest.approx(0.79705, abs=1e-5)
    assert report.tasks[1].drift_bound == pytest.approx(0.84456, abs=1e-5)
    assert [step.get("merged", step.get("removed")) for step in subspace.state.lineage] == [
        ["mrpc"], ["sst2"], ["rte"], "sst2",
    ]  # fmt: skip
    root = load_file(old_tree / "adapter_model.safetensors")
    for module, update in subspace.state.updates_of("rte").items():
        a, b = (root[f"{PREFIX}{module}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(update.dense(), b @ a, rtol=1e-5, atol=1e-7)


def test_its_tasks_load_in_peft(old_tree: Path, tiny_model: Callable[[str], PreTrainedModel]) -> None:
    base = named(bert_with_labels(tiny_model("bert"), 2))
    model = PeftModel.from_pretrained(base, old_tree, subfolder="tasks/mrpc", adapter_name="mrpc")
    model.load_adapter(old_tree, "rte", subfolder="tasks/rte")
    state = SharedSubspace.from_pretrained(old_tree).state
    for module, layer in share_layers(model).items():
        for task in ("mrpc", "rte"):
            expected = state.layers[module].update_of(task).dense()
            torch.testing.assert_close(layer.get_delta_weight(task), expected, rtol=1e-5, atol=1e-7)


def test_it_can_be_added_to_and_saved(old_tree: Path) -> None:
    subspace = SharedSubspace.from_pretrained(old_tree)
    subspace.export_lora("mrpc", old_tree.with_name("lora"))
    subspace.add_adapters({"again": old_tree.with_name("lora")}, progress=False)
    subspace.save_pretrained(old_tree)
    assert SharedSubspace.from_pretrained(old_tree).tasks == ("mrpc", "rte", "again")
