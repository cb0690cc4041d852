"""A subspace whose modules transformers has renamed since is continued under the model's names."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import Trainer

from share_hf import ShareCallback, ShareConfig, SharedSubspace, ShareTrainer, ShareTrainingArguments
from tests.continual.cases import language_task
from tests.llava import TARGETS, as_before_4_52, tiny_llava
from tests.trees import assert_close, logits, lora_config, named, plain_logits, save_adapter


@pytest.fixture
def old_adapter(tmp_path: Path) -> Path:
    folder = save_adapter(named(tiny_llava()), tmp_path / "old", lora_config(target_modules=TARGETS), 1)
    path = folder / "adapter_model.safetensors"
    save_file({as_before_4_52(key): value for key, value in load_file(path).items()}, path)
    return folder


def arguments(folder: Path) -> ShareTrainingArguments:
    return ShareTrainingArguments(
        str(folder / "out"),
        max_steps=2,
        per_device_train_batch_size=8,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )


def assert_continued(subspace: SharedSubspace, old_adapter: Path) -> None:
    assert subspace.tasks == ("old", "new")
    assert len(subspace.state.layers) == 4
    assert all(layer.tasks == ("old", "new") for layer in subspace.state.layers.values())
    assert_close(logits(subspace.apply(tiny_llava(), ["old"])), plain_logits(tiny_llava(), old_adapter), 1e-3)


def test_a_stream_continues(old_adapter: Path, tmp_path: Path) -> None:
    subspace = SharedSubspace.from_adapters([old_adapter], num_components=12, pseudo_rank=4, progress=False)
    config = ShareConfig(num_components=12, pseudo_rank=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    trainer = ShareTrainer(
        tiny_llava(), arguments(tmp_path), config, tasks={"new": language_task(1)}, subspace=subspace
    )
    trainer.train()
    assert_continued(trainer.subspace, old_adapter)


def test_a_callback_continues(old_adapter: Path, tmp_path: Path) -> None:
    subspace = SharedSubspace.from_adapters([old_adapter], num_components=12, pseudo_rank=4, progress=False)
    callback = ShareCallback("new", subspace)
    model = subspace.apply(tiny_llava(), trainable=True)
    Trainer(model, arguments(tmp_path), train_dataset=language_task(1)["train"], callbacks=[callback]).train()
    assert_continued(callback.subspace, old_adapter)
