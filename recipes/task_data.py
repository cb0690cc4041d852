"""Helpers shared by the recipes: loading of data, settings from YAML files, and quantization."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, DatasetDict, load_dataset
from transformers import BitsAndBytesConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv"}
# The names that data sets give to each split. The first one that exists is used.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "validation_matched", "dev_matched"),
    "test": ("test", "test_matched"),
}


def load_task(
    place: str, train_examples: int | None = None, eval_examples: int | None = None, held_out: int = 0
) -> DatasetDict:
    """Load a task from a jsonl or csv file, a folder of `train`, `validation`, `test` files, or a `datasets` id.

    If there is neither a test nor a validation split, a tenth of the training data is held out as test split.

    Args:
        place: Path or id of the data.
        train_examples: Number of training examples to keep, the first ones. None means all.
        eval_examples: Number of examples to keep in each other split, the first ones. None means all.
        held_out: Number of training examples, the last ones, that replace the other splits as test split.

    Raises:
        ValueError: If `place` has no training data, or not enough to hold some out.
    """
    data = with_scored_split(load_splits(place))
    if held_out:
        if (rest := len(data["train"]) - held_out) < 1:
            raise ValueError(
                f"{place}: {len(data['train'])} training examples, expected more than the {held_out} held out"
            )
        train = data["train"]
        data = DatasetDict(train=train.select(range(rest)), test=train.select(range(rest, len(train))))
    return first_examples(data, train_examples, eval_examples)


def check_score_metric(score_metric: str | None, metrics: Mapping[str, Sequence[str]]) -> None:
    """Refuse a score that a task will not have, before anything is trained.

    Args:
        score_metric: Value of `--score_metric`.
        metrics: Names of the metrics of each task.

    Raises:
        ValueError: If a task does not have the metric. Names the task and its metrics.
    """
    for task, names in metrics.items():
        if score_metric is not None and score_metric not in names:
            raise ValueError(f"--score_metric is {score_metric!r}, expected one of {list(names)}, which {task!r} has")


def load_splits(place: str) -> DatasetDict:
    """Load the splits of a data set from any place that `load_task` accepts, under their usual names.

    Raises:
        ValueError: If there is no training split, or a file is missing.
    """
    path = Path(place)
    if path.is_dir():
        data = _load_folder(path)
    elif path.suffix in FORMATS:
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        data = load_dataset(FORMATS[path.suffix], data_files={"train": str(path)})
    else:
        data = load_dataset(*place.split(":", 1))
    return with_usual_names(place, data)


def with_usual_names(place: str, data: DatasetDict) -> DatasetDict:
    """Return the splits that serve as `train`, `validation` and `test`, under these names.

    Raises:
        ValueError: If there is no training split.
    """
    return DatasetDict({split: data[name] for split, name in _found_splits(place, list(data)).items()})


def without_unlabelled(name: str, data: DatasetDict, column: str) -> DatasetDict:
    """Drop test and validation splits without labels: on the Hub, test splits often have no labels, or only -1."""
    kept = DatasetDict(data)
    for split in ("validation", "test"):
        if split in data and (
            column not in data[split].column_names or all(label in (None, -1) for label in data[split][column])
        ):
            logger.warning("Task %r: its %s split has no labels, so another split scores it.", name, split)
            del kept[split]
    return kept


def with_scored_split(data: DatasetDict) -> DatasetDict:
    """Hold out a tenth of the training data as test split if there is no other split to score on."""
    if {"test", "validation"} & set(data):
        return data
    return data["train"].train_test_split(test_size=0.1, seed=0)


def first_examples(data: DatasetDict, train_examples: int | None, eval_examples: int | None = None) -> DatasetDict:
    """Return splits with at most this many examples, the first ones of each. None means all."""
    kept = DatasetDict(data)
    for split, rows in data.items():
        most = train_examples if split == "train" else eval_examples
        if most is not None:
            kept[split] = rows.select(range(min(most, len(rows))))
    return kept


def _load_folder(folder: Path) -> DatasetDict:
    files = {file.stem: file for file in sorted(folder.iterdir()) if file.suffix in FORMATS}
    found = {split: files[name] for split, name in _found_splits(str(folder), list(files)).items()}
    formats = {FORMATS[file.suffix] for file in found.values()}
    if len(formats) > 1:
        raise ValueError(f"{folder}: {sorted(file.name for file in found.values())}, expected files of one format")
    return load_dataset(formats.pop(), data_files={split: str(file) for split, file in found.items()})


def _found_splits(place: str, names: list[str]) -> dict[str, str]:
    """Map each usual name to the split that serves as it. A warning names the splits that are not used."""
    found = {
        split: next(name for name in known if name in names)
        for split, known in SPLITS.items()
        if set(known) & set(names)
    }
    if "train" not in found:
        raise ValueError(f"{place}: has splits {names}, expected 'train' among them, such as train.jsonl in a folder")
    if unused := [name for name in names if name not in found.values()]:
        logger.warning("%s: splits %s are not used, only %s are.", place, unused, sorted(found.values()))
    return found


def evaluation_of(data: DatasetDict) -> Dataset:
    """Return the split that a task is scored on."""
    return data["test"] if "test" in data else data["validation"]


def parse_tasks(arguments: list[str]) -> dict[str, str]:
    """Parse `name=place` arguments to a dict, in their order."""
    tasks: dict[str, str] = {}
    for argument in arguments:
        name, separator, place = argument.partition("=")
        if not separator or not place:
            raise ValueError(f"--tasks has {argument!r}, expected name=path or name=dataset-id")
        if name in tasks:
            raise ValueError(f"--tasks has {name!r} twice, expected each task once")
        tasks[name] = place
    return tasks


def by_task(flag: str, arguments: Sequence[str], tasks: Collection[str]) -> dict[str, list[str]]:
    """Parse the `name=value` or `name=first,second` arguments of a flag to a dict.

    Raises:
        ValueError: If an argument has another form, names an unknown task, or names a task a second time.
    """
    values: dict[str, list[str]] = {}
    for argument in arguments:
        name, separator, value = argument.partition("=")
        if not separator or not value:
            raise ValueError(f"{flag} has {argument!r}, expected name=value or name=first,second")
        if name not in tasks:
            near = get_close_matches(name, tasks)
            raise ValueError(
                f"{flag} has {name!r}, expected one of --tasks, {list(tasks)}{f': {near[0]!r}?' if near else ''}"
            )
        if name in values:
            raise ValueError(f"{flag} has {name!r} twice, expected each task once")
        values[name] = value.split(",")
    return values


def dataset_ids(places: Mapping[str, str]) -> dict[str, str]:
    """Return the places that are data sets on the Hub, by task, without their configurations."""
    return {name: place.split(":")[0] for name, place in places.items() if not Path(place).exists()}


def quantization(load_in_4bit: bool, dtype: torch.dtype, head: str | None = None) -> BitsAndBytesConfig | None:
    """Return a configuration for NF4 with quantized constants, or None to leave the model as it is.

    Args:
        load_in_4bit: Whether to quantize.
        dtype: Data type to compute in and, because FSDP requires it, to store the weights in.
        head: Name of a module that is trained in full and therefore not quantized. None means that transformers
            finds it.
    """
    if not load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
        llm_int8_skip_modules=None if head is None else [head],
    )


def flags_with_config(argv: list[str] | None = None) -> list[str]:
    """Expand `--config file.yaml` to flags and put them before the others, so that a flag overrides the file."""
    argv = sys.argv[1:] if argv is None else argv
    if "--config" not in argv:
        return argv
    position = argv.index("--config")
    values: dict[str, Any] = yaml.safe_load(Path(argv[position + 1]).read_text())
    flags: list[str] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            value = [
                f"{key}={','.join(map(str, item)) if isinstance(item, list) else item}" for key, item in value.items()
            ]
        flags += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return [*flags, *argv[:position], *argv[position + 2 :]]
