"""Which names refer to the same base model, and which of them may be published."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from share_hf import SharedSubspace
from share_hf.format.base_model import base_name, common_base, is_same_model, published_name
from tests.tree_fixtures import SaveLora
from tests.trees import edit_json


REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/base", "org/base"),
        ("org/base/", "org/base"),
        (" org/base ", "org/base"),
        ("gpt2", "gpt2"),
        (f"/home/user/.cache/huggingface/hub/models--org--base/snapshots/{REVISION}", "org/base"),
        (f"/data/hub/models--gpt2/snapshots/{REVISION}/", "gpt2"),
        (rf"C:\Users\me\hub\models--org--base\snapshots\{REVISION}", "org/base"),
        ("https://huggingface.co/org/base", "org/base"),
        ("https://huggingface.co/org/base/tree/main", "org/base"),
        ("./models/base/", "./models/base"),
        ("/", "/"),
        ("", None),
        (None, None),
    ],
)
def test_a_name_is_the_id_on_the_hub_where_it_has_one(name: str | None, expected: str | None) -> None:
    assert base_name(name) == expected


@pytest.mark.parametrize(
    "name",
    ["./llama", "../llama", ".", "/models/llama", "~/llama", r"C:\llama", "a/b/c", "", None],
)
def test_a_place_on_a_machine_is_not_published(name: str | None) -> None:
    assert published_name(name) is None


def test_a_folder_that_is_called_like_a_repository_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert published_name("org/base") == "org/base"
    (tmp_path / "org" / "base").mkdir(parents=True)
    assert published_name("org/base") is None


@pytest.mark.parametrize("twin", ["unsloth/llama-bnb-4bit", "unsloth/llama-unsloth-bnb-4bit"])
def test_the_4_bit_copy_beside_a_model_is_the_model(twin: str) -> None:
    assert is_same_model(twin, "unsloth/llama")
    assert is_same_model("unsloth/llama", twin)
    assert not is_same_model(twin, "meta/llama")
    assert not is_same_model(twin, "unsloth/llama-2")


@pytest.fixture
def cached(
    tiny_model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], Path]:
    """Put a tiny model into the cache as a repository, and return its snapshot."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(model: str, repo_id: str) -> Path:
        repository = tmp_path / "hub" / f"models--{repo_id.replace('/', '--')}"
        snapshot = repository / "snapshots" / REVISION
        shutil.copytree(tiny_model_folder(model), snapshot)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(REVISION)
        return snapshot

    return put


def test_a_copy_on_disk_is_the_model_if_all_its_files_are(cached: Callable[[str, str], Path], tmp_path: Path) -> None:
    snapshot = cached("llama", "org/base")
    copy = shutil.copytree(snapshot, tmp_path / "copy")
    edit_json(copy / "config.json", lambda config: config.update(_name_or_path="org/base", transformers_version="4.0"))
    assert is_same_model(str(copy), "org/base")
    assert is_same_model("org/base", f"{copy}/")
    assert common_base({"a": str(copy), "b": "org/base", "c": None}) == "org/base"
    weights = copy / "model.safetensors"
    trained = bytearray(weights.read_bytes())
    trained[-1] ^= 1  # of the same size
    weights.write_bytes(trained)
    assert not is_same_model(str(copy), "org/base")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_copy_without_its_files_is_not_known(
    missing: str, cached: Callable[[str, str], Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(cached("llama", "org/base"), tmp_path / "copy")
    (copy / missing).unlink()
    assert not is_same_model(str(copy), "org/base")


def test_another_configuration_is_another_model(cached: Callable[[str, str], Path], tmp_path: Path) -> None:
    copy = shutil.copytree(cached("llama", "org/base"), tmp_path / "copy")
    edit_json(copy / "config.json", lambda config: config.update(rms_norm_eps=1e-3))
    assert not is_same_model(str(copy), "org/base")
    twin = cached("llama", "org/base-bnb-4bit")
    edit_json(twin / "config.json", lambda config: config.update(quantization_config={"load_in_4bit": True}))
    assert is_same_model("org/base-bnb-4bit", "org/base")
    edit_json(twin / "config.json", lambda config: config.update(rms_norm_eps=1e-3))
    assert not is_same_model("org/base-bnb-4bit", "org/base")


def test_adapters_of_one_model_by_several_names_make_one_subspace(save_lora: SaveLora) -> None:
    names = {
        "hub": "org/tiny",
        "slash": "org/tiny/",
        "cache": f"/cache/models--org--tiny/snapshots/{REVISION}",
        "twin": "org/tiny-bnb-4bit",
        "nameless": "",
    }
    adapters = {task: save_lora(task, seed=i, base=base) for i, (task, base) in enumerate(names.items())}
    subspace = SharedSubspace.from_adapters(adapters, pseudo_rank=4, progress=False)
    assert subspace.base_model_name_or_path == "org/tiny"
    reversed_order = dict(reversed(adapters.items()))
    assert SharedSubspace.from_adapters(reversed_order, pseudo_rank=4, progress=False).tasks == tuple(reversed_order)


def test_what_is_not_certain_is_named_by_the_user(
    save_lora: SaveLora, subspace: SharedSubspace, tmp_path: Path
) -> None:
    local = save_lora("local", base="./models/tiny")
    before = subspace.state
    with pytest.raises(ValueError, match=r"'./models/tiny', expected 'org/tiny'; if both .* base_model= .*--base-mod"):
        subspace.add_adapters([local], progress=False)
    assert subspace.state is before
    subspace.add_adapters([local], base_model="org/tiny", progress=False)
    assert subspace.base_model_name_or_path == "org/tiny"
    made = SharedSubspace.from_adapters(
        {"local": local, "hub": save_lora("hub")}, base_model="org/tiny/", pseudo_rank=4, progress=False
    )
    made.save_pretrained(tmp_path / "tree")
    assert SharedSubspace.from_pretrained(tmp_path / "tree").base_model_name_or_path == "org/tiny"


@pytest.mark.parametrize("name", ["", "  ", 5])
def test_a_base_model_of_no_name_is_refused(name: object, loras: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"base_model is .*, expected a Hub id or a folder"):
        SharedSubspace.from_adapters(loras, base_model=name, progress=False)


def test_a_tree_of_a_local_model_loads_and_its_card_does_not_tell(save_lora: SaveLora, tmp_path: Path) -> None:
    base = str(tmp_path / "models" / "llama")
    subspace = SharedSubspace.from_adapters([save_lora("one", base=base)], pseudo_rank=4, progress=False)
    subspace.save_pretrained(tmp_path / "tree")
    assert SharedSubspace.from_pretrained(tmp_path / "tree").base_model_name_or_path == base
    assert str(tmp_path) not in (tmp_path / "tree" / "README.md").read_text()
