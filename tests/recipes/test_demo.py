"""The demo: what it finds in a subspace, what it answers, and the page itself in a real browser."""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from share_hf import ShareConfig, SharedSubspace, ShareTrainer, ShareTrainingArguments
from share_hf.state import ContinualMetrics
from tests.collections_on_disk import write_collection
from tests.facade.test_routing import WORDS, learned, texts_of, word_tokenizer
from tests.trees import BASE_NAME, BERT_LORA, lora_config, named, save_adapter

from .test_recipes import RECIPES


DEMO = RECIPES / "demo"
TEXTS = ["one two three", "alpha beta gamma delta", "four four"]

SaveLora = Callable[..., Path]


@pytest.fixture(scope="module")
def demo() -> Iterator[SimpleNamespace]:
    """The modules of the demo that do not need Gradio."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DEMO))
        yield SimpleNamespace(
            **{name: importlib.import_module(name) for name in ("answering", "desk", "subspaces", "views")}
        )


@pytest.fixture
def base_of(tiny_model_folder: Callable[[str], Path], tmp_path: Path) -> Callable[[str], str]:
    """The folder of a tiny model with a tokenizer."""

    def folder_of(name: str) -> str:
        folder = Path(shutil.copytree(tiny_model_folder(name), tmp_path / f"base-{name}"))
        word_tokenizer().save_pretrained(folder)
        return str(folder)

    return folder_of


@pytest.fixture
def classifiers(save_classifier: SaveLora) -> SharedSubspace:
    """Tasks of each kind: two classes, three labels at once, and a value."""
    places = {name: save_classifier(name, n, seed=n) for name, n in (("mood", 2), ("tags", 3), ("stars", 1))}
    made = SharedSubspace.from_adapters(places, num_components=8, pseudo_rank=4, progress=False)
    known = {
        "mood": dict(labels=("bad", "good"), problem_type="single_label_classification"),
        "tags": dict(labels=("short", "funny", "new"), problem_type="multi_label_classification"),
        "stars": dict(problem_type="regression"),
    }
    tasks = {name: replace(info, **known[name]) for name, info in made.state.tasks.items()}
    return SharedSubspace(replace(made.state, tasks=tasks))


def with_scores(subspace: SharedSubspace, **metrics: Any) -> SharedSubspace:
    return SharedSubspace(replace(subspace.state, metrics=ContinualMetrics(**metrics).as_dict()))


# What it finds in a subspace


def test_the_facts_are_those_of_the_report(demo: SimpleNamespace, subspace: SharedSubspace) -> None:
    scored = with_scores(subspace, tasks=["mrpc", "sst2"], matrix=[[0.9, None], [0.8, 0.7]], baseline=[0.5, 0.4])
    facts, report = demo.subspaces.facts_of_tasks(scored), scored.report()
    assert [task.name for task in facts] == ["mrpc", "sst2"]
    assert [(task.size, task.drift, task.bound) for task in facts] == [
        (task.bytes, task.drift, task.drift_bound) for task in report.tasks
    ]
    assert [(task.metric, task.learned, task.now) for task in facts] == [
        ("accuracy", 0.9, 0.8),
        ("accuracy", 0.7, 0.7),
    ]
    summary = demo.subspaces.summary_of(scored, facts)
    assert (summary.tasks, summary.base_model, summary.basis_bytes) == (2, BASE_NAME, report.basis_bytes)
    assert summary.means["forgetting"] == pytest.approx(0.1) and "forward_transfer" not in summary.means
    assert facts[0].drift > 0 and f"{facts[0].drift:.2g}" in demo.views.task_table(facts)


def test_what_a_subspace_lacks_is_said(demo: SimpleNamespace, subspace: SharedSubspace) -> None:
    bare = SharedSubspace(replace(subspace.state, base_model_name_or_path=None))
    summary = demo.subspaces.summary_of(bare, demo.subspaces.facts_of_tasks(bare))
    assert [sentence.split(":")[0].split(",")[0] for sentence in summary.missing] == [
        "It names no base model",
        "It has no scores",
        "It has no router",
    ]
    shown = demo.views.summary(summary)
    assert all(sentence in shown for sentence in summary.missing) and "unnamed" in shown
    assert demo.subspaces.matrix_of(bare, 1) == (None, 1, 1)
    assert "has no scores" in demo.views.matrix(None) and demo.views.means(summary) == ""


def test_the_scores_are_shown_a_page_at_a_time(demo: SimpleNamespace, subspace: SharedSubspace) -> None:
    names = [f"task{i:03}" for i in range(40)]
    matrix = [[0.5 + i / 100 if j <= i else None for j in range(40)] for i in range(40)]
    scored = with_scores(subspace, tasks=names, matrix=matrix, baseline=[0.1] * 40)
    first, page, pages = demo.subspaces.matrix_of(scored, 1)
    assert (page, pages, first.columns) == (1, 3, tuple(names[:15]))
    assert [name for name, _ in first.rows] == [*names[:15], names[-1]]
    assert first.rows[-1][1] == (0.89,) * 15
    last, page, _ = demo.subspaces.matrix_of(scored, 99)
    assert (page, last.columns) == (3, tuple(names[30:]))
    assert [name for name, _ in last.rows] == names[30:]
    assert demo.views.matrix(first).count("<tr>") == 17 and "0.890" in demo.views.matrix(first)


def test_a_thousand_tasks_are_searched_and_never_shown_at_once(
    demo: SimpleNamespace, subspace: SharedSubspace
) -> None:
    (fact, _) = demo.subspaces.facts_of_tasks(subspace)
    many = [replace(fact, name=f"client-{i:04}") for i in range(1000)]
    found = demo.subspaces.matching(many, "CLIENT 99")  # 099 to 899, and 990 to 999
    assert len(found) == 19 and {task.name for task in found} >= {"client-0099", "client-0990", "client-0999"}
    rows, page, pages = demo.subspaces.page_of(found, 3, 10)
    assert (len(rows), page, pages) == (9, 2, 2)
    rows, page, pages = demo.subspaces.page_of(many, 50, 20)
    assert (rows[-1].name, page, pages) == ("client-0999", 50, 50)
    assert demo.views.task_table(rows).count("<tr>") == 21
    assert "No task has such a name" in demo.views.task_table([])


def test_the_audit_is_that_of_the_library(demo: SimpleNamespace, subspace: SharedSubspace) -> None:
    found = demo.subspaces.audit(subspace)
    shown = demo.views.audit(found)
    assert len(found.report.rows) == 4 == found.layers
    assert found.report.sentences()[0] in shown and found.report.rows[0].module in shown
    alone = SharedSubspace(subspace.state)
    alone.remove_task("sst2")
    assert "needs two" in demo.views.audit(demo.subspaces.audit(alone))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("", "No subspace is named"),
        ("/no/such/folder", "no such folder"),
        (".", "holds no subspace"),
        ("a b c", "no id of a repository"),
        ("org/nothing-there", "no repository that could be read"),
    ],
)
def test_a_wrong_place_is_a_message_for_the_page(
    demo: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(demo.subspaces.DemoError, match=message):
        demo.desk.Desk().open(place)


def test_subspaces_nearby_are_found_and_the_newest_comes_first(demo: SimpleNamespace, tree: Path) -> None:
    inner = tree.parent / "llama-stream" / "subspace"
    shutil.copytree(tree, inner)
    os.utime(tree / "share_config.json", (1e9, 1e9))
    shutil.copytree(tree, tree.parent / "llama-stream" / "phases" / "0001-mrpc" / "checkpoint-3")
    assert demo.subspaces.nearby(tree.parent) == [inner.as_posix(), tree.as_posix()]


def test_names_from_anywhere_are_escaped(demo: SimpleNamespace) -> None:
    evil = "<script>alert(1)</script>"
    views, answering = demo.views, demo.answering
    given = answering.Answer(evil, labels=((evil, 0.9),), chosen=(evil,))
    route = answering.Route(evil, ((evil, 0.9),))
    answered = answering.Answered((given, answering.Answer("b", text=evil)), (route, None), 0.1)
    lines = [answering.Line(evil, evil), answering.Line(evil, "b")]
    fact = demo.subspaces.TaskFacts(evil, "adapter", 1, 0.0, 0.0, (evil,), True, False, evil, 1.0, None)
    matrix = demo.subspaces.Matrix(evil, (evil,), ((evil, (1.0,)),))
    shown = [
        *(views.answer(each, route) for each in answered.answers),
        views.batch(lines, answered),
        views.task_table([fact]),
        views.matrix(matrix),
        views.problem(evil),
        views.note(evil),
    ]
    assert not [html for html in shown if "<script" in html]
    assert all("&lt;script&gt;" in html for html in shown)


def test_a_subspace_is_read_again_and_its_model_kept(
    demo: SimpleNamespace, tree: Path, save_lora: SaveLora, base_of: Callable[[str], str], tmp_path: Path
) -> None:
    desk, base = demo.desk.Desk(), base_of("llama")
    opened = desk.open(f" {tree} ")
    model = opened.answerer(base).model
    again = desk.open(str(tree))
    assert again is not opened and again is desk.get(str(tree)) and again.answerer(base).model is model
    changed = SharedSubspace.from_pretrained(tree)
    changed.add_adapters({"rte": save_lora("rte", seed=9)}, progress=False)
    changed.save_pretrained(tree)
    assert desk.open(str(tree)).subspace.tasks == ("mrpc", "sst2", "rte")
    for i in range(demo.desk.KEPT):
        desk.open(str(shutil.copytree(tree, tmp_path / f"copy{i}")))
    assert len(desk._opened) == demo.desk.KEPT
    assert desk.get(str(tree)) is not opened
    with pytest.raises(demo.subspaces.DemoError, match="No subspace is open"):
        desk.get("")


# What it answers


def test_classifiers_answer_with_the_probabilities_of_their_own_labels(
    demo: SimpleNamespace, classifiers: SharedSubspace, base_of: Callable[[str], str]
) -> None:
    base, line = base_of("bert"), demo.answering.Line
    answerer = demo.answering.Answerer(classifiers, base)
    model = classifiers.apply(AutoModelForSequenceClassification.from_pretrained(base, num_labels=3))
    expected = {}
    for task in classifiers.tasks:
        model.set_adapter(task)
        batch = word_tokenizer()(TEXTS[0], return_tensors="pt")
        expected[task] = model(**batch).logits[0].detach()
    mood, tags, stars = answerer.answer([line(TEXTS[0], task) for task in classifiers.tasks]).answers

    assert [name for name, _ in sorted(mood.labels)] == ["bad", "good"]
    assert dict(mood.labels)["good"] == pytest.approx(float(expected["mood"][:2].softmax(0)[1]), abs=1e-5)
    assert mood.chosen == (mood.labels[0][0],) and mood.labels[0][1] >= 0.5
    likely = expected["tags"].sigmoid()
    assert [probability for _, probability in tags.labels] == pytest.approx(sorted(likely.tolist())[::-1], abs=1e-5)
    assert set(tags.chosen) == {
        name for name, value in zip(("short", "funny", "new"), likely, strict=True) if value > 0.5
    }
    assert stars.value == pytest.approx(float(expected["stars"][0]), abs=1e-5) and not stars.labels
    assert mood.short() == mood.chosen[0] and stars.short() == f"{stars.value:.3g}"


def test_a_mixed_batch_answers_as_each_task_alone(
    demo: SimpleNamespace, classifiers: SharedSubspace, base_of: Callable[[str], str]
) -> None:
    answerer, line = demo.answering.Answerer(classifiers, base_of("bert")), demo.answering.Line
    lines = [
        line(f"{text} ||| two" if i == 1 else text, task)
        for i, (text, task) in enumerate(zip(TEXTS, classifiers.tasks, strict=True))
    ]
    passes = []
    handle = answerer.model.get_base_model().bert.register_forward_hook(lambda *_: passes.append(1))
    together = answerer.answer(lines).answers
    assert len(passes) == 1
    handle.remove()
    for given, each in zip(together, lines, strict=True):
        (alone,) = answerer.answer([each]).answers
        assert given.task == alone.task and given.chosen == alone.chosen
        assert [p for _, p in given.labels] == pytest.approx([p for _, p in alone.labels], abs=1e-5)
        assert given.value == pytest.approx(alone.value, abs=1e-5)
    (pair,) = answerer.answer([line("one ||| two", "mood")]).answers
    (joined,) = answerer.answer([line("one two", "mood")]).answers
    assert pair.labels != joined.labels


def test_a_language_model_writes_what_each_task_would_write(
    demo: SimpleNamespace, subspace: SharedSubspace, base_of: Callable[[str], str], tiny_model: Callable[[str], Any]
) -> None:
    answerer, line = demo.answering.Answerer(subspace, base_of("llama")), demo.answering.Line
    tasks = ["mrpc", demo.answering.BASE, "sst2"]
    lines = [line(text, task) for text, task in zip(TEXTS, tasks, strict=True)]
    answers = answerer.answer(lines, after_text=" two", max_new_tokens=6).answers
    tokenizer = word_tokenizer()
    model = subspace.apply(tiny_model("llama"))
    for text, task, given in zip(TEXTS, tasks, answers, strict=True):
        prompt = [*tokenizer(text)["input_ids"], *tokenizer(" two", add_special_tokens=False)["input_ids"]]
        ids = model.generate(input_ids=torch.tensor([prompt]), adapter_names=[task], max_new_tokens=6, do_sample=False)
        assert given.text == tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True).strip()
    assert len({given.text for given in answers}) > 1


def test_a_chat_template_makes_the_prompt(
    demo: SimpleNamespace, subspace: SharedSubspace, base_of: Callable[[str], str]
) -> None:
    base = base_of("llama")
    (Path(base) / "chat_template.jinja").write_text(
        "{% for m in messages %}alpha {{ m.content }}{% endfor %}{% if add_generation_prompt %} beta{% endif %}"
    )
    answerer = demo.answering.Answerer(subspace, base)
    ids = answerer._prompt("one", " two", 8)["input_ids"]
    assert answerer.tokenizer.decode(ids).split() == ["alpha", "one", "two", "beta"]
    ids = answerer._prompt("one " * 200, " two", 8)["input_ids"]  # the model takes 64 tokens
    assert answerer.tokenizer.decode(ids).split() == ["alpha", *["one"] * 53, "two", "beta"]


def test_the_router_finds_the_task_of_a_text(
    demo: SimpleNamespace, subspace: SharedSubspace, base_of: Callable[[str], str], tiny_model: Callable[[str], Any]
) -> None:
    learned(subspace, tiny_model("llama"))
    answerer, line, router = (
        demo.answering.Answerer(subspace, base_of("llama")),
        demo.answering.Line,
        demo.answering.ROUTER,
    )
    texts = {task: texts_of(task, 4, seed=3) for task in subspace.tasks}
    lines = [line(text, router) for task in texts for text in texts[task]]
    found = answerer.answer([*lines, line("one", "mrpc")], after_text="", max_new_tokens=2)
    assert found.routes[-1] is None and found.answers[-1].task == "mrpc"
    for route, given, task in zip(
        found.routes, found.answers, [task for task in texts for _ in range(4)], strict=False
    ):
        assert route.nearest[0][0] == task and 0.5 < route.nearest[0][1] <= 1
        assert route.task in (task, None) and given.task == (route.task or demo.answering.BASE)
    assert any(route is not None and route.task for route in found.routes)
    lost = demo.views.answer(found.answers[0], demo.answering.Route(None, (("mrpc", 0.6),)))
    assert "the base model answers" in lost and "60.0 %" in lost


def test_lines_of_a_mixed_batch_name_their_tasks(
    demo: SimpleNamespace, subspace: SharedSubspace, tiny_model: Callable[[str], Any]
) -> None:
    parsed, line = demo.answering.parsed, demo.answering.Line
    text = "mrpc: one: two\n\n  sst2 :three\n__base__: four\n"
    known = [line("one: two", "mrpc"), line("three", "sst2"), line("four", "__base__")]
    assert parsed(text, subspace) == known
    with pytest.raises(demo.subspaces.DemoError, match="Line 2 begins with no task"):
        parsed("mrpc: one\nnote: two", subspace)
    learned(subspace, tiny_model("llama"))
    assert parsed(f"{text}note: two", subspace) == [*known, line("note: two", demo.answering.ROUTER)]


@pytest.mark.parametrize(
    ("text", "task", "message"),
    [
        ("  ", "mrpc", "no text yet"),
        (" ||| ", "mrpc", "no text yet"),
        ("one", "mrcp", "no task “mrcp”. Did you mean “mrpc”"),
        ("one", "(router)", "no router"),
        ("one", "", "Pick a task"),
    ],
)
def test_a_question_that_has_no_answer_is_a_message(
    demo: SimpleNamespace, subspace: SharedSubspace, base_of: Callable[[str], str], text: str, task: str, message: str
) -> None:
    answerer, line = demo.answering.Answerer(subspace, base_of("llama")), demo.answering.Line
    with pytest.raises(demo.subspaces.DemoError, match=message):
        answerer.answer([line("one", "sst2"), line(text, task)])
    with pytest.raises(demo.subspaces.DemoError, match="65 lines"):
        answerer.answer([line("one", "sst2")] * 65)


def test_a_base_model_that_does_not_do_is_a_message(
    demo: SimpleNamespace, subspace: SharedSubspace, base_of: Callable[[str], str], save_lora: SaveLora
) -> None:
    answerer = demo.answering.Answerer
    with pytest.raises(demo.subspaces.DemoError, match=f"{BASE_NAME}: no base model that could be loaded"):
        answerer(subspace)
    with pytest.raises(demo.subspaces.DemoError, match="is not the base model of this subspace"):
        answerer(subspace, base_of("gpt2"))
    nameless = SharedSubspace(replace(subspace.state, base_model_name_or_path=None))
    with pytest.raises(demo.subspaces.DemoError, match="names no base model"):
        answerer(nameless)
    tokens = {
        name: replace(info, target={**info.target, "task_type": "TOKEN_CLS"})
        for name, info in subspace.state.tasks.items()
    }
    with pytest.raises(demo.subspaces.DemoError, match="of the type TOKEN_CLS"):
        answerer(SharedSubspace(replace(subspace.state, tasks=tokens)), base_of("llama"))


def test_tasks_without_a_type_are_those_of_their_base_models_class(
    demo: SimpleNamespace, save_lora: SaveLora, base_of: Callable[[str], str]
) -> None:
    made = SharedSubspace.from_adapters({"mrpc": save_lora("mrpc", task_type=None)}, progress=False)
    assert demo.desk.Opened("here", made).may_generate
    assert demo.answering.Answerer(made, base_of("llama")).task_type == "CAUSAL_LM"


def test_a_task_without_a_head_answers_with_that_of_the_base_model(
    demo: SimpleNamespace, save_classifier: SaveLora, base_of: Callable[[str], str]
) -> None:
    made = SharedSubspace.from_adapters({"mood": save_classifier("mood", 3)}, progress=False)
    headless = SharedSubspace(replace(made.state, tasks={"mood": replace(made.state.tasks["mood"], head={})}))
    line = demo.answering.Line
    (given,) = demo.answering.Answerer(headless, base_of("bert")).answer([line("one", "mood")]).answers
    assert sorted(name for name, _ in given.labels) == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_a_language_model_with_a_head_classifies_texts_of_different_lengths(
    demo: SimpleNamespace, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    config = LlamaConfig(**{**tiny_model("llama").config.to_dict(), "pad_token_id": None, "num_labels": 2})
    model, base = LlamaForSequenceClassification(config).eval(), str(tmp_path / "base")
    model.save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    lora = save_adapter(named(model, base), tmp_path / "lora", lora_config(task_type="SEQ_CLS"), seed=1)
    made = SharedSubspace.from_adapters({"mood": lora}, progress=False)
    answerer, lines = demo.answering.Answerer(made), [demo.answering.Line(text, "mood") for text in TEXTS]
    for line, given in zip(lines, answerer.answer(lines).answers, strict=True):
        (alone,) = answerer.answer([line]).answers
        assert [p for _, p in given.labels] == pytest.approx([p for _, p in alone.labels], abs=1e-5)
        assert [name for name, _ in sorted(given.labels)] == ["LABEL_0", "LABEL_1"]


# The page


@dataclass(frozen=True)
class Browser:
    """The page in Chromium.

    Args:
        page: What Playwright calls a page.
        screenshots: Folder to keep screenshots in.
        problems: Errors of its scripts, and requests to other machines.
    """

    page: Any
    screenshots: Path
    problems: list[str]

    def open(self, place: Path | str) -> None:
        """Open a subspace as a visitor does."""
        field = self.page.get_by_label("Subspace: a folder, or an id on the Hub")
        field.fill(str(place))
        field.press("Enter")
        self.page.get_by_role("button", name="Open", exact=True).click()

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def choose(self, menu: str, entry: str, typed: str | None = None) -> None:
        """Choose an entry of a menu, after typing to find it."""
        field = self.page.get_by_label(menu, exact=True)
        field.click()
        if typed is not None:
            field.fill("")
            field.press_sequentially(typed)
        self.page.get_by_role("option", name=entry, exact=True).click()

    def click(self, button: str) -> None:
        self.page.get_by_role("button", name=button, exact=True).click()

    def shows(self, text: str, where: str = "body") -> None:
        """Wait for a text within visible elements."""
        from_here = self.page.locator(f"{where}:visible").filter(has_text=text)
        from_here.first.wait_for(timeout=60_000)

    def texts(self, where: str) -> list[str]:
        """The texts of visible elements."""
        return self.page.locator(f"{where}:visible").all_inner_texts()

    def keep(self, name: str) -> None:
        self.page.wait_for_timeout(300)  # what fades in
        self.page.screenshot(path=self.screenshots / f"demo-{name}.png", full_page=True)


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory, pristine_models: dict[str, PreTrainedModel]) -> SharedSubspace:
    """A subspace with heads, scores and a router, learned from texts by a real run, beside its base model."""
    root = tmp_path_factory.mktemp("stream")
    tokenizer = word_tokenizer()
    pristine_models["bert"].save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    model = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=3)
    trainer = ShareTrainer(
        model,
        ShareTrainingArguments(
            str(root / "out"),
            learning_rate=1e-2,
            num_train_epochs=6,
            per_device_train_batch_size=16,
            num_init_tasks=2,
            routing=True,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        ),
        ShareConfig(num_components=8, pseudo_rank=4, target_modules=BERT_LORA["target_modules"]),
        tasks={name: task_of_texts(name, tokenizer) for name in ("mood", "letter", "stars", "tags")},
        labels={"tags": ("early", "late", "both")},
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.subspace.save_pretrained(root / "subspace")
    return trainer.subspace


def task_of_texts(name: str, tokenizer: Any) -> DatasetDict:
    """Texts of words of one kind, whose label is told by the first word."""
    words = WORDS["sst2" if name in ("mood", "stars") else "mrpc"].split()
    splits = {}
    for seed, split in enumerate(("train", "test")):
        texts = [
            " ".join([text.split()[0], *text.split()])
            for text in texts_of("sst2" if name in ("mood", "stars") else "mrpc", 96, seed=seed)
        ]
        places = [words.index(text.split()[0]) for text in texts]
        label = {
            "mood": lambda place: int(place > 1),
            "letter": lambda place: min(place, 2),
            "stars": lambda place: float(place) - 1.5,
            "tags": lambda place: [float(place < 2), float(place > 1), 1.0],
        }[name]
        data = Dataset.from_dict({"text": texts, "label": [label(place) for place in places]})
        if name in ("mood", "letter"):
            names = ["bad", "good"] if name == "mood" else ["first", "second", "other"]
            data = data.cast_column("label", ClassLabel(names=names))
        splits[split] = data.map(lambda batch: tokenizer(batch["text"]), batched=True)
    return DatasetDict(splits)


@pytest.fixture(scope="module")
def chromium() -> str:
    """The path of a browser."""
    for package in ("gradio", "playwright"):
        if util.find_spec(package) is None:
            pytest.skip(f"{package}, of the extra tests, is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium on PATH, which the page is opened in")
    return found


@pytest.fixture(scope="module")
def address(chromium: str, stream: SharedSubspace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The demo as a person starts it, in the folder of a stream."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("examples")
    (folder / "examples.txt").write_text("mood: one one three\nletter: beta beta alpha\nnobody: knows\n")
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "SHARE_HF_EXAMPLES": str(folder / "examples.txt")}
    here = Path(stream.base_model_name_or_path or "").parent
    with (folder / "log.txt").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, str(DEMO / "app.py")], cwd=here, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(240):
            with suppress(OSError), urllib.request.urlopen(url, timeout=5):
                break
            assert server.poll() is None, (folder / "log.txt").read_text()
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.fixture
def browser(chromium: str, address: str, tmp_path: Path) -> Iterator[Browser]:
    """The page, opened by a visitor."""
    from playwright.sync_api import sync_playwright

    screenshots = Path(os.environ.get("SHARE_HF_SCREENSHOTS") or tmp_path)
    screenshots.mkdir(parents=True, exist_ok=True)
    problems: list[str] = []
    with sync_playwright() as playwright:
        program = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = program.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url) if is_elsewhere(request.url) else None)
        page.goto(address)
        yield Browser(page, screenshots, problems)
        program.close()
    assert problems == []


def is_elsewhere(url: str) -> bool:
    return not url.startswith(("http://127.0.0.1", "data:", "blob:"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_visitor_sees_the_subspace_and_asks_its_tasks(browser: Browser, stream: SharedSubspace) -> None:
    report, metrics = stream.report(), stream.state.metrics
    browser.shows("base model", ".share-card")
    assert browser.texts(".share-card")[:2] == ["4\ntasks", "base\nbase model"]
    browser.shows("Drift: how far", ".share-note")
    assert not any("has no" in text for text in browser.texts(".share-note"))
    rows = browser.texts(".share-scroll tbody tr")
    assert [row.split("\t")[0] for row in rows] == ["mood", "letter", "stars", "tags"]
    assert "bad, good" in rows[0] and f"{report.tasks[0].drift:.2g}" in rows[0] and "pearson" in rows[2]
    browser.keep("tasks")
    browser.page.get_by_placeholder("Search by name").fill("ETT")
    browser.page.get_by_role("cell", name="mood").wait_for(state="hidden")
    assert [row.split("\t")[0] for row in browser.texts(".share-scroll tbody tr")] == ["letter"]

    browser.tab("Scores")
    browser.shows(f"{metrics['average']:.3f}", ".share-card")
    cells = [row.split("\t") for row in browser.texts(".matrix tbody tr")]
    assert [row[0] for row in cells] == list(stream.tasks)
    assert [row[1:] for row in cells] == [
        ["" if value is None else f"{value:.3f}" for value in row] for row in metrics["matrix"]
    ]
    browser.keep("scores")

    browser.tab("Audit")
    browser.click("Run the audit")
    browser.shows("2 tasks started from 2 different random A")
    browser.shows("bert.encoder.layer.0.attention.self.query", "td")
    browser.keep("audit")

    browser.tab("Ask")
    browser.page.get_by_text("one one three", exact=True).click()  # an example, which brings its task
    browser.click("Ask")
    browser.shows("mood", ".share-answer h4")
    assert browser.texts(".share-answer p.main") == ["bad"]
    assert [bar.split("\n")[0] for bar in browser.texts(".share-bar")] == ["bad", "good"]
    browser.page.locator("#text textarea").fill("four four one")
    browser.choose("Compare with", "stars")
    browser.click("Ask")
    browser.shows("stars", ".share-answer h4")
    bad_or_good, value = browser.texts(".share-answer p.main")
    assert bad_or_good == "good" and float(value) > 0
    browser.keep("compare")
    browser.choose("Task", "the router chooses")
    browser.page.locator("#text textarea").fill("gamma gamma alpha delta beta")
    browser.choose("Compare with", "no other task")
    browser.click("Ask")
    browser.shows("router", ".share-answer")
    browser.keep("router")

    browser.tab("Mixed batch")
    lines = browser.page.locator("#lines textarea")
    assert lines.input_value() == "mood: one one three\nletter: beta beta alpha"
    lines.fill(
        "mood: one one three\nletter: beta beta alpha\nstars: one one two\ntags: delta delta\nalpha alpha beta gamma"
    )
    browser.click("Ask all at once")
    browser.shows("5 texts and")
    rows = [row.split("\t") for row in browser.texts(".share-scroll tbody tr")]
    assert [row[1] for row in rows[:4]] == ["mood", "letter", "stars", "tags"]
    assert [row[2] for row in rows[:2]] == ["bad", "second"] and float(rows[2][2]) < 0 and "late" in rows[3][2]
    assert "(router)" in rows[4][1]
    browser.keep("batch")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_visitor_opens_what_is_bare_what_is_wrong_and_a_language_model(
    browser: Browser, saved: tuple[Any, Path], base_of: Callable[[str], str]
) -> None:
    browser.open("/no/such/folder")
    browser.shows("/no/such/folder: no such folder", "[role=alert]")
    browser.page.get_by_role("tab").first.wait_for(state="hidden")
    browser.keep("wrong-folder")

    browser.open(saved[1])
    browser.shows("It has no scores", ".share-note")
    browser.shows("It has no router", ".share-note")
    browser.tab("Scores")
    browser.shows("This subspace has no scores")
    browser.tab("Ask")
    browser.page.locator("#text textarea").fill("one two three")
    browser.click("Ask")
    browser.shows(f"{BASE_NAME}: no base model that could be loaded", "[role=alert]")
    browser.keep("no-base-model")
    browser.page.get_by_text("Model and prompt", exact=True).click()
    browser.page.get_by_label("Base model").fill(base_of("llama"))
    browser.choose("Compare with", "the base model alone")
    browser.click("Ask")
    browser.shows("base model", ".share-answer h4")
    assert all(browser.texts(".share-answer p.text"))
    browser.keep("language-model")
    browser.tab("Mixed batch")
    browser.page.locator("#lines textarea").fill("mrpc: one\nnote: two")
    browser.click("Ask all at once")
    browser.shows("Line 2 begins with no task of this subspace", "[role=alert]")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_visitor_finds_one_task_of_many(browser: Browser, tmp_path: Path) -> None:
    places = write_collection(tmp_path / "adapters", 130, 2)
    many = SharedSubspace.from_adapters(places, num_components=8, pseudo_rank=2, progress=False)
    many.save_pretrained(tmp_path / "many")
    browser.open(tmp_path / "many")
    browser.shows("Page 1 of 7")
    assert len(browser.texts(".share-scroll tbody tr")) == 20
    browser.click("Next ›")
    browser.shows("Page 2 of 7")
    assert browser.texts(".share-scroll tbody tr")[0].startswith("task20\t")
    browser.keep("many-tasks")
    browser.page.get_by_placeholder("Search by name").fill("task129")
    browser.page.get_by_role("cell", name="task20", exact=True).wait_for(state="hidden")
    assert [row.split("\t")[0] for row in browser.texts(".share-scroll tbody tr")] == ["task129"]
    browser.tab("Ask")
    browser.page.get_by_label("Task", exact=True).click()
    assert 20 < browser.page.get_by_role("option").count() <= 100
    browser.choose("Task", "task129", typed="129")
    assert browser.page.get_by_label("Task", exact=True).input_value() == "task129"
