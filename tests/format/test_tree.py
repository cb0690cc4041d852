"""The tree on disk: what is in it, and that everything comes back from it bit by bit."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import PreTrainedModel

from share_hf import SharedSubspace
from share_hf.state import ContinualMetrics
from share_hf.version import __version__
from tests.tree_fixtures import SaveLora
from tests.trees import BASE_NAME, assert_same_state, edit_json, files_of


MODULES = [f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")]
METRICS = ContinualMetrics(tasks=["mrpc", "sst2"], matrix=[[0.9, None], [0.85, 0.75]], baseline=[None, None]).as_dict()


def with_metrics(subspace: SharedSubspace) -> SharedSubspace:
    """The subspace as a trainer would have left it: with scores and label names."""
    state = subspace.state
    tasks = dict(state.tasks)
    tasks["sst2"] = replace(tasks["sst2"], learned_by="adapt", labels=("negative", "positive"), scores={"now": 0.75})
    return SharedSubspace(replace(state, tasks=tasks, metrics=METRICS))


def test_a_tree_has_the_documented_files_and_no_others(
    subspace: SharedSubspace, tmp_path: Path, with_figures: None
) -> None:
    with_metrics(subspace).save_pretrained(tmp_path / "tree")
    assert sorted(files_of(tmp_path / "tree")) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "figures/accuracy_matrix.png",
        "figures/drift.png",
        "figures/spectra.png",
        "metrics.json",
        "share_config.json",
        "subspace.safetensors",
        *(f"tasks/{task}/{name}" for task in ("mrpc", "sst2") for name in (
            "adapter_config.json",
            "adapter_model.safetensors",
            "metrics.json",
        )),
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir() if path.name != "adapters"] == ["tree"]
    for path in (tmp_path / "tree" / "figures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_index_says_what_the_tree_holds(tree: Path) -> None:
    index = json.loads((tree / "share_config.json").read_text())
    assert index.pop("digest") and index.pop("sha256") and index.pop("lineage") and index.pop("fingerprint")
    assert index == {
        "format_version": 2,
        "kind": "tree",
        "share_hf_version": __version__,
        "base_model_name_or_path": BASE_NAME,
        "settings": {
            "num_components": 6,
            "pseudo_rank": 4,
            "basis": "joint",
            "center": False,
            "explained_variance": None,
            "drift_tolerance": None,
            "max_components": None,
        },
        "modules": {
            name: {"shape": [64 if "q_proj" in name else 32, 64], "num_components": [6, 6]} for name in MODULES
        },
        "tasks": ["mrpc", "sst2"],
        "default_task": None,
        "branches": {},
        "branched": None,
        "replaced": {},
    }


def test_the_basis_is_stored_once_in_float32_with_orthonormal_columns(tree: Path) -> None:
    tensors = load_file(tree / "subspace.safetensors")
    parts = ("alpha", "beta", "explained_variance", "spectrum_in", "spectrum_out")
    assert sorted(tensors) == [f"{module}.{part}" for module in MODULES for part in parts]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    for name, tensor in tensors.items():
        if name.endswith(("alpha", "beta")):
            assert tensor.shape == (32 if name.endswith("v_proj.beta") else 64, 6)
            assert torch.allclose(tensor.T @ tensor, torch.eye(6), atol=1e-5)
        elif "spectrum" in name:
            assert torch.equal(tensor, tensor.sort(descending=True).values)


def test_a_task_is_its_coefficients_and_what_basis_they_belong_to(tree: Path) -> None:
    for task in ("mrpc", "sst2"):
        tensors = load_file(tree / "tasks" / task / "adapter_model.safetensors")
        assert sorted(tensors) == [
            f"base_model.model.{module}.share_{part}"
            for module in MODULES
            for part in ("coefficients_in", "coefficients_out", "fingerprint")
        ]
        found = {(tensor.shape, tensor.dtype) for tensor in tensors.values()}
        assert found == {((6, 4), torch.float32), ((8,), torch.uint8)}
        config = json.loads((tree / "tasks" / task / "adapter_config.json").read_text())
        assert config["peft_type"] == "SHARE"
        assert config["base_model_name_or_path"] == BASE_NAME
        metrics = json.loads((tree / "tasks" / task / "metrics.json").read_text())
        assert sorted(metrics["certificate"]) == MODULES
        assert metrics["certificate_columns"] == ["norm", "rank_error", "drift_bound", "drift_estimate"]
        assert {len(row) for row in metrics["certificate"].values()} == {4}


def test_the_root_is_a_plain_lora_of_the_newest_task_unless_another_is_chosen(
    subspace: SharedSubspace, tmp_path: Path
) -> None:
    for default_task in (None, "mrpc"):
        chosen = SharedSubspace(replace(subspace.state, default_task=default_task))
        chosen.save_pretrained(tmp_path / "tree")
        config = json.loads((tmp_path / "tree" / "adapter_config.json").read_text())
        assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 4)
        tensors = load_file(tmp_path / "tree" / "adapter_model.safetensors")
        assert len(tensors) == 2 * len(MODULES)
        for module, layer in subspace.state.layers.items():
            update = layer.update_of(default_task or "sst2")
            lora_a, lora_b = (tensors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
            assert torch.equal(lora_b, update.out_factor)
            assert torch.equal(lora_a, update.in_factor.T)
        assert SharedSubspace.from_pretrained(tmp_path / "tree").state.default_task == default_task


def test_removing_the_default_task_makes_the_newest_the_default(subspace: SharedSubspace) -> None:
    chosen = SharedSubspace(replace(subspace.state, default_task="mrpc"))
    chosen.remove_task("mrpc")
    assert chosen.state.default_task is None
    assert chosen.state.root_task == "sst2"


# ---- Round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_string", [False, True])
def test_a_subspace_comes_back_to_the_bit(subspace: SharedSubspace, tmp_path: Path, as_string: bool) -> None:
    saved = with_metrics(subspace)
    place = tmp_path / "some where" / "tree"
    saved.save_pretrained(str(place) if as_string else place)
    loaded = SharedSubspace.from_pretrained(str(place) if as_string else place)
    assert_same_state(loaded.state, saved.state)
    assert loaded.report() == saved.report()


def test_tasks_of_different_modules_and_heads_come_back_to_the_bit(save_classifier: SaveLora, tmp_path: Path) -> None:
    adapters = [
        save_classifier("two", 2, seed=1),
        save_classifier("three", 3, seed=2, target_modules=["query", "dense"]),
        save_classifier("elsewhere", 5, seed=3, target_modules=["key"]),
    ]
    saved = SharedSubspace.from_adapters(adapters, num_components=12, pseudo_rank=4, progress=False)
    assert [len(saved.state.layers_of(task)) for task in saved.tasks] == [4, 9, 2]
    saved.save_pretrained(tmp_path / "tree")
    loaded = SharedSubspace.from_pretrained(tmp_path / "tree")
    assert_same_state(loaded.state, saved.state)
    assert [loaded.state.tasks[task].head["classifier.bias"].shape[0] for task in saved.tasks] == [2, 3, 5]


@pytest.mark.parametrize(
    "settings",
    [
        {"basis": "factor", "center": True},
        {"explained_variance": 0.6},
        {"drift_tolerance": 0.02, "max_components": 32},
        {"num_components": 32, "pseudo_rank": 1},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_settings_come_back(settings: dict[str, object], loras: dict[str, Path], tmp_path: Path) -> None:
    values = {"num_components": 8, "pseudo_rank": 4, **settings}
    saved = SharedSubspace.from_adapters(loras, progress=False, **values)
    saved.save_pretrained(tmp_path / "tree")
    assert_same_state(SharedSubspace.from_pretrained(tmp_path / "tree").state, saved.state)


def test_a_loaded_subspace_merges_as_the_saved_one_would(
    subspace: SharedSubspace, tree: Path, loras: dict[str, Path]
) -> None:
    loaded = SharedSubspace.from_pretrained(tree)
    for each in (loaded, subspace):
        each.add_adapters({"rte": loras["rte"]}, progress=False)
    assert_same_state(loaded.state, subspace.state)


def test_the_same_subspace_is_written_with_the_same_bytes(
    subspace: SharedSubspace, tmp_path: Path, with_figures: None
) -> None:
    saved = with_metrics(subspace)
    saved.save_pretrained(tmp_path / "one")
    SharedSubspace.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    one, two = files_of(tmp_path / "one"), files_of(tmp_path / "two")
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


def test_saving_over_an_older_tree_leaves_nothing_of_it(
    subspace: SharedSubspace, tree: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    subspace.remove_task("mrpc")
    subspace.save_pretrained(tree)
    subspace.save_pretrained(tmp_path / "fresh")
    assert files_of(tree) == files_of(tmp_path / "fresh")


def test_a_revision_of_a_local_folder_is_refused(tree: Path) -> None:
    for revision in ("main", "mrpc"):
        with pytest.raises(ValueError, match=f"revision is {revision!r} but .* is a local folder.*tasks are in"):
            SharedSubspace.from_pretrained(tree, revision=revision)


@pytest.mark.parametrize("place", ["empty", "missing"])
def test_a_place_without_a_tree_is_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"{place}.*no such"):
        SharedSubspace.from_pretrained(tmp_path / place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


@pytest.mark.parametrize("place", [Path("no/where"), "./nowhere", "/no/where"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(place: str | Path) -> None:
    with pytest.raises(ValueError, match="where: no such folder"):
        SharedSubspace.from_pretrained(place)


# ---- The folder -----------------------------------------------------------------------------------------------------


def test_what_else_is_in_the_folder_stays(subspace: SharedSubspace, tree: Path) -> None:
    (tree / "notes.txt").write_text("mine")
    (tree / ".git").mkdir()
    (tree / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (tree / "link").symlink_to("notes.txt")
    subspace.save_pretrained(tree)
    assert (tree / "notes.txt").read_text() == "mine"
    assert (tree / ".git" / "HEAD").read_text() == "ref: refs/heads/main"
    assert (tree / "link").is_symlink()
    assert_same_state(SharedSubspace.from_pretrained(tree).state, subspace.state)


def test_a_tree_can_be_saved_through_a_link(subspace: SharedSubspace, tree: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tree, target_is_directory=True)
    subspace.remove_task("mrpc")
    subspace.save_pretrained(link)
    assert link.is_symlink()
    for place in (link, tree):
        assert SharedSubspace.from_pretrained(place).tasks == ("sst2",)


def test_a_tree_is_loaded_from_the_current_folder_but_not_saved_over_it(
    subspace: SharedSubspace, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(tree)
    for place in (tree, tree / "tasks"):
        monkeypatch.chdir(place)
        for folder in (tree, os.path.relpath(tree)):
            assert_same_state(SharedSubspace.from_pretrained(folder).state, subspace.state)
            with pytest.raises(ValueError, match="is or contains the current folder"):
                subspace.save_pretrained(folder)
    assert files_of(tree) == before


def test_a_file_in_the_way_is_refused_and_stays(subspace: SharedSubspace, tmp_path: Path) -> None:
    (tmp_path / "tree").write_text("mine")
    with pytest.raises(ValueError, match="tree is a file, expected a folder"):
        subspace.save_pretrained(tmp_path / "tree")
    assert (tmp_path / "tree").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_a_private_folder_stays_private(subspace: SharedSubspace, tmp_path: Path) -> None:
    folder = tmp_path / "private"
    folder.mkdir(mode=0o700)
    subspace.save_pretrained(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_new_files_have_the_usual_permissions(subspace: SharedSubspace, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        subspace.save_pretrained(tmp_path / "tree")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "tree").stat().st_mode) == 0o750
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "tree").rglob("*") if path.is_file()}
    assert modes == {0o640}


# ---- The card -------------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_tree_holds(subspace: SharedSubspace, tmp_path: Path, with_figures: None) -> None:
    with_metrics(subspace).save_pretrained(tmp_path / "tree")
    card = ModelCard.load(tmp_path / "tree" / "README.md")
    assert card.data.base_model == BASE_NAME
    assert card.data.library_name == "peft"
    assert {"share", "lora"} <= set(card.data.tags)
    scores = {result.dataset_name: result.metric_value for result in card.data.eval_results}
    assert scores == {"mrpc": 0.85, "sst2": 0.75}
    drift = {task.name: f"{task.drift:.2g}" for task in subspace.report().tasks}
    assert f"| `mrpc` | adapter | 0.900 | 0.850 | {drift['mrpc']} |" in card.text
    assert f"| `sst2` | adapt | 0.750 | 0.750 | {drift['sst2']} |" in card.text
    assert "| `mrpc` | 0.900 |  |" in card.text
    assert "| 0.800 | 0.050 | -0.050 |  |" in card.text
    for figure in ("accuracy_matrix", "drift", "spectra"):
        assert f"(figures/{figure}.png)" in card.text
    assert 'subfolder="tasks/sst2", adapter_name="sst2"' in card.text


def test_the_card_names_no_folder_of_the_machine(
    save_lora: SaveLora, tiny_model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    place = str(tiny_model_folder("llama"))
    subspace = SharedSubspace.from_adapters([save_lora("local", base=place)], pseudo_rank=4, progress=False)
    subspace.save_pretrained(tmp_path / "tree")
    assert ModelCard.load(tmp_path / "tree" / "README.md").data.base_model is None


def test_the_card_says_how_many_labels_the_head_has(save_classifier: SaveLora, tmp_path: Path) -> None:
    adapters = [save_classifier("five", 5), save_classifier("two", 2)]
    SharedSubspace.from_adapters(adapters, pseudo_rank=4, progress=False).save_pretrained(tmp_path / "tree")
    text = (tmp_path / "tree" / "README.md").read_text()
    # The root is the LoRA of the task "two"; a model for all tasks needs the labels of the largest one.
    assert 'AutoPeftModelForSequenceClassification.from_pretrained("org/share-subspace", num_labels=2)' in text
    assert f'AutoModelForSequenceClassification.from_pretrained("{BASE_NAME}", num_labels=5)' in text


def test_a_tree_without_matplotlib_has_no_figures(tree: Path) -> None:
    assert not (tree / "figures").exists()
    assert "figures/" not in (tree / "README.md").read_text()


# ---- PEFT's own saving ----------------------------------------------------------------------------------------------


def test_an_applied_subspace_can_be_saved_by_peft_and_read_as_adapters_again(
    subspace: SharedSubspace, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    subspace.apply(tiny_model("llama")).save_pretrained(tmp_path / "checkpoint")
    for task in subspace.tasks:
        saved = load_file(tmp_path / "checkpoint" / task / "adapter_model.safetensors")
        for module, layer in subspace.state.layers.items():
            stored = saved[f"base_model.model.{module}.share_coefficients_out"]
            assert torch.equal(stored, layer.coefficients_out[layer.index(task)])


def test_figures_survive_a_loud_task(
    subspace: SharedSubspace,
    loras: dict[str, Path],
    copy_of: Callable[[Path], Path],
    tmp_path: Path,
    with_figures: None,
) -> None:
    loud = copy_of(loras["rte"])
    edit_json(loud / "adapter_config.json", lambda config: config.update(lora_alpha=1e12))
    subspace.add_adapters({"loud": loud}, progress=False)
    subspace.save_pretrained(tmp_path / "tree")
    assert_same_state(SharedSubspace.from_pretrained(tmp_path / "tree").state, subspace.state)
