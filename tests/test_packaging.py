"""The wheel and the source distribution, built and used like somebody does who does not have the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from share_hf import __version__


ROOT = Path(__file__).parents[1]
NOT_SOURCES = shutil.ignore_patterns(
    *(".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__"),
    *("build", "dist", "*.egg-info", "output*", "runs", "wandb", "*.log"),
)
# Files of the repository that are not part of a release.
LEFT_OUT = {".gitattributes", ".gitignore"}
MADE = re.compile(r"PKG-INFO|setup\.cfg|share_hf\.egg-info/.*")
PARTS = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "share_hf", "recipes", "tests", "model_cards")

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Distributions:
    """What was built, and what it was built from."""

    source: Path
    wheel: Path
    archive: Path


@dataclass(frozen=True)
class Environment:
    """An environment in which the wheel is installed, beside the libraries of the environment that runs the tests."""

    python: Path
    program: Path

    def run(self, *command: str | Path, cwd: Path) -> str:
        """Run a command, which must succeed, and return what it printed."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        variables |= {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
        run = subprocess.run(
            [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=280, env=variables
        )
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """Run `python -m build` in a copy of the repository: the source distribution, and the wheel made from it."""
    pytest.importorskip("build", reason="build, which makes the distributions, is not installed")
    pytest.importorskip("setuptools", minversion="77", reason="setuptools is not installed, or is older than 77")
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    for name in (*PARTS, ".github", ".ci"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=NOT_SOURCES)
        else:
            shutil.copy(ROOT / name, source / name)
    # Without isolation, nothing is downloaded: the installed setuptools builds them.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(source)]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,), (archive,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return Distributions(source, wheel, archive)


@pytest.fixture(scope="module")
def installed(built: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel in a new environment, whose other libraries are those of this one."""
    folder = tmp_path_factory.mktemp("installed") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    scripts = folder / ("Scripts" if sys.platform == "win32" else "bin")
    environment = Environment(scripts / "python", scripts / "share-hf")
    pip = (sys.executable, "-m", "pip", "--python", environment.python)
    environment.run(*pip, "install", "--no-deps", "--no-index", built.wheel, cwd=folder)
    packages = environment.run(
        environment.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
    )
    # Files `.pth` in folders that a `.pth` file names are not read, so an editable installation here stays unseen.
    others = "\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    Path(packages.strip(), "libraries.pth").write_text(f"{others}\n")
    return environment


@pytest.fixture(scope="module")
def unpacked(built: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the source distribution."""
    folder = tmp_path_factory.mktemp("unpacked")
    shutil.unpack_archive(built.archive, folder)
    (root,) = folder.iterdir()
    return root


def test_the_wheel_has_the_packages_and_nothing_else(built: Distributions) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        names = set(wheel.namelist())
    metadata = f"share_hf-{__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"share_hf", "share_hf_cli", metadata}
    assert {"share_hf/py.typed", "share_hf/model_cards/subspace.md.jinja", f"{metadata}/licenses/LICENSE"} <= names
    in_package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "share_hf").rglob("*.py")}
    expected = {re.sub("^share_hf/cli/", "share_hf_cli/", name) for name in in_package}
    assert {name for name in names if name.endswith(".py")} == expected


def test_the_source_distribution_has_every_file_of_the_repository(built: Distributions) -> None:
    with tarfile.open(built.archive) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    made = re.compile(MADE)
    sources = {path.relative_to(built.source).as_posix() for path in built.source.rglob("*") if path.is_file()}
    sources = {name for name in sources if not made.fullmatch(name)}
    assert {name for name in names if not made.fullmatch(name)} == sources
    assert {"recipes/quickstart.sh", ".github/constraints.txt", "tests/run.sh", "model_cards/quickstart.md"} <= names
    assert not LEFT_OUT & names


def test_the_installed_program_runs(installed: Environment, tmp_path: Path) -> None:
    assert installed.run(installed.program, "--help", cwd=tmp_path).startswith("usage: share-hf")
    assert installed.run(installed.program, "--version", cwd=tmp_path) == f"share-hf {__version__}\n"


def test_the_installed_package_is_the_one_of_the_wheel(installed: Environment, tmp_path: Path) -> None:
    code = (
        "import share_hf, importlib.resources as resources\n"
        "print(share_hf.__file__, *(getattr(share_hf, name) is not None for name in share_hf.__all__))\n"
        "print((resources.files('share_hf') / 'model_cards' / 'subspace.md.jinja').is_file())\n"
    )
    output = installed.run(installed.python, "-c", code, cwd=tmp_path).split()
    assert Path(output[0]).is_relative_to(installed.python.parents[1])
    assert output[1:] == ["True"] * 7


def test_a_recipe_of_the_source_distribution_runs_with_the_wheel(
    installed: Environment, unpacked: Path, tmp_path: Path
) -> None:
    # Only the recipes are there, without the package beside them.
    shutil.copytree(unpacked / "recipes", tmp_path / "recipes")
    small = ("--clients", "6", "--notes", "48", "--test_notes", "6", "--basis_examples", "32")
    recipe = tmp_path / "recipes" / "many_tasks.py"
    installed.run(installed.python, recipe, *small, "--num_train_epochs", "1", cwd=tmp_path)
    # The card is written from the template in the wheel.
    assert "| `client001 +5` |" in (tmp_path / "many-tasks" / "subspace" / "README.md").read_text()
