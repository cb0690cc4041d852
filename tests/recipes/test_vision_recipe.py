"""The recipe for images as a person runs it: digits, folders of images, and messages about unexpected data."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Images
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from share_hf import SharedSubspace

from .test_recipes import RECIPES, launch, refusal, shown_average


pytest.importorskip("sklearn", reason="scikit-learn, which carries the digits, is not installed")

SMALL = ("--train_examples", "48", "--num_train_epochs", "1", "--num_components", "8", "--pseudo_rank", "2")


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the recipes, which belong to no package."""
    monkeypatch.syspath_prepend(RECIPES)
    return importlib.import_module("digits")


@pytest.fixture
def image_tasks(digits: ModuleType) -> ModuleType:
    return importlib.import_module("image_tasks")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny ViT with random weights, a head with four labels and a processor of images."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vit")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=4, **sizes)).save_pretrained(folder)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture
def shades(tmp_path: Path) -> Path:
    """A folder with a folder of images for each of three labels. Their sizes differ, and some have no colours."""
    random = np.random.default_rng(0)
    for number, name in enumerate(("bright", "dark", "grey")):
        (tmp_path / "shades" / name).mkdir(parents=True)
        for i in range(20):
            pixels = random.integers(80 * number, 80 * number + 60, (10 + i, 12, 3), dtype=np.uint8)
            image = Images.fromarray(pixels if i % 4 else pixels[:, :, 0])
            image.save(tmp_path / "shades" / name / f"{i}.png")
    return tmp_path / "shades"


def test_no_image_of_a_task_is_there_to_pretrain_on_or_in_both_of_its_splits(digits: ModuleType) -> None:
    numbers = [set(range(1797)[part]) for part in digits.SPLITS.values()]
    assert sum(map(len, numbers)) == len(set.union(*numbers)) == 1797
    assert [len(digits.digits(split)) for split in digits.SPLITS] == [898, 500, 399]


def test_tasks_of_digits_differ_in_labels_and_in_look(digits: ModuleType) -> None:
    plain, other = digits.digits_of("digits:ten"), digits.digits_of("digits:inverted,prime")
    label = plain["test"].features["label"]
    assert label.names == [str(digit) for digit in range(10)]
    assert other["test"].features["label"].names == ["not prime", "prime"]
    for row in range(20):
        digit = int(label.int2str(plain["test"][row]["label"]))
        assert other["test"][row]["label"] == (digit in (2, 3, 5, 7))
    pixels = np.array(plain["train"][0]["image"])
    assert pixels.shape == (8, 8)
    assert 200 < pixels.max() <= 255
    assert np.array_equal(np.array(other["train"][0]["image"]), 255 - pixels)
    turned = {
        look: np.array(digits.digits_of(f"digits:{look}")["train"][0]["image"]) for look in ("rotated", "mirrored")
    }
    assert np.array_equal(turned["rotated"], np.rot90(pixels))
    assert np.array_equal(turned["mirrored"], np.fliplr(pixels))


@pytest.mark.parametrize("place", ["digits:odd", "digits:", "digits:prime,even-odd", "digits:ten,rotated,rotated"])
def test_tasks_of_digits_that_are_none_are_refused_with_those_there_are(place: str, digits: ModuleType) -> None:
    with pytest.raises(ValueError, match=rf"'{place}' is not a digits task, expected one of \['ten', 'even-odd'"):
        digits.digits_of(place)


def saved(folder: Path, monkeypatch: pytest.MonkeyPatch, image_tasks: ModuleType, **splits: dict[str, Any]) -> None:
    """Let `load_dataset` find these columns with ten images each, as if they were on the Hub."""
    image = Images.fromarray(np.zeros((4, 4), dtype=np.uint8))
    data = {
        split: Dataset.from_dict(
            {name: [image] * 10 if values == "images" else values for name, values in columns.items()},
            features=Features(
                {name: Image() if values == "images" else Value("string") for name, values in columns.items()}
            ),
        )
        for split, columns in splits.items()
    }
    monkeypatch.setattr(image_tasks, "load_dataset", lambda place: DatasetDict(data))


