"""This process as a client of the server, as if it had been started with HF_ENDPOINT set to its address.

The client reads its environment when it is imported, into constants that are set here. No
function is replaced. Beside those of `huggingface_hub.constants`, two `HfApi` keep the endpoint they were made with:
the one whose methods `huggingface_hub` exports, and the one of transformers. PEFT reads HF_HUB_OFFLINE at run time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import transformers.utils.hub
from huggingface_hub import HfApi, constants, hf_api
from huggingface_hub.utils import _cache_manager

from .repository import Repository
from .server import HubServer, User


USER = "alice"
ORGANIZATION = "org"


class Hub:
    """The server as a test sees it.

    `alice`, who may write to `org`, is logged in: her token is in HF_TOKEN.

    Attributes:
        server: The server.
        user: User who is logged in; None for nobody.
        home: HF_HOME, which is new for each test.
    """

    def __init__(self, server: HubServer, home: Path, patch: pytest.MonkeyPatch) -> None:
        self.server = server
        self.home = home
        self.user: User | None = server.add_user(USER, organizations={ORGANIZATION: "write"})
        self._patch = patch
        self._machines = 0
        patch.setattr(constants, "ENDPOINT", server.url)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        patch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
        patch.setattr(hf_api.api, "endpoint", server.url)
        patch.setattr(hf_api.api, "_whoami_cache", {})
        patch.setattr(transformers.utils.hub, "_hf_api", None)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        # For PEFT, and for child processes.
        patch.setenv("HF_ENDPOINT", server.url)
        patch.setenv("HF_TOKEN", self.user.token)
        patch.setenv("HF_HUB_OFFLINE", "0")
        patch.setenv("HF_HUB_DISABLE_XET", "1")
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.delenv("TRANSFORMERS_OFFLINE", raising=False)
        self._set_home()

    @property
    def url(self) -> str:
        """Address of the Hub."""
        return self.server.url

    @property
    def api(self) -> HfApi:
        """Client of the user who is logged in."""
        return HfApi()

    @property
    def cache(self) -> Path:
        """Folder of downloaded repositories."""
        return self.home / "hub"

    def repository(self, repo_id: str) -> Repository:
        """Return what the server has, to look at it, or to `write` to it as somebody else."""
        return self.server.repositories[repo_id]

    def move_to_another_machine(self) -> None:
        """Empty the cache."""
        self._machines += 1
        self.home = self.home.with_name(f"{self.home.name}-{self._machines}")
        self._set_home()

    @contextmanager
    def logged_in_as(self, user: User | None) -> Iterator[None]:
        """Use the token of somebody else, or none, within the block."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self, "user", user)
            if user is None:
                patch.delenv("HF_TOKEN", raising=False)
            else:
                patch.setenv("HF_TOKEN", user.token)
            yield

    @contextmanager
    def offline(self) -> Iterator[None]:
        """Let the client behave as with HF_HUB_OFFLINE=1 within the block."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constants, "HF_HUB_OFFLINE", True)
            patch.setenv("HF_HUB_OFFLINE", "1")
            yield

    def subprocess_env(self, **changes: str) -> dict[str, str]:
        """Return an environment in which a child process uses this Hub and this cache, as the logged-in user."""
        return {**os.environ, **changes}

    def _set_home(self) -> None:
        self._patch.setenv("HF_HOME", str(self.home))
        self._patch.setenv("HF_HUB_CACHE", str(self.cache))
        self._patch.setattr(constants, "HF_HOME", str(self.home))
        self._patch.setattr(constants, "HF_HUB_CACHE", str(self.cache))
        self._patch.setattr(constants, "HUGGINGFACE_HUB_CACHE", str(self.cache))
        self._patch.setattr(_cache_manager, "HF_HUB_CACHE", str(self.cache))
        self._patch.setattr(constants, "HF_ASSETS_CACHE", str(self.home / "assets"))
        self._patch.setattr(constants, "HF_TOKEN_PATH", str(self.home / "token"))
        self._patch.setattr(constants, "HF_STORED_TOKENS_PATH", str(self.home / "stored_tokens"))
