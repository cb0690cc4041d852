"""Streams of images: pixels that are computed when they are read, heads with labels of each task, and loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, DatasetDict, Features, Image
from peft import AutoPeftModel, LoraConfig, PeftConfig, get_peft_model
from torch.testing import assert_close
from transformers import Trainer, ViTConfig, ViTForImageClassification

from share_hf import ShareCallback, ShareConfig, SharedSubspace, ShareTrainer
from share_hf.format.lora import read_lora
from share_hf.tuner.head import parts_to_keep
from share_hf.tuner.merged_model import base_model_for

from .cases import arguments, config


# The names in newer and in older versions of transformers.
TARGETS = ["q_proj", "v_proj", "query", "value"]
NAMES = {"shades": ("dark", "bright"), "sides": ("left", "middle", "right"), "heights": ("low", "high")}
MAPPING = {
    "base_model_class": "ViTForImageClassification",
    "parent_library": "transformers.models.vit.modeling_vit",
}


@pytest.fixture(scope="module")
def body(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a ViT without a head, as models are published for others to adapt."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, initializer_range=0.2, **sizes))
    model.vit.save_pretrained(folder := tmp_path_factory.mktemp("vit"))
    return folder


@pytest.fixture
def vit(body: Path) -> Callable[[], ViTForImageClassification]:
    return lambda: ViTForImageClassification.from_pretrained(body, num_labels=3)


def images(task: str, rows: int = 24) -> DatasetDict:
    """Images of noise on which a block of pixels determines the label."""
    random, names = np.random.default_rng(len(task)), NAMES[task]
    labels = [row % len(names) for row in range(rows)]
    pixels = random.integers(0, 60, (rows, 8, 8, 3), dtype=np.uint8)
    for row, label in enumerate(labels):
        pixels[row, 2 * label : 2 * label + 2] += np.uint8(150)
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    data = Dataset.from_dict({"image": list(pixels), "label": labels}, features=features)
    return DatasetDict(train=data, test=data)


def read(batch: dict[str, list[Any]]) -> dict[str, Any]:
    """Apply an image processor to a batch."""
    pixels = [torch.tensor(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in batch["image"]]
    return {"pixel_values": torch.stack(pixels), "labels": batch["label"]}


def on_the_fly(*tasks: str) -> dict[str, DatasetDict]:
    return {task: images(task).with_transform(read) for task in tasks or NAMES}


def trainer_of(model: ViTForImageClassification, folder: Path, tasks: Any, **overrides: Any) -> ShareTrainer:
    return ShareTrainer(model, arguments(folder, **overrides), config(TARGETS), tasks)


@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_images_are_read_when_they_are_needed(remove_unused_columns: bool, vit: Any, tmp_path: Path) -> None:
    options = {"max_steps": 12, "remove_unused_columns": remove_unused_columns, "learning_rate": 1e-2}
    trainer = trainer_of(vit(), tmp_path / "out", on_the_fly(), **options)
    trainer.train()
    assert trainer.metrics["score"] == "accuracy"
    assert trainer.metrics["average"] > 0.8
    assert trainer.metrics["forgetting"] == 0


def test_each_task_has_a_head_of_its_own_labels(vit: Any, tmp_path: Path) -> None:
    trainer = trainer_of(vit(), tmp_path / "out", on_the_fly())
    trainer.train()
    tasks = trainer.subspace.state.tasks
    assert {name: info.labels for name, info in tasks.items()} == NAMES
    assert all(info.head.keys() == {"classifier.weight", "classifier.bias"} for info in tasks.values())
    model = SharedSubspace.from_pretrained(tmp_path / "out" / "subspace").apply(vit())
    pixels = images("shades")["test"].with_transform(read)[:]["pixel_values"]
    model.set_adapter("shades")
    with torch.no_grad():
        assert set(model.eval()(pixel_values=pixels).logits.argmax(-1).tolist()) <= {0, 1}


def test_a_head_that_the_checkpoint_has_is_trained_too(vit: Any, tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path / "whole")
    whole = ViTForImageClassification.from_pretrained(tmp_path / "whole")
    assert parts_to_keep(whole, None) == ["classifier"]
    assert parts_to_keep(whole.vit, None) == []


def test_other_parts_of_a_model_are_adapted_as_well(vit: Any, tmp_path: Path) -> None:
    adapted = config(["patch_embeddings.projection", *TARGETS])
    trainer = ShareTrainer(vit(), arguments(tmp_path / "out"), adapted, on_the_fly("shades", "sides"))
    trainer.train()
    layouts = trainer.subspace.state.layouts
    assert [module for module, layout in layouts.items() if layout.kind == "convolution"] == [
        "vit.embeddings.patch_embeddings.projection"
    ]
    assert SharedSubspace.from_pretrained(tmp_path / "out" / "subspace").state.layouts == layouts


def test_images_are_streamed(vit: Any, tmp_path: Path) -> None:
    data = {}
    for task in ("shades", "sides"):
        splits = images(task)
        features = Features(
            {"pixel_values": Array3D((3, 8, 8), "float32"), "label": splits["train"].features["label"]}
        )
        pixels = (
            splits["train"]
            .to_iterable_dataset()
            .map(
                lambda batch: {"pixel_values": read(batch)["pixel_values"].numpy()},
                batched=True,
                remove_columns=["image"],
                features=features,
            )
        )
        data[task] = {"train": pixels, "test": splits["test"].with_transform(read)}
    trainer = trainer_of(vit(), tmp_path / "out", data)
    trainer.train()
    assert trainer.metrics["score"] == "accuracy"
    assert trainer.subspace.state.tasks["sides"].labels == NAMES["sides"]


def test_inputs_find_their_task_by_their_pixels(vit: Any, tmp_path: Path) -> None:
    trainer = trainer_of(vit(), tmp_path / "out", on_the_fly("shades", "sides"), routing=True)
    trainer.train()
    pixels = images("sides")["test"].with_transform(read)[:]["pixel_values"]
    assert trainer.model.route(pixel_values=pixels).tasks == ("shades", "sides")


def test_the_card_and_the_root_name_the_class_of_the_model(vit: Any, tmp_path: Path) -> None:
    trainer = trainer_of(vit(), tmp_path / "out", on_the_fly("sides", "shades"))
    trainer.train()
    tree = tmp_path / "out" / "subspace"
    card = (tree / "README.md").read_text()
    assert "type: image-classification" in card
    assert 'ViTForImageClassification.from_pretrained("the base model", num_labels=3)' in card
    assert 'AutoPeftModel.from_pretrained("org/share-subspace", num_labels=3)' in card
    assert PeftConfig.from_pretrained(tree / "tasks" / "sides").auto_mapping == MAPPING
    pixels = images("shades")["test"].with_transform(read)[:]["pixel_values"]
    loaded = AutoPeftModel.from_pretrained(str(tree), num_labels=3)
    with torch.no_grad():
        found = loaded.eval()(pixel_values=pixels).logits
        assert_close(found, trainer.model.eval()(pixel_values=pixels).logits.clamp(min=-1e4), rtol=1e-3, atol=1e-3)


def test_a_model_to_merge_a_task_into_has_its_class_and_its_labels(vit: Any, body: Path, tmp_path: Path) -> None:
    trainer = trainer_of(vit(), tmp_path / "out", on_the_fly("sides"))
    trainer.train()
    model = base_model_for(body, trainer.subspace.state.tasks["sides"])
    assert type(model) is ViTForImageClassification
    assert list(model.config.id2label.values()) == list(NAMES["sides"])


def test_a_lora_of_images_brings_the_class_of_its_model(vit: Any, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["classifier"], init_lora_weights=False)
    get_peft_model(vit(), lora).save_pretrained(tmp_path / "lora")
    assert read_lora(tmp_path / "lora").target["auto_mapping"] == MAPPING
    SharedSubspace.from_adapters({"a": tmp_path / "lora"}, progress=False).export_lora("a", tmp_path / "exported")
    assert PeftConfig.from_pretrained(tmp_path / "exported").auto_mapping == MAPPING


def test_the_callback_keeps_the_head(vit: Any, tmp_path: Path) -> None:
    model = get_peft_model(vit(), config(TARGETS))
    callback = ShareCallback("shades")
    data = on_the_fly("shades")["shades"]["train"]
    args = arguments(tmp_path / "out", remove_unused_columns=False)
    Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    assert callback.subspace.state.tasks["shades"].head.keys() == {"classifier.weight", "classifier.bias"}


def test_labels_that_the_model_does_not_have_are_refused(body: Path, tmp_path: Path) -> None:
    model = ViTForImageClassification.from_pretrained(body, num_labels=2)
    with pytest.raises(ValueError, match="task 'sides' has label 2, expected integers under num_labels = 2"):
        ShareTrainer(model, arguments(tmp_path / "out"), ShareConfig(target_modules=TARGETS), on_the_fly("sides"))
