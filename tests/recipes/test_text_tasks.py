"""Data as people have it, made into tasks: columns, kinds of labels, splits, metrics, and messages if in doubt."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value
from transformers import AutoTokenizer, EvalPrediction, PreTrainedTokenizerBase

from .test_recipes import RECIPES, TASKS, encoder, launch, refusal  # noqa: F401


sk = pytest.importorskip("sklearn.metrics", reason="scikit-learn, which recipes/text_tasks.py scores with, is missing")
stats = pytest.importorskip("scipy.stats")

Write = Callable[..., str]
CLASSES, REGRESSION, MULTI_LABEL = "single_label_classification", "regression", "multi_label_classification"


@pytest.fixture(scope="module")
def recipe() -> Any:
    """The module of the recipe, imported as the recipes import their neighbours."""
    sys.path.insert(0, str(RECIPES))
    try:
        return importlib.import_module("text_tasks")
    finally:
        sys.path.remove(str(RECIPES))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(RECIPES / "assets" / "backbone")


@pytest.fixture
def load(recipe: Any, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Any]:
    return lambda name, place, **options: recipe.load_text_task(name, str(place), tokenizer, **options)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder of jsonl splits; rows are dicts."""

    def folder(name: str = "data", **splits: list[dict[str, Any]]) -> Path:
        place = tmp_path / name
        place.mkdir()
        for split, rows in splits.items():
            (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return place

    return folder


def rows(*labels: Any, **columns: str) -> list[dict[str, Any]]:
    texts = columns or {"text": "a text"}
    return [
        {**{name: f"{text} {i}" for name, text in texts.items()}, "label": label} for i, label in enumerate(labels)
    ]


# ---- Columns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "columns",
    [("text",), ("sentence",), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"),
     ("question1", "question2"), ("question", "answer"), ("text1", "text2")],
    ids="+".join,
)  # fmt: skip
def test_usual_columns_are_found_and_pairs_are_encoded_as_pairs(
    columns: tuple[str, ...], load: Any, write: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = {name: f"what {name} says" for name in columns}
    task = load("task", write(train=rows("yes", "no", **texts), test=rows("no", **texts)))
    assert task.text_columns == columns
    expected = tokenizer(*(f"what {name} says 0" for name in columns))["input_ids"]
    assert task.data["train"][0]["input_ids"] == expected
    assert not set(columns) & set(task.data["train"].column_names)


def test_pairs_have_token_types_where_the_tokenizer_has_them(recipe: Any, write: Any, encoder: str) -> None:  # noqa: F811
    place = write(
        train=rows("a", "b", sentence1="one", sentence2="two"), test=rows("a", sentence1="one", sentence2="two")
    )
    task = recipe.load_text_task("task", str(place), AutoTokenizer.from_pretrained(encoder))
    assert set(task.data["test"][0]["token_type_ids"]) == {0, 1}


def test_named_columns_come_before_usual_ones_and_doubts_are_reported(load: Any, write: Any) -> None:
    place = write(
        train=rows("a", "b", text="one", left="two", right="three"), test=rows("a", left="x", right="y", text="z")
    )
    assert load("task", place, text_columns=["left", "right"]).text_columns == ("left", "right")
    doubtful = write("other", train=rows("a", "b", text="one", sentence="two"))
    with pytest.raises(ValueError, match=r"'task' has columns \['text', 'sentence'\] .* text and sentence may be"):
        load("task", doubtful)
    unknown = write("third", train=rows("a", "b", review="one"))
    with pytest.raises(ValueError, match=r"\['review'\] beside 'label', expected .*--text_columns task=column"):
        load("task", unknown)
    with pytest.raises(ValueError, match=r"has columns \['review', 'label'\] in train, expected 'body' too"):
        load("task", unknown, text_columns=["body"])


def test_labels_and_texts_that_are_missing_are_reported(load: Any, write: Any) -> None:
    no_labels = write("one", train=[{"text": "a", "target": 1}])
    with pytest.raises(ValueError, match=r"has columns \['text', 'target'\], expected one of \('label', 'labels'"):
        load("task", no_labels)
    empty = write("two", train=[*rows("a", "b"), {"text": "c", "label": None}])
    with pytest.raises(ValueError, match="has 1 of 3 examples in train without 'label'"):
        load("task", empty)
    no_text = write("three", train=[*rows("a", "b"), {"text": None, "label": "a"}], test=rows("a"))
    with pytest.raises(ValueError, match="has 1 of 3 examples in train whose 'text' is not text"):
        load("task", no_text)


# ---- Kinds ----------------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[list[Any], str, tuple[str, ...], list[Any]]] = {
    "strings": (["b", "a", "b"], CLASSES, ("a", "b"), [1, 0, 1]),
    "integers": ([10, 2, 10], CLASSES, ("2", "10"), [1, 0, 1]),
    "booleans": ([True, False, True], CLASSES, ("0", "1"), [1, 0, 1]),
    "fractions": ([0.5, 3.25, 5.0], REGRESSION, ("label",), [0.5, 3.25, 5.0]),
    "flags": ([[1, 0, 1], [0, 0, 0], [1, 1, 0]], MULTI_LABEL, ("0", "1", "2"), [[1, 0, 1], [0, 0, 0], [1, 1, 0]]),
    "lists of names": ([["b", "a"], [], ["c"]], MULTI_LABEL, ("a", "b", "c"), [[1, 1, 0], [0, 0, 0], [0, 0, 1]]),
    "lists of zero and one": ([[0], [1], [0, 1], []], MULTI_LABEL, ("0", "1"), [[1, 0], [0, 1], [1, 1], [0, 0]]),
    "lists of numbers": ([[3, 1], [], [7]], MULTI_LABEL, ("1", "3", "7"), [[1, 1, 0], [0, 0, 0], [0, 0, 1]]),
}


