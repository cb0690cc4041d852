"""A pytest plugin that writes its progress to a file as lines of JSON, so that nothing is lost if pytest is killed.

    SHARE_HF_EVENTS=events.jsonl PYTHONPATH=recipes/benchmarks python -m pytest -p _pytest_rows …

After collection, there is a line with the names of all tests, followed by a line for each start and each end of a
test. A file that fails or is skipped during collection has a line before them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest


def _note(**event: Any) -> None:
    with open(os.environ["SHARE_HF_EVENTS"], "a", encoding="utf-8") as events:
        events.write(json.dumps(event) + "\n")


def pytest_collection_finish(session: pytest.Session) -> None:
    _note(tests=[item.nodeid for item in session.items])


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _note(broken=report.nodeid, failed=_last_line(report))
    elif report.skipped:
        _note(broken=report.nodeid, skipped=_why_skipped(report))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _note(began=item.nodeid)
    return (yield)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        _note(ended=report.nodeid, skipped=_why_skipped(report))
    elif report.failed:
        _note(ended=report.nodeid, failed=f"{report.when}: {_last_line(report)}", seconds=report.duration)
    elif report.when == "call":
        _note(ended=report.nodeid, seconds=report.duration)


def _why_skipped(report: pytest.CollectReport | pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    return str(report.longrepr)


def _last_line(report: pytest.CollectReport | pytest.TestReport) -> str:
    """Return the error message in one line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = str(crash.message if crash is not None else report.longrepr).strip().splitlines()
    return (lines[0] if crash is not None else lines[-1])[:300]
