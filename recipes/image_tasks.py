"""Image tasks from folders, from data sets on the Hub, and from the digits that ship with scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import ClassLabel, DatasetDict, Features, Image, load_dataset
from digits import PREFIX, digits_of
from task_data import with_scored_split, with_usual_names, without_unlabelled
from transformers import BaseImageProcessor


def load_images(
    place: str,
    train_examples: int | None = None,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
) -> DatasetDict:
    """Return the splits of a task, with the columns `image` and `label`.

    If there is neither a test nor a validation split, a tenth of the training data is held out as test split.

    Args:
        place: Folder in the `imagefolder` format of datasets, such as one with a folder of images for each label; a
            `datasets` id; or a task of `digits`, such as `digits:even-odd`.
        train_examples: Number of examples to train on, drawn at random because folders list one label after the other.
            None means all.
        image_column: Name of the column of images. None means `image`, `images`, or the only column of images.
        label_column: Name of the column of labels. None means `label`, `labels`, or the only column of classes.

    Raises:
        ValueError: If there is no training split, or a column cannot be found.
    """
    if place.startswith(PREFIX):
        data = digits_of(place)
    elif Path(place).is_dir():
        data = load_dataset("imagefolder", data_dir=place)
    else:
        data = load_dataset(place)
    data = with_usual_names(place, data)
    features = data["train"].features
    columns = {
        _column(place, "image", image_column, features, Image): "image",
        (labels := _column(place, "label", label_column, features, ClassLabel)): "label",
    }
    data = without_unlabelled(place, data, labels)
    data = _with_classes(place, data.select_columns(list(columns)).rename_columns(columns))
    data = with_scored_split(data)
    if train_examples is not None:
        data["train"] = data["train"].shuffle(seed=0).select(range(min(train_examples, len(data["train"]))))
    return data


def with_pixels(data: DatasetDict, processor: BaseImageProcessor) -> DatasetDict:
    """Return the same data with images that become `pixel_values` (3, height, width) when they are read."""

    def read(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch["image"]]
        return {**processor(images, return_tensors="pt"), "labels": batch["label"]}

    return data.with_transform(read)


def _column(place: str, name: str, given: str | None, features: Features, kind: type) -> str:
    """Find a column: the given one, the one with this name (or its plural), or the only one of its kind."""
    of_kind = [column for column, feature in features.items() if isinstance(feature, kind)]
    if given is None:
        given = next((column for column in (name, f"{name}s") if column in features), None)
    if given is None and len(of_kind) == 1:
        given = of_kind[0]
    if given not in features:
        found = "not found" if given is None else repr(given)
        raise ValueError(
            f"{place}: the column with the {name}s is {found}, expected one of {sorted(features)}: give "
            f"--{name}_column"
        )
    return given


def _with_classes(place: str, data: DatasetDict) -> DatasetDict:
    """Return the same data with class labels; labels without classes get those found in the training data."""
    if isinstance(data["train"].features["label"], ClassLabel):
        return data
    names = sorted({str(label) for label in data["train"]["label"]})
    for split, part in data.items():
        if unseen := sorted({str(label) for label in part["label"]} - set(names)):
            raise ValueError(f"{place}: {split} has label {unseen[0]!r}, expected one of the training data's: {names}")
    numbers = {name: number for number, name in enumerate(names)}
    features = Features({**data["train"].features, "label": ClassLabel(names=names)})
    return data.map(lambda example: {"label": numbers[str(example["label"])]}, features=features)
