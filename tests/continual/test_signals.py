"""Ctrl-C and SIGTERM end a stream at once, after a line that says how to continue it."""

from __future__ import annotations

import logging
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from .cases import At, classification_tasks
from .conftest import Make
from .kill_server import CLOCKS, Ask, end_of, kill_server, whole_stream


MOMENTS = 6
LINE = "the stream was interrupted; train(resume_from_checkpoint=True) continues it."


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    with kill_server(tmp_path_factory.mktemp("server") / "log.txt") as ask:
        yield ask


@pytest.fixture(scope="module")
def whole(run: Ask, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], dict[str, float]]:
    """What a stream leaves that is not ended early, and its length by each clock."""
    return whole_stream(run, tmp_path_factory.mktemp("whole"))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs streams in forked processes")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("attempt", range(MOMENTS))
def test_a_stream_that_is_ended_at_a_random_moment_says_so_and_can_continue(
    attempt: int,
    number: signal.Signals,
    run: Ask,
    whole: tuple[dict[str, bytes], dict[str, float]],
    tmp_path: Path,
) -> None:
    expected, lengths = whole
    chance = random.Random(f"{attempt}{number}")
    clock = CLOCKS[attempt % len(CLOCKS)]
    ended = run(tmp_path, clock, lengths[clock] * chance.uniform(0.1, 0.8), number=number)
    assert ended["codes"] == [-number if number == signal.SIGTERM else 1], ended["output"][-4000:]
    assert ended["output"].count(f"{tmp_path}: {LINE}") == 1
    assert ("KeyboardInterrupt" in ended["output"]) == (number == signal.SIGINT)
    resumed = run(tmp_path)
    assert resumed["codes"] == [0], resumed["output"][-4000:]
    found = end_of(tmp_path)
    assert found.keys() == expected.keys()
    assert not [name for name in expected if found[name] != expected[name]]


@pytest.fixture
def default_handlers() -> Iterator[None]:
    """Set the signal handlers that a new process has."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("default_handlers")
def test_ctrl_c_is_raised_on(make: Make, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.WARNING)
    trainer = make(classification_tasks("colors"))
    trainer.add_callback(At("on_step_end", lambda args, state, **kwargs: signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [record.getMessage() for record in caplog.records].count(f"{tmp_path / 'out'}: {LINE}") == 1


@pytest.mark.usefixtures("default_handlers")
def test_a_handler_of_the_users_own_is_called_and_stays(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caught: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        caught.append(number)

    def send(args: Any, state: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            signal.raise_signal(signal.SIGTERM)

    trainer = make(classification_tasks("colors"))
    trainer.add_callback(At("on_step_end", send))
    signal.signal(signal.SIGTERM, handler)
    trainer.train()
    assert signal.getsignal(signal.SIGTERM) is handler
    assert caught == [signal.SIGTERM]
    assert trainer.subspace.tasks == ("colors",)
    assert not any(LINE in record.getMessage() for record in caplog.records)


@pytest.mark.usefixtures("default_handlers")
def test_a_handler_that_a_callback_sets_stays(make: Make) -> None:
    def ignore(args: Any, state: Any, **kwargs: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    trainer = make(classification_tasks("colors"))
    trainer.add_callback(At("on_train_begin", ignore))
    trainer.train()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


@pytest.mark.usefixtures("default_handlers")
def test_sigterm_ends_a_process_as_before_when_the_stream_is_over(make: Make) -> None:
    make(classification_tasks("colors")).train()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
