# ruff: noqa: F401, F811 -- fixtures of other modules
"""How a launcher's environment affects a command; `tests/distributed/test_builds.py` has real launches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.collections_on_disk import write_collection
from tests.test_cli import SMALL, Output, as_before, share


@pytest.mark.parametrize(
    ("variables", "speaks"),
    [
        ({}, True),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, False),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0"}, False),  # the first of a second machine
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"WORLD_SIZE": "2", "RANK": "1"}, True),  # a cluster's, in which every program is on its own
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, False),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, True),
    ],
)
def test_the_first_process_alone_does_what_is_not_divided(
    variables: dict[str, str],
    speaks: bool,
    share: Callable[..., Output],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places, tree = write_collection(tmp_path, 1, 1), str(tmp_path / "tree")
    assert share("init", tree, *places, *SMALL)[0] == 0
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for argv, says in ((["info", tree], f"{tree}: 1 task"), (["rename", tree, "task0", "other"], tree)):
        code, out, err = share(*argv)
        assert (code, err) == (0, "")
        assert out.startswith(says) if speaks else not out
    code, out, err = share("export", tree, "nothing", str(tmp_path / "out"))
    assert (code, bool(err)) == ((1, True) if speaks else (0, False))
