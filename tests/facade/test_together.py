"""Features in combination: kinds of layers, ranks, components and originals, through edits and exports."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from share_hf import SharedSubspace
from share_hf.cli import main
from share_hf.format.lora import read_lora
from share_hf.format.originals import LocalOriginal, originals_file, read_originals, write_originals
from share_hf.state import (
    Layout,
    SubspaceState,
    TaskInfo,
    check_original,
    hub_originals,
    merge_tasks,
    reconcile,
    refitted,
)
from share_hf.subspace import LowRankUpdate, SubspaceSettings
from share_hf.tuner import share_layers
from tests.hub_server.fixtures import Hub
from tests.trees import assert_close, assert_same_state, edit_json, small_lora

from ..tuner.test_layer_kinds import Reader, lora_of, of_lora, output


QUIET = dict(progress=False)
KERNEL = (3, 2)


@pytest.fixture
def base() -> Reader:
    torch.manual_seed(0)
    return Reader(KERNEL).eval()


@pytest.fixture
def folders(base: Reader, tmp_path: Path) -> dict[str, Path]:
    """Four LoRAs of ranks 2 to 5. One of them leaves out two layers."""
    targets = {"third": {"target_modules": ["image", "words"]}}
    return {
        task: lora_of(base, tmp_path / f"lora-{task}", rank, **targets.get(task, {}))
        for rank, task in enumerate(["first", "other", "third", "fourth"])
    }


def learned(folders: dict[str, Path]) -> dict[str, dict[str, Tensor]]:
    """Return the update of each adapter in float64, by task and module."""
    return {
        task: {
            module: update.out_factor.double() @ update.in_factor.double().T
            for module, update in read_lora(folder).updates.items()
        }
        for task, folder in folders.items()
    }


def assert_certified(state: SubspaceState, folders: dict[str, Path]) -> None:
    """Assert that every task is as close to its adapter as its bound says."""
    for task, updates in learned(folders).items():
        layers = state.layers_of(task)
        assert layers.keys() == updates.keys()
        for module, layer in layers.items():
            true, found = updates[module], layer.update_of(task, torch.float64).dense()
            bound = float(layer.records.drift_bounds[layer.index(task)])
            assert float((found - true).norm() / true.norm()) <= bound + 1e-12, (task, module)


# ---- All settings, all kinds of layers ------------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", [None, 0.3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "4bit"])
def test_edits_keep_what_is_certified_and_stored(
    dtype: str, tolerance: float | None, folders: dict[str, Path], tmp_path: Path
) -> None:
    settings = dict(num_components=6, pseudo_rank=4, coefficient_dtype=dtype, tolerance=tolerance)
    made = SharedSubspace.from_adapters({task: folders[task] for task in ("first", "other")}, **settings, **QUIET)
    tree = tmp_path / "tree"
    made.save_pretrained(tree, history=9, keep_originals=True)

    def saved() -> None:
        made.save_pretrained(tree)
        assert_same_state(SharedSubspace.from_pretrained(tree).state, made.state)

    made.add_adapters({"third": folders["third"]}, tolerance=0.6, **QUIET)
    saved()
    assert_certified(made.state, {task: folders[task] for task in ("first", "other", "third")})
    made.rename_task("first", "uno")
    made.replace_task("other", folders["fourth"], **QUIET)
    saved()
    there = {"uno": folders["first"], "other": folders["fourth"], "third": folders["third"]}
    assert_certified(made.state, there)
    made = SharedSubspace.from_pretrained(tree)
    made.refit(**QUIET)
    assert made.state.lineage[-1]["from_originals"] == 3
    saved()
    assert_certified(made.state, there)
    assert SharedSubspace.undo(tree).state.lineage == made.state.lineage[:-1]


@pytest.mark.parametrize("tolerance", [None, 0.3])
@pytest.mark.parametrize("dtype", ["bfloat16", "4bit"])
def test_two_writers_end_with_bounds_that_hold(
    dtype: str, tolerance: float | None, folders: dict[str, Path], tmp_path: Path
) -> None:
    settings = dict(num_components=6, pseudo_rank=4, coefficient_dtype=dtype, tolerance=tolerance)
    SharedSubspace.from_adapters({"first": folders["first"]}, **settings, **QUIET).save_pretrained(tmp_path / "tree")
    ours, theirs = (SharedSubspace.from_pretrained(tmp_path / "tree") for _ in range(2))
    ours.add_adapters({"other": folders["other"], "third": folders["third"]}, **QUIET)
    theirs.add_adapters({"fourth": folders["fourth"]}, tolerance=0.8, **QUIET)
    theirs.rename_task("first", "uno")
    ours.save_pretrained(tmp_path / "tree")
    theirs.save_pretrained(tmp_path / "tree")
    loaded = SharedSubspace.from_pretrained(tmp_path / "tree")
    assert_same_state(loaded.state, theirs.state)
    assert loaded.state.layouts["image"] == Layout("convolution", KERNEL)
    assert_certified(loaded.state, {"uno": folders["first"], **{t: folders[t] for t in ("other", "third", "fourth")}})


@pytest.mark.parametrize("dtype", ["float32", "4bit"])
def test_edits_reach_the_hub_its_branches_and_other_writers(
    dtype: str, base: Reader, folders: dict[str, Path], hub: Hub
) -> None:
    settings = dict(num_components=8, pseudo_rank=4, coefficient_dtype=dtype, tolerance=0.3)
    ours = SharedSubspace.from_adapters({task: folders[task] for task in ("first", "other")}, **settings, **QUIET)
    ours.push_to_hub("org/kinds")
    theirs = SharedSubspace.from_pretrained("org/kinds")
    theirs.add_adapters({"third": folders["third"]}, tolerance=0.5, **QUIET)
    theirs.push_to_hub("org/kinds")
    ours.rename_task("first", "uno")
    ours.replace_task("other", folders["fourth"], **QUIET)
    ours.push_to_hub("org/kinds")
    assert set(ours.tasks) == {"uno", "other", "third"}
    ours.refit({"uno": folders["first"]}, **QUIET)
    ours.push_to_hub("org/kinds")
    theirs.update_from(SharedSubspace.from_pretrained("org/kinds"))
    on_hub = SharedSubspace.from_pretrained("org/kinds")
    for found in (theirs, on_hub):
        assert_same_state(found.state, ours.state)
    there = {"uno": folders["first"], "other": folders["fourth"], "third": folders["third"]}
    assert_certified(on_hub.state, there)
    applied = on_hub.apply(copy.deepcopy(base))
    for task in there:
        branch = SharedSubspace.from_pretrained("org/kinds", revision=task)
        by_peft = PeftModel.from_pretrained(copy.deepcopy(base), "org/kinds", revision=task)
        applied.set_adapter(task)
        for model in (branch.apply(copy.deepcopy(base), [task]), by_peft):
            assert_close(output(model), output(applied))


@pytest.mark.parametrize("dtype", ["float32", "4bit"])
def test_tasks_of_other_ranks_share_a_batch_and_a_sum(dtype: str, base: Reader, folders: dict[str, Path]) -> None:
    settings = dict(num_components=20, pseudo_rank=6, coefficient_dtype=dtype, tolerance=0.3)
    model = SharedSubspace.from_adapters(folders, **settings, **QUIET).apply(copy.deepcopy(base))
    layers = share_layers(model).values()
    ranks = {layer.share_coefficients_in[task].shape[1] for layer in layers for task in layer.tasks}
    assert len(ranks) > 2
    mixed = output(model, adapter_names=list(folders))
    for i, task in enumerate(folders):
        model.set_adapter(task)
        assert_close(output(model)[i], mixed[i])
    weights = {"other": 0.5, "third": -1.0}
    before = {
        name: sum(weight * layer.get_delta_weight(task) for task, weight in weights.items() if layer.has_task(task))
        for name, layer in share_layers(model).items()
    }
    model.base_model.add_weighted_adapter([*weights], [*weights.values()], "sum")
    for name, layer in share_layers(model).items():
        summed = layer.get_delta_weight("sum")
        lost = (summed - before[name]).flatten(1)
        # It loses no more than the best approximation of rank p.
        values = torch.linalg.svdvals(before[name].flatten(1))
        assert float(lost.norm()) <= float(values[6:].norm()) + 1e-4 * float(values.norm())
    model.set_adapter("sum")  # the factors folded for "other" before are not used for the sum
    in_weights = copy.deepcopy(model).merge_and_unload()
    assert_close(output(model), output(in_weights), 1e-4)


# ---- Ranks ----------------------------------------------------------------------------------------------------------


def many_updates(count: int, seed: int, scale: float = 1.0) -> dict[str, dict[str, LowRankUpdate]]:
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    common = normal(40, 10), normal(30, 10)
    decay = torch.tensor([1.0, 0.6, 0.3, 0.2, 0.1, 0.05])
    return {
        f"t{seed}-{i}": {"m": LowRankUpdate(scale * common[0] @ normal(10, 6) * decay, common[1] @ normal(10, 6))}
        for i in range(count)
    }


def test_a_refit_does_not_cut_a_rank_twice(folders: dict[str, Path]) -> None:
    made = SharedSubspace.from_adapters(folders, num_components=24, pseudo_rank=6, tolerance=0.4, **QUIET)
    before = made.state
    refit, _ = refitted(before, {"first": read_lora(folders["first"]).updates})
    for module, layer in refit.layers.items():
        old = before.layers[module]
        for task in layer.tasks:
            assert layer.ranks[layer.index(task)] == old.ranks[old.index(task)], (module, task)
            assert_close(layer.update_of(task).dense(), old.update_of(task).dense(), 1e-5)
    assert_certified(refit, folders)


@pytest.mark.parametrize("basis", ["joint", "factor"])
def test_many_tasks_of_another_writer_keep_their_ranks(basis: str) -> None:
    def added(state: SubspaceState, updates: dict[str, dict[str, LowRankUpdate]]) -> SubspaceState:
        return merge_tasks(state, updates, {task: TaskInfo() for task in updates})[0]

    settings = SubspaceSettings(num_components=20, pseudo_rank=6, tolerance=0.3, basis=basis)
    start = added(SubspaceState(settings=settings), many_updates(2, 0))
    ours, theirs = added(start, many_updates(120, 1)), added(start, many_updates(3, 2))
    merged = reconcile(ours, theirs)
    found, known = merged.layers["m"], ours.layers["m"]
    of_ours = [task for task in ours.tasks if task not in start.tasks]
    ranks = [int(known.ranks[known.index(task)]) for task in of_ours]
    assert [int(found.ranks[found.index(task)]) for task in of_ours] == ranks
    assert min(ranks) < 6


# ---- Layouts --------------------------------------------------------------------------------------------------------


def test_a_refit_forgets_the_kind_of_a_module_that_no_task_adapts(base: Reader, tmp_path: Path) -> None:
    with_image = lora_of(base, tmp_path / "with", 1)
    without = lora_of(base, tmp_path / "without", 2, target_modules=["words", "head"])
    made = SharedSubspace.from_adapters({"with": with_image, "without": without}, **QUIET)
    made.remove_task("with")
    made.refit(**QUIET)
    assert made.state.layers.keys() == {"words", "head"}
    assert made.state.layouts.keys() == {"words"}
    made.save_pretrained(tmp_path / "tree")
    assert_same_state(SharedSubspace.from_pretrained(tmp_path / "tree").state, made.state)


def test_an_adapter_of_another_kind_of_layer_is_named_with_all_broken_ones_or_left_out(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    turned = lora_of(Reader(KERNEL[::-1]), tmp_path / "turned", 1)
    (broken := tmp_path / "broken").mkdir()
    places = {"turned": turned, "broken": broken}
    told = r"(?s)2 of 4 .*turned: 'image' is of kind convolution with kernel \(2, 3\) .*broken: .*no adapter_config"
    with pytest.raises(ValueError, match=told):
        SharedSubspace.from_adapters({"first": folders["first"], **places, "third": folders["third"]}, **QUIET)
    made = SharedSubspace.from_adapters({"first": folders["first"], **places}, skip_bad=True, **QUIET)
    assert made.tasks == ("first",)
    made.add_adapters({**places, "third": folders["third"]}, skip_bad=True, **QUIET)
    assert made.tasks == ("first", "third")
    assert made.reading.skipped.keys() == places.keys()


def test_diffusers_gets_convolutions_as_kernels(base: Reader, tmp_path: Path) -> None:
    folders = [lora_of(base, tmp_path / f"lora{i}", i, target_modules=["image", "series", "head"]) for i in range(2)]
    made = SharedSubspace.from_adapters(folders, num_components=24, pseudo_rank=6, tolerance=0.2, **QUIET)
    made.export_lora("lora1", tmp_path / "out", style="diffusers", component="unet")
    tensors = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert tensors["unet.image.lora_A.weight"].shape[1:] == (1, *KERNEL)
    assert tensors["unet.image.lora_B.weight"].shape[2:] == (1, 1)
    assert tensors["unet.series.lora_A.weight"].ndim == 3
    # Earlier versions of diffusers scale other ranks wrongly if there is no alpha.
    assert len({tensor.shape[1] for name, tensor in tensors.items() if "lora_B" in name}) == 1
    again = read_lora(tmp_path / "out")
    assert again.layouts == made.state.layouts
    assert again.component == "unet"
    for module, update in made.state.updates_of("lora1").items():
        assert_close(again.updates[module].dense(), update.dense(), 1e-6)


def test_diffusers_gets_no_embedding(folders: dict[str, Path], tmp_path: Path) -> None:
    made = SharedSubspace.from_adapters(folders, **QUIET)
    with pytest.raises(ValueError, match="'words' is an embedding, which diffusers has no key for"):
        made.export_lora("first", tmp_path / "out", style="diffusers", component="text_encoder")
    assert not (tmp_path / "out").exists()


def test_a_sum_of_kinds_is_one_lora(base: Reader, folders: dict[str, Path], tmp_path: Path) -> None:
    made = SharedSubspace.from_adapters(folders, num_components=40, pseudo_rank=6, **QUIET)
    assert made.export_combined({"first": 0.5, "third": 2.0}, tmp_path / "sum", rank=12) < 1e-5
    expected = copy.deepcopy(base)
    for task, weight in (("first", 0.5), ("third", 2.0)):
        for module, update in learned(folders)[task].items():
            kept = expected.get_submodule(module).weight.data
            kept += weight * (update.T if module == "words" else update).reshape(kept.shape).float()
    assert_close(of_lora(base, tmp_path / "sum"), output(expected), 1e-4)


# ---- Components -----------------------------------------------------------------------------------------------------


def pipeline_file(path: Path, seed: int) -> Path:
    """A LoRA of two components in one file, as diffusers saves it."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"unet.down_blocks.0.to_q": (12, 10), "text_encoder.text_model.encoder.layers.0.mlp.fc1": (9, 11)}
    tensors = {}
    for module, (n, d) in sizes.items():
        tensors[f"{module}.lora_A.weight"] = torch.randn(3, d, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(n, 3, generator=generator)
    save_file(tensors, path, {"format": "pt"})
    return path


@pytest.fixture
def styles(tmp_path: Path) -> dict[str, Path]:
    return {f"s{i}": pipeline_file(tmp_path / f"s{i}.safetensors", i) for i in range(4)}


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_what_was_read_of_a_pipeline_is_replaced_and_refitted(
    component: str, styles: dict[str, Path], tmp_path: Path
) -> None:
    tree, of_component = tmp_path / "tree", dict(component=component, **QUIET)
    made = SharedSubspace.from_adapters(
        {task: styles[task] for task in ("s0", "s1")}, num_components=4, pseudo_rank=3, **of_component
    )
    made.replace_task("s1", styles["s2"], **of_component)
    made.save_pretrained(tree, keep_originals=True)
    known = json.loads(originals_file(tree).read_text())
    assert known == {t: {"place": str(styles[s]), "component": component} for t, s in (("s0", "s0"), ("s1", "s2"))}
    loaded = SharedSubspace.from_pretrained(tree)
    loaded.refit(**QUIET)
    assert loaded.state.lineage[-1]["from_originals"] == 2
    # Named again, with the intended component.
    with pytest.raises(ValueError, match="several components"):
        loaded.refit({"s1": styles["s2"]}, **QUIET)
    loaded.refit({"s1": styles["s2"]}, **of_component)


def test_the_commands_know_components(styles: dict[str, Path], tmp_path: Path) -> None:
    tree = str(tmp_path / "tree")
    of_unet = ("--component", "unet")
    assert main(["init", tree, *map(str, (styles["s0"], styles["s1"])), *of_unet, "--keep-originals"]) == 0
    assert main(["replace", tree, f"s1={styles['s2']}", *of_unet]) == 0
    assert main(["refit", tree]) == 0
    assert main(["refit", tree, f"s1={styles['s2']}", *of_unet]) == 0
    assert SharedSubspace.from_pretrained(tree).state.lineage[-1]["from_originals"] == 2


# ---- Originals ------------------------------------------------------------------------------------------------------


def test_adapters_that_call_their_base_by_other_names_are_refitted(tmp_path: Path) -> None:
    folders = [small_lora(tmp_path / f"lora{i}", i, 1.0)[0] for i in range(2)]
    for i, folder in enumerate(folders):
        edit_json(
            folder / "adapter_config.json", lambda config, i=i: config.update(base_model_name_or_path=f"org/{i}")
        )
    made = SharedSubspace.from_adapters(folders, base_model="org/base", **QUIET)
    made.refit(**QUIET)
    assert made.state.lineage[-1]["from_originals"] == 2
    assert made.base_model_name_or_path == "org/base"


def test_a_folder_that_is_called_like_a_repository_is_never_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapters").mkdir()
    small_lora(tmp_path / "adapters" / "mrpc", 0, 1.0)
    monkeypatch.chdir(tmp_path)
    made = SharedSubspace.from_adapters(["adapters/mrpc"], **QUIET)
    made.save_pretrained("tree", keep_originals=True)
    assert hub_originals(made.state.lineage) == {}
    assert read_originals(tmp_path / "tree") == {"mrpc": LocalOriginal(str(tmp_path / "adapters" / "mrpc"))}


def test_a_step_back_knows_the_folders_of_before(tmp_path: Path) -> None:
    folders = [small_lora(tmp_path / f"lora{i}", i, 1.0)[0] for i in range(3)]
    tree = tmp_path / "tree"
    made = SharedSubspace.from_adapters({"a": folders[0], "b": folders[1]}, **QUIET)
    made.save_pretrained(tree, history=3, keep_originals=True)
    before = read_originals(tree)
    made.replace_task("a", folders[2], **QUIET)
    made.remove_task("b")
    made.save_pretrained(tree)
    assert read_originals(tree) == {"a": LocalOriginal(str(folders[2]))}
    back = SharedSubspace.undo(tree)
    assert read_originals(tree) == before
    back.refit(**QUIET)
    assert back.state.lineage[-1]["from_originals"] == 2


@pytest.mark.parametrize("where", ["subfolder", "file", "revision", "pipeline"])
def test_places_on_the_hub_are_known_by_commit_sum_and_component(
    where: str, hub: Hub, styles: dict[str, Path], tmp_path: Path
) -> None:
    folders = [small_lora(tmp_path / f"lora{i}", i, 1.0)[0] for i in range(3)]
    hub.api.create_repo("org/styles")

    def upload(i: int, **options: Any) -> str:
        if where == "pipeline":
            return hub.api.upload_file(
                repo_id="org/styles", path_or_fileobj=styles[f"s{i}"], path_in_repo="all.safetensors", **options
            ).oid
        path = None if where == "revision" else "loras/one"
        return hub.api.upload_folder(repo_id="org/styles", folder_path=folders[i], path_in_repo=path, **options).oid

    if where == "revision":
        hub.api.create_branch("org/styles", branch="v1")
        commit = upload(0, revision="v1")
    else:
        commit = upload(0)
    given, noted = {
        "subfolder": ("org/styles:loras/one", "org/styles:loras/one"),
        "file": ("org/styles:loras/one/adapter_model.safetensors",) * 2,
        "revision": ("org/styles@v1", "org/styles"),
        "pipeline": ("org/styles:all.safetensors",) * 2,
    }[where]
    component = {"component": "unet"} if where == "pipeline" else {}
    made = SharedSubspace.from_adapters({"a": given}, num_components=4, pseudo_rank=4, **component, **QUIET)
    known = hub_originals(made.state.lineage)["a"]
    assert known == {"place": noted, "commit": commit, "sha256": known["sha256"], **component}
    # What the repository has later is not what the task came from.
    upload(1, **({"revision": "v1"} if where == "revision" else {}))
    made.save_pretrained(tmp_path / "tree")
    loaded = SharedSubspace.from_pretrained(tmp_path / "tree")
    loaded.refit(**QUIET)
    assert loaded.state.lineage[-1]["from_originals"] == 1
    assert loaded.report().tasks[0].drift < 1e-5


def test_the_commit_is_found_below_a_folder_of_any_name(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, _ = small_lora(tmp_path / "lora", 0, 1.0)
    hub.api.create_repo("org/one")
    path = "snapshots/models--org--one/snapshots/one"
    commit = hub.api.upload_folder(repo_id="org/one", folder_path=folder, path_in_repo=path).oid
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "snapshots" / "cache"))
    made = SharedSubspace.from_adapters({"a": f"org/one:{path}"}, **QUIET)
    assert hub_originals(made.state.lineage)["a"]["commit"] == commit


