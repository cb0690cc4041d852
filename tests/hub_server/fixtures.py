"""The fixture `hub`. A conftest imports it together with `hub_server`, or names this module in `pytest_plugins`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from .client import Hub
from .server import HubServer


@pytest.fixture(scope="session")
def hub_server() -> Iterator[HubServer]:
    """The server. Tests use `hub`, which empties it first."""
    with HubServer() as server:
        yield server


@pytest.fixture
def hub(hub_server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub to which the client in this process talks, with an empty cache."""
    hub_server.reset()
    huggingface_hub.close_session()
    yield Hub(hub_server, tmp_path / "hf-home", monkeypatch)
    huggingface_hub.close_session()
