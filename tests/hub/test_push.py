"""Publishing a subspace: commits, branches, tags, what is uploaded, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError

from share_hf import SharedSubspace
from share_hf.subspace import LayerSubspace, LowRankUpdate
from tests.hub_server.fixtures import Hub
from tests.trees import assert_same_state, files_of


REPO = "org/share-subspace"


def branches_and_tags(hub: Hub) -> tuple[list[str], list[str]]:
    refs = hub.api.list_repo_refs(REPO)
    return sorted(ref.name for ref in refs.branches), sorted(ref.name for ref in refs.tags)


def commits_on_main(hub: Hub) -> list[str]:
    return [commit.title for commit in hub.api.list_repo_commits(REPO)]


def content(hub: Hub, path: str, revision: str = "main") -> bytes:
    return hub.repository(REPO).commit_at(revision).files[path].content


def test_a_push_is_one_commit_with_a_branch_for_each_task_and_a_tag_for_the_step(
    hub: Hub, subspace: SharedSubspace
) -> None:
    commit = subspace.push_to_hub(REPO)
    assert commits_on_main(hub) == ["Add 2 tasks", "initial commit"]
    assert commit.oid == hub.api.repo_info(REPO).sha
    assert branches_and_tags(hub) == (["main", "mrpc", "sst2"], ["step-0002-sst2"])
    assert_same_state(SharedSubspace.from_pretrained(REPO).state, subspace.state)


def test_what_was_pushed_is_what_is_saved(hub: Hub, subspace: SharedSubspace, tmp_path: Path) -> None:
    subspace.save_pretrained(tmp_path / "tree")
    subspace.push_to_hub(REPO)
    pushed = {name: Path(hub.api.hf_hub_download(REPO, name)).read_bytes() for name in hub.api.list_repo_files(REPO)}
    saved = files_of(tmp_path / "tree")
    assert pushed.keys() - {".gitattributes"} == saved.keys()
    different = {name for name in saved if pushed[name] != saved[name]}
    assert different == {"share_config.json"}  # which lists the branches


def test_the_branch_of_a_task_has_it_at_its_root(hub: Hub, subspace: SharedSubspace, tmp_path: Path) -> None:
    subspace.push_to_hub(REPO)
    for revision, task in (("main", "sst2"), ("sst2", "sst2"), ("mrpc", "mrpc")):
        subspace.export_lora(task, tmp_path / task)
        assert (
            content(hub, "adapter_model.safetensors", revision)
            == (tmp_path / task / "adapter_model.safetensors").read_bytes()
        )
        assert f"plain LoRA of the task `{task}`" in content(hub, "README.md", revision).decode()


def test_nothing_is_uploaded_where_nothing_changed(hub: Hub, subspace: SharedSubspace, with_figures: None) -> None:
    first = subspace.push_to_hub(REPO)
    hub.server.forget_requests()
    assert subspace.push_to_hub(REPO).oid == first.oid
    assert SharedSubspace.from_pretrained(REPO).push_to_hub(REPO).oid == first.oid
    assert not [request for request in hub.server.requests if "/commit/" in request.path or request.method == "PUT"]
    assert commits_on_main(hub) == ["Add 2 tasks", "initial commit"]


def test_a_task_that_the_basis_explains_uploads_itself_alone(
    hub: Hub, subspace: SharedSubspace, tmp_path: Path
) -> None:
    subspace.push_to_hub(REPO)
    subspace.export_lora("mrpc", tmp_path / "again")
    subspace.add_adapters({"again": tmp_path / "again"}, progress=False)
    hub.server.forget_requests()
    subspace.push_to_hub(REPO)
    assert hub.server.uploaded(REPO, "subspace.safetensors") == 0
    for task in ("mrpc", "sst2"):
        assert hub.server.uploaded(REPO, f"tasks/{task}/adapter_model.safetensors") == 0
        assert hub.server.uploaded(REPO, f"tasks/{task}/metrics.json") == 0
    assert hub.server.uploaded(REPO, "tasks/again/adapter_model.safetensors") > 0
    new_root = content(hub, "adapter_model.safetensors")
    assert len(hub.server.uploads_of(new_root)) == 1
    assert content(hub, "adapter_model.safetensors", "again") == new_root
    assert branches_and_tags(hub) == (["again", "main", "mrpc", "sst2"], ["step-0002-sst2", "step-0003-again"])


def test_the_tag_of_a_step_stays_where_it_is(hub: Hub, subspace: SharedSubspace, loras: dict[str, Path]) -> None:
    first = subspace.push_to_hub(REPO)
    before = subspace.state
    subspace.add_adapters({"rte": loras["rte"]}, progress=False)
    subspace.push_to_hub(REPO)
    assert branches_and_tags(hub)[1] == ["step-0002-sst2", "step-0003-rte"]
    assert hub.repository(REPO).tags["step-0002-sst2"].oid == first.oid
    assert_same_state(SharedSubspace.from_pretrained(REPO, revision="step-0002-sst2").state, before)


def test_a_removed_task_is_gone_from_main_and_may_be_learned_again(
    hub: Hub, subspace: SharedSubspace, loras: dict[str, Path]
) -> None:
    subspace.push_to_hub(REPO)
    subspace.remove_task("mrpc")
    subspace.push_to_hub(REPO)
    assert not [name for name in hub.api.list_repo_files(REPO) if name.startswith("tasks/mrpc")]
    subspace.add_adapters({"mrpc": loras["rte"]}, progress=False)
    subspace.push_to_hub(REPO, default_task="sst2")
    assert branches_and_tags(hub)[1] == ["step-0002-sst2", "step-0003-mrpc"]
    of_branch = SharedSubspace.from_pretrained(REPO, revision="mrpc")
    assert of_branch.state.root_task == "mrpc"
    assert content(hub, "tasks/mrpc/adapter_model.safetensors", "mrpc") == content(
        hub, "tasks/mrpc/adapter_model.safetensors"
    )


def test_the_branch_of_a_task_is_written_again_when_it_drifted_too_far(
    hub: Hub, subspace: SharedSubspace, loras: dict[str, Path], tmp_path: Path
) -> None:
    subspace.push_to_hub(REPO)
    root = content(hub, "adapter_model.safetensors", "mrpc")
    subspace.add_adapters({"rte": loras["rte"]}, progress=False)
    drift = subspace.state.drifts()["mrpc"]
    assert drift > 0.05
    subspace.push_to_hub(REPO, branch_tolerance=2.0)
    assert content(hub, "adapter_model.safetensors", "mrpc") == root
    subspace.push_to_hub(REPO)
    subspace.export_lora("mrpc", tmp_path / "mrpc")
    assert (
        content(hub, "adapter_model.safetensors", "mrpc")
        == (tmp_path / "mrpc" / "adapter_model.safetensors").read_bytes()
    )
    assert_same_state(
        SharedSubspace.from_pretrained(REPO, revision="mrpc").state, replace(subspace.state, default_task="mrpc")
    )
    hub.server.forget_requests()
    subspace.push_to_hub(REPO)
    assert not [request for request in hub.server.requests if "/commit/" in request.path]


def test_the_default_task_of_main_is_chosen_once(hub: Hub, subspace: SharedSubspace, loras: dict[str, Path]) -> None:
    subspace.push_to_hub(REPO, default_task="mrpc")
    assert content(hub, "adapter_model.safetensors") == content(hub, "adapter_model.safetensors", "mrpc")
    subspace.add_adapters({"rte": loras["rte"]}, progress=False)
    subspace.push_to_hub(REPO)
    assert SharedSubspace.from_pretrained(REPO).state.default_task == "mrpc"
    assert SharedSubspace.from_pretrained(REPO, revision="rte").state.root_task == "rte"
    with pytest.raises(ValueError, match="no task 'cola' in the subspace, it has"):
        subspace.push_to_hub(REPO, default_task="cola")


def test_a_pull_request_leaves_the_repository_as_it_is(hub: Hub, subspace: SharedSubspace) -> None:
    hub.api.create_repo(REPO)
    commit = subspace.push_to_hub(REPO, create_pr=True, commit_message="Two tasks", commit_description="of GLUE")
    assert commit.pr_num == 1 and commit.pr_revision == "refs/pr/1"
    assert commits_on_main(hub) == ["initial commit"]
    assert branches_and_tags(hub) == (["main"], [])
    assert_same_state(SharedSubspace.from_pretrained(REPO, revision="refs/pr/1").state, subspace.state)
    repository = hub.repository(REPO)
    assert repository.pull_requests["refs/pr/1"].title == "Two tasks"
    assert repository.pull_requests["refs/pr/1"].description == "of GLUE"
    repository.branches["main"] = repository.pull_requests["refs/pr/1"]
    subspace.push_to_hub(REPO)
    assert branches_and_tags(hub) == (["main", "mrpc", "sst2"], ["step-0002-sst2"])


def test_a_private_repository_needs_its_token(hub: Hub, subspace: SharedSubspace) -> None:
    subspace.push_to_hub(REPO, private=True)
    assert hub.repository(REPO).private
    token, stranger = hub.user.token, hub.server.add_user("mallory")
    hub.move_to_another_machine()
    for user in (None, stranger):
        with hub.logged_in_as(user), pytest.raises(HfHubHTTPError):
            SharedSubspace.from_pretrained(REPO)
    with hub.logged_in_as(None):
        assert SharedSubspace.from_pretrained(REPO, token=token).tasks == subspace.tasks


def test_a_user_without_rights_changes_nothing(hub: Hub, subspace: SharedSubspace, loras: dict[str, Path]) -> None:
    head = subspace.push_to_hub(REPO).oid
    subspace.add_adapters({"rte": loras["rte"]}, progress=False)
    before = subspace.state
    with pytest.raises(HfHubHTTPError, match="403"):
        subspace.push_to_hub(REPO, token=hub.server.add_user("mallory").token)
    assert hub.api.repo_info(REPO).sha == head
    assert subspace.state is before


# ---- What is refused ------------------------------------------------------------------------------------------------


def test_a_repository_of_something_else_is_left_alone(
    hub: Hub, subspace: SharedSubspace, loras: dict[str, Path]
) -> None:
    hub.api.create_repo(REPO)
    hub.repository(REPO).write({**files_of(loras["rte"]), "README.md": b"A LoRA."})
    refuses(hub, subspace, "holds an adapter that is not a shared subspace, expected another repository")


@pytest.mark.parametrize("kind", ["branch", "tag"])
def test_a_name_that_means_something_else_in_the_repository_is_refused(
    kind: str, hub: Hub, subspace: SharedSubspace
) -> None:
    hub.api.create_repo(REPO)
    if kind == "branch":
        hub.api.create_branch(REPO, branch="sst2")
    else:
        hub.api.create_tag(REPO, tag="sst2")
    refuses(hub, subspace, f"has a {kind} 'sst2'.*, expected no .*: delete it, or rename the task")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pseudo_rank": 3}, "the other subspace has pseudo_rank = 4, expected 3"),
        ({"num_components": 5}, "the other subspace has num_components = 6, expected 5"),
    ],
)
def test_a_subspace_with_other_settings_is_not_merged_into_the_repository(
    settings: dict[str, int], message: str, hub: Hub, subspace: SharedSubspace, loras: dict[str, Path]
) -> None:
    subspace.push_to_hub(REPO)
    values = {"num_components": 6, "pseudo_rank": 4, **settings}
    refuses(hub, SharedSubspace.from_adapters({"rte": loras["rte"]}, progress=False, **values), message)


def test_a_subspace_of_another_base_model_is_not_merged_into_the_repository(
    hub: Hub, subspace: SharedSubspace, save_lora: Callable[..., Path]
) -> None:
    subspace.push_to_hub(REPO)
    other = SharedSubspace.from_adapters(
        {"rte": save_lora("rte", base="org/other")}, num_components=6, pseudo_rank=4, progress=False
    )
    refuses(hub, other, "the other subspace belongs to base model 'org/tiny', expected 'org/other'")


@pytest.mark.parametrize("base", ["/home/somebody/llama", "./llama"])
def test_a_place_on_the_writers_machine_is_not_published(
    base: str, hub: Hub, subspace: SharedSubspace, loras: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    ours = SharedSubspace(replace(subspace.state, base_model_name_or_path=base))
    first = ours.push_to_hub(REPO)
    assert f"The base model '{base}' is a path on this machine, and its name is not published" in caplog.text
    assert ours.base_model_name_or_path == base
    for revision in ("main", "mrpc", "sst2"):
        files = hub.repository(REPO).commit_at(revision).files
        assert not [name for name, file in files.items() if base.encode() in file.content]
    assert ours.push_to_hub(REPO).oid == first.oid
    theirs = SharedSubspace.from_pretrained(REPO)
    assert theirs.base_model_name_or_path is None
    theirs.add_adapters({"rte": loras["rte"]}, base_model="org/tiny", progress=False)
    theirs.push_to_hub(REPO)
    nameless = SharedSubspace(replace(theirs.state, base_model_name_or_path=None))
    ours.update_from(nameless)
    assert (ours.tasks, ours.base_model_name_or_path) == (("mrpc", "sst2", "rte"), base)


def test_another_task_of_the_same_name_is_not_overwritten(
    hub: Hub, subspace: SharedSubspace, loras: dict[str, Path]
) -> None:
    subspace.push_to_hub(REPO)
    again = SharedSubspace.from_adapters({"mrpc": loras["rte"]}, num_components=6, pseudo_rank=4, progress=False)
    refuses(hub, again, "task 'mrpc' was learned by both sides, with different results: .* under another name")


def test_a_subspace_without_tasks_is_not_pushed(hub: Hub, subspace: SharedSubspace) -> None:
    for task in subspace.tasks:
        subspace.remove_task(task)
    with pytest.raises(ValueError, match="the subspace has no tasks"):
        subspace.push_to_hub(REPO)
    assert not hub.api.repo_exists(REPO)


def refuses(hub: Hub, subspace: SharedSubspace, message: str) -> None:
    """Assert that a push raises, and that neither the repository nor the subspace has changed."""
    repository, before = hub.repository(REPO), subspace.state
    refs = dict(repository.branches), dict(repository.tags)
    with pytest.raises(ValueError, match=message):
        subspace.push_to_hub(REPO)
    assert (repository.branches, repository.tags) == refs
    assert subspace.state is before


# ---- The card -------------------------------------------------------------------------------------------------------


def test_what_the_owner_wrote_on_the_card_stays(hub: Hub, subspace: SharedSubspace, loras: dict[str, Path]) -> None:
    subspace.push_to_hub(REPO)
    card = ModelCard.load(REPO)
    card.data.license = "mit"
    card.data.tags.append("glue")
    card.text = f"Written by hand.\n\n{card.text.strip()}\n\n## Thanks\n\nTo everybody.\n"
    card.push_to_hub(REPO)
    subspace.add_adapters({"rte": loras["rte"]}, progress=False)
    subspace.push_to_hub(REPO)
    new = ModelCard.load(REPO)
    assert new.data.license == "mit" and "glue" in new.data.tags and "share" in new.data.tags
    assert new.text.strip().startswith("Written by hand.") and new.text.strip().endswith("To everybody.")
    assert "| `rte` |" in new.text and new.text.count("## Tasks") == 1
    assert "Written by hand." in content(hub, "README.md", "rte").decode()


def test_a_card_that_was_there_before_the_subspace_is_kept(hub: Hub, subspace: SharedSubspace) -> None:
    hub.api.create_repo(REPO)
    hub.repository(REPO).write({"README.md": b"---\nlicense: mit\n---\n\nSoon here.\n"})
    subspace.push_to_hub(REPO)
    card = ModelCard.load(REPO)
    assert card.text.strip().startswith("Soon here.") and card.data.license == "mit"
    assert card.data.library_name == "peft"


def test_a_custom_template_writes_the_card(hub: Hub, subspace: SharedSubspace, tmp_path: Path) -> None:
    template = tmp_path / "card.md.jinja"
    template.write_text("---\n{{ card_data }}\n---\n{% for task in tasks %}* {{ task.name }}\n{% endfor %}")
    subspace.push_to_hub(REPO, card_template=template)
    assert "* mrpc\n* sst2\n" in content(hub, "README.md").decode()
    broken: dict[str, Any] = {"no.jinja": None, "broken.jinja": "---\n{{ card_data }}\n---\n{% for %}"}
    for name, text in broken.items():
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name}: (no such model card template|not a usable model card templ)"):
            subspace.push_to_hub(REPO, card_template=tmp_path / name)


def test_another_machine_that_rounds_otherwise_pushes_nothing_where_nothing_changed(
    hub: Hub, subspace: SharedSubspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bases and coefficients decide whether something changed, not the root adapter, which is their product."""
    subspace.push_to_hub(REPO)
    before = {branch: hub.repository(REPO).commit_at(branch).oid for branch in ("main", *subspace.tasks)}
    exact = LayerSubspace.update_of

    def rounded_otherwise(self: LayerSubspace, task: str) -> LowRankUpdate:
        update = exact(self, task)
        return LowRankUpdate(update.out_factor * (1 + 1e-7), update.in_factor)

    monkeypatch.setattr(LayerSubspace, "update_of", rounded_otherwise)
    loaded = SharedSubspace.from_pretrained(REPO)
    hub.server.forget_requests()
    loaded.push_to_hub(REPO)
    assert {branch: hub.repository(REPO).commit_at(branch).oid for branch in before} == before
    assert hub.server.uploaded(REPO, "adapter_model.safetensors") == 0
    SharedSubspace.from_pretrained(REPO)


def test_the_root_adapter_follows_its_task(hub: Hub, subspace: SharedSubspace) -> None:
    subspace.push_to_hub(REPO)
    files = hub.repository(REPO).commit_at("main").files
    subspace.push_to_hub(REPO, default_task="mrpc")
    changed = hub.repository(REPO).commit_at("main").files
    assert changed["adapter_model.safetensors"].content != files["adapter_model.safetensors"].content
    subspace.push_to_hub(REPO, default_task="sst2")
    again = hub.repository(REPO).commit_at("main").files
    assert again["adapter_model.safetensors"].content == files["adapter_model.safetensors"].content
