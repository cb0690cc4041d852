"""Completion of `share-hf` in the shell, as argcomplete asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
# The word breaks of bash, without those that argcomplete leaves out.
WORDBREAKS = " \t\n\"'><=;|&(:"

pytest.importorskip("argcomplete")


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the command line as setup.py installs it: on its own."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / "share_hf_cli").symlink_to(ROOT / "share_hf" / "cli", target_is_directory=True)
    return folder


@pytest.fixture
def here(tree: Path, tmp_path: Path) -> Path:
    """A folder with a subspace `sub` and a folder `adapters/mrpc-2`."""
    folder = tmp_path / "here"
    (folder / "adapters" / "mrpc-2").mkdir(parents=True)
    (folder / "sub").symlink_to(tree, target_is_directory=True)
    (folder / "broken").mkdir()
    (folder / "broken" / "share_config.json").write_text("{", encoding="utf-8")
    return folder


def completions(line: str, here: Path, cli: Path) -> list[str]:
    answer = here.parent / "answer"
    answer.touch()
    environment = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_COMP_WORDBREAKS": WORDBREAKS,
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
        "PYTHONPATH": os.pathsep.join([str(cli), os.environ.get("PYTHONPATH", "")]),
    }
    # If the command waited for torch, it would fail here, where torch is missing.
    program = "import sys; sys.modules['torch'] = None; from share_hf_cli import main; main()"
    subprocess.run(
        [sys.executable, "-c", program], cwd=here, env={**os.environ, **environment}, check=True, timeout=60
    )
    return answer.read_text(encoding="utf-8").split("\n")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("share-hf ref", ["refit"]),
        ("share-hf init new --basis ", ["joint", "factor"]),
        ("share-hf init new --num", ["--num-components"]),
        ("share-hf rename sub ", ["mrpc", "sst2"]),
        ("share-hf remove sub mrpc s", ["sst2"]),
        ("share-hf replace sub m", ["mrpc="]),
        ("share-hf replace sub mrpc=ad", ["adapters/"]),
        ("share-hf refit sub mrpc=adapters/", ["adapters/mrpc-2/"]),
        ("share-hf rename broken m", [""]),
        ("share-hf rename org/repo m", [""]),
    ],
)
def test_a_line_is_completed(line: str, expected: list[str], here: Path, cli: Path) -> None:
    found = completions(line, here, cli)
    assert [word for word in found if not word.startswith("-") or line.endswith("--num")] == expected


def test_a_shell_that_asks_without_argcomplete_hears_nothing(cli: Path) -> None:
    program = "import sys; sys.modules['argcomplete'] = None; from share_hf_cli import main; main(['info', 'sub'])"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(cli), "_ARGCOMPLETE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (run.returncode, run.stdout, run.stderr) == (1, "", "")
