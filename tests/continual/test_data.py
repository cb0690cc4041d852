"""Data that a Trainer accepts: streamed or not, from datasets or torch, in splits with any name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, Sequence, Value
from transformers import PreTrainedModel

from share_hf import ShareTrainer

from .cases import (
    LLAMA_TARGETS,
    arguments,
    assert_same_tasks,
    classification_task,
    classifier_trainer,
    config,
    language_task,
)


TinyModel = Callable[[str], PreTrainedModel]
Make = Callable[..., ShareTrainer]


class Rows(torch.utils.data.Dataset):
    """Rows by number, about which nothing else is known."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.rows[i]


class Stream(torch.utils.data.IterableDataset):
    """A stream of rows that starts from the beginning each time."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


class OneShot(Stream):
    """A stream that can be read once."""

    def __init__(self, rows: Dataset) -> None:
        self.iterator = iter(rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.iterator


@pytest.fixture
def classifier(tiny_model: TinyModel, tmp_path: Path) -> Make:
    def build(tasks: Any, name: str = "stream", **changes: Any) -> ShareTrainer:
        return classifier_trainer(tiny_model("bert"), tmp_path / name, tasks, **changes)

    return build


@pytest.fixture
def language(tiny_model: TinyModel, tmp_path: Path) -> Make:
    def build(tasks: Any, name: str = "stream", **changes: Any) -> ShareTrainer:
        model = tiny_model("llama")
        return ShareTrainer(model, arguments(tmp_path / name, **changes), config(LLAMA_TARGETS), tasks)

    return build


def test_data_of_torch_is_learned_and_scored_as_that_of_datasets(classifier: Make) -> None:
    data = {"colors": classification_task(0, 2), "shapes": classification_task(1, 3)}
    rows = {task: {split: Rows(of_split) for split, of_split in splits.items()} for task, splits in data.items()}
    expected, found = classifier(data, "expected"), classifier(rows, "found")
    for trainer in (expected, found):
        trainer.train()
    assert_same_tasks(found.subspace, expected.subspace)
    assert found.metrics["matrix"] == expected.metrics["matrix"]


@pytest.mark.parametrize("stream", [Dataset.to_iterable_dataset, Stream], ids=["datasets", "torch"])
def test_streamed_data_is_learned_in_its_order_and_scored(stream: Callable[[Dataset], Any], language: Make) -> None:
    data = {"a": language_task(0), "b": language_task(1)}
    streams = {task: {split: stream(of_split) for split, of_split in splits.items()} for task, splits in data.items()}
    changes = dict(eval_strategy="steps", eval_steps=2, finetune_num_train_epochs=1)
    expected = language(data, "expected", train_sampling_strategy="sequential", **changes)
    found = language(streams, "found", **changes)
    for trainer in (expected, found):
        trainer.train()
    assert_same_tasks(found.subspace, expected.subspace)
    assert found.metrics["matrix"] == expected.metrics["matrix"]


def test_a_streamed_classification_has_its_labels_in_its_features(classifier: Make) -> None:
    data = classification_task(0, 2, names=("red", "green"))
    streams = {split: of_split.to_iterable_dataset() for split, of_split in data.items()}
    trainer = classifier({"colors": streams})
    trainer.train()
    assert trainer.subspace.state.tasks["colors"].labels == ("red", "green")
    assert (trainer.subspace.state.tasks["colors"].head["classifier.bias"] < -100).tolist() == [False, False, True]


PLAIN = classification_task(0, 2)
LANGUAGE = language_task(0)
FEATURES = Features(input_ids=Sequence(Value("int64")), labels=ClassLabel(num_classes=4))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (PLAIN["train"].to_iterable_dataset(), "task 'a' is streamed, .*expected features with a datasets.ClassLabel"),
        (Stream(PLAIN["train"]), "task 'a' is streamed, .*expected features with a datasets.ClassLabel for 'labels'"),
        (
            IterableDataset.from_generator(lambda: iter(PLAIN["train"]), features=FEATURES),
            "task 'a' has label 3, expected integers under num_labels = 3",
        ),
        (Rows([([1, 2], 0), ([3, 4], 1)]), "task 'a' has a tuple as an example, expected a mapping with one of"),
        (Rows([{"input_ids": [1, 2]}]), r"task 'a' has columns \['input_ids'\], expected one of"),
        (
            {"train": PLAIN["train"], "test": Rows([{"input_ids": [1, 2], "labels": torch.tensor(2)}])},
            "task 'a' has label 2 in its evaluation data",
        ),
        ("imdb", "task 'a' has a str as its train data, expected a data set of datasets or torch"),
        ({"train": PLAIN["train"], "test": {"x": 1}}, "task 'a' has a dict as its test data"),
        (
            {"train": PLAIN["train"], "validation_matched": PLAIN["test"], "validation_mismatched": PLAIN["test"]},
            r"task 'a' has splits \[.*'validation_matched'.*\], expected one of \('test', 'validation', 'eval'\) .*"
            r"'test': data\['validation_matched'\]",
        ),
    ],
)
def test_data_that_no_task_can_be_made_of_is_refused(data: Any, message: str, classifier: Make) -> None:
    with pytest.raises(ValueError, match=message):
        classifier({"a": data})


def test_splits_without_a_use_are_left_where_one_of_a_known_name_is(classifier: Make) -> None:
    data = {"train": PLAIN["train"], "test": PLAIN["test"], "unsupervised": PLAIN["test"]}
    assert classifier({"a": data}).tasks["a"].evaluation is PLAIN["test"]


def test_a_stream_without_an_end_needs_a_number_of_steps(language: Make) -> None:
    with pytest.raises(ValueError, match="task 'a' has training data without a length, expected max_steps"):
        language({"a": Stream(LANGUAGE["train"])}, max_steps=-1, num_train_epochs=1)


def test_a_stream_that_is_used_up_is_not_taken_for_a_task_that_was_learned(language: Make) -> None:
    trainer = language({"a": OneShot(LANGUAGE["train"])}, finetune_num_train_epochs=1)
    with pytest.raises(ValueError, match="task 'a' has a stream that is used up"):
        trainer.train()
    evaluated = language({"a": {"train": LANGUAGE["train"], "test": OneShot(LANGUAGE["validation"])}}, "evaluated")
    evaluated.train()
    with pytest.raises(ValueError, match="task 'a' has a stream that is used up"):
        evaluated._score("a")


def test_evaluation_data_without_labels_is_not_taken_for_a_score(language: Make) -> None:
    trainer = language({"a": {"train": LANGUAGE["train"], "test": LANGUAGE["validation"].remove_columns("labels")}})
    with pytest.raises(ValueError, match=r"task 'a' has metrics .*expected 'accuracy' or 'loss' among them"):
        trainer.train()


def test_a_task_is_learned_from_a_stream_by_itself(language: Make) -> None:
    trainer = language({})
    trainer.learn_task("a", Stream(LANGUAGE["train"]), LANGUAGE["validation"].to_iterable_dataset())
    assert set(trainer.evaluate_tasks()) == {"a"}


def test_a_first_task_that_was_interrupted_can_be_trained_again(language: Make) -> None:
    trainer = language({"a": OneShot(LANGUAGE["train"].select([]))})
    with pytest.raises(ValueError, match="task 'a' has a stream that is used up"):
        trainer.train()
    trainer.tasks["a"] = trainer.tasks["a"]._replace(train=LANGUAGE["train"])
    trainer.train()
    fresh = language({"a": LANGUAGE["train"]}, "fresh")
    fresh.train()
    assert_same_tasks(trainer.subspace, fresh.subspace)
