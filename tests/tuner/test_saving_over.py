"""A save never destroys a subspace: neither its tree, nor the tasks of another model in the same folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from share_hf import SharedSubspace
from share_hf.tuner.transfer import state_of
from tests.trees import files_of, leave_aside

from .cases import LLAMA, logits, with_random_bases, with_tasks


Base = Callable[[str], PreTrainedModel]


@pytest.fixture
def tree(tiny_model: Base, tmp_path: Path) -> Path:
    model = with_random_bases(with_tasks(tiny_model("llama"), LLAMA, "one", "two"))
    SharedSubspace(state_of(model)).save_pretrained(tmp_path / "tree")
    return tmp_path / "tree"


@pytest.mark.parametrize("place", ["", "tasks/one", "tasks/new"])
@pytest.mark.parametrize("method", ["share", "lora", "transformers"])
def test_a_model_is_not_saved_into_the_tree_of_a_subspace(
    method: str, place: str, tree: Path, tiny_model: Base
) -> None:
    before = files_of(tree)
    model = tiny_model("llama")
    if method == "transformers":
        model.add_adapter(LLAMA.config(), "default")
    else:
        model = get_peft_model(model, LLAMA.config() if method == "share" else LoraConfig())
    with pytest.raises(ValueError, match="holds a shared subspace, which the adapters of a model would overwrite"):
        model.save_pretrained(tree / place)
    assert files_of(tree) == before
    assert not (tree / "tasks" / "new").exists()


def test_a_tree_that_a_crash_left_aside_is_not_taken_for_gone(tree: Path, tiny_model: Base) -> None:
    before = files_of(tree)
    leave_aside(tree)
    with pytest.raises(ValueError, match="holds a shared subspace"):
        with_tasks(tiny_model("llama"), LLAMA, "one").save_pretrained(tree)
    assert files_of(tree.with_name(".tree.share_hf") / "old") == before
    assert SharedSubspace.from_pretrained(tree).tasks == ("one", "two")


def test_a_tree_with_a_damaged_index_is_not_written_over(tree: Path, tiny_model: Base) -> None:
    (tree / "share_config.json").write_text("{")
    before = files_of(tree)
    with pytest.raises(ValueError, match="holds a shared subspace"):
        with_tasks(tiny_model("llama"), LLAMA, "one").save_pretrained(tree)
    assert files_of(tree) == before


def test_a_base_model_without_adapters_may_lie_beside_a_tree(tree: Path, tiny_model: Base) -> None:
    tiny_model("llama").save_pretrained(tree)
    assert SharedSubspace.from_pretrained(tree).tasks == ("one", "two")


def test_a_checkpoint_may_be_saved_over_with_another_basis(tiny_model: Base, tmp_path: Path) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "one", "default")
    model.save_pretrained(tmp_path)
    with_random_bases(model).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "one")
    assert torch.equal(logits(loaded, LLAMA.batch()), logits(model, LLAMA.batch()))


@pytest.mark.parametrize(("there", "saved"), [("one", "other"), ("default", "other"), ("one", "default")])
def test_the_basis_of_another_models_adapters_is_not_replaced(
    there: str, saved: str, tiny_model: Base, tmp_path: Path
) -> None:
    with_random_bases(with_tasks(tiny_model("llama"), LLAMA, there)).save_pretrained(tmp_path)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=rf"holds the adapters \['{there}'\] of a model with another basis"):
        with_tasks(tiny_model("llama"), LLAMA, saved).save_pretrained(tmp_path)
    assert files_of(tmp_path) == before


def test_adapters_of_one_model_may_be_saved_one_by_one(tiny_model: Base, tmp_path: Path) -> None:
    model = with_random_bases(with_tasks(tiny_model("llama"), LLAMA, "one", "two"))
    for task in ("one", "two"):
        model.save_pretrained(tmp_path, selected_adapters=[task])
    for task in ("one", "two"):
        model.set_adapter(task)
        loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / task)
        assert torch.equal(logits(loaded, LLAMA.batch()), logits(model, LLAMA.batch()))
