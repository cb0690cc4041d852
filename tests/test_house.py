"""The structure of the package: which packages import which, how long a module may be, and what an import loads."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "share_hf"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))

# The packages that each one may import from.
BELOW_THE_FACADE = {"subspace", "state", "format", "card", "hub", "tuner"}
ARROWS: dict[str, set[str]] = {
    "version": set(),
    "subspace": set(),
    "state": {"subspace"},
    "format": {"state", "subspace", "version"},
    "card": {"format", "state", "subspace", "version"},
    "hub": {"card", "format", "state"},
    "tuner": {"format", "state", "subspace"},
    "engines": {"subspace", "tuner"},
    "facade": BELOW_THE_FACADE,
    "shared_subspace": {*BELOW_THE_FACADE, "facade"},
    "continual": {*BELOW_THE_FACADE, "engines", "shared_subspace"},
    "serving": {"shared_subspace", "hub", "format", "state", "subspace"},
    "cli": {*BELOW_THE_FACADE, "engines", "shared_subspace", "continual", "serving", "version", "share_hf"},
    "share_hf": {"tuner", "version", "continual", "shared_subspace"},
}
LONGEST = 450
LONGEST_OF = {"continual/trainer.py": 400}


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "share_hf" if parts[0] == "__init__" else parts[0]


def imports(path: Path, *, top_level: bool | None = None) -> Iterator[tuple[str, int]]:
    """Yield names and lines of what a module imports from share_hf: at top level, within functions, or both."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    within = {id(node) for scope in ast.walk(tree) if isinstance(scope, ast.FunctionDef) for node in ast.walk(scope)}
    package = ("share_hf", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(tree):
        if top_level is not None and (id(node) in within) == top_level:
            continue
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join([*start, *(node.module or "").split(".")]).strip(".")
            names = [name] if node.module else [f"{name}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "share_hf":
                yield name, node.lineno


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_arrows_run_down_only(path: Path) -> None:
    room = room_of(path)
    for name, line in imports(path):
        other = name.split(".")[1] if "." in name else "share_hf"
        assert other == room or other in ARROWS[room], f"{path}:{line}: {room} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_import_of_ours_hides_in_a_function(path: Path) -> None:
    hidden = [f"{path}:{line}: {name}" for name, line in imports(path, top_level=False)]
    # The command line parses its arguments before it waits for torch.
    assert not hidden or path == PACKAGE / "cli" / "__init__.py", hidden


def test_every_room_has_its_arrows() -> None:
    assert {room_of(path) for path in MODULES} == ARROWS.keys()


def test_the_mathematics_know_torch_and_tqdm_alone() -> None:
    for path in (PACKAGE / "subspace").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
        modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        foreign = {module.split(".")[0] for module in modules} - sys.stdlib_module_names
        assert foreign <= {"torch", "tqdm"}, f"{path}: {foreign}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_module_has_a_readable_length(path: Path) -> None:
    name = path.relative_to(PACKAGE).as_posix()
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_OF.get(name, LONGEST)


def test_the_tuner_brings_neither_the_card_nor_the_network() -> None:
    program = (
        "import share_hf.tuner, sys; print(*sorted(name for name in sys.modules if name.startswith('share_hf.')))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    rooms = {name.split(".")[1] for name in run.stdout.split()}
    assert rooms == {"format", "state", "subspace", "tuner", "version"}


def test_the_package_offers_what_it_lists() -> None:
    program = "import share_hf; print(*(getattr(share_hf, name) and name for name in share_hf.__all__))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names = "ShareCallback ShareConfig ShareTrainer ShareTrainingArguments SharedSubspace"
    assert run.stdout.split()[:-1] == names.split()
    assert {*names.split()} <= {*dir(__import__("share_hf"))}


def test_no_page_names_a_test_that_is_not_there() -> None:
    pages = [ROOT / "README.md", *(ROOT / "recipes" / "guides").glob("**/*.md")]
    named = {test for page in pages for test in re.findall(r"`(tests/[\w/]+\.py)`", page.read_text(encoding="utf-8"))}
    assert len(named) >= 15
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
