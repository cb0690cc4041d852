"""The run of everything on one CUDA card, as far as it goes on a machine without one."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch


ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "benchmarks"

Rows = dict[str, dict[str, Any]]

TESTS = """
import os, signal, time
import pytest

def test_passes(): time.sleep(0.01)
def test_fails(): assert 1 + 1 == 3, "sums are wrong"
def test_is_skipped(): pytest.importorskip("no_such_package", reason="no_such_package is not installed")
def test_hangs(): {hangs}
def test_comes_last(): pass
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, which belongs to no package."""
    monkeypatch.syspath_prepend(FOLDER)
    module = importlib.import_module("gpu")
    before = signal.getsignal(signal.SIGTERM)
    yield module
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def tests(tmp_path: Path) -> Callable[[str], Path]:
    """A file of small tests, one of which behaves as requested."""

    def write(hangs: str) -> Path:
        file = tmp_path / "test_small.py"
        file.write_text(TESTS.format(hangs=hangs))
        return file

    return write


def rows_in(path: Path) -> Rows:
    content = json.loads(path.read_text())
    assert content["versions"]["torch"] == torch.__version__
    assert content["machine"]["cores"] == os.cpu_count()
    return {row["name"]: row for row in content["rows"]}


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_parts_are_all_the_cuda_tests_and_the_benchmarks_within_eight_minutes(gpu: ModuleType) -> None:
    parts = {part.name: part for part in gpu.all_parts("cuda")}
    assert set(parts) == {
        *(file.name for file in (ROOT / "tests" / "cuda").glob("test_*.py")),
        "training.py",
        "merge.py",
        "inference.py",
        "continual.py",
    }
    assert gpu.SECONDS + 2 * gpu.SECONDS_TO_STOP < 8 * 60
    assert sum(part.seconds for part in parts.values()) <= gpu.SECONDS
    for name in ("training.py", "merge.py"):
        assert parts[name].command(Path("out"))[1:] == [str(FOLDER / name), "--size", "1b", "--json", "out"]


def test_results_of_glue_are_rows(gpu: ModuleType, tmp_path: Path) -> None:
    share = {"run": {"label": ""}, "matrix": [[0.5, None], [0.5, 0.7]]}
    tuned = {"run": {"label": "rate=1"}, "matrix": [[0.1, None], [0.1, 0.1]]}
    (tmp_path / "glue-share-order0-seed0-1.json").write_text(json.dumps(share))
    (tmp_path / "glue-lora-seed0-2.json").write_text(json.dumps(tuned))
    found, missing = gpu.glue_rows(tmp_path, gpu.Ending(None, 30))
    assert (found.name, found.value) == ("continual.py: average of share on GLUE", pytest.approx(60))
    assert missing.reason == "not run: the time limit of 30 s came first"


def test_every_outcome_of_a_test_is_a_row(gpu: ModuleType, tests: Callable[[str], Path], tmp_path: Path) -> None:
    part = gpu.tests_of(tests("pass"), 30)
    assert gpu.run_parts([part], tmp_path / "out.json", seconds=60, device="cpu") == 1
    rows = rows_in(tmp_path / "out.json")
    assert [name.partition("::")[2] for name in rows] == [
        "test_passes",
        "test_fails",
        "test_is_skipped",
        "test_hangs",
        "test_comes_last",
    ]
    passed, failed, skipped = list(rows.values())[:3]
    assert passed["ok"] is True
    assert 0.01 <= passed["value"] < 10
    assert "reason" not in passed
    assert failed["ok"] is False
    assert "sums are wrong" in failed["reason"]
    assert "sums are wrong" in (tmp_path / "out.log").read_text()
    assert skipped == {
        "name": "test_small.py::test_is_skipped",
        "value": None,
        "unit": "",
        "goal": None,
        "ok": None,
        "reason": "not run: no_such_package is not installed",
    }


@pytest.mark.slow
def test_the_time_limit_ends_a_part_and_the_next_one_is_run(
    gpu: ModuleType, tests: Callable[[str], Path], tmp_path: Path
) -> None:
    file = tests("time.sleep(100)")
    second = tmp_path / "test_second.py"
    second.write_text("def test_second(): pass")
    started = time.monotonic()
    gpu.run_parts([gpu.tests_of(file, 10), gpu.tests_of(second, 10)], tmp_path / "out.json", seconds=16, device="cpu")
    assert time.monotonic() - started < 16
    rows = rows_in(tmp_path / "out.json")
    assert rows["test_small.py::test_passes"]["ok"] is True
    for name in ("test_hangs", "test_comes_last"):
        assert rows[f"test_small.py::{name}"]["reason"] == "not run: the time limit of 8 s came first"
    assert rows["test_second.py::test_second"]["ok"] is True


def test_a_test_that_kills_its_process_has_failed_and_those_after_it_were_not_run(
    gpu: ModuleType, tests: Callable[[str], Path], tmp_path: Path
) -> None:
    part = gpu.tests_of(tests("os.kill(os.getpid(), signal.SIGSEGV)"), 30)
    assert gpu.run_parts([part], tmp_path / "out.json", seconds=60, device="cpu") == 1
    rows = rows_in(tmp_path / "out.json")
    assert rows["test_small.py::test_hangs"]["ok"] is False
    assert rows["test_small.py::test_hangs"]["reason"] == "the process ended with SIGSEGV"
    assert rows["test_small.py::test_comes_last"]["reason"] == "not run: the process ended with SIGSEGV"


def test_tests_that_cannot_be_imported_have_failed(gpu: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "test_broken.py"
    file.write_text("import no_such_module")
    assert gpu.run_parts([gpu.tests_of(file, 30)], tmp_path / "out.json", seconds=60, device="cpu") == 1
    (row,) = rows_in(tmp_path / "out.json").values()
    assert (row["name"], row["ok"]) == ("test_broken.py", False)
    assert "no_such_module" in row["reason"]


def test_a_missing_package_leaves_its_part_not_run_and_its_time_to_others(gpu: ModuleType, tmp_path: Path) -> None:
    never = gpu.Part(
        "never.py", 1e6, lambda path: [sys.executable, "-c", "raise SystemExit"], lambda *_: [], ("no_such",)
    )
    file = tmp_path / "test_second.py"
    file.write_text("def test_second(): pass")
    assert gpu.run_parts([never, gpu.tests_of(file, 1)], tmp_path / "out.json", seconds=60, device="cpu") == 0
    rows = rows_in(tmp_path / "out.json")
    assert rows["never.py"]["reason"] == "not run: no_such is not installed"
    assert rows["test_second.py::test_second"]["ok"] is True


SLOW_BENCHMARK = """
import sys, time
from pathlib import Path
from _report import Row, report