class TestTwoWriters:
    @pytest.fixture
    def adapters(self, tmp_path: Path) -> dict[str, Path]:
        return {f"t{i}": small_lora(tmp_path / f"lora{i}", i, 1.0)[0] for i in range(4)}

    @pytest.fixture
    def tree(self, adapters: dict[str, Path], tmp_path: Path) -> Path:
        made = SharedSubspace.from_adapters({"t0": adapters["t0"]}, num_components=8, pseudo_rank=4, **QUIET)
        made.save_pretrained(tmp_path / "tree", keep_originals=True)
        return tmp_path / "tree"

    def test_the_folders_of_both_are_kept(self, adapters: dict[str, Path], tree: Path) -> None:
        ours, theirs = (SharedSubspace.from_pretrained(tree) for _ in range(2))
        ours.add_adapters({"t1": adapters["t1"]}, **QUIET)
        theirs.add_adapters({"t2": adapters["t2"]}, **QUIET)
        ours.save_pretrained(tree)
        theirs.save_pretrained(tree)
        theirs.save_pretrained(tree)
        assert read_originals(tree) == {t: LocalOriginal(str(adapters[t])) for t in ("t0", "t1", "t2")}
        SharedSubspace.from_pretrained(tree).refit(**QUIET)

    def test_a_task_that_the_other_replaced_is_not_that_of_our_folder(
        self, adapters: dict[str, Path], tree: Path
    ) -> None:
        ours, theirs = (SharedSubspace.from_pretrained(tree) for _ in range(2))
        theirs.replace_task("t0", adapters["t3"], **QUIET)
        ours.add_adapters({"t1": adapters["t1"]}, **QUIET)
        ours.update_from(theirs)
        check_original(ours.state, "t0", read_lora(adapters["t3"]).updates)
        ours.refit(**QUIET)  # otherwise it would look for t3 where t0 was
        assert ours.state.lineage[-1]["from_originals"] == 1

    @pytest.mark.parametrize("content", ['{"a": 1}', '{"a": {"component": "unet"}}', '{"a": {"place": 1}}'])
    def test_a_damaged_list_is_refused(self, content: str, tree: Path) -> None:
        originals_file(tree).write_text(content)
        with pytest.raises(ValueError, match="expected"):
            read_originals(tree)

    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        originals = {"a": LocalOriginal("/x/a"), "b": LocalOriginal("/x/b.safetensors", "unet")}
        write_originals(tmp_path / "tree", originals)
        assert read_originals(tmp_path / "tree") == originals
