"""Where adapters are: folders, files, and places on the Hub with a revision and a subfolder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitInfo, constants
from huggingface_hub.errors import LocalEntryNotFoundError

from share_hf import SharedSubspace
from share_hf.format.locating import Reference, last_part
from share_hf.format.lora import LoraAdapter, read_lora
from tests.hub_server.fixtures import Hub
from tests.tree_fixtures import SaveLora

from .test_pipelines import UNET, assert_updates, factors_of, in_peft_style, in_style_of_kohya, write


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
REPO = "org/loras"


def assert_same(found: LoraAdapter, expected: LoraAdapter) -> None:
    assert found.updates.keys() == expected.updates.keys()
    for module in expected.updates:
        assert torch.equal(found.updates[module].out_factor, expected.updates[module].out_factor)
        assert torch.equal(found.updates[module].in_factor, expected.updates[module].in_factor)
    assert found.target == expected.target
    assert found.base_model_name_or_path == expected.base_model_name_or_path


# ---- Places as text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reference", "name"),
    [
        ("lora", Reference("lora"), "lora"),
        ("org/lora", Reference("org/lora"), "lora"),
        ("org/lora@v1.0", Reference("org/lora", "v1.0"), "lora"),
        ("org/lora@refs/pr/1", Reference("org/lora", "refs/pr/1"), "lora"),
        ("org/loras:mrpc", Reference("org/loras", None, "mrpc"), "mrpc"),
        ("org/loras:glue/mrpc/", Reference("org/loras", None, "glue/mrpc"), "mrpc"),
        ("org/loras@main:glue/mrpc", Reference("org/loras", "main", "glue/mrpc"), "mrpc"),
        ("org/loras:my style.safetensors", Reference("org/loras", None, "my style.safetensors"), "my style"),
        ("org/lora:adapter_model.safetensors", Reference("org/lora", None, "adapter_model.safetensors"), "lora"),
        ("org/l:mrpc/adapter_model.bin", Reference("org/l", None, "mrpc/adapter_model.bin"), "mrpc"),
        ("org/lora:pytorch_lora_weights.bin", Reference("org/lora", None, "pytorch_lora_weights.bin"), "lora"),
        ("a/b/c", None, "c"),
        ("/absolute/lora", None, "lora"),
        ("org/lora:../../etc", None, "etc"),
        ("org/lora:a/../b", None, "b"),
        ("org/lora@", None, "lora@"),
        ("org/lora:", None, "lora:"),
        ("org/lora@a@b", None, "lora@a@b"),
        ("C:\\loras\\mrpc", None, "C:\\loras\\mrpc"),
    ],
)  # fmt: skip
def test_a_text_is_a_place_on_the_hub_or_none(text: str, reference: Reference | None, name: str) -> None:
    assert Reference.parse(text) == reference
    assert last_part(text) == name


def test_the_name_of_a_file_is_its_own_or_that_of_its_folder(save_lora: SaveLora, tmp_path: Path) -> None:
    folder = save_lora("mrpc")
    assert last_part(str(folder)) == last_part(folder / WEIGHTS) == "mrpc"
    style = write(tmp_path / "style.v2.safetensors", in_peft_style(factors_of(UNET), "unet."))
    assert last_part(style) == "style.v2"


def test_the_folder_one_is_in_has_a_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mrpc" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mrpc" / "deep")
    assert last_part(".") == "deep"
    assert last_part("..") == "mrpc"


# ---- Files and folders ----------------------------------------------------------------------------------------------


def test_a_file_is_read_with_the_configuration_beside_it(save_lora: SaveLora, tmp_path: Path) -> None:
    folder = save_lora("mrpc")
    expected = read_lora(folder)
    assert_same(read_lora(folder / WEIGHTS), expected)
    shutil.copy(folder / CONFIG, tmp_path / CONFIG)
    shutil.copy(folder / WEIGHTS, tmp_path / "step-100.safetensors")
    assert_same(read_lora(str(tmp_path / "step-100.safetensors")), expected)


def test_files_in_one_folder_have_configurations_of_their_own(save_lora: SaveLora, tmp_path: Path) -> None:
    folders = {"a": save_lora("a", seed=1, lora_alpha=4), "b": save_lora("b", seed=2, lora_alpha=16)}
    for name, folder in folders.items():
        shutil.copy(folder / CONFIG, tmp_path / f"{name}.json")
        shutil.copy(folder / WEIGHTS, tmp_path / f"{name}.safetensors")
    (tmp_path / CONFIG).write_text("{}")  # somebody else's
    for name, folder in folders.items():
        assert_same(read_lora(tmp_path / f"{name}.safetensors"), read_lora(folder))


def test_a_description_beside_a_file_is_not_a_configuration(tmp_path: Path) -> None:
    path = write(tmp_path / "style.safetensors", in_style_of_kohya(factors_of(UNET), "unet."))
    for text in ('{"description": "a style"}', "no JSON", "[]"):
        path.with_suffix(".json").write_text(text)
        assert_updates(path, factors_of(UNET))


def test_the_file_of_a_pipeline_is_read_beside_the_configuration_of_another(
    save_lora: SaveLora, tmp_path: Path
) -> None:
    shutil.copy(save_lora("mrpc") / CONFIG, tmp_path / CONFIG)
    assert_updates(write(tmp_path / "s.safetensors", in_style_of_kohya(factors_of(UNET), "unet.")), factors_of(UNET))


def test_a_folder_with_one_file_stands_for_it(tmp_path: Path) -> None:
    write(tmp_path / "style.safetensors", in_style_of_kohya(factors_of(UNET), "unet."))
    assert_updates(tmp_path, factors_of(UNET))


def test_a_folder_with_several_files_needs_the_name_of_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.safetensors", in_style_of_kohya(factors_of(UNET), "unet."))
    with pytest.raises(ValueError, match=r"no adapter_config.json in it.*its files instead: a.safetensors, b.safet"):
        read_lora(tmp_path)


def test_a_folder_of_adapters_is_distinguished_from_an_adapter(save_lora: SaveLora) -> None:
    folder = save_lora("mrpc").parent
    save_lora("sst2")
    with pytest.raises(ValueError, match=r"adapters: no adapter_config.json in it.*instead: mrpc, sst2"):
        read_lora(folder)
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no adapter_config.json in it, expected .* a PEFT adapter$"):
        read_lora(folder / "empty")


def test_a_file_that_holds_no_weights_is_refused(save_lora: SaveLora) -> None:
    folder = save_lora("mrpc")
    with pytest.raises(ValueError, match=r"adapter_config.json: expected a folder, or a file of weights"):
        read_lora(folder / CONFIG)
    (folder / CONFIG).unlink()
    with pytest.raises(ValueError, match=r"mrpc: no adapter_config\.json in it"):
        read_lora(folder / WEIGHTS)


# ---- The hub --------------------------------------------------------------------------------------------------------


def upload(hub: Hub, folder: Path, path_in_repo: str | None = None) -> CommitInfo:
    return hub.api.upload_folder(
        repo_id=REPO, folder_path=folder, path_in_repo=path_in_repo, allow_patterns=["adapter_*"]
    )


def test_revisions_subfolders_and_files_of_a_repository_are_read(
    hub: Hub, save_lora: SaveLora, tmp_path: Path
) -> None:
    repo = REPO
    hub.api.create_repo(repo)
    folders = {"old": save_lora("old", seed=1), "new": save_lora("new", seed=2), "sub": save_lora("sub", seed=3)}
    first = upload(hub, folders["old"])
    hub.api.create_branch(repo, branch="v1.0")
    upload(hub, folders["new"])
    upload(hub, folders["sub"], "glue/mrpc")
    style = write(tmp_path / "style.safetensors", in_style_of_kohya(factors_of(UNET), "unet."))
    hub.api.upload_file(repo_id=repo, path_or_fileobj=style, path_in_repo="styles/style.safetensors")
    hub.api.upload_file(repo_id=repo, path_or_fileobj=style, path_in_repo="one/pytorch_lora_weights.safetensors")
    hub.move_to_another_machine()

    def check() -> None:
        for place, name in {
            repo: "new",
            f"{repo}@v1.0": "old",
            f"{repo}@{first.oid}": "old",
            f"{repo}:glue/mrpc": "sub",
            f"{repo}@main:glue/mrpc": "sub",
            f"{repo}@main:glue/mrpc/adapter_model.safetensors": "sub",
        }.items():
            assert_same(read_lora(place), read_lora(folders[name]))
        assert_same(read_lora(repo, revision="v1.0"), read_lora(folders["old"]))
        assert_updates(f"{repo}:styles/style.safetensors", factors_of(UNET))
        assert_updates(f"{repo}:one", factors_of(UNET))

    check()
    with hub.offline():
        check()
    subspace = SharedSubspace.from_adapters(
        [f"{repo}@v1.0", f"{repo}:glue/mrpc"], num_components=8, pseudo_rank=4, progress=False
    )
    assert subspace.tasks == ("loras", "mrpc")


def test_what_a_repository_does_not_have_is_named(hub: Hub, save_lora: SaveLora) -> None:
    repo = REPO
    hub.api.create_repo(repo)
    upload(hub, save_lora("a"), "a")
    for place, message in {
        repo: "org/loras: no adapter_config.json in this repository, expected a PEFT adapter",
        f"{repo}:b": "org/loras:b: no adapter_config.json in this repository",
        f"{repo}:b/c.safetensors": "c.safetensors: no c.safetensors in this repository",
        f"{repo}@v7:a": "org/loras@v7:a: no revision 'v7' in this repository",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_lora(place)
    with pytest.raises(ValueError, match="org/loras@v1: revision= is 'v2' too, expected only one of the two"):
        read_lora(f"{repo}@v1", revision="v2")
    with (
        hub.offline(),
        pytest.raises(LocalEntryNotFoundError, match="org/other@v1: no such folder, and no repo"),
    ):
        read_lora("org/other@v1")


def test_places_of_the_hub_that_cannot_be_read_are_left_out(hub: Hub, save_lora: SaveLora) -> None:
    hub.api.create_repo(REPO)
    upload(hub, save_lora("a"), "a")
    missing = {"b": "org/nowhere", "c": f"{REPO}:nothing", "d": f"{REPO}@v7:a"}
    messages = {"b": "no repository that could be read", "c": "no adapter_config.json", "d": "no revision 'v7'"}
    with pytest.raises(ValueError, match="3 of 4 adapters cannot be used") as caught:
        SharedSubspace.from_adapters({"a": f"{REPO}:a", **missing}, pseudo_rank=4, progress=False)
    assert all(message in str(caught.value) for message in messages.values())
    subspace = SharedSubspace.from_adapters(
        {**missing, "a": f"{REPO}:a"}, pseudo_rank=4, skip_bad=True, progress=False
    )
    assert subspace.tasks == ("a",)
    assert all(messages[name] in reason for name, reason in subspace.reading.skipped.items())
    assert subspace.reading.skipped.keys() == missing.keys()


@pytest.mark.slow  # the client retries for a while
def test_a_hub_that_is_out_of_reach_leaves_no_adapter_out(
    hub: Hub, save_lora: SaveLora, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    with pytest.raises(LocalEntryNotFoundError, match="org/lora: no such folder, and no repository in the cache"):
        SharedSubspace.from_adapters([save_lora("a"), "org/lora"], pseudo_rank=4, skip_bad=True, progress=False)


def test_a_local_folder_of_the_name_of_a_repository_comes_first(
    save_lora: SaveLora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(save_lora("mrpc"), tmp_path / "org" / "lora")
    assert_same(read_lora("org/lora"), read_lora(tmp_path / "adapters" / "mrpc"))
    config = json.loads((tmp_path / "org" / "lora" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == read_lora("org/lora").base_model_name_or_path
