"""The benchmark of collections as a person runs it, at a small size. Its times are not asserted here."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch


FOLDER = Path(__file__).parents[2] / "recipes" / "benchmarks"


@pytest.fixture
def adapters(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module that makes adapters, which belongs to no package."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("_adapters")


@pytest.fixture
def collection(adapters: ModuleType) -> ModuleType:
    return importlib.import_module("collection")


def test_adapters_are_made_once_and_share_a_part(adapters: ModuleType, tmp_path: Path) -> None:
    sizes = adapters.Sizes(modules=2, features=40, rank=3)
    first = adapters.make_adapters(tmp_path, 2, sizes)
    times = [place.stat().st_mtime_ns for place in first]
    (first[1] / "adapter_config.json").unlink()  # as if it had been stopped there
    places = adapters.make_adapters(tmp_path, 3, sizes)
    assert [place.name for place in places] == ["task00000", "task00001", "task00002"]
    assert places[0].stat().st_mtime_ns == times[0]
    factors = [adapters.factors_of(place) for place in places]
    assert all(list(of) == sorted(sizes.names()) for of in factors)
    out, in_ = factors[0][sizes.names()[0]]
    assert (out.shape, in_.shape) == ((40, 3), (3, 40))
    assert not torch.equal(out, factors[1][sizes.names()[0]][0])


def test_the_error_is_that_of_the_matrices(adapters: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    b, a, c, d = (torch.randn(*shape, generator=generator) for shape in ((20, 3), (3, 30), (20, 2), (2, 30)))
    expected = (b @ a - c @ d).norm() / (b @ a).norm()
    assert adapters.relative_error((b.double(), a.double()), (c, d)) == pytest.approx(float(expected), rel=1e-5)


def test_as_many_components_fit_as_the_bytes_allow(collection: ModuleType) -> None:
    sizes = collection.Sizes(modules=2, features=100, rank=4)
    assert collection.components_that_fit("lorashare", 2 * 2 * 4 * (100 + 10 * 4) * 7 + 1, sizes, 10) == 7
    assert collection.components_that_fit("vlora", 2 * 2 * 4 * (400 + 3 * (400 + 10)), sizes, 10) == 3
    assert collection.components_that_fit("vlora", 10, sizes, 10) == 1


def test_the_exact_basis_explains_more_than_any_other(collection: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = [
        (torch.randn(50, 4, generator=generator).double(), torch.randn(4, 60, generator=generator).double())
        for _ in range(30)
    ]

    def explained(out: torch.Tensor, in_: torch.Tensor) -> float:
        return sum(float((out.T @ b @ (a @ in_)).square().sum() / (b @ a).square().sum()) for b, a in factors)

    best = explained(*collection.exact_joint_basis(factors))
    for _ in range(3):
        other = [torch.linalg.qr(torch.randn(side, 32, generator=generator).double()).Q for side in (50, 60)]
        assert explained(*other) < best


@pytest.mark.slow
@pytest.mark.benchmark
def test_a_run_measures_everything_and_continues_where_it_was_stopped(tmp_path: Path) -> None:
    def run() -> dict[str, dict]:
        done = subprocess.run(
            [
                sys.executable,
                str(FOLDER / "collection.py"),
                "--quick",
                "--folder",
                str(tmp_path),
                "--json",
                "rows.json",
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=560,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}

    rows = run()
    for start in ("build, 24", "memory, 24", "error of ΔW, 24", "build, 48", "adding adapter 25", "loading, 24"):
        assert any(name.startswith(start) and row["value"] > 0 for name, row in rows.items()), start
    exact = next(row for name, row in rows.items() if name.endswith("over the exact joint basis'"))
    assert exact["ok"], exact
    written = next(row for name, row in rows.items() if name.startswith("files of "))
    assert written["ok"], written

    results = sorted((tmp_path / "results").iterdir())
    last = max(results, key=lambda path: path.stat().st_mtime_ns)
    last.unlink()
    times = {path: path.stat().st_mtime_ns for path in results if path != last}
    assert run().keys() == rows.keys()
    assert last.is_file()
    assert {path: path.stat().st_mtime_ns for path in times} == times