@pytest.mark.parametrize("what", list(KINDS))
def test_labels_determine_the_kind_of_a_task(what: str, load: Any, write: Any) -> None:
    labels, kind, names, encoded = KINDS[what]
    task = load("task", write(train=rows(*labels), test=rows(*labels)))
    assert (task.problem_type, task.labels, task.num_labels) == (kind, names, len(names))
    for split in ("train", "test"):
        assert task.data[split]["label"][:] == encoded  # in their order


def test_a_kind_that_is_asked_for_comes_before_what_is_found(load: Any, write: Any) -> None:
    stars = write(train=rows(5, 1, 3), test=rows(1))
    assert load("task", stars, problem_type=CLASSES).labels == ("1", "3", "5")
    task = load("task", stars, problem_type=REGRESSION)
    assert (task.labels, task.data["train"]["label"][:]) == (("label",), [5.0, 1.0, 3.0])
    halves = write("halves", train=rows(1.0, 0.0), test=rows(1.0))
    with pytest.raises(ValueError, match=r"whole numbers, such as 1\.0, expected --problem_types task=regression or"):
        load("task", halves)
    assert load("task", halves, problem_type=CLASSES).labels == ("0", "1")
    assert load("task", halves, problem_type=REGRESSION).problem_type == REGRESSION
    with pytest.raises(ValueError, match=r"has 'regresion' for task 'task', expected one of \['regression'"):
        load("task", halves, problem_type="regresion")
    with pytest.raises(ValueError, match="has label 'high' in train, expected a number for a regression"):
        load("task", write("words", train=rows("high", "low"), test=rows("low")), problem_type=REGRESSION)


def test_what_may_be_flags_or_numbers_of_labels_is_reported(load: Any, write: Any) -> None:
    with pytest.raises(ValueError, match=r"labels such as \[0, 1\], which may be numbers of labels or a zero or one"):
        load("task", write(train=rows([0, 1], [1, 0]), test=rows([0, 1])))


