"""Names of tasks: which are refused, and that nothing has changed then."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from share_hf import ShareCallback, SharedSubspace
from share_hf.format.names import check_stored_names, check_task_name


UNUSABLE = ["", "a.b", "a/b", "../up", "with space", "-first", "_first", "ünicode", "x" * 65, "new\nline", "a\n"]
RESERVED = ["main", "default", "ref", "HEAD", "head", "Main", "step-0001-x", "step-9999-", "STEP-0001-x"]
COMMITS = ["a" * 40, "0123456789abcdef0123456789abcdef01234567", "A" * 40]
DEVICES = ["con", "NUL", "Aux", "prn", "com1", "LPT9"]
PARAMETERS = ["weight", "bias"]
ATTRIBUTES = ["train", "eval", "type", "keys", "update", "values", "items", "pop", "forward", "to", "copy", "get"]


@pytest.mark.parametrize("name", [*UNUSABLE, *RESERVED, *COMMITS, *DEVICES, *PARAMETERS, *ATTRIBUTES])
def test_a_name_that_some_part_of_the_stack_could_not_carry_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="task name") as refusal:
        check_task_name(name)
    assert repr(name) in str(refusal.value)
    assert "expected" in str(refusal.value)


@pytest.mark.parametrize("name", [None, 3, b"bytes", ("mrpc",)])
def test_a_name_that_is_not_a_string_is_refused(name: object) -> None:
    with pytest.raises(ValueError, match="not usable, expected 1 to 64 letters"):
        check_task_name(name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    [
        "a",
        "0",
        "MRPC",
        "sst-2_v1",
        "x" * 64,
        "a" * 39,
        "g" * 40,
        "step-1-x",
        "step-0001",
        "mains",
        "heads",
        "console",
        "com10",
        "Bias",
    ],
)
def test_any_other_name_is_taken(name: str) -> None:
    check_task_name(name, taken=["other"])


@pytest.mark.parametrize(
    ("name", "message"), [("mrpc", "already exists"), ("MRPC", "differs from 'mrpc' only in case")]
)
def test_a_name_is_taken_once_in_any_case(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_task_name(name, taken=["sst2", "mrpc"])


@pytest.mark.parametrize("name", ["train", "main", "a/b", "mrpc", "MRPC", "RTE"])
def test_adapters_under_a_refused_name_change_nothing(
    name: str, subspace: SharedSubspace, loras: dict[str, Path]
) -> None:
    before = subspace.state
    with pytest.raises(ValueError, match=name):
        subspace.add_adapters({"rte": loras["rte"], name: loras["rte"]}, progress=False)
    assert subspace.state is before


def test_a_name_is_refused_before_its_adapter_is_looked_for(subspace: SharedSubspace) -> None:
    with pytest.raises(ValueError, match="task name 'main' is reserved"):
        subspace.add_adapters({"main": "/nowhere"})


def test_a_callback_refuses_a_name_when_it_is_made(subspace: SharedSubspace) -> None:
    with pytest.raises(ValueError, match="is reserved"):
        ShareCallback("main")
    with pytest.raises(ValueError, match="'mrpc' already exists"):
        ShareCallback("mrpc", subspace)


@pytest.mark.parametrize("name", [*DEVICES, *PARAMETERS])
def test_trees_that_were_saved_with_such_a_name_are_still_read(name: str) -> None:
    check_stored_names(["mrpc", name])


@pytest.mark.parametrize("names", [["a", "b", "A"], ["a", "b", "a"], ["a", "main"], ["a", "../b"], ["a", 3]])
def test_the_names_in_a_tree_are_checked(names: list[str]) -> None:
    with pytest.raises(ValueError, match="task"):
        check_stored_names(names)


def test_the_time_for_names_grows_with_their_number_alone() -> None:
    def seconds(count: int) -> float:
        names = [f"task-{number}" for number in range(count)]
        started = time.perf_counter()
        check_stored_names(names)
        return time.perf_counter() - started

    assert min(seconds(40_000) for _ in range(3)) < 20 * min(seconds(10_000) for _ in range(3))
