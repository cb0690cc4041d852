"""The Hub that the tests use, accessed with the real client: it behaves like the Hub, including what it refuses."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    get_session,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.trees import lora_config

from ..hub_server import Answer, Delay, DropDownload, DropUpload, Hub, is_commit, is_download_of, is_upload


REPO = "alice/model"
WEIGHTS = "subspace.safetensors"
CARD = "---\nlicense: mit\ntags: [peft]\nlibrary_name: peft\n---\n# Card\n"


@pytest.fixture
def repo(hub: Hub) -> Hub:
    """The Hub with an empty repository of the user who is logged in."""
    huggingface_hub.create_repo(REPO)
    return hub


def push(files: dict[str, bytes], **options: object) -> CommitInfo:
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return HfApi().create_commit(REPO, operations, commit_message="Push", **options)


def status_of(call: Callable[[], object]) -> int:
    with pytest.raises(HfHubHTTPError) as caught:
        call()
    return caught.value.response.status_code


def content_of(path: str, **options: object) -> bytes:
    return Path(hf_hub_download(REPO, path, **options)).read_bytes()


# Repositories and who may use them


def test_a_repository_is_born_with_one_commit_and_can_be_made_once(repo: Hub) -> None:
    assert repo.api.list_repo_files(REPO) == [".gitattributes"]
    assert [commit.title for commit in repo.api.list_repo_commits(REPO)] == ["initial commit"]
    assert status_of(lambda: repo.api.create_repo(REPO)) == 409
    url = repo.api.create_repo(REPO, exist_ok=True)
    assert (url, url.repo_id) == (f"{repo.url}/{REPO}", REPO)
    repo.api.delete_repo(REPO)
    assert not repo.api.repo_exists(REPO)


def test_a_repository_without_an_organization_is_the_users_own(hub: Hub) -> None:
    assert hub.api.create_repo("model").repo_id == "alice/model"
    hub.server.create_repo("gpt2").write({"config.json": b"{}"})
    assert hub.api.model_info("gpt2").author is None
    assert Path(hf_hub_download("gpt2", "config.json")).read_bytes() == b"{}"
    assert status_of(lambda: hub.api.upload_file(path_or_fileobj=b"", path_in_repo="a", repo_id="gpt2")) == 403


def test_tokens_say_who_may_write_where(hub: Hub) -> None:
    assert [org["name"] for org in hub.api.whoami()["orgs"]] == ["org"]
    hub.api.create_repo("org/model")
    assert status_of(lambda: hub.api.create_repo("other/model")) == 403
    member = hub.server.add_user("bob", organizations={"org": "read"})
    weak = hub.server.add_user("alice", can_write=False)
    for user, status in ((member, 403), (weak, 403), (None, 401)):
        with hub.logged_in_as(user):
            assert status_of(lambda: hub.api.create_branch("org/model", branch="b")) == status
    assert status_of(lambda: HfApi(token="hf_wrong").model_info("org/model")) == 401


def test_a_private_repository_does_not_exist_for_others(hub: Hub) -> None:
    hub.api.create_repo(REPO, private=True)
    push({"config.json": b"{}"})
    assert hub.api.model_info(REPO).private
    for user, status in ((None, 401), (hub.server.add_user("bob"), 404)):
        with hub.logged_in_as(user):
            for call in (
                lambda: hub.api.model_info(REPO),
                lambda: hf_hub_download(REPO, "config.json", force_download=False, cache_dir=hub.home / "other"),
                lambda: snapshot_download(REPO, cache_dir=hub.home / "other"),
                lambda: push({"a": b""}),
            ):
                with pytest.raises(RepositoryNotFoundError) as caught:
                    call()
                assert caught.value.response.status_code == status
    assert content_of("config.json") == b"{}"


def test_a_gated_repository_can_be_seen_but_not_downloaded_without_a_grant(hub: Hub) -> None:
    repository = hub.server.create_repo("meta/llama", gated=True)
    repository.write({"config.json": b"{}"})
    assert hub.api.model_info("meta/llama").gated == "manual"
    with pytest.raises(GatedRepoError):
        hf_hub_download("meta/llama", "config.json")
    repository.granted.add("alice")
    hf_hub_download("meta/llama", "config.json")


# Commits


def test_a_commit_must_have_the_head_as_its_parent(repo: Hub) -> None:
    first = push({"a.txt": b"1"})
    second = push({"a.txt": b"2"}, parent_commit=first.oid)
    assert status_of(lambda: push({"a.txt": b"3"}, parent_commit=first.oid)) == 412
    assert [commit.commit_id for commit in repo.api.list_repo_commits(REPO)][:2] == [second.oid, first.oid]
    assert content_of("a.txt") == b"2"
    assert content_of("a.txt", revision=first.oid) == b"1"


def test_a_commit_adds_copies_and_deletes_at_once(repo: Hub) -> None:
    push({"a.txt": b"a", "folder/b.txt": b"b", WEIGHTS: b"w" * 100})
    operations = [
        CommitOperationCopy(WEIGHTS, f"copy/{WEIGHTS}"),
        CommitOperationCopy("a.txt", "copy/a.txt"),
        CommitOperationDelete("folder/"),
        CommitOperationDelete("a.txt"),
    ]
    repo.api.create_commit(REPO, operations, commit_message="Move")
    assert repo.api.list_repo_files(REPO) == [".gitattributes", "copy/a.txt", f"copy/{WEIGHTS}", WEIGHTS]
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        repo.api.delete_file("a.txt", REPO)


def test_a_commit_without_a_change_is_not_made(repo: Hub) -> None:
    made = push({"a.txt": b"1", WEIGHTS: b"w"})
    repo.server.forget_requests()
    assert push({"a.txt": b"1", WEIGHTS: b"w"}).oid == made.oid
    assert not any(is_commit(request) for request in repo.server.requests)


def test_somebody_else_can_be_faster(repo: Hub) -> None:
    head = repo.api.model_info(REPO).sha
    repo.server.faults.before_commit(lambda: repo.repository(REPO).write({"b.txt": b"bob"}))
    assert status_of(lambda: push({"a.txt": b"1"}, parent_commit=head)) == 412
    push({"a.txt": b"1"}, parent_commit=repo.api.model_info(REPO).sha)
    assert repo.api.list_repo_files(REPO) == [".gitattributes", "a.txt", "b.txt"]


def test_of_two_concurrent_commits_one_is_refused(repo: Hub) -> None:
    head = repo.api.model_info(REPO).sha
    both_there = threading.Barrier(2)
    repo.server.faults.before_commit(both_there.wait, times=2)
    statuses: list[int] = []

    def commit(name: str) -> None:
        try:
            push({name: b"1"}, parent_commit=head)
        except HfHubHTTPError as error:
            statuses.append(error.response.status_code)

    threads = [threading.Thread(target=commit, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [412]


# Large files


def test_an_object_is_uploaded_once(repo: Hub) -> None:
    weights, figure = b"w" * 50_000, b"\x89PNG\0" + b"p" * 300
    push({WEIGHTS: weights, "figures/a.png": figure, "a.txt": b"text"})
    server = repo.server
    assert (server.uploaded(REPO, WEIGHTS), server.uploaded(REPO, "figures/a.png")) == (50_000, 305)
    assert server.uploaded(REPO, "a.txt") == 4
    assert b"figures/a.png filter=lfs" in content_of(".gitattributes")
    info = {file.path: file for file in repo.api.get_paths_info(REPO, [WEIGHTS, "a.txt", "figures", "missing"])}
    assert info[WEIGHTS].lfs.sha256 == hashlib.sha256(weights).hexdigest()
    assert (info[WEIGHTS].size, info["a.txt"].lfs) == (50_000, None)
    assert info["a.txt"].blob_id == hashlib.sha1(b"blob 4\0text").hexdigest()
    assert set(info) == {WEIGHTS, "a.txt", "figures"}

    server.forget_requests()
    push({WEIGHTS: weights, f"again/{WEIGHTS}": weights, "a.txt": b"other"})
    assert server.uploaded(REPO, f"again/{WEIGHTS}") == server.uploaded(REPO, WEIGHTS) == 0
    assert server.uploads_of(weights) == []
    assert 0 < server.bytes_received() < 5000


def test_what_belongs_into_lfs_is_refused_elsewhere(repo: Hub) -> None:
    def refused(*lines: str) -> int:
        body = "\n".join(('{"key": "header", "value": {"summary": "s"}}', *lines))
        headers = {"authorization": f"Bearer {repo.user.token}"}
        return (
            get_session().post(f"{repo.url}/api/models/{REPO}/commit/main", content=body, headers=headers).status_code
        )

    assert (
        refused('{"key": "file", "value": {"path": "a.safetensors", "content": "YWJj", "encoding": "base64"}}') == 400
    )
    oid = "0" * 64
    assert refused(f'{{"key": "lfsFile", "value": {{"path": "a.safetensors", "oid": "{oid}", "size": 3}}}}') == 400
    assert refused('{"key": "file", "value": {"path": "a/../b", "content": "YWJj", "encoding": "base64"}}') == 400
    assert repo.api.list_repo_files(REPO) == [".gitattributes"]


def test_the_storage_takes_signed_addresses_and_true_content_only(repo: Hub) -> None:
    oid = hashlib.sha256(b"abc").hexdigest()
    address = repo.server.signed_url("PUT", f"/{REPO}/{oid}")
    client = get_session()
    assert client.put(address, content=b"abd").status_code == 400
    assert client.put(address, content=b"abc", headers={"authorization": "Bearer hf_alice"}).status_code == 400
    assert client.put(address.partition("?")[0], content=b"abc").status_code == 403
    assert client.put(address, content=b"abc").status_code == 200


def test_a_dropped_upload_is_tried_again(repo: Hub) -> None:
    weights = b"w" * 300_000
    repo.server.faults.add(is_upload, DropUpload(after=100_000))
    push({WEIGHTS: weights})
    assert [upload.received for upload in repo.server.uploads_of(weights)] == [100_000, 300_000]
    assert content_of(WEIGHTS) == weights


def test_an_upload_that_fails_for_good_leaves_no_commit(repo: Hub) -> None:
    repo.server.faults.add(is_upload, Answer(403), times=math.inf)
    with pytest.raises(RuntimeError, match=WEIGHTS):
        push({WEIGHTS: b"w" * 1000, "a.txt": b"1"})
    assert repo.api.list_repo_files(REPO) == [".gitattributes"]
    repo.server.faults.clear()
    push({WEIGHTS: b"w" * 1000, "a.txt": b"1"})
    assert content_of(WEIGHTS) == b"w" * 1000


# Downloads


def test_a_download_is_kept_in_the_cache_by_its_etag(repo: Hub) -> None:
    weights = b"w" * 5000
    commit = push({WEIGHTS: weights, "folder/a b.txt": b"text"})
    path = Path(hf_hub_download(REPO, WEIGHTS))
    assert path.read_bytes() == weights
    assert path.parent.name == commit.oid
    assert path.resolve().name == hashlib.sha256(weights).hexdigest()
    assert content_of("folder/a b.txt") == b"text"
    assert repo.server.downloaded(REPO, WEIGHTS) == 5000
    assert repo.server.downloaded(REPO, "folder/a b.txt") == 4

    repo.server.forget_requests()
    repo.repository(REPO).write({"folder/a b.txt": b"changed"})
    assert content_of(WEIGHTS) == weights
    assert repo.server.bytes_sent() == 0
    repo.move_to_another_machine()
    assert content_of(WEIGHTS) == weights
    assert repo.server.downloaded(REPO, WEIGHTS) == 5000


def test_a_snapshot_has_all_files_and_serves_offline(repo: Hub) -> None:
    files = {f"tasks/{i}/metrics.json": f"{i}".encode() for i in range(7)} | {WEIGHTS: b"w"}
    push(files)
    repo.server.page_size = 3
    folder = Path(snapshot_download(REPO))
    assert {path: (folder / path).read_bytes() for path in files} == files
    assert len([request for request in repo.server.requests if "/tree/" in request.path]) > 3
    partial = Path(snapshot_download(REPO, allow_patterns="tasks/1/*", cache_dir=repo.home / "other"))
    assert [path.name for path in partial.rglob("*") if path.is_file()] == ["metrics.json"]

    repo.server.forget_requests()
    with repo.offline():
        assert Path(snapshot_download(REPO)) == folder
        assert content_of(WEIGHTS) == b"w"
        with pytest.raises(LocalEntryNotFoundError):
            hf_hub_download(REPO, "missing.json")
    assert repo.server.requests == []


def test_a_dropped_download_continues_where_it_broke_off(repo: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)  # the client loses a chunk that is not complete
    weights = bytes(range(256)) * 1000
    push({WEIGHTS: weights})
    repo.server.faults.add(is_download_of(WEIGHTS), DropDownload(after=100_000))
    assert content_of(WEIGHTS) == weights
    sent = [(request.status, request.sent) for request in repo.server.requests if request.downloaded]
    assert sent == [(200, 100_000), (206, len(weights) - 100_000)]


def test_ranges_are_answered(repo: Hub) -> None:
    push({"a.txt": b"0123456789", WEIGHTS: b"0123456789"})
    for name in ("a.txt", WEIGHTS):
        url = huggingface_hub.hf_hub_url(REPO, name)

        def part(wanted: str, url: str = url) -> tuple[int, bytes, str]:
            response = get_session().get(url, headers={"Range": f"bytes={wanted}"})
            return response.status_code, response.content, response.headers["Content-Range"]

        assert part("2-4") == (206, b"234", "bytes 2-4/10")
        assert part("7-") == (206, b"789", "bytes 7-9/10")
        assert part("-2") == (206, b"89", "bytes 8-9/10")
        assert (part("10-")[0], part("10-")[2]) == (416, "bytes */10")


def test_what_is_missing_is_told_apart(repo: Hub) -> None:
    push({"folder/a.txt": b"1"})
    for path in ("missing.json", "folder"):
        with pytest.raises(RemoteEntryNotFoundError):
            hf_hub_download(REPO, path)
    assert repo.api.file_exists(REPO, "folder/a.txt")
    assert not repo.api.file_exists(REPO, "missing.json")
    for call in (
        lambda: hf_hub_download(REPO, "folder/a.txt", revision="missing"),
        lambda: snapshot_download(REPO, revision="missing"),
        lambda: repo.api.list_repo_files(REPO, revision="0" * 40),
        lambda: push({"a.txt": b""}, revision="missing"),
    ):
        with pytest.raises(RevisionNotFoundError):
            call()
    with pytest.raises(RepositoryNotFoundError):
        repo.api.model_info("alice/missing")
    with pytest.raises(EntryNotFoundError):
        list(repo.api.list_repo_tree(REPO, "missing"))


# Branches, tags and pull requests


def test_branches_move_and_tags_stay(repo: Hub) -> None:
    first = push({"a.txt": b"1"})
    repo.api.create_branch(REPO, branch="mrpc")
    repo.api.create_tag(REPO, tag="step-0001-mrpc")
    second = push({"a.txt": b"2"}, revision="mrpc")
    repo.api.create_branch(REPO, branch="old", revision=first.oid[:7])
    refs = repo.api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {
        "main": first.oid,
        "mrpc": second.oid,
        "old": first.oid,
    }
    assert [(tag.name, tag.ref, tag.target_commit) for tag in refs.tags] == [
        ("step-0001-mrpc", "refs/tags/step-0001-mrpc", first.oid)
    ]
    assert content_of("a.txt", revision="step-0001-mrpc") == b"1"
    assert content_of("a.txt", revision="mrpc") == b"2"
    assert status_of(lambda: push({"a.txt": b"3"}, revision="step-0001-mrpc")) == 400


def test_names_of_branches_and_tags_clash_and_can_be_given_back(repo: Hub) -> None:
    api = repo.api
    api.create_branch(REPO, branch="b")
    api.create_tag(REPO, tag="t")
    assert status_of(lambda: api.create_branch(REPO, branch="b")) == 409
    assert status_of(lambda: api.create_tag(REPO, tag="t")) == 409
    api.create_branch(REPO, branch="b", exist_ok=True)
    api.create_tag(REPO, tag="t", exist_ok=True)
    for name in ("refs/pr/5", "a..b", "a b", "0" * 40):
        with pytest.raises(BadRequestError):
            api.create_branch(REPO, branch=name)
    with pytest.raises(RevisionNotFoundError):
        api.create_branch(REPO, branch="c", revision="missing")
    with pytest.raises(RevisionNotFoundError):
        api.create_tag(REPO, tag="u", revision="missing")
    assert status_of(lambda: api.delete_branch(REPO, branch="main")) == 403
    assert status_of(lambda: api.delete_branch(REPO, branch="t")) == 404
    api.delete_branch(REPO, branch="b")
    api.delete_tag(REPO, tag="t")
    refs = api.list_repo_refs(REPO)
    assert ([ref.name for ref in refs.branches], refs.tags) == (["main"], [])


def test_a_pull_request_is_a_ref_of_its_own_that_anybody_can_open(repo: Hub) -> None:
    with repo.logged_in_as(repo.server.add_user("bob")):
        commit = push({"a.txt": b"1", WEIGHTS: b"w" * 10}, create_pr=True)
    assert (commit.pr_num, commit.pr_revision) == (1, "refs/pr/1")
    assert repo.api.list_repo_files(REPO) == [".gitattributes"]
    push({"b.txt": b"2"}, revision="refs/pr/1", parent_commit=commit.oid)
    files = [".gitattributes", "a.txt", "b.txt", WEIGHTS]
    assert repo.api.list_repo_files(REPO, revision="refs/pr/1") == files
    assert content_of(WEIGHTS, revision="refs/pr/1") == b"w" * 10
    assert [ref.ref for ref in repo.api.list_repo_refs(REPO, include_pull_requests=True).pull_requests] == [
        "refs/pr/1"
    ]


def test_listings_have_folders_pages_and_last_commits(repo: Hub) -> None:
    first = push({"a/b/c.txt": b"1", "a/d.txt": b"2"})
    push({"a/d.txt": b"3"})
    top = list(repo.api.list_repo_tree(REPO))
    assert [(type(entry).__name__, entry.path) for entry in top] == [
        ("RepoFile", ".gitattributes"),
        ("RepoFolder", "a"),
    ]
    assert [entry.path for entry in repo.api.list_repo_tree(REPO, "a/b")] == ["a/b/c.txt"]
    repo.server.page_size = 1
    branch = repo.api.create_branch(REPO, branch="x/y") or "x/y"
    entries = {
        entry.path: entry for entry in repo.api.list_repo_tree(REPO, recursive=True, expand=True, revision=branch)
    }
    assert list(entries) == [".gitattributes", "a", "a/b", "a/b/c.txt", "a/d.txt"]
    assert entries["a/b/c.txt"].last_commit.oid == entries["a/b"].last_commit.oid == first.oid
    assert entries["a"].last_commit.title == "Push"
    assert len(repo.api.list_repo_commits(REPO)) == 3


# Model cards


def test_a_card_is_checked_and_reported(repo: Hub) -> None:
    card = ModelCard(CARD)
    card.validate()
    card.push_to_hub(REPO)
    info = repo.api.model_info(REPO, files_metadata=True)
    assert (info.tags, info.library_name, info.card_data.license) == (["peft"], "peft", "mit")
    assert {file.rfilename: file.size for file in info.siblings}["README.md"] == len(CARD)
    assert ModelCard.load(REPO).data.tags == ["peft"]
    with pytest.warns(UserWarning, match="empty or missing"):
        push({"README.md": b"# No metadata"})


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ("license: mine", '"license" must be one of'),
        ("tags: peft", '"tags" must be an array'),
        ("base_model: /tmp/tiny/llama", '"base_model" with value'),
        ("library_name: [a]", '"library_name" must be a string'),
        ("a: [", "YAML metadata is invalid"),
        ("model-index: [{name: a, results: [{task: {type: t}}]}]", "dataset. is required"),
    ],
)
def test_bad_metadata_is_refused(repo: Hub, metadata: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        push({"README.md": f"---\n{metadata}\n---\n".encode()})


# Faults


def test_faults_happen_as_often_as_asked(repo: Hub) -> None:
    faults = repo.server.faults
    faults.add(is_commit, Answer(503), times=1)
    assert status_of(lambda: push({"a.txt": b"1"})) == 503
    faults.add(lambda request: "/refs" in request.path, Delay(0.01))
    repo.api.list_repo_refs(REPO)
    faults.add(lambda request: "/preupload/" in request.path, Answer(429, headers={"Retry-After": "0"}))
    push({"a.txt": b"1"})
    statuses = [request.status for request in repo.server.requests if "/preupload/" in request.path]
    assert statuses == [200, 429, 200]


# Other libraries, and other processes


def test_transformers_and_peft_load_from_the_server_and_from_the_cache(
    repo: Hub, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    tiny_model("gpt2").push_to_hub(REPO)
    adapted = get_peft_model(tiny_model("gpt2"), lora_config(target_modules=["c_attn"]))
    adapted.push_to_hub("org/lora")

    def logits() -> torch.Tensor:
        base = AutoModelForCausalLM.from_pretrained(REPO)
        return PeftModel.from_pretrained(base, "org/lora")(torch.tensor([[1, 2, 3]])).logits

    online = logits()
    assert repo.server.downloaded("org/lora", "adapter_model.safetensors") > 0
    repo.server.forget_requests()
    with repo.offline():
        assert torch.equal(logits(), online)
    assert repo.server.requests == []


def test_a_child_process_uses_the_server_too(repo: Hub) -> None:
    push({"a.txt": b"from the parent"})
    program = f"""
import huggingface_hub as hub
print(open(hub.hf_hub_download({REPO!r}, "a.txt")).read(), hub.whoami()["name"])
hub.upload_file(path_or_fileobj=b"w" * 9, path_in_repo={WEIGHTS!r}, repo_id={REPO!r})
"""
    command = [sys.executable, "-c", program]
    with repo.offline():
        assert subprocess.run(command, env=repo.subprocess_env(), capture_output=True).returncode == 1
    run = subprocess.run(command, env=repo.subprocess_env(), capture_output=True, text=True, check=True)
    assert run.stdout == "from the parent alice\n"
    assert content_of(WEIGHTS) == b"w" * 9
