"""What both stream recipes need beside the Trainer: data of any form, YAML beside flags, and LoRA baselines."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, DatasetDict, load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging

from share_hf.continual import ContinualMetrics
from share_hf.continual.progress import StreamProgressCallback


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
    found = _found_splits(place, list(data))
    return DatasetDict({split: data[name] for split, name in found.items()})


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


def quantization(load_in_4bit: bool, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """NF4 with quantized constants, computing and, as FSDP wants it, stored in `dtype`; None for a model as it is."""
    if not load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
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


class HeadsOfTasks:
    """Gives an adapter that learns several tasks a head of its own for each, as the tasks of other methods have.

    Args:
        model: Has the adapter.
        adapter: Its name. Its head as it is now is what each task begins with.
    """

    def __init__(self, model: PeftModel, adapter: str) -> None:
        wrappers = (module for module in model.modules() if isinstance(module, ModulesToSaveWrapper))
        self._modules = [wrapper.modules_to_save[adapter] for wrapper in wrappers]
        self._fresh = self._copies()
        self._learned: dict[str, list[dict[str, Tensor]]] = {}
        self._task: str | None = None

    def use(self, task: str) -> None:
        """Put the head of a task in the place of that of another."""
        if self._task is not None:
            self._learned[self._task] = self._copies()
        for module, tensors in zip(self._modules, self._learned.get(task, self._fresh), strict=True):
            module.load_state_dict(tensors)
        self._task = task

    def _copies(self) -> list[dict[str, Tensor]]:
        return [copy.deepcopy(module.state_dict()) for module in self._modules]


def train_loras(
    model: PreTrainedModel,
    args: TrainingArguments,
    lora_config: LoraConfig,
    tasks: Mapping[str, DatasetDict],
    score: Callable[[Trainer, str, Dataset], float],
    *,
    sequential: bool,
    prepare: Callable[[PeftModel, str], None] = lambda model, task: None,
    score_names: Mapping[str, str] | None = None,
    finish: Callable[[PeftModel, Mapping[str, str]], None] = lambda model, names: None,
    **trainer_kwargs: Any,
) -> ContinualMetrics:
    """The baselines: a LoRA of its own for each task, or one LoRA trained on all tasks in their order.

    Args:
        model: The base model.
        args: Arguments of every task's training.
        lora_config: Configuration of every LoRA.
        tasks: The stream.
        score: Scores the active adapter on a task.
        sequential: One LoRA for all tasks. Each has a head of its own all the same.
        prepare: Called before a task is trained or scored.
        score_names: By task, what it is scored by; accuracy if not given.
        finish: Called at the end, with the name of each task's adapter.
        trainer_kwargs: For the Trainer.
    """
    metrics = ContinualMetrics(score_names=dict(score_names or {}), tasks=list(tasks), baseline=[None] * len(tasks))
    names = {task: "sequential" if sequential else task for task in tasks}
    first = names[next(iter(tasks))]
    peft_model = get_peft_model(model, copy.deepcopy(lora_config), adapter_name=first)
    heads = HeadsOfTasks(peft_model, first) if sequential else None
    for position, (task, data) in enumerate(tasks.items()):
        started = time.monotonic()
        set_seed(args.seed + 2 * position)
        if names[task] not in peft_model.peft_config:
            peft_model.add_adapter(names[task], copy.deepcopy(lora_config))
        peft_model.set_adapter(names[task])
        if heads is not None:
            heads.use(task)
        prepare(peft_model, task)
        trainer = Trainer(model=peft_model, args=args, train_dataset=data["train"], **trainer_kwargs)
        progress = StreamProgressCallback()
        progress.title = f"{task} [lora]"
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(progress)
        trainer.train()
        row: list[float | None] = [None] * len(tasks)
        for j, seen in enumerate(list(tasks)[: position + 1]):
            if not sequential and j < position:  # its LoRA is what it was
                row[j] = metrics.matrix[-1][j]
                continue
            peft_model.set_adapter(names[seen])
            if heads is not None:
                heads.use(seen)
            prepare(peft_model, seen)
            row[j] = score(trainer, seen, evaluation_of(tasks[seen]))
        metrics.matrix.append(row)
        progress.task_line(metrics, "sequential" if sequential else "lora", time.monotonic() - started)
    finish(peft_model, names)
    return metrics
