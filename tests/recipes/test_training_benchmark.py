"""The benchmark of training steps as a person runs it, at a small size. Its times are not asserted here."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM


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
        ratio, added = rows[f"{engine} over DDP: LoRA"], rows[f"{engine} adds to a step: LoRA"]
        goals = rows_named(rows, f"{engine} over DDP: Share, ")
        assert len(goals) == 2
        assert ratio["value"] > 0
        assert all(row["value"] > 0 and row["ok"] == (row["value"] <= ratio["value"]) for row in goals), goals
        for phase in ("coefficients", "adapt"):
            goal = rows[f"{engine} adds to a step: Share, {phase} phase, at most LoRA's + noise"]
            noise = rows[f"{engine} adds to a step: noise of Share, {phase} phase - LoRA"]
            assert noise["value"] > 0
            assert goal["ok"] == (goal["value"] <= added["value"] + noise["value"]), (goal, noise)


def test_steps_that_need_more_gpus_than_there_are_were_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    training, engines = (importlib.import_module(name) for name in ("training", "_engines"))
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    rows = training.engine_rows(torch.bfloat16, quick=False)
    assert len({row.name for row in rows}) == 9  # by adapter and engine
    assert rows[0].name == "a step in two processes, hidden size 512, DDP: LoRA"
    for row in rows:
        assert row.value is row.ok is None
        assert row.reason == "not run: 2 processes need a GPU each, found 1"


@pytest.mark.slow
@pytest.mark.benchmark
@pytest.mark.distributed
def test_only_zero_3_is_measured_with_the_linear_function_of_deepspeed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    engines = importlib.import_module("_engines")
    monkeypatch.setenv("LINEAR_FUNCTIONS", str(tmp_path / "functions"))
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    adapters = {"LoRA": LoraConfig(r=4, target_modules=["q_proj"])}
    make_base = partial(ModelThatNotesItsLinearFunction, config)
    seconds = engines.seconds_in_two_processes(make_base, adapters, (1, 8), 1)
    assert list(seconds) == [("LoRA", "DDP"), ("LoRA", "ZeRO-2"), ("LoRA", "ZeRO-3")]
    rounds = (tmp_path / "functions").read_text().split()
    assert rounds == ["torch._C._nn", "torch._C._nn", "deepspeed.runtime.zero.linear"] * 3  # two of them warm up


class ModelThatNotesItsLinearFunction(LlamaForCausalLM):
    """A model that records the module of `F.linear` at every step, in the first of the processes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.distributed.get_rank() == 0:
            with open(os.environ["LINEAR_FUNCTIONS"], "a") as functions:
                print(F.linear.__module__, file=functions)
        return super().forward(*args, **kwargs)
