"""Streams whose subspace stores coefficients in few bits, or with individual ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from share_hf import SharedSubspace
from share_hf.tuner import share_layers

from .cases import P, assert_same_tasks, classification_tasks
from .conftest import Make


@pytest.mark.parametrize("share", [{"coefficient_dtype": "4bit"}, {"tolerance": 0.5, "coefficient_dtype": "bfloat16"}])
@pytest.mark.parametrize("method", ["share", "coefficients"])
def test_a_stream_holds_in_the_model_what_it_saves(
    share: dict[str, Any], method: str, make: Make, tmp_path: Path
) -> None:
    tasks = classification_tasks("colors", "shapes", "sizes")
    trainer = make(tasks, "stream", share=share, method=method, finetune_num_train_epochs=0.25)
    trainer.train()
    trainer.subspace.save_pretrained(tmp_path / "tree")
    loaded = SharedSubspace.from_pretrained(tmp_path / "tree")
    assert_same_tasks(loaded, trainer.subspace)
    assert loaded.settings.coefficient_dtype == share["coefficient_dtype"]
    smaller = 0
    for module, layer in share_layers(trainer.model).items():
        for task in loaded.tasks:
            expected = loaded.state.layers[module].coefficients_of(task, trimmed="tolerance" in share)
            found = layer.share_coefficients_out[task], layer.share_coefficients_in[task]
            for side, coefficients in zip(found, expected, strict=True):
                assert torch.equal(side.detach(), coefficients)
            smaller += found[0].shape[1] < P
    assert (smaller > 0) <= ("tolerance" in share)


def test_a_stream_continues_from_the_tree_of_another(make: Make, tmp_path: Path) -> None:
    share = {"tolerance": 0.5, "coefficient_dtype": "bfloat16"}
    first = make(classification_tasks("colors", "shapes"), "first", share=share)
    first.train()
    first.subspace.save_pretrained(tmp_path / "tree")
    subspace = SharedSubspace.from_pretrained(tmp_path / "tree")
    second = make(classification_tasks("sizes"), "second", share=share, trainer={"subspace": subspace})
    second.train()
    assert second.subspace.tasks == ("colors", "shapes", "sizes")
    assert second.subspace.settings == first.subspace.settings
