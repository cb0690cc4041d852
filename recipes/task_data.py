"""What the recipes need beside the Trainer: data of any form, YAML beside flags, and quantization."""

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
# By split, the names that data sets have for it; the first one that is there counts.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "validation_matched", "dev_matched"),
    "test": ("test", "test_matched"),
}


def load_task(
    place: str, train_examples: int | None = None, eval_examples: int | None = None, held_out: int = 0
) -> DatasetDict:
    """Data of a task from a jsonl or csv file, a folder of `train`, `validation`, `test` files, or a `datasets` id.

    Without a test split, a tenth of the training data is held out for it.

    Args:
        place: Where the data is.
        train_examples: How many training examples to keep, the first ones; all if not given.
        eval_examples: The same of each other split.
        held_out: How many training examples, the last ones, take the place of the test data.

    Raises:
        ValueError: If there is no training data there, or not enough to hold some out.
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


def load_splits(place: str) -> DatasetDict:
    """The splits of a data set that is anywhere `load_task` finds one, by their usual names.

    Raises:
        ValueError: If there is no training split, or a file of it.
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
    """The splits of a data set that count as `train`, `validation` and `test`, by these names.

    Raises:
        ValueError: If there is no training split.
    """
    return DatasetDict({split: data[name] for split, name in _found_splits(place, list(data)).items()})


def without_unlabelled(name: str, data: DatasetDict, column: str) -> DatasetDict:
    """Splits that a task can be scored on: test splits on the hub often have no labels at all, or -1 for each."""
    kept = DatasetDict(data)
    for split in ("validation", "test"):
        if split in data and (
            column not in data[split].column_names or all(label in (None, -1) for label in data[split][column])
        ):
            logger.warning("Task %r: its %s split has no labels, so another split scores it.", name, split)
            del kept[split]
    return kept


def with_scored_split(data: DatasetDict) -> DatasetDict:
    """Splits of which one can be scored: a tenth of the training data is held out where there is no other."""
    if {"test", "validation"} & set(data):
        return data
    return data["train"].train_test_split(test_size=0.1, seed=0)


def first_examples(data: DatasetDict, train_examples: int | None, eval_examples: int | None = None) -> DatasetDict:
    """Splits with at most so many examples, the first ones of each; all of them if None."""
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
    """By usual name, the split of a data set that counts as it. The others are named in a warning."""
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
    """The split that a task is scored on."""
    return data["test"] if "test" in data else data["validation"]


def parse_tasks(arguments: list[str]) -> dict[str, str]:
    """`name=place` arguments as a dict, in their order."""
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
    """`name=value` or `name=first,second` arguments of a flag, as a dict.

    Raises:
        ValueError: If one is of another form, or names no task, or one twice.
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
    """Those of the tasks' places that are data sets of the hub, without their configurations."""
    return {name: place.split(":")[0] for name, place in places.items() if not Path(place).exists()}


def quantization(load_in_4bit: bool, dtype: torch.dtype, head: str | None = None) -> BitsAndBytesConfig | None:
    """NF4 with quantized constants, computing and, as FSDP wants it, stored in `dtype`; None for a model as it is.

    Args:
        load_in_4bit: Whether to quantize.
        dtype: The dtype.
        head: A module that is trained as a whole, and not quantized; found by transformers if not given.
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
    """Command-line flags after those of `--config file.yaml`, so that a flag overrides the file."""
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