def test_columns_are_found_by_their_names_or_kinds(
    image_tasks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ["cat", "dog"] * 5
    saved(tmp_path, monkeypatch, image_tasks, train={"img": "images", "labels": kinds, "place": ["here"] * 10})
    data = image_tasks.load_images("org/animals", 4)
    assert {name: len(split) for name, split in data.items()} == {"train": 4, "test": 1}
    assert data["train"].column_names == ["image", "label"]
    assert data["train"].features["label"].names == ["cat", "dog"]
    chosen = image_tasks.load_images("org/animals", label_column="place")
    assert chosen["train"].features["label"].names == ["here"]
    with pytest.raises(
        ValueError, match=r"org/animals: the column with the images is 'picture', expected one of \['im"
    ):
        image_tasks.load_images("org/animals", image_column="picture")


def test_columns_and_labels_that_are_not_there_are_refused(
    image_tasks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ["cat", "dog"] * 5
    saved(tmp_path, monkeypatch, image_tasks, train={"img": "images", "kind": kinds})
    with pytest.raises(ValueError, match=r"the column with the labels is not found.*\['img', 'kind'\]: give --la"):
        image_tasks.load_images("org/animals")
    both = {"train": {"image": "images", "label": kinds}, "test": {"image": "images", "label": ["cow"] * 10}}
    saved(tmp_path, monkeypatch, image_tasks, **both)
    with pytest.raises(ValueError, match=r"org/animals: test has label 'cow', expected one of .*\['cat', 'dog'\]"):
        image_tasks.load_images("org/animals")
    saved(tmp_path, monkeypatch, image_tasks, test=both["test"])
    with pytest.raises(ValueError, match=r"org/animals: has splits \['test'\], expected 'train' among them"):
        image_tasks.load_images("org/animals")


def test_splits_are_found_and_those_without_labels_score_nothing(
    image_tasks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {"image": "images", "label": ["cat", "dog"] * 5}
    unlabelled = {"image": "images", "label": [None] * 10}
    saved(tmp_path, monkeypatch, image_tasks, training=kinds, dev=kinds, test=unlabelled)
    data = image_tasks.load_images("org/animals")
    assert {name: len(split) for name, split in data.items()} == {"train": 10, "validation": 10}
    saved(tmp_path, monkeypatch, image_tasks, train=kinds, test={"image": "images"})
    data = image_tasks.load_images("org/animals")
    assert {name: len(split) for name, split in data.items()} == {"train": 9, "test": 1}


def test_images_become_pixels_of_the_size_of_the_model(image_tasks: ModuleType, vit: Path, shades: Path) -> None:
    data = image_tasks.load_images(str(shades), 30)
    assert data["train"].features["label"].names == ["bright", "dark", "grey"]
    assert {len(data["train"]), len(data["test"])} == {30, 6}
    assert len(set(data["train"]["label"])) == 3
    batch = image_tasks.with_pixels(data, AutoImageProcessor.from_pretrained(vit))["train"][:8]
    assert batch.keys() == {"pixel_values", "labels"}
    assert batch["pixel_values"].shape == (8, 3, 8, 8)


def run(vit: Path, shades: Path, *flags: str) -> str:
    tasks = ("--tasks", "parity=digits:even-odd", f"shades={shades}")
    name = ("--model_name_or_path", str(vit))
    return launch("vision_stream.py", *name, *tasks, "--num_init_tasks", "1", *SMALL, *flags, cwd=shades.parent)


def test_vision_stream_leaves_a_tree_that_loads(vit: Path, shades: Path) -> None:
    output = run(vit, shades)
    tree = shades.parent / "vision-stream" / "subspace"
    subspace = SharedSubspace.from_pretrained(tree)
    assert {name: info.labels for name, info in subspace.state.tasks.items()} == {
        "parity": ("even", "odd"),
        "shades": ("bright", "dark", "grey"),
    }
    assert [subspace.state.tasks[name].learned_by for name in subspace.tasks] == ["init", "adapt"]
    assert subspace.state.metrics["average"] == pytest.approx(shown_average(output), abs=6e-4)
    assert "type: image-classification" in (tree / "README.md").read_text()
    model = AutoModelForImageClassification.from_pretrained(vit, num_labels=3, ignore_mismatched_sizes=True)
    assert subspace.apply(model)(pixel_values=torch.zeros(1, 3, 8, 8)).logits.shape == (1, 3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["coefficients", "per_task_lora", "sequential_lora"])
def test_vision_stream_runs_every_method(method: str, vit: Path, shades: Path) -> None:
    (shades.parent / "stream.yaml").write_text("method: share\nbf16: true\nuse_cpu: true")
    output = run(vit, shades, "--config", "stream.yaml", "--method", method)
    assert 0 <= shown_average(output) <= 1
    assert (shades.parent / "vision-stream" / "subspace").exists() == (method == "coefficients")


@pytest.mark.slow
def test_vision_stream_learns_on_a_quantized_model(vit: Path, shades: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed", exc_type=ImportError)
    assert 0 <= shown_average(run(vit, shades, "--load_in_4bit")) <= 1


def test_a_task_that_is_none_says_what_was_expected(vit: Path, tmp_path: Path) -> None:
    said = refusal("vision_stream.py", "--model_name_or_path", str(vit), "--tasks", "a=digits:odd", cwd=tmp_path)
    assert "'digits:odd' is not a digits task, expected one of" in said


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_digits_are_learned_as_by_a_lora_each_and_none_is_forgotten(tmp_path: Path) -> None:
    launch("train_digits_vit.py", "digits-vit", cwd=tmp_path)
    matrices = {}
    for method in ("share", "per_task_lora", "sequential_lora"):
        flags = ("--model_name_or_path", "digits-vit", "--method", method)
        output = launch("vision_stream.py", *flags, cwd=tmp_path)
        last = output.strip().split("accuracy: average")[0].strip().splitlines()[-1]
        matrices[method] = [float(score) for score in re.findall(r"\d\.\d+", last)]
        assert len(matrices[method]) == 6
    share, lora, sequential = (np.array(scores) for scores in matrices.values())
    assert share.mean() > lora.mean() - 0.05
    assert share[:-1].mean() > sequential[:-1].mean() + 0.1
    metrics = json.loads((tmp_path / "vision-stream" / "subspace" / "metrics.json").read_text())
    assert all(metrics["matrix"][-1][j] >= metrics["matrix"][j][j] - 0.01 for j in range(6))
