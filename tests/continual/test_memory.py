"""What a stream keeps in memory and reads from disk as the number of tasks grows."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from share_hf import ShareTrainer
from share_hf.continual.stream import Stream
from share_hf.format.basis_file import read_bases
from share_hf.tuner import loading

from .cases import LLAMA_TARGETS, arguments, config, language_task, language_tasks


def bytes_alive() -> int:
    """Return the number of bytes of all tensors that are still referenced."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


def coefficient_bytes(trainer: ShareTrainer) -> int:
    return sum(
        layer.coefficients_out.nbytes + layer.coefficients_in.nbytes
        for layer in trainer.subspace.state.layers.values()
    )


def short_trainer(model: PreTrainedModel, folder: Path, **overrides: Any) -> ShareTrainer:
    values = dict(max_steps=1, save_strategy="no", evaluate_seen_tasks=False, num_init_tasks=1)
    return ShareTrainer(model, arguments(folder, **{**values, **overrides}), config(LLAMA_TARGETS))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["share", "coefficients"])
def test_twenty_tasks_hold_as_much_as_two_and_their_coefficients(
    method: str, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    trainer = short_trainer(tiny_model("llama"), tmp_path / "out", method=method)
    held = {}
    for count in range(1, 21):
        trainer.learn_task(f"task{count}", language_task(count)["train"])
        held[count] = bytes_alive() - 2 * coefficient_bytes(trainer)  # those of the state, and those of the model
    basis = sum(layer.basis_out.nbytes + layer.basis_in.nbytes for layer in trainer.subspace.state.layers.values())
    # The bases of the third to the twentieth task would take eighteen times as much.
    assert held[20] - held[3] < basis


def test_a_tree_is_written_once_a_phase_and_only_scores_after_it(
    tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[dict[str, int]] = []
    save = Stream.save_subspace

    def note(self: Stream, **options: Any) -> None:
        save(self, **options)
        folder = self.folder / "subspace"
        files = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json")]
        written.append({path.relative_to(folder).as_posix(): path.stat().st_ino for path in files})

    monkeypatch.setattr(Stream, "save_subspace", note)
    trainer = short_trainer(tiny_model("llama"), tmp_path / "out", finetune_num_train_epochs=1)
    trainer.learn_task("a", *language_tasks("a")["a"].values())
    trainer.learn_task("b", *language_tasks("b")["b"].values())
    merged, tuned, scored = written[-3:]
    assert {name for name in tuned if tuned[name] != merged.get(name)} == {
        *("adapter_model.safetensors", "share_config.json", "metrics.json"),
        *("tasks/b/adapter_model.safetensors", "tasks/b/metrics.json"),
    }
    assert {name for name in scored if scored[name] != tuned.get(name)} == {
        *("metrics.json", "share_config.json", "tasks/b/metrics.json")
    }


def test_the_basis_is_read_once_for_all_tasks_of_a_tree(
    tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = short_trainer(tiny_model("llama"), tmp_path / "out")
    names = [f"task{count}" for count in range(5)]
    for count, name in enumerate(names):
        trainer.learn_task(name, language_task(count)["train"])
    trainer.subspace.save_pretrained(tmp_path / "tree")
    read: list[Path] = []

    def note(path: Path) -> Any:
        read.append(path)
        return read_bases(path)

    monkeypatch.setattr(loading, "read_bases", note)
    model = PeftModel.from_pretrained(
        tiny_model("llama"), tmp_path / "tree", subfolder=f"tasks/{names[0]}", adapter_name=names[0]
    )
    for name in names[1:]:
        model.load_adapter(tmp_path / "tree", name, subfolder=f"tasks/{name}")
    assert len(read) == 1
    # A basis that was replaced is no longer that in the file.
    (layer, *_) = (module for module in model.modules() if hasattr(module, "set_basis"))
    layer.set_basis(layer.share_basis_out.flip(1), layer.share_basis_in)
    model.delete_adapter(names[-1])
    with pytest.raises(ValueError, match="is not the one the model has"):
        model.load_adapter(tmp_path / "tree", names[-1], subfolder=f"tasks/{names[-1]}")
