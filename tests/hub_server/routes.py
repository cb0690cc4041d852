"""The answers of the Hub: its HTTP API, as far as models are concerned, and the storage behind it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import parse_qs, unquote, urlencode

import yaml

from .cards import card_metadata, card_problems
from .faults import Request
from .repository import README, Blob, Commit, HubError, Repository


if TYPE_CHECKING:
    from .server import HubServer, User

_REPO_NAME = re.compile(r"(?!.*(--|\.\.))(?![-.])[\w.-]{1,96}(?<![-.])(?<!\.git)")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_COMMITS_ON_A_PAGE = 50


@dataclass(frozen=True)
class Response:
    """An answer. `name` says whose content its body is: a path in the repository, or the SHA-256 of an object."""

    status: int = HTTPStatus.OK
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    name: str | None = None


@dataclass(frozen=True)
class Call:
    """A request with what its path and its token refer to."""

    hub: HubServer
    request: Request
    params: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    @property
    def user(self) -> User | None:
        """User who asks; None for anonymous.

        Raises:
            HubError: 401 if nobody has the token.
        """
        header = self.request.headers.get("authorization")
        if header is None:
            return None
        user = self.hub.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    @property
    def revision(self) -> str:
        return self.params.get("rev", "main")

    @property
    def commit(self) -> Commit:
        return self.readable().commit_at(self.revision)

    def known_user(self) -> User:
        """User who asks, who must not be anonymous.

        Raises:
            HubError: 401 for anonymous.
        """
        if self.user is None:
            # The client uses this code to tell what it would otherwise tell from the https:// of the address.
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        return self.user

    def readable(self) -> Repository:
        """Repository, for a user who may know about it.

        Raises:
            HubError: 404 if it is missing or private, 401 if the one who asks is anonymous.
        """
        repository = self.hub.repositories.get(self.params["repo"])
        if repository is None or not self.hub.may_read(self.user, repository):
            self.known_user()
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repository

    def writable(self) -> Repository:
        """Repository, for a user who may change it.

        Raises:
            HubError: 403 if that is somebody else.
        """
        repository, user = self.readable(), self.known_user()
        if not user.can_write:
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        if not self.hub.may_write(user, repository.namespace):
            raise HubError(403, "Forbidden: you don't have write access to this repository.")
        return repository

    def open_to_pull_requests(self) -> Repository:
        """Repository, for a user who may open a pull request there: any named user who can read it."""
        self.known_user()
        return self.readable()

    def is_asked(self, name: str) -> bool:
        """Return whether a flag of the query is set."""
        return self.request.query.get(name, [""])[0].lower() in ("1", "true")

    def page(self, entries: list[Any], size: int) -> Response:
        """Return the part of a listing that the cursor points to, with the address of the next part."""
        start = int(self.request.query.get("cursor", ["0"])[0])
        headers = {}
        if start + size < len(entries):
            query = {**self.request.query, "cursor": [str(start + size)]}
            address = f"{self.hub.url}{self.request.raw_path}?{urlencode(query, doseq=True)}"
            headers["Link"] = f'<{address}>; rel="next"'
        return _as_json(entries[start : start + size], headers=headers)


Endpoint: TypeAlias = Callable[[Call], Response]
Route: TypeAlias = tuple[str, re.Pattern[str], Endpoint]
HUB: list[Route] = []
STORAGE: list[Route] = []


def find(table: list[Route], method: str, path: str) -> tuple[Endpoint, dict[str, str]]:
    """Return the endpoint for a path that is still percent-encoded, and what the path names."""
    for verb, pattern, endpoint in table:
        if verb == method and (found := pattern.fullmatch(path)):
            return endpoint, {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
    return _nothing_there, {}


def refusal(error: HubError) -> Response:
    """Return an error in the form of the Hub."""
    message = error.message.replace("\n", " ").encode("ascii", "replace").decode()
    headers = {"X-Error-Message": message}
    if error.code is not None:
        headers["X-Error-Code"] = error.code
    return _as_json(error.body, error.status, {**headers, **error.headers})


def _route(method: str, path: str, table: list[Route] = HUB) -> Callable[[Endpoint], Endpoint]:
    """Make a function the endpoint for a path: {repo} has one part or two, {path} any number, all others one."""
    parts = {"repo": r"[^/]+(?:/[^/]+)?", "path": r".+"}
    pattern = re.sub(r"\{(\w+)\}", lambda name: f"(?P<{name[1]}>{parts.get(name[1], '[^/]+')})", path)

    def register(endpoint: Endpoint) -> Endpoint:
        table.append((method, re.compile(pattern), endpoint))
        return endpoint

    return register


def _nothing_there(call: Call) -> Response:
    raise HubError(404, f"Sorry, we can't find the page you are looking for: {call.request.path}")


@_route("GET", "/api/whoami-v2")
def whoami(call: Call) -> Response:
    user = call.known_user()
    token = {"displayName": "test", "role": "write" if user.can_write else "read"}
    organizations = [{"type": "org", "name": name, "roleInOrg": role} for name, role in user.organizations.items()]
    auth = {"type": "access_token", "accessToken": token}
    return _as_json({"type": "user", "name": user.name, "fullname": user.name, "orgs": organizations, "auth": auth})


@_route("GET", "/api/agent-harnesses")
def agent_harnesses(call: Call) -> Response:
    return _as_json({"standardEnvVars": ["AI_AGENT", "AGENT"], "harnesses": {}})


@_route("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Response:
    errors, warnings = card_problems(call.json["content"])
    told = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return _as_json(told, HTTPStatus.BAD_REQUEST if errors else HTTPStatus.OK)


@_route("POST", "/api/repos/create")
def create_repo(call: Call) -> Response:
    user, asked = call.known_user(), call.json
    namespace, name = asked.get("organization") or user.name, asked["name"]
    if asked.get("type", "model") != "model":
        raise HubError(400, f"This server has models only, no {asked['type']}s")
    if not _REPO_NAME.fullmatch(name):
        raise HubError(400, f"Invalid name for a repository: {name}")
    if not call.hub.may_write(user, namespace):
        message = f'You don\'t have the rights to create a model under the namespace "{namespace}"'
        raise HubError(403, message)
    private = asked.get("visibility") == "private"
    repository = call.hub.create_repo(f"{namespace}/{name}", private=private)
    return _as_json({"url": f"{call.hub.url}/{repository.id}", "name": repository.id})


@_route("DELETE", "/api/repos/delete")
def delete_repo(call: Call) -> Response:
    namespace = call.json.get("organization") or call.known_user().name
    repository = replace(call, params={"repo": f"{namespace}/{call.json['name']}"}).writable()
    del call.hub.repositories[repository.id]
    return Response()


@_route("POST", "/api/models/{repo}/preupload/{rev}")
def preupload(call: Call) -> Response:
    repository = call.open_to_pull_requests() if call.is_asked("create_pr") else call.writable()
    head = repository.commit_at(call.revision)
    files = []
    for file in call.json["files"]:
        in_lfs = head.keeps_in_lfs(file["path"], base64.b64decode(file["sample"]), file["size"])
        there = head.files.get(file["path"])
        told = {"path": file["path"], "uploadMode": "lfs" if in_lfs else "regular", "shouldIgnore": False}
        files.append({**told, "oid": there.etag} if there else told)
    return _as_json({"files": files})


@_route("POST", "/api/models/{repo}/commit/{rev}")
def commit(call: Call) -> Response:
    create_pr = call.is_asked("create_pr")
    repository = call.open_to_pull_requests() if create_pr else call.writable()
    (key, header), *operations = [(line["key"], line["value"]) for line in map(json.loads, call.body.splitlines())]
    if key != "header" or not header.get("summary"):
        raise HubError(400, "The commit has no summary")
    for key, value in operations:
        if key == "file":
            call.request.uploaded[value["path"]] += len(base64.b64decode(value["content"]))
    made, ref = repository.commit(
        operations,
        header["summary"],
        description=header.get("description", ""),
        author=call.known_user().name,
        revision=call.revision,
        parent=header.get("parentCommit"),
        create_pr=create_pr,
    )
    told = {"success": True, "commitOid": made.oid, "commitUrl": f"{call.hub.url}/{repository.id}/commit/{made.oid}"}
    if create_pr:
        told["pullRequestUrl"] = f"{call.hub.url}/{repository.id}/discussions/{ref.rpartition('/')[2]}"
    return _as_json(told)


@_route("POST", "/{repo}.git/info/lfs/objects/batch")
def lfs_batch(call: Call) -> Response:
    # Without a ref it is for a pull request.
    repository = call.writable() if "ref" in call.json else call.open_to_pull_requests()
    objects = []
    for wanted in call.json["objects"]:
        told = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in repository.lfs:
            upload = call.hub.signed_url("PUT", f"/{repository.id}/{wanted['oid']}")
            verify = f"{call.hub.url}/{repository.id}.git/info/lfs/objects/verify"
            told["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        objects.append(told)
    return _as_json({"transfer": "basic", "objects": objects})


@_route("POST", "/{repo}.git/info/lfs/objects/verify")
def lfs_verify(call: Call) -> Response:
    content = call.open_to_pull_requests().lfs.get(call.json["oid"])
    if content is None or len(content) != call.json["size"]:
        raise HubError(404, "The object was not uploaded, or not all of it")
    return Response()


@_route("POST", "/api/models/{repo}/branch/{name}")
def create_branch(call: Call) -> Response:
    call.writable().create_branch(call.params["name"], call.json.get("startingPoint", "main"))
    return Response()


@_route("DELETE", "/api/models/{repo}/branch/{name}")
def delete_branch(call: Call) -> Response:
    call.writable().delete_branch(call.params["name"])
    return Response()


@_route("POST", "/api/models/{repo}/tag/{rev}")
def create_tag(call: Call) -> Response:
    call.writable().create_tag(call.json["tag"], call.revision)
    return Response()


@_route("DELETE", "/api/models/{repo}/tag/{name}")
def delete_tag(call: Call) -> Response:
    call.writable().delete_tag(call.params["name"])
    return Response()


@_route("GET", "/api/models/{repo}/refs")
def refs(call: Call) -> Response:
    repository = call.readable()
    told = {
        "branches": _refs("refs/heads/", repository.branches),
        "tags": _refs("refs/tags/", repository.tags),
        "converts": [],
    }
    if call.is_asked("include_prs"):
        told["pullRequests"] = _refs("", repository.pull_requests)
    return _as_json(told)


@_route("GET", "/api/models/{repo}/commits/{rev}")
def commits(call: Call) -> Response:
    told = [
        {
            "id": made.oid,
            "title": made.title,
            "message": made.description,
            "authors": [{"user": made.author}],
            "date": _as_text(made.date),
        }
        for made in call.commit.history()
    ]
    return call.page(told, min(call.hub.page_size, _COMMITS_ON_A_PAGE))


@_route("GET", "/api/models/{repo}/tree/{rev}/{path}")
@_route("GET", "/api/models/{repo}/tree/{rev}")
def tree(call: Call) -> Response:
    folder, commit = call.params.get("path", ""), call.commit
    paths = commit.paths_in(folder, call.is_asked("recursive"))
    if not paths and folder:
        raise HubError(404, f"{folder} does not exist on {call.revision!r}", "EntryNotFound")
    expand = call.is_asked("expand")
    entries = [_entry(commit, path, expand) for path in paths]
    return call.page(entries, min(call.hub.page_size, 50) if expand else call.hub.page_size)


@_route("POST", "/api/models/{repo}/paths-info/{rev}")
def paths_info(call: Call) -> Response:
    form, commit = parse_qs(call.body.decode()), call.commit
    paths = [path.strip("/") for path in form.get("paths", [])]
    if len(paths) > 1000:
        raise HubError(413, "too many parameters")
    expand = form.get("expand") == ["true"]
    return _as_json([_entry(commit, path, expand) for path in paths if commit.oid_of(path)])


@_route("GET", "/api/models/{repo}/revision/{rev}")
@_route("GET", "/api/models/{repo}")
def model_info(call: Call) -> Response:
    repository, commit = call.readable(), call.commit
    card = _card(commit)
    siblings = [
        {"rfilename": path, **(_blob_info(blob, "sha256") if call.is_asked("blobs") else {})}
        for path, blob in sorted(commit.files.items())
    ]
    told = {
        "id": repository.id,
        "modelId": repository.id,
        "author": repository.namespace or None,
        "sha": commit.oid,
        "lastModified": _as_text(commit.date),
        "private": repository.private,
        "gated": "manual" if repository.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": card.get("tags", []),
        "cardData": card,
        "siblings": siblings,
        **{key: card[key] for key in ("library_name", "pipeline_tag") if key in card},
    }
    wanted = call.request.query.get("expand")
    return _as_json({key: told[key] for key in told if wanted is None or key in ("id", *wanted)})


@_route("HEAD", "/{repo}/resolve/{rev}/{path}")
@_route("GET", "/{repo}/resolve/{rev}/{path}")
def resolve(call: Call) -> Response:
    """Return a file, or for an LFS object, where to get it."""
    repository, commit, path = call.readable(), call.commit, call.params["path"]
    if not call.hub.may_download(call.user, repository):
        status = 403 if call.user else 401
        raise HubError(status, f"Access to model {repository.id} is restricted.", "GatedRepo")
    headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    blob = commit.files.get(path)
    if blob is None:
        raise HubError(404, "Entry not found", "EntryNotFound", headers=headers)
    headers["ETag"] = f'"{blob.etag}"'
    if not blob.in_lfs:
        return _content(call, blob.content, headers, path)
    address = call.hub.signed_url("GET", f"/{repository.id}/{blob.sha256}")
    linked = {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(blob.content))}
    location = f"{address}&{urlencode({'filename': path})}"
    return Response(HTTPStatus.FOUND, headers={**headers, **linked, "Location": location})


@_route("PUT", "/{repo}/{oid}", STORAGE)
def put_object(call: Call) -> Response:
    _expect_signature(call)
    if hashlib.sha256(call.body).hexdigest() != call.params["oid"]:
        raise HubError(400, "BadDigest: the content is not what its SHA-256 says")
    call.hub.repositories[call.params["repo"]].lfs[call.params["oid"]] = call.body
    return Response(headers={"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})


@_route("GET", "/{repo}/{oid}", STORAGE)
def get_object(call: Call) -> Response:
    _expect_signature(call)
    content = call.hub.repositories[call.params["repo"]].lfs[call.params["oid"]]
    return _content(call, content, {"ETag": f'"{call.params["oid"]}"', "Accept-Ranges": "bytes"}, call.params["oid"])


def _expect_signature(call: Call) -> None:
    """Anyone who has the address may use it. Sending a token as well is an error, as it is at S3."""
    if "authorization" in call.request.headers:
        raise HubError(400, "Only one auth mechanism allowed")
    if call.request.query.get("signature") != [call.hub.signature(call.request.method, call.request.path)]:
        raise HubError(403, "SignatureDoesNotMatch")


def _content(call: Call, content: bytes, headers: Mapping[str, str], name: str) -> Response:
    """Return all of a file, or the part that is requested."""
    wanted = _RANGE.fullmatch(call.request.headers.get("range", ""))
    if wanted is None or wanted[0] == "bytes=-":
        return Response(HTTPStatus.OK, content, headers, name)
    size = len(content)
    first, last = wanted.groups()
    start = int(first) if first else max(0, size - int(last))
    end = min(int(last) + 1, size) if first and last else size
    if start >= end:
        unsatisfied = {"Content-Range": f"bytes */{size}"}
        raise HubError(416, "The range is beyond the end of the file", headers=unsatisfied)
    headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{size}"}
    return Response(HTTPStatus.PARTIAL_CONTENT, content[start:end], headers, name)


def _entry(commit: Commit, path: str, expand: bool) -> dict[str, Any]:
    """Return a file or a folder as listings have it."""
    blob = commit.files.get(path)
    if blob is None:
        told = {"type": "directory", "path": path, "oid": commit.oid_of(path), "size": 0}
    else:
        told = {"type": "file", "path": path, "oid": blob.oid, **_blob_info(blob, "oid")}
    if expand:
        last = commit.last_change_of(path)
        told["lastCommit"] = {"id": last.oid, "title": last.title, "date": _as_text(last.date)}
    return told


def _blob_info(blob: Blob, digest: str) -> dict[str, Any]:
    told: dict[str, Any] = {"size": len(blob.content), "blobId": blob.oid}
    if blob.in_lfs:
        told["lfs"] = {digest: blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
    return told


def _card(commit: Commit) -> dict[str, Any]:
    """Return the metadata of the model card."""
    try:
        metadata = card_metadata(commit.files[README].content.decode())
    except (KeyError, yaml.YAMLError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _refs(prefix: str, targets: Mapping[str, Commit]) -> list[dict[str, str]]:
    return [{"name": name, "ref": prefix + name, "targetCommit": made.oid} for name, made in targets.items()]


def _as_text(date: datetime) -> str:
    return f"{date:%Y-%m-%dT%H:%M:%S}.{date.microsecond // 1000:03}Z"


def _as_json(told: Any, status: int = HTTPStatus.OK, headers: Mapping[str, str] | None = None) -> Response:
    body = json.dumps(told, default=str).encode()
    return Response(status, body, {"Content-Type": "application/json; charset=utf-8", **(headers or {})})
