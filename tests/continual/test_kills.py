"""A stream that is killed at any moment and resumed ends like one that is not killed, byte for byte."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from .kill_server import CLOCKS, Ask, end_of, kill_server, whole_stream


MOMENTS = 50

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="runs streams in forked processes"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Run the stream in a folder up to a moment, resuming it if possible, and return how it ended."""
    with kill_server(tmp_path_factory.mktemp("server") / "log.txt") as ask:
        yield ask


@pytest.fixture(scope="module")
def whole(run: Ask, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], dict[str, float]]:
    """What a stream that is not killed leaves, and its length by each clock."""
    return whole_stream(run, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("number", range(MOMENTS))
def test_a_stream_that_is_killed_at_a_random_moment_ends_as_one_that_is_not(
    number: int, run: Ask, whole: tuple[dict[str, bytes], dict[str, float]], tmp_path: Path
) -> None:
    expected, lengths = whole
    clock, chance = CLOCKS[number % len(CLOCKS)], random.Random(number)
    folder, moment = tmp_path / "stream-0", lengths[clock] * chance.random()
    while (killed := run(folder, clock, moment))["codes"] == [0]:  # faster than the run that was timed
        moment *= 0.8
        folder = folder.with_name(f"{folder.name}0")
    assert killed["codes"] == [-signal.SIGKILL], killed["output"][-4000:]
    if chance.random() < 0.4:
        clock = chance.choice(CLOCKS)
        run(folder, clock, lengths[clock] * chance.random())
    resumed = run(folder)
    assert resumed["codes"] == [0], resumed["output"][-4000:]
    found = end_of(folder)
    assert found.keys() == expected.keys()
    assert not [name for name in expected if found[name] != expected[name]]
