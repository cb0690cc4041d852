"""Places of adapters that are whole subspaces, or tasks of one: one task never silently stands for all of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import get_peft_model

from share_hf import SharedSubspace
from share_hf.cli import main
from share_hf.format.lora import read_lora
from share_hf.tuner import ShareConfig
from tests.hub_server.fixtures import Hub
from tests.tree_fixtures import SaveLora
from tests.trees import files_of


WEIGHTS = "adapter_model.safetensors"
REPO = "org/share-subspace"
TOLD = r"is a shared subspace of the tasks \['mrpc', 'sst2'\], expected a single adapter; export its tasks first"


def built(*places: str | Path, **options: object) -> SharedSubspace:
    return SharedSubspace.from_adapters(list(places), num_components=8, pseudo_rank=4, progress=False, **options)  # type: ignore[arg-type]


def test_a_tree_is_not_an_adapter_of_a_new_subspace_or_of_another(tree: Path, loras: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=rf"{tree}: {TOLD} \(`share-hf export {tree} --all OUT`\)"):
        built(tree)
    subspace = built(loras["rte"])
    before = subspace.state
    with pytest.raises(ValueError, match=rf"name {tree / WEIGHTS} for its default task 'sst2' alone"):
        subspace.add_adapters({"other": str(tree)}, progress=False)
    with pytest.raises(ValueError, match=TOLD):
        subspace.replace_task("rte", tree, progress=False)
    assert subspace.state is before


def test_a_tree_among_adapters_is_named_and_can_be_left_out(tree: Path, loras: dict[str, Path]) -> None:
    subspace = built(loras["rte"], tree, skip_bad=True)
    assert subspace.tasks == ("rte",)
    assert "is a shared subspace of the tasks ['mrpc', 'sst2']" in subspace.reading.skipped["tree"]


def test_the_root_lora_of_a_tree_is_taken_where_its_file_is_named(tree: Path) -> None:
    subspace = built(tree / WEIGHTS)
    assert subspace.tasks == ("tree",)
    assert subspace.state.updates_of("tree").keys() == read_lora(tree).updates.keys()


def test_a_task_of_a_tree_is_refused_with_what_to_do(tree: Path) -> None:
    with pytest.raises(ValueError, match=r"peft_type is 'SHARE'.*export its tasks as LoRAs first \(`share-hf exp"):
        built(tree / "tasks" / "mrpc")


def test_what_the_refusal_advises_works(tree: Path, tmp_path: Path) -> None:
    assert main(["export", str(tree), "--all", str(tmp_path / "out"), "--quiet"]) == 0
    assert built(tmp_path / "out" / "mrpc", tmp_path / "out" / "sst2").tasks == ("mrpc", "sst2")


@pytest.mark.parametrize("command", ["init", "add", "audit"])
def test_commands_refuse_a_tree_among_adapters(
    command: str, tree: Path, loras: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = {"init": [str(tmp_path / "new")], "add": [str(tree)], "audit": []}[command]
    other = Path(shutil.copytree(tree, tmp_path / "other"))
    before = files_of(tree)
    assert main([command, *folder, str(loras["rte"]), str(other), "--quiet"]) == 1
    assert f"{other}: is a shared subspace of the tasks" in capsys.readouterr().err
    assert files_of(tree) == before
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_of_a_model_says_itself_what_it_is(tiny_model: Callable[[str], object], tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("llama"), ShareConfig(num_components=8, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="peft_type is 'SHARE', expected 'LORA'"):
        built(tmp_path / "model")


def test_a_repository_with_a_tree_is_not_an_adapter_but_the_branch_of_a_task_is(
    hub: Hub, subspace: SharedSubspace, save_lora: SaveLora
) -> None:
    subspace.push_to_hub(REPO)
    hub.api.upload_folder(
        repo_id=REPO, folder_path=save_lora("plain"), path_in_repo="plain", allow_patterns="adapter_*"
    )
    hub.move_to_another_machine()

    def check() -> None:
        for place in (REPO, f"{REPO}@main"):
            with pytest.raises(
                ValueError, match=f"{place}: {TOLD}.*name {place}:{WEIGHTS} for its default task 'sst2'"
            ):
                built(place)
        with pytest.raises(ValueError, match="peft_type is 'SHARE', expected 'LORA', export its tasks"):
            built(f"{REPO}:tasks/mrpc")
        assert built(f"{REPO}@mrpc", f"{REPO}:plain").tasks == ("share-subspace", "plain")
        assert built(f"{REPO}:{WEIGHTS}").tasks == ("share-subspace",)

    check()
    with hub.offline():
        check()
