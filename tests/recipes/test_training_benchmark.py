"""The benchmark of training steps as a person runs it, small; its times are read by people, not asserted here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


BENCHMARK = Path(__file__).parents[2] / "recipes" / "benchmarks" / "training.py"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("training")
    run = subprocess.run(
        [sys.executable, str(BENCHMARK), "--quick", "--json", str(folder / "training.json")],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return {row["name"]: row for row in json.loads((folder / "training.json").read_text())["rows"]}


def rows_named(rows: dict[str, dict[str, Any]], start: str) -> list[dict[str, Any]]:
    return [row for name, row in rows.items() if name.startswith(start) and row["goal"] is not None]


@pytest.mark.slow
@pytest.mark.benchmark
def test_coefficients_take_many_times_less_training_memory_than_a_lora(rows: dict[str, dict[str, Any]]) -> None:
    goals = rows_named(rows, "bytes of LoRA / of ")
    assert [row["goal"] for row in goals] == [">= 15", ">= 100"]
    assert all(row["ok"] for row in goals), goals


@pytest.mark.slow
@pytest.mark.benchmark
def test_no_activation_wider_than_the_rank_is_kept_beside_the_input(rows: dict[str, dict[str, Any]]) -> None:
    goals = rows_named(rows, "widest activation ")
    assert len(goals) == 4  # two phases in two dtypes
    assert all(row["ok"] and row["value"] > 0 for row in goals), goals


@pytest.mark.slow
@pytest.mark.benchmark
def test_steps_and_all_else_in_a_stream_are_timed(rows: dict[str, dict[str, Any]]) -> None:
    goals = [*rows_named(rows, "step of the "), *rows_named(rows, "its share of the time of 500 steps")]
    assert [row["goal"] for row in goals] == ["<= 1.02", "<= 1.2", "<= 1.02", "<= 1.2", "<= 2"]
    assert all(row["value"] > 0 for row in goals), goals


@pytest.mark.slow
@pytest.mark.benchmark
@pytest.mark.distributed
def test_zero_is_compared_with_ddp_for_a_lora_and_for_each_phase(rows: dict[str, dict[str, Any]]) -> None:
    pytest.importorskip("deepspeed")
    assert len([name for name in rows if name.startswith("a step in two processes, ")]) == 9  # by adapter and engine
    for engine in ("ZeRO-2", "ZeRO-3"):
        lora = rows[f"{engine} over DDP: LoRA"]
        goals = rows_named(rows, f"{engine} over DDP: Share, ")
        assert len(goals) == 2
        assert lora["value"] > 0
        assert all(row["value"] > 0 and row["ok"] == (row["value"] <= lora["value"]) for row in goals), goals
