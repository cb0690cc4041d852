"""Requests to the server, and the faults that a test arranges."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias
from urllib.parse import unquote


@dataclass
class Request:
    """A request as it came in, and how far it got.

    Attributes:
        raw_path: Percent-encoded path as it came in, without the query.
        repo_id: Repository that the request is about, once that is known.
        status: Status of the answer; None if the connection was dropped before that, or there is no answer yet.
        received: Number of bytes of the body that came in.
        sent: Number of bytes of the body that went out.
        uploaded: Number of bytes of content that came in, by path in the repository, or by SHA-256 for an LFS object.
        downloaded: Same for content that went out.
    """

    method: str
    raw_path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    repo_id: str | None = None
    status: int | None = None
    received: int = 0
    sent: int = 0
    uploaded: Counter[str] = field(default_factory=Counter)
    downloaded: Counter[str] = field(default_factory=Counter)

    @property
    def path(self) -> str:
        """Path without percent-encoding."""
        return unquote(self.raw_path)


@dataclass(frozen=True)
class Answer:
    """Answer with a status, and do nothing. The client retries after 408, 429, 500, 502, 503 and 504."""

    status: int
    message: str = "Injected by the test"
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DropUpload:
    """Close the connection after this many bytes of the body have come in, and do nothing."""

    after: int = 0


@dataclass(frozen=True)
class DropDownload:
    """Do what was asked for, but close the connection after this many bytes of the body have gone out."""

    after: int = 0


@dataclass(frozen=True)
class LoseAnswer:
    """Do what was asked for, but close the connection before the answer."""


@dataclass(frozen=True)
class WebPage:
    """Answer with a web page, as a proxy or the sign-in page of a network does, and do nothing."""

    status: int = 200
    body: bytes = b"<!doctype html><html><body><h1>Welcome to our network</h1></body></html>"


@dataclass(frozen=True)
class Delay:
    """Wait, then do what was asked for."""

    seconds: float


@dataclass(frozen=True)
class Run:
    """Call something when all of the request has come in, then do what was asked for."""

    function: Callable[[], object]


Fault: TypeAlias = Answer | DropUpload | DropDownload | LoseAnswer | WebPage | Delay | Run
Match: TypeAlias = Callable[[Request], bool]


@dataclass
class _Rule:
    match: Match
    action: Fault
    times: float


class Faults:
    """Rules of a test: what to do to which requests, and how often. The first that matches a request is used up."""

    def __init__(self) -> None:
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()

    def add(self, match: Match, action: Fault, *, times: float = 1) -> None:
        """Do something to the next `times` requests that match (`math.inf`: to all)."""
        with self._lock:
            self._rules.append(_Rule(match, action, times))

    def before_commit(self, function: Callable[[], object], *, times: float = 1) -> None:
        """Call something right before a commit is made, such as a commit by somebody else."""
        self.add(is_commit, Run(function), times=times)

    def clear(self) -> None:
        """Remove all rules."""
        with self._lock:
            self._rules.clear()

    def take(self, request: Request) -> Fault | None:
        """Return what to do to a request."""
        with self._lock:
            for rule in self._rules:
                if rule.times > 0 and rule.match(request):
                    rule.times -= 1
                    return rule.action
        return None


def is_commit(request: Request) -> bool:
    """Return whether a request makes a commit."""
    return request.method == "POST" and request.path.startswith("/api/models/") and "/commit/" in request.path


def is_upload(request: Request) -> bool:
    """Return whether a request carries the content of an LFS object to the storage."""
    return request.method == "PUT"


def is_download_of(name: str) -> Match:
    """Match requests for the content of a file: at the Hub, and at the storage to which the Hub sends clients."""
    return lambda request: (
        request.method == "GET"
        and (
            ("/resolve/" in request.path and request.path.endswith(f"/{name}"))
            or request.query.get("filename") == [name]
        )
    )
