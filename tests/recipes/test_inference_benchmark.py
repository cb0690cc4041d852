"""The benchmark of many tasks in one model as a person runs it, at a small size. People read its times."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from share_hf import SharedSubspace


FOLDER = Path(__file__).parents[2] / "recipes" / "benchmarks"


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module that makes models and tasks, which belongs to no package."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("_serving")


@pytest.fixture
def inference(serving: ModuleType) -> ModuleType:
    return importlib.import_module("inference")


@pytest.fixture
def sizes(serving: ModuleType) -> Any:
    return serving.Sizes(hidden=64, intermediate=96, layers=1, k=8, p=2)


def test_tasks_of_a_subspace_and_their_loras_compute_the_same(
    serving: ModuleType, inference: ModuleType, sizes: Any, tmp_path: Path
) -> None:
    base = sizes.llama()
    subspace = serving.random_subspace(base, 3, sizes)
    assert len(subspace.state.layers) == 7
    loras = serving.with_loras(base, serving.export_loras(subspace, subspace.tasks, tmp_path / "loras"))
    subspace.save_pretrained(tmp_path / "tree")
    share = SharedSubspace.from_pretrained(tmp_path / "tree").apply(serving.copy_of(base))
    prompts = inference.Prompts(base, 3, 5)
    found, expected = (prompts.prefill(model, adapter_names=subspace.tasks).logits for model in (share, loras))
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(prompts.prefill(base).logits, expected, atol=1e-2)
    for _ in range(2):
        prompts.step(share, adapter_names=subspace.tasks)
        assert prompts._cache.get_seq_length() == 5


def test_loras_take_the_bytes_that_are_computed(serving: ModuleType, sizes: Any, tmp_path: Path) -> None:
    base = sizes.llama()
    subspace = serving.random_subspace(base, 2, sizes)
    model = serving.with_loras(base, serving.export_loras(subspace, subspace.tasks, tmp_path))
    held = sum(parameter.nbytes for name, parameter in model.named_parameters() if ".lora_" in name)
    assert serving.bytes_of_loras(base, 2, sizes.p) == held


@pytest.mark.parametrize("count", [2, 9, 64, 1000])
def test_another_task_comes_at_each_switch_from_everywhere(count: int, inference: ModuleType) -> None:
    names = [str(i) for i in range(count)]
    taken = list(itertools.islice(inference.in_turn(names), inference.SWITCHES))
    assert all(one != two for one, two in itertools.pairwise(taken))
    assert len(set(taken)) == min(count, inference.SWITCHES)
    assert max(map(int, taken)) >= count * 3 // 4


def test_ratios_are_those_of_the_rounds_and_a_line_leads_on(inference: ModuleType) -> None:
    seconds = {"one": [1.0, 2.0, 90.0], "two": [2.0, 2.0, 60.0]}
    assert inference.ratio(seconds, "one", "two") == 1.0
    assert inference.added_to(seconds, "one", "two") == 0.0
    assert inference.on_a_line((10, 64, 200), (0.005, 0.0212, 0.062), 1000) == pytest.approx(0.302)


def test_learning_that_a_model_refuses_was_not_run(
    inference: ModuleType, serving: ModuleType, sizes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = sizes.llama()
    scale = inference.Scale(sizes, prompt=4, together=2)
    subspace = serving.random_subspace(base, 2, sizes)
    step = inference.Learning.step

    def refusing(learning: Any, **options: Any) -> None:
        if options:
            raise ValueError("not in this mode")
        step(learning)

    monkeypatch.setattr(inference.Learning, "step", refusing)
    (row,) = inference.learning_rows(base, subspace, scale, 1)
    assert row.value is row.ok is None
    assert row.reason == "not run: not in this mode"
    # as if all samples were of the task that is trained
    monkeypatch.setattr(inference.Learning, "step", lambda learning, **options: step(learning))
    rows = list(inference.learning_rows(base, subspace, scale, 1))
    assert [row.goal for row in rows] == [None, None, "<= 1.3"]
    assert all(row.value > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.benchmark
def test_a_quick_run_has_every_row(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(FOLDER / "inference.py"), "--quick", "--json", "rows.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=560,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    goals = [row["goal"] for row in rows.values() if row["goal"] is not None and "training step" not in row["name"]]
    memory, forwards, single = [">= 25", "<= 5"], ["<= 0.001", "<= 1.3", "<= 1.4", "<= 0.2"], ["<= 1.05", "<= 1.05"]
    assert goals == [*memory, *forwards, *single, ">= 50", "<= 4.8", "<= 1.5", ">= 50"]
    assert all(row["value"] is not None or row["reason"].startswith("not run: ") for row in rows.values())
    assert all(math.isfinite(row["value"]) for row in rows.values() if row["value"] is not None)
    same = next(row for name, row in rows.items() if "logits of Share and LoRA" in name)
    assert same["ok"], same
