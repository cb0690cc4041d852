"""The figures and the card work with any number of tasks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from share_hf import SharedSubspace
from share_hf.state import SubspaceState


LARGEST_SIDE = 1600  # pixels


def with_matrix(state: SubspaceState, tasks: int) -> SubspaceState:
    names = [f"task{i}" for i in range(tasks)]
    matrix = [[0.5 if j <= i else None for j in range(tasks)] for i in range(tasks)]
    metrics = {"score": "accuracy", "tasks": names, "matrix": matrix, "baseline": [None] * tasks, "average": 0.5}
    return replace(state, metrics=metrics)


@pytest.mark.parametrize("tasks", [1, 2, 17, 300])
def test_the_matrix_is_of_a_readable_size(
    tasks: int, saved: tuple[SubspaceState, Path], tmp_path: Path, with_figures: None
) -> None:
    SharedSubspace(with_matrix(saved[0], tasks)).save_pretrained(tmp_path / "tree")
    with Image.open(tmp_path / "tree" / "figures" / "accuracy_matrix.png") as figure:
        assert max(figure.size) <= LARGEST_SIDE
        assert min(figure.size) >= 300


def test_a_card_has_a_table_of_a_few_tasks_and_names_the_file_of_many(
    saved: tuple[SubspaceState, Path], tmp_path: Path
) -> None:
    cards = {}
    for tasks in (5, 31):
        SharedSubspace(with_matrix(saved[0], tasks)).save_pretrained(tmp_path / str(tasks))
        cards[tasks] = (tmp_path / str(tasks) / "README.md").read_text()
    assert "| `task4` | 0.500 |" in cards[5] and "`metrics.json`" not in cards[5]
    assert "| `task4` |" not in cards[31]
    assert "The scores on each of 31 tasks after each step are in `metrics.json` and in the figure." in cards[31]
    assert all("| 0.500 | " in card for card in cards.values())


PROGRAM = """
import resource, sys
from dataclasses import replace
from pathlib import Path
import matplotlib.figure
from share_hf import SharedSubspace
from tests.card.test_figures import with_matrix

subspace = SharedSubspace.from_pretrained(sys.argv[1])
subspace.save_pretrained(sys.argv[2] + "-small")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
SharedSubspace(with_matrix(subspace.state, 300)).save_pretrained(sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_a_save_of_three_hundred_tasks_takes_little_memory(tree: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tree), str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(run.stdout.split()[-1]) * unit < 300 * 2**20


def test_the_name_of_a_score_is_not_a_formula(
    saved: tuple[SubspaceState, Path], tmp_path: Path, with_figures: None
) -> None:
    state = with_matrix(saved[0], 2)
    named = replace(state, metrics={**state.metrics, "score": "$\\frac$"})
    SharedSubspace(named).save_pretrained(tmp_path / "tree")
    assert (tmp_path / "tree" / "figures" / "accuracy_matrix.png").is_file()
    assert SharedSubspace.from_pretrained(tmp_path / "tree").state.metrics["score"] == "$\\frac$"
