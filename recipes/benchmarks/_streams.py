"""Streams of the benchmark of continual learning, and their data in the form that the recipes read."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


Example = dict[str, Any]

VALIDATION = 1000  # training examples per task, at most a fifth, that candidate settings are scored on
FIFTY_TEST = 200  # test examples of each of the fifty tasks


@dataclass(frozen=True)
class Stream:
    """A set of tasks and the orders in which they are learned.

    Args:
        folder: Folder of the tasks' data, relative to the folder of all data.
        orders: Names of the tasks in each order.
        train_examples: Largest number of training examples per task.
        target_modules: Modules to adapt, in the form that a recipe takes.
        metrics: Metric by task; accuracy for the others.
        elsewhere: Folder by task, for tasks whose data is not in `folder`.
    """

    folder: str
    orders: tuple[tuple[str, ...], ...]
    train_examples: int
    target_modules: str
    metrics: Mapping[str, str] = field(default_factory=dict)
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    def metric(self, task: str) -> str:
        return self.metrics.get(task, "accuracy")


@dataclass(frozen=True)
class Slice:
    """A task made from a part of another one.

    Args:
        source: Name of the task whose examples it takes.
        labels: New label by label of the source; examples with other labels are left out. None keeps all labels.
        part: Number of the part of the training examples, and number of parts.
    """

    source: str
    labels: Mapping[str, str] | None = None
    part: tuple[int, int] = (0, 1)

    def of(self, examples: list[Example]) -> list[Example]:
        labels = self.labels
        if labels is None:
            return examples
        return [{**example, "label": labels[example["label"]]} for example in examples if example["label"] in labels]


def _sentiment(source: str) -> dict[str, Slice]:
    """Return tasks made from reviews with five labels: pairs to distinguish, and coarser labels."""
    pairs = {
        "extremes": ("very negative", "very positive"),
        "bad-or-best": ("negative", "very positive"),
        "worst-or-good": ("very negative", "positive"),
        "bad-or-good": ("negative", "positive"),
        "worst-or-neutral": ("very negative", "neutral"),
        "neutral-or-best": ("neutral", "very positive"),
    }
    polarity = {"very negative": "bad", "negative": "bad", "positive": "good", "very positive": "good"}
    tasks = {f"{source}-{name}": Slice(source, {label: label for label in pair}) for name, pair in pairs.items()}
    tasks[f"{source}-polarity"] = Slice(source, polarity, (1, 2))
    tasks[f"{source}-three"] = Slice(source, {**polarity, "neutral": "neutral"}, (1, 2))
    return {**tasks, f"{source}-five": Slice(source, None, (0, 2))}


def _fifty() -> dict[str, Slice]:
    topics = ("World", "Sports", "Science or Technology", "Business")
    short = dict(zip(topics, ("world", "sports", "science", "business"), strict=True))
    tasks: dict[str, Slice] = {}
    for i, one in enumerate(topics):
        for other in topics[i + 1 :]:
            tasks[f"agnews-{short[one]}-{short[other]}"] = Slice("agnews", {one: one, other: other})
        rest = dict.fromkeys(topics, "other") | {one: one}
        tasks[f"agnews-{short[one]}-or-not"] = Slice("agnews", rest, (i, 4))
    public = {"World": "public", "Business": "public", "Sports": "leisure", "Science or Technology": "leisure"}
    tasks["agnews-public"] = Slice("agnews", public)
    tasks |= {f"agnews-four-{i}": Slice("agnews", None, (i, 2)) for i in range(2)}
    tasks |= _sentiment("amazon") | _sentiment("yelp")
    for source, parts in {"imdb": 3, "sst2": 4, "mnli": 2, "rte": 2, "wic": 2, "cb": 1}.items():
        tasks |= {f"{source}-{i}": Slice(source, None, (i, parts)) for i in range(parts)}
    relations = ("entailment", "neutral", "contradiction")
    for left_out in relations:
        kept = [relation for relation in relations if relation != left_out]
        tasks[f"mnli-{kept[0]}-or-{kept[1]}"] = Slice("mnli", {relation: relation for relation in kept})
    tasks["mnli-entailment-or-not"] = Slice("mnli", dict.fromkeys(relations, "no") | {"entailment": "entailment"})
    tasks["cb-entailment-or-contradiction"] = Slice("cb", {name: name for name in ("entailment", "contradiction")})
    return tasks


FIFTY = _fifty()
_SHUFFLED = random.Random(0).sample(sorted(FIFTY), len(FIFTY))

STREAMS: dict[str, Stream] = {
    "glue": Stream(
        "glue",
        (("cola", "mrpc", "rte", "stsb", "qnli", "sst2"),),  # the order of the paper
        1000,
        "query,value",
        {"cola": "matthews_correlation", "stsb": "pearson"},
    ),
    "nine": Stream(
        "cl_bench",
        (
            ("agnews", "amazon", "yelp", "sst2", "imdb", "rte", "mnli", "wic", "cb"),
            ("wic", "yelp", "mnli", "agnews", "cb", "imdb", "rte", "amazon", "sst2"),
            ("imdb", "cb", "sst2", "rte", "amazon", "mnli", "agnews", "wic", "yelp"),
        ),
        1000,
        "query,value",
    ),
    "fifty": Stream("cl_bench", (tuple(_SHUFFLED),), 300, "query,value,intermediate.dense"),
    "smollm2": Stream(
        "cl_bench",
        (("agnews", "mrpc", "sst2", "qnli"),),
        400,
        "all-linear",
        elsewhere={"mrpc": "glue", "qnli": "glue"},
    ),
}


def write_data(stream: str, data: Path, folder: Path, *, validation: bool = False) -> dict[str, str]:
    """Write the data of a stream's tasks in the form that the recipes read.

    Training examples are shuffled, because some files sort them by source: the first thousand of STS-B come from a
    single one. Values to be predicted are standardized with the mean and deviation of the training examples. A head
    that starts near zero would otherwise spend its first steps on their mean and, at higher rates, so would the model.

    Args:
        stream: Name of the stream.
        data: Folder of all data.
        folder: Folder to write to.
        validation: Whether held-out training examples take the place of the test examples, to choose settings on.

    Returns:
        Folder of the data by task.
    """
    declared, places = STREAMS[stream], {}
    for task in sorted(declared.orders[0]):
        part = FIFTY[task] if stream == "fifty" else Slice(task)
        source = data / declared.elsewhere.get(task, declared.folder) / part.source
        train, test = (list(_examples(source / f"{split}.jsonl")) for split in ("train", "test"))
        random.Random(0).shuffle(train)
        train = part.of(train)[part.part[0] :: part.part[1]]
        if validation:
            held_out = min(VALIDATION, len(train) // 5)
            train, test = train[:-held_out], train[-held_out:]
        else:
            test = part.of(test)[:FIFTY_TEST] if stream == "fifty" else part.of(test)
        train, test = _standardized(train, test)
        for split, examples in (("train", train), ("test", test)):
            _write(folder / task / f"{split}.jsonl", examples)
        places[task] = str(folder / task)
    return places


def _standardized(train: list[Example], test: list[Example]) -> tuple[list[Example], list[Example]]:
    """Return the examples with values that have mean 0 and deviation 1 over the training examples."""
    if not any(isinstance(example["label"], float) for example in train):  # classes
        return train, test
    values = [float(example["label"]) for example in train]
    mean, deviation = statistics.mean(values), statistics.pstdev(values) or 1.0
    return tuple(
        [{**example, "label": (float(example["label"]) - mean) / deviation} for example in examples]
        for examples in (train, test)
    )


def _examples(path: Path) -> Iterator[Example]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def _write(path: Path, examples: list[Example]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    draft.replace(path)
