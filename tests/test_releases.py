"""The scripts in `.github` that continuous integration and releases use work, and its other files can be read."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from share_hf import __version__


ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, GITHUB / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A version and a changelog."""
    (tmp_path / "share_hf").mkdir()
    (tmp_path / ".github").mkdir()
    (tmp_path / "share_hf" / "version.py").write_text('__version__ = "1.2.0"\n')
    (tmp_path / ".github" / "CHANGELOG.md").write_text("# Changelog\n\n## [1.2.0] - 2026-01-01\n")
    return tmp_path


class TestTag:
    def test_of_the_version_is_right(self, repository: Path) -> None:
        assert script("check_tag").fault_of("v1.2.0", repository) is None

    @pytest.mark.parametrize("tag", ["v1.2.1", "1.2.0", "v1.2", "v1.2.0rc1", ""])
    def test_of_another_version_is_not(self, repository: Path, tag: str) -> None:
        fault = script("check_tag").fault_of(tag, repository)
        assert fault == f"the tag is {tag!r}, but share_hf/version.py says '1.2.0': expected the tag 'v1.2.0'"

    def test_wants_a_section_of_the_changelog(self, repository: Path) -> None:
        (repository / ".github" / "CHANGELOG.md").write_text("# Changelog\n\n## [1.1.0] - 2026-01-01\n")
        assert script("check_tag").fault_of("v1.2.0", repository) == ".github/CHANGELOG.md has no section [1.2.0]"

    def test_is_checked_on_the_command_line(self) -> None:
        command = [sys.executable, str(GITHUB / "check_tag.py")]
        wrong = subprocess.run([*command, "v0.0.0"], capture_output=True, text=True)
        assert (wrong.returncode, wrong.stdout) == (1, "")
        assert wrong.stderr.startswith("error: the tag is 'v0.0.0'")
        assert subprocess.run([*command, f"v{__version__}"], capture_output=True).returncode == 0
        assert subprocess.run(command, capture_output=True).returncode == 2


def row(name: str, value: float | None, goal: str | None, ok: bool | None, **more: Any) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": "x", "goal": goal, "ok": ok, **more}


class TestBenchmarks:
    @pytest.mark.parametrize(
        ("rows", "code"),
        [
            ([row("step over LoRA", 1.01, "<= 1.02", True)], 0),
            ([row("step over LoRA", 1.5, "<= 1.02", False)], 0),
            ([row("step over LoRA", 4, "<= 1.02", False)], 1),
            ([row("times faster", 20, ">= 50", False)], 0),
            ([row("times faster", 10, ">= 50", False)], 1),
            ([row("largest relative difference of an update", 2e-6, "<= 1e-06", False)], 1),
            ([row("bytes of LoRA / of the coefficients phase", 14, ">= 15", False)], 1),
            ([row("times faster", 60, ">= 50", True), row("routes", None, None, None, reason="not run: no data")], 0),
            ([row("seconds", 3, None, None)], 1),
            ([], 1),
        ],
    )
    def test_miss_their_goals_by_more_than_the_clock_explains(
        self, rows: list[dict[str, Any]], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
        assert script("check_benchmarks").main([str(tmp_path / "rows.json")]) == code
        assert ("REGRESSION" in capsys.readouterr().out) == (code == 1 and any(one["goal"] for one in rows))


class TestOldest:
    def test_takes_the_lower_bounds_and_no_extra(self) -> None:
        requirements = ["torch>=2.6", "huggingface_hub>=1.5", 'trl>=1.0; extra == "trl"']
        assert script("oldest").oldest(requirements) == ["torch==2.6", "huggingface_hub==1.5"]

    def test_refuses_a_requirement_without_one(self) -> None:
        with pytest.raises(ValueError, match=r"'tqdm': expected name>=version"):
            script("oldest").oldest(["tqdm"])

    def test_every_requirement_has_a_bound_and_a_version_that_is_tested(self) -> None:
        block = re.search(
            r"install_requires = \[(.*?)\n\]", (ROOT / "setup.py").read_text(encoding="utf-8"), re.DOTALL
        )
        assert block is not None
        requirements = re.findall(r'"(.+?)"', block[1])
        names = {bound.partition("==")[0].lower() for bound in script("oldest").oldest(requirements)}
        tested = re.findall(r"^([\w.-]+)==", (GITHUB / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
        assert names <= {name.lower() for name in tested}


class AnyTag(yaml.SafeLoader):
    """Reads values with tags, such as those of mkdocs, as None."""


AnyTag.add_multi_constructor("", lambda loader, tag, node: None)


class TestFiles:
    @pytest.mark.parametrize("path", sorted(GITHUB.rglob("*.yml")), ids=lambda path: path.name)
    def test_are_yaml(self, path: Path) -> None:
        assert isinstance(yaml.load(path.read_text(encoding="utf-8"), AnyTag), dict)

    def test_name_files_that_are_there(self) -> None:
        for path in (GITHUB / "workflows").glob("*.yml"):
            for name in re.findall(
                r"(?:python|bash) ([\w./-]+\.(?:py|sh)|\.ci/run)", path.read_text(encoding="utf-8")
            ):
                assert (ROOT / name).is_file(), f"{path.name}: {name}"
