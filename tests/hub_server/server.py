"""The server: who may do what, the two sockets, and the log of all requests."""

from __future__ import annotations

import hashlib
import secrets
import socket
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from . import routes
from .faults import Answer, Delay, DropDownload, DropUpload, Fault, Faults, LoseAnswer, Request, Run, WebPage
from .repository import HubError, Repository


@dataclass(frozen=True)
class User:
    """An account.

    Attributes:
        name: Name, which is a namespace too.
        token: Only token of the account.
        can_write: Whether the token allows writing.
        organizations: Role, `read` or `write`, in each organization.
    """

    name: str
    token: str
    can_write: bool = True
    organizations: Mapping[str, str] = field(default_factory=dict)


class HubServer:
    """The Hub on loopback. `with HubServer() as server:` runs it.

    Like the real one, it has two hosts: the Hub at `url`, and the storage of the LFS objects, to which the Hub sends
    clients with signed addresses, and which refuses their tokens.

    Attributes:
        users: Users by token.
        repositories: Repositories by id.
        requests: All requests since the last `reset` or `forget_requests`.
        faults: Faults that the test has arranged.
        page_size: Number of entries on a page of a listing.
    """

    def __init__(self) -> None:
        self.users: dict[str, User] = {}
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.faults = Faults()
        self.page_size = 1000
        self._secret = secrets.token_hex()
        self._hub_socket = _Socket(self, routes.HUB)
        self._storage_socket = _Socket(self, routes.STORAGE)

    def __enter__(self) -> HubServer:
        for listener in (self._hub_socket, self._storage_socket):
            threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for listener in (self._hub_socket, self._storage_socket):
            listener.shutdown()
            listener.server_close()

    @property
    def url(self) -> str:
        """Value for `HF_ENDPOINT`."""
        return self._hub_socket.url

    def reset(self) -> None:
        """Remove everything."""
        self.users, self.repositories, self.page_size = {}, {}, 1000
        self.faults.clear()
        self.forget_requests()

    def add_user(self, name: str, *, can_write: bool = True, organizations: Mapping[str, str] | None = None) -> User:
        """Make an account; its token is `hf_<name>`."""
        user = User(name, f"hf_{name}", can_write, organizations or {})
        self.users[user.token] = user
        return user

    def create_repo(self, repo_id: str, *, private: bool = False, gated: bool = False) -> Repository:
        """Make a repository in any namespace, or in none, like the oldest models of the Hub.

        Raises:
            HubError: 409 if there is one.
        """
        if repo_id in self.repositories:
            raise HubError(409, "You already created this model repo", url=f"{self.url}/{repo_id}")
        repository = self.repositories[repo_id] = Repository(repo_id, private=private, gated=gated)
        return repository

    def may_read(self, user: User | None, repository: Repository) -> bool:
        """Return whether somebody may know that there is a repository."""
        return not repository.private or self._role(user, repository.namespace) is not None

    def may_write(self, user: User | None, namespace: str) -> bool:
        """Return whether somebody may make and change repositories in a namespace."""
        return user is not None and user.can_write and self._role(user, namespace) == "write"

    def may_download(self, user: User | None, repository: Repository) -> bool:
        """Return whether somebody who may read a repository may also have its files."""
        if not repository.gated or self._role(user, repository.namespace) is not None:
            return True
        return user is not None and user.name in repository.granted

    def signed_url(self, method: str, path: str) -> str:
        """Return an address at the storage that can be used without a token."""
        return f"{self._storage_socket.url}{path}?signature={self.signature(method, path)}"

    def signature(self, method: str, path: str) -> str:
        """Return what a signed address must have."""
        return hashlib.sha256(f"{self._secret} {method} {path}".encode()).hexdigest()

    def forget_requests(self) -> None:
        """Start counting again."""
        self.requests = []

    def bytes_received(self) -> int:
        """Number of bytes in the bodies of all requests."""
        return sum(request.received for request in self.requests)

    def bytes_sent(self) -> int:
        """Number of bytes in the bodies of all answers."""
        return sum(request.sent for request in self.requests)

    def uploaded(self, repo_id: str, path: str) -> int:
        """Return the number of bytes of a file that came in: in commits, and as LFS objects of any of its versions."""
        return sum(request.uploaded[name] for request, name in self._transfers_of(repo_id, path))

    def downloaded(self, repo_id: str, path: str) -> int:
        """Return the number of bytes of a file that went out, from the Hub and from the storage."""
        return sum(request.downloaded[name] for request, name in self._transfers_of(repo_id, path))

    def uploads_of(self, content: bytes) -> list[Request]:
        """Return the requests that carried an LFS object to the storage, complete or not, for all repositories."""
        oid = hashlib.sha256(content).hexdigest()
        return [request for request in self.requests if request.method == "PUT" and oid in request.uploaded]

    def _transfers_of(self, repo_id: str, path: str) -> list[tuple[Request, str]]:
        names = {path, *self.repositories[repo_id].lfs_objects_of(path)}
        return [(request, name) for request in self.requests if request.repo_id == repo_id for name in names]

    def _role(self, user: User | None, namespace: str) -> str | None:
        if user is None:
            return None
        return "write" if user.name == namespace else user.organizations.get(namespace)


class _Socket(ThreadingHTTPServer):
    """One of the two hosts."""

    request_queue_size = 128

    def __init__(self, hub: HubServer, table: list[routes.Route]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self.routes = table
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that hang up; the handler reports everything else."""


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: _Socket
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_any(self) -> None:
        """Let a fault of the test happen, or answer."""
        hub, url = self.server.hub, urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        endpoint, params = routes.find(self.server.routes, self.command, url.path)
        request = Request(self.command, url.path, parse_qs(url.query), headers, params.get("repo"))
        hub.requests.append(request)
        fault = hub.faults.take(request)
        size = int(headers.get("content-length", 0))
        body = self.rfile.read(min(size, fault.after) if isinstance(fault, DropUpload) else size)
        request.received = len(body)
        if self.command == "PUT" and "oid" in params:
            request.uploaded[params["oid"]] += len(body)
        if isinstance(fault, DropUpload) or len(body) < size:
            self._hang_up()
            return
        try:
            _let_happen(fault)
            if isinstance(fault, WebPage):
                response = routes.Response(fault.status, fault.body, {"Content-Type": "text/html"})
            else:
                response = endpoint(routes.Call(hub, request, params, body))
        except HubError as error:
            response = routes.refusal(error)
        except Exception:
            traceback.print_exc()
            response = routes.refusal(HubError(500, "Internal Server Error"))
        if isinstance(fault, LoseAnswer):
            request.status = response.status
            self._hang_up()
            return
        self._send(request, response, fault.after if isinstance(fault, DropDownload) else None)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def _send(self, request: Request, response: routes.Response, drop_after: int | None) -> None:
        request.status = response.status
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        body = b"" if self.command == "HEAD" else response.body[:drop_after]
        # It is counted before it goes out, because the client may read the counters as soon as it has the last byte.
        request.sent = len(body)
        if response.name is not None:
            request.downloaded[response.name] += len(body)
        with suppress(ConnectionError):
            self.end_headers()
            self.wfile.write(body)
        if drop_after is not None:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args: object) -> None:
        """Print nothing to the terminal: `HubServer.requests` has it all."""


def _let_happen(fault: Fault | None) -> None:
    """Do what comes before the answer."""
    match fault:
        case Answer():
            raise HubError(fault.status, fault.message, fault.code, fault.headers)
        case Delay():
            time.sleep(fault.seconds)
        case Run():
            fault.function()