def test_names_of_classes_in_the_features_are_honoured(
    load: Any, write: Any, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["low", "middle", "high"]
    data = recipe.load_splits(str(write(train=rows(2, 0), test=rows(-1, -1), validation=rows(0, 2))))
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    monkeypatch.setattr(recipe, "load_splits", lambda place: data.cast(features))
    task = load("task", "org/data")
    assert task.labels == tuple(names)
    assert task.data["validation"].features["label"].names == names
    assert set(task.data) == {"train", "validation"}  # the test split has no labels, like those of GLUE on the Hub
    assert task.scored is task.data["validation"]

    features = Features({"text": Value("string"), "label": Sequence(ClassLabel(names=names))})
    rows_of = {"train": [[0, 2], [1]], "test": [[2]]}
    lists = {
        split: Dataset.from_dict({"text": ["a text"] * len(labels), "label": labels}, features=features)
        for split, labels in rows_of.items()
    }
    monkeypatch.setattr(recipe, "load_splits", lambda place: DatasetDict(lists))
    several = load("task", "org/lists")
    assert (several.labels, several.data["test"]["label"][:]) == (tuple(names), [[0.0, 0.0, 1.0]])


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (["a", "b"], ["c"], r"has label 'c' in test, expected one of those it is trained on: \['a', 'b'\]"),
        ([["a"], ["b"]], [["a", "c"]], r"has label 'c' in test, expected one of those"),
        ([1, 0], [2], r"has label '2' in test, expected one of those it is trained on: \['0', '1'\]"),
    ],
)
def test_labels_that_are_never_seen_in_training_are_reported(
    train: list[Any], test: list[Any], message: str, load: Any, write: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        load("task", write(train=rows(*train), test=rows(*test)))


# ---- Splits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["validation", "dev", "eval", "valid", "validation_matched"])
def test_splits_of_other_names_score_a_task(split: str, load: Any, write: Any) -> None:
    task = load("task", write(train=rows("a", "b"), **{split: rows("b", "a", "a")}))
    assert task.scored is task.data["validation"] and len(task.scored) == 3


def test_splits_that_are_not_used_are_named(load: Any, write: Any, caplog: pytest.LogCaptureFixture) -> None:
    place = write(train=rows("a", "b"), test_matched=rows("b"), test_mismatched=rows("b"), notes=rows("c"))
    task = load("task", place)
    assert task.scored is task.data["test"]
    assert "['notes', 'test_mismatched'] are not used" in caplog.text
    with pytest.raises(ValueError, match=r"has splits \['test'\], expected 'train' among them"):
        load("task", write("untrained", test=rows("a")))


def test_a_test_split_without_labels_is_not_scored(load: Any, write: Any, caplog: pytest.LogCaptureFixture) -> None:
    place = write(train=rows(*[1, 0] * 10), test=rows(-1, -1))
    task = load("task", place)
    assert "Task 'task': its test split has no labels" in caplog.text
    assert (len(task.data["train"]), len(task.data["test"])) == (18, 2)  # a tenth of the training data scores it


def test_the_first_examples_are_trained_on_and_all_are_scored_in_their_order(load: Any, write: Any) -> None:
    labels = [0.5 * i for i in range(9)]
    task = load("task", write(train=rows(*labels), test=rows(*reversed(labels))), train_examples=4)
    assert task.data["train"]["label"][:] == labels[:4]
    assert task.data["test"]["label"][:] == labels[::-1]


# ---- Metrics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "labels", "metrics"),
    [
        ("cola", ["a", "b"], ("matthews_correlation",)),
        ("mrpc", ["a", "b"], ("accuracy", "f1")),
        ("mrpc", ["a", "b", "c"], ("accuracy",)),
        ("sts-b", [0.5, 1.0], ("pearson", "spearman")),
        ("rte", ["a", "b"], ("accuracy",)),
        ("ratings", [0.5, 1.0], ("pearson", "spearman")),
        ("topics", [["a", "b"], ["b"]], ("f1",)),
    ],
)
def test_a_task_has_the_metrics_of_glue_or_of_its_kind(
    name: str, labels: list[Any], metrics: tuple[str, ...], load: Any, write: Any
) -> None:
    assert load(name, write(train=rows(*labels), test=rows(*labels))).metrics == metrics


def test_scores_are_those_of_scikit_learn_and_scipy(load: Any, write: Any) -> None:
    rng = np.random.default_rng(0)
    logits, classes = rng.normal(size=(40, 2)), rng.integers(0, 2, 40)
    names = ["accuracy", "f1", "f1_macro", "matthews_correlation", "balanced_accuracy"]
    task = load("mrpc", write(train=rows("same", "not_same"), test=rows("same")), metrics=names)
    predicted = logits.argmax(-1)
    same = task.labels.index("same")
    scores = task.scores(logits, classes)
    assert list(scores) == names
    assert scores["f1"] == pytest.approx(sk.f1_score(classes, predicted, pos_label=same))
    assert scores["matthews_correlation"] == pytest.approx(sk.matthews_corrcoef(classes, predicted))
    assert task.compute_metrics(EvalPrediction((logits, None), classes)) == scores

    values, predictions = rng.normal(size=40), rng.normal(size=(40, 1))
    task = load("sts", write("values", train=rows(0.5, 1.5), test=rows(1.0)), metrics=["spearman", "pearson", "r2"])
    scores = task.scores(predictions, values)
    assert scores["spearman"] == pytest.approx(stats.spearmanr(values, predictions[:, 0]).statistic)
    assert scores["pearson"] == pytest.approx(np.corrcoef(values, predictions[:, 0])[0, 1])
    assert task.scores(np.ones((40, 1)), values)["pearson"] == 0

    flags, logits = rng.integers(0, 2, (40, 3)), rng.normal(size=(40, 3))
    task = load(
        "topics", write("lists", train=rows([1, 0, 1], [0, 1, 1]), test=rows([0, 0, 1])), metrics=["f1", "accuracy"]
    )
    scores = task.scores(logits, flags)
    assert scores["f1"] == pytest.approx(sk.f1_score(flags, logits > 0, average="micro"))
    assert scores["accuracy"] == pytest.approx(((logits > 0) == flags).all(-1).mean())


