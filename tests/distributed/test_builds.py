"""Builds that two processes divide between them are equal to those of one process, byte for byte."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from share_hf.cli import main
from tests.collections_on_disk import WEIGHTS, scale, write_collection
from tests.trees import files_of

from .launching import HERE, children_of, environment, launcher, run


pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(sys.platform == "win32", reason="launches as Linux does"),
]

COUNT, MODULES = 20, 41  # an odd number, so that one process has no module in the last turn
SMALL = ["--num-components", "8", "--pseudo-rank", "4"]


def without_figures_of(files: dict[str, bytes]) -> dict[str, bytes]:
    """Hide matplotlib, because the tests of one process hide it too, and figures depend on it."""
    return {name: content for name, content in files.items() if not name.startswith("figures")}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder of adapters, and the trees that one process made of them: after init, and after add."""
    folder = tmp_path_factory.mktemp("builds")
    names = [f"loras/{Path(place).name}" for place in write_collection(folder / "loras", COUNT, MODULES)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["init", "one", *names[:-1], *SMALL]) == 0
        after_init = files_of(folder / "one")
        assert main(["add", "one", names[-1]]) == 0
    return folder, names, after_init, files_of(folder / "one")


def test_two_processes_make_the_tree_of_one_and_fail_together(built: Any, tmp_path: Path) -> None:
    folder, names, after_init, after_add = built
    cut, loud = tmp_path / "cut", tmp_path / "loud"
    for other in (cut, loud):
        write_collection(other / "loras", COUNT, MODULES)
    weights = cut / names[3] / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    scale(str(loud / names[5]), 1, 1e25)  # the module that the second process has first
    here, tree = str(folder), str(tmp_path / "two")
    init = ["init", tree, *names[:-1], *SMALL]
    commands = [
        [[here, str(cut)], init],  # fails while reading
        [[here, str(loud)], init],  # fails while merging
        [[here, here], ["init", str(tmp_path / "two-parts"), *names[:-1], *SMALL, "--json"]],
        [[here, here], init],
        [[here, here], ["add", tree, names[-1]]],
        [[here, here], ["info", tree]],
        [[str(loud), str(loud)], ["init", str(tmp_path / "skipped"), *names[:-1], *SMALL, "--skip-bad"]],
    ]
    options = {"report": str(tmp_path), "commands": commands}
    result = run([*launcher("ddp"), str(HERE / "builds.py"), json.dumps(options)])

    assert result.returncode == 0, result.stdout[-4000:]
    for rank in (0, 1):
        assert json.loads((tmp_path / f"codes{rank}.json").read_text()) == [1, 1, 0, 0, 0, 0, 0]
    errors = [line for line in result.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2, errors
    assert errors[0].startswith("error: rank 1: loras/task3/adapter_model.safetensors: not a readable safetensors")
    assert errors[1].startswith("error: rank 1: 'model.layers.01.self_attn.q_proj': task 'task5'")
    assert result.stdout.count(f"{tree}: added task{COUNT - 1}") == 1
    assert result.stdout.count('"base_model": "org/base"') == 1
    assert without_figures_of(files_of(tmp_path / "two-parts")) == without_figures_of(after_init)
    assert without_figures_of(files_of(Path(tree))) == without_figures_of(after_add)
    expected = [f"task{i}" for i in range(COUNT - 1) if i != 5]
    assert json.loads((tmp_path / "skipped" / "share_config.json").read_text())["tasks"] == expected
    assert (
        result.stdout.count("1 adapter was left out:\n  task5: 'model.layers.01.self_attn.q_proj': task 'task5'") == 1
    )
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_killed_build_continues_where_it_was(built: Any, tmp_path: Path) -> None:
    folder, names, after_init, _ = built
    tree = tmp_path / "two"
    command = [*launcher("ddp"), "-m", "share_hf.cli", "init", str(tree), *names[:-1], *SMALL]
    unfinished = tmp_path / ".two.share_hf.unfinished"
    process = subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    family: list[psutil.Process] = []
    deadline = time.monotonic() + 120
    try:
        while len([*unfinished.glob("*.safetensors")]) < 5:
            if len(family) < 3:  # known before it is time to kill the processes
                family = children_of(process.pid)
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        for child in {*family, *children_of(process.pid)}:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait()
    kept = len([*unfinished.glob("*.safetensors")])
    assert 5 <= kept < MODULES and not tree.exists()

    result = run(command, cwd=folder)
    assert result.returncode == 0, result.stdout[-4000:]
    assert f"{tree}: continuing, {kept} of {MODULES} modules are finished" in result.stdout
    assert without_figures_of(files_of(tree)) == without_figures_of(after_init)
    assert not unfinished.exists()