def rows():
    yield Row.at_most("first", 3, "x", 2)
    {then}
    yield Row("second", 1, "s")

report("Slow", rows(), Path(sys.argv[-1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("then", "expected"),
    [
        ("time.sleep(100)", {"ok": None, "reason": "not run: the time limit of 6 s came first"}),
        ("raise MemoryError", {"ok": False, "reason": "the process ended with code 1"}),
    ],
)
def test_a_benchmark_that_does_not_end_keeps_what_it_has_measured(
    then: str, expected: dict[str, Any], gpu: ModuleType, tmp_path: Path
) -> None:
    script = tmp_path / "slow.py"
    script.write_text(SLOW_BENCHMARK.format(then=then))
    part = gpu.Part(
        "slow.py",
        1,
        lambda path: [sys.executable, str(script), str(path)],
        lambda path, ending: gpu.benchmark_rows("slow.py", path, ending),
    )
    assert gpu.run_parts([part], tmp_path / "out.json", seconds=6, device="cpu") == 0  # no test has failed
    rows = rows_in(tmp_path / "out.json")
    assert list(rows) == ["slow.py: first", "slow.py: the rest"]
    assert (rows["slow.py: first"]["value"], rows["slow.py: first"]["ok"]) == (3, False)
    assert expected.items() <= rows["slow.py: the rest"].items()


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(getattr(signal, "SIGKILL", 9), marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_interrupted_keeps_what_it_has(
    number: signal.Signals, tests: Callable[[str], Path], tmp_path: Path
) -> None:
    out, file = tmp_path / "out.json", tests("time.sleep(60)")
    code = f"""
import gpu
from pathlib import Path
parts = [gpu.tests_of(Path({str(file)!r}), 60), gpu.benchmark("merge.py", (), 60)]
gpu.run_parts(parts, Path({str(out)!r}), seconds=120, device="cpu")
"""
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(FOLDER)})
    children: list[psutil.Process] = []
    try:
        wait_for(lambda: out.is_file() and "test_passes" in out.read_text() and not cut_off(out, "test_is_skipped"))
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(number)
        process.wait(timeout=30)
        if number != signal.SIGKILL:
            assert not any(child.is_running() for child in children)
    finally:
        process.kill()
        for child in children:
            if child.is_running():
                child.kill()
    rows = rows_in(out)
    assert rows["test_small.py::test_passes"]["ok"] is True
    assert rows["test_small.py::test_fails"]["ok"] is False
    for name in ("test_small.py::test_hangs", "test_small.py::test_comes_last", "merge.py"):
        assert rows[name]["ok"] is None
        assert rows[name]["reason"] == "not run: the run was interrupted before"


def cut_off(path: Path, test: str) -> bool:
    return "was interrupted" in next(row for name, row in rows_in(path).items() if test in name)["reason"]


def gpu_sh(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script, with no GPU in sight."""
    script = ["bash", str(FOLDER / "gpu.sh"), *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(script, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
@pytest.mark.benchmark
def test_without_a_card_every_row_says_so(tmp_path: Path) -> None:
    """It uses the Python of an environment, because the one on PATH lacks what is needed."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "env"):
        (tools / name).symlink_to(shutil.which(name))
    environment = {"PATH": str(tools), "SHARE_HF_VENV": sys.prefix, "PYTHON": ""}
    done = gpu_sh("--json", "out.json", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_in(tmp_path / "out.json")
    assert len(rows) == 8
    for name, row in rows.items():
        assert row["ok"] is row["value"] is None
        assert row["reason"].startswith("not run: no CUDA device: torch ")
        assert name in done.stdout


@pytest.mark.slow
@pytest.mark.benchmark
def test_a_rehearsal_runs_the_tests_on_the_cpu(tmp_path: Path) -> None:
    arguments = ("--json", "out.json", "--device", "cpu", "--only", "adapters", "--only", "merging")
    done = gpu_sh(*arguments, cwd=tmp_path, PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_in(tmp_path / "out.json")
    assert {name.partition("::")[0] for name in rows} == {"test_adapters.py", "test_merging.py"}
    assert all(row["ok"] for row in rows.values()), rows


def test_a_python_without_pytorch_is_reported(tmp_path: Path) -> None:
    done = gpu_sh(cwd=tmp_path, PYTHON="/bin/false")
    assert done.returncode == 1
    assert "none of these has PyTorch: /bin/false" in done.stderr