@pytest.mark.parametrize(
    ("labels", "positive"),
    [
        (("equivalent", "not_equivalent"), 0),
        (("duplicate", "not duplicate"), 0),
        (("not_x", "x"), 1),
        (("acceptable", "unacceptable"), 0),
        (("negative", "positive"), 1),
        (("0", "1"), 1),
        (("note", "e"), 1),
    ],
)
def test_f1_is_of_the_class_that_the_other_denies(labels: tuple[str, str], positive: int, recipe: Any) -> None:
    assert recipe.positive_class(labels) == positive


def test_metrics_that_do_not_fit_are_reported_with_similar_ones(load: Any, write: Any) -> None:
    place = write(train=rows("a", "b", "c"), test=rows("a"))
    with pytest.raises(ValueError, match=r"has 'acuracy' for task 'task', .*'accuracy'\?"):
        load("task", place, metrics=["acuracy"])
    with pytest.raises(ValueError, match=r"has 'pearson' for task 'task', which is single_label_classification, exp"):
        load("task", place, metrics=["pearson"])
    with pytest.raises(ValueError, match=r"has 'f1' for task 'task', which has 3 classes, expected 'f1_macro' or"):
        load("task", place, metrics=["f1"])


def test_a_missing_package_is_reported_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(RECIPES)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install 'share-hf\[metrics\]' or scikit-learn"):
        runpy.run_path(str(RECIPES / "text_tasks.py"))


# ---- The recipe -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--metrics", "--problem_types", "--text_columns"])
def test_a_flag_for_a_task_that_is_not_there_names_those_that_are(flag: str, tmp_path: Path) -> None:
    tasks = ("--tasks", f"giver={TASKS / 'giver'}", "--model_name_or_path", str(RECIPES / "assets" / "backbone"))
    said = refusal("text_stream.py", *tasks, flag, "givr=accuracy", cwd=tmp_path)
    assert f"{flag} has 'givr', expected one of --tasks, ['giver']: 'giver'?" in said


def test_a_score_that_a_task_lacks_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    tasks = ("--tasks", f"giver={TASKS / 'giver'}", "--model_name_or_path", str(RECIPES / "assets" / "backbone"))
    said = refusal("text_stream.py", *tasks, "--score_metric", "pearson", cwd=tmp_path)
    assert "--score_metric is 'pearson', expected one of ['accuracy'], which 'giver' has" in said


@pytest.mark.slow
@pytest.mark.parametrize("method", ["share", "coefficients", "per_task_lora", "sequential_lora"])
def test_text_stream_learns_tasks_of_all_kinds(tmp_path: Path, encoder: str, write: Any, method: str) -> None:  # noqa: F811
    words = {"good": 4.5, "fair": 2.5, "bad": 0.5}
    pairs = [(one, other) for one in words for other in words] * 4
    same = [
        {"sentence1": f"it was {a}", "sentence2": f"so {b}", "label": "same" if a == b else "not_same"}
        for a, b in pairs
    ]
    stars = [{"text": f"it was {a} and {b}", "label": (words[a] + words[b]) / 2} for a, b in pairs]
    topics = [{"text": f"{a} but also {b}", "label": sorted({a, b})} for a, b in pairs]
    data = {"same": same, "stars": stars, "topics": topics}
    places = [f"{name}={write(name, train=each, test=each[:12])}" for name, each in data.items()]
    output = launch(
        "text_stream.py",
        *("--model_name_or_path", encoder, "--tasks", *places, "--metrics", "same=f1,accuracy", "--method", method),
        *("--num_init_tasks", "1", "--num_train_epochs", "8"),
        cwd=tmp_path,
    )
    found = "same: 2 classes (not_same, same) from sentence1 + sentence2, 36 to train, f1 of 'same', accuracy on 12"
    assert found in output
    assert [line.split() for line in output.splitlines() if line.startswith("(score)")] == [
        ["(score)", "f1", "pearson", "f1"]
    ]
    last = next(line.split() for line in output.splitlines() if line.startswith("topics ") and "from" not in line)
    assert all(-1 <= float(score) <= 1 for score in last[1:])
    if method == "per_task_lora":
        assert float(last[2]) > 0.5
    if method == "share":
        metrics = json.loads((tmp_path / "text-stream" / "subspace" / "tasks" / "same" / "metrics.json").read_text())
        assert (list(metrics["scores"]), metrics["score"]) == (["accuracy", "f1"], "f1")
