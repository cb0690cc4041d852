"""Subspaces from plain LoRA adapters that PEFT wrote: made, extended, reported on, and truncated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from share_hf import SharedSubspace
from share_hf.subspace import DriftToleranceError
from tests.tree_fixtures import SaveLora
from tests.trees import assert_close, assert_same_state, delta_weights, edit_json, logits, plain_logits


VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "rank-1": {"r": 1, "lora_alpha": 3},
    "rslora": {"r": 6, "lora_alpha": 5, "use_rslora": True},
    "alpha-pattern": {"alpha_pattern": {"v_proj": 3, "layers.1.self_attn.q_proj": 32}},
    "rank-pattern": {"rank_pattern": {"q_proj": 2, "layers.0.self_attn.v_proj": 6}},
    "patterns-and-rslora": {"alpha_pattern": {"q": 9}, "rank_pattern": {"v_proj": 5}, "use_rslora": True},
    "other-modules": {"target_modules": ["k_proj", "down_proj", "q_proj"]},
    "some-layers": {"layers_to_transform": [1]},
    "regex": {"target_modules": r".*\.0\.mlp\.(up|gate)_proj"},
    "gaussian-but-trained": {"init_lora_weights": "gaussian"},
}


@pytest.fixture
def variants(save_lora: SaveLora) -> dict[str, Path]:
    """LoRAs of every kind that one subspace can mix."""
    return {name: save_lora(name, seed=i, **config) for i, (name, config) in enumerate(VARIANTS.items())}


@pytest.mark.parametrize("basis", ["joint", "factor"])
def test_adapters_of_any_rank_scale_and_target_come_back_as_peft_computes_them(
    basis: str, variants: dict[str, Path], tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    subspace = SharedSubspace.from_adapters(
        variants, num_components=32, pseudo_rank=6, basis=basis, drift_tolerance=1e-4, progress=False
    )
    assert subspace.tasks == tuple(VARIANTS)
    for task, folder in variants.items():
        expected = delta_weights(tiny_model("llama"), folder)
        stored = subspace.state.layers_of(task)
        assert stored.keys() == expected.keys()
        for module, layer in stored.items():
            assert_close(layer.update_of(task).dense(), expected[module])


def test_applied_tasks_compute_what_their_adapters_do_in_peft(
    variants: dict[str, Path], tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    subspace = SharedSubspace.from_adapters(
        variants, num_components=32, pseudo_rank=6, drift_tolerance=1e-4, progress=False
    )
    model = subspace.apply(tiny_model("llama"))
    for task, folder in variants.items():
        model.set_adapter(task)
        assert_close(logits(model), plain_logits(tiny_model("llama"), folder), tolerance=1e-4)


def test_a_list_of_folders_names_its_tasks_by_their_last_part(loras: dict[str, Path]) -> None:
    listed = SharedSubspace.from_adapters([str(loras["mrpc"]) + "/", loras["sst2"]], pseudo_rank=4, progress=False)
    by_name = SharedSubspace.from_adapters(
        {"mrpc": str(loras["mrpc"]), "sst2": loras["sst2"]}, pseudo_rank=4, progress=False
    )
    assert listed.tasks == ("mrpc", "sst2")
    assert_same_state(listed.state, by_name.state)


@pytest.mark.parametrize("progress", [True, False])
def test_a_person_sees_progress_unless_it_is_switched_off(
    progress: bool, loras: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    SharedSubspace.from_adapters(loras, pseudo_rank=4, progress=progress)
    shown = capfd.readouterr().err
    assert ("Reading adapters" in shown, "Merging" in shown) == (progress, progress)


def test_an_adapter_that_was_never_trained_has_no_weight_in_the_basis(
    save_lora: SaveLora, loras: dict[str, Path]
) -> None:
    fresh = save_lora("fresh", init_lora_weights=True)
    alone = SharedSubspace.from_adapters(loras, num_components=8, pseudo_rank=4, progress=False)
    beside = SharedSubspace.from_adapters({**loras, "fresh": fresh}, num_components=8, pseudo_rank=4, progress=False)
    for module, layer in beside.state.layers.items():
        assert torch.equal(layer.basis_out, alone.state.layers[module].basis_out)
        assert not layer.update_of("fresh").dense().any()
        assert float(layer.records.norms[layer.index("fresh")]) == 0
    assert beside.report().tasks[-1].drift == 0


def test_half_precision_adapters_are_read_as_they_are(
    loras: dict[str, Path], copy_of: Callable[[Path], Path], tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    folder = copy_of(loras["mrpc"])
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    subspace = SharedSubspace.from_adapters({"mrpc": folder}, num_components=8, pseudo_rank=4, progress=False)
    for module, update in delta_weights(tiny_model("llama"), folder).items():
        assert_close(subspace.state.layers[module].update_of("mrpc").dense(), update.float())


# ---- Merging --------------------------------------------------------------------------------------------------------


def test_adding_adapters_reports_the_drift_that_can_be_measured(
    loras: dict[str, Path], tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    subspace = SharedSubspace.from_adapters({"mrpc": loras["mrpc"]}, num_components=6, pseudo_rank=4, progress=False)
    before = {module: layer.update_of("mrpc").dense() for module, layer in subspace.state.layers.items()}
    report = subspace.add_adapters({"sst2": loras["sst2"], "rte": loras["rte"]}, progress=False)
    assert subspace.tasks == ("mrpc", "sst2", "rte")
    assert report.new_tasks == ("sst2", "rte")
    assert report.drift.keys() == {"mrpc", "sst2", "rte"}
    assert report.layers.keys() == before.keys()
    assert report.changed_layers == len(before)
    drifted = total = 0.0
    for module, update in before.items():
        change = subspace.state.layers[module].update_of("mrpc").dense() - update
        drifted, total = drifted + float(change.square().sum()), total + float(update.square().sum())
        assert report.layers[module].drift["mrpc"] == pytest.approx(float(change.norm() / update.norm()), rel=1e-3)
    assert report.drift["mrpc"] == pytest.approx((drifted / total) ** 0.5, rel=1e-3)
    assert report.max_drift == report.drift["mrpc"] > 0.05
    for module, update in delta_weights(tiny_model("llama"), loras["rte"]).items():
        error = (subspace.state.layers[module].update_of("rte").dense() - update).norm() / update.norm()
        assert report.layers[module].drift["rte"] == pytest.approx(float(error), rel=1e-3)


def test_an_adapter_that_the_basis_explains_leaves_the_basis_as_it_is(
    loras: dict[str, Path], copy_of: Callable[[Path], Path], subspace: SharedSubspace
) -> None:
    wide = SharedSubspace.from_adapters(loras, num_components=16, pseudo_rank=4, progress=False)
    before = wide.state
    again = copy_of(loras["mrpc"])
    edit_json(again / "adapter_config.json", lambda config: config.update(lora_alpha=3))
    report = wide.add_adapters({"again": again}, progress=False)
    assert report.changed_layers == 0
    assert report.max_drift == 0
    for module, layer in wide.state.layers.items():
        assert torch.equal(layer.basis_out, before.layers[module].basis_out)
        assert_close(layer.update_of("again").dense(), layer.update_of("mrpc").dense() * 3 / 8)


def test_adapters_given_at_once_or_one_by_one_are_recorded_in_the_lineage(
    loras: dict[str, Path], subspace: SharedSubspace
) -> None:
    at_once = SharedSubspace.from_adapters(loras, pseudo_rank=4, progress=False)
    assert [step["merged"] for step in at_once.state.lineage] == [["mrpc", "sst2", "rte"]]
    report = subspace.add_adapters({"rte": loras["rte"]}, progress=False)
    subspace.remove_task("mrpc")
    assert len({step["id"] for step in (*at_once.state.lineage, *subspace.state.lineage)}) == 5
    assert [step.get("merged") for step in subspace.state.lineage] == [["mrpc"], ["sst2"], ["rte"], None]
    assert subspace.state.lineage[2]["max_drift"] == pytest.approx(report.max_drift, rel=5e-3)
    assert subspace.state.lineage[3]["removed"] == "mrpc"


def test_layers_grow_to_meet_the_tolerated_drift(loras: dict[str, Path]) -> None:
    subspace = SharedSubspace.from_adapters(
        {"mrpc": loras["mrpc"]}, num_components=4, pseudo_rank=4, drift_tolerance=0.02, progress=False
    )
    report = subspace.add_adapters({name: loras[name] for name in ("sst2", "rte")}, progress=False)
    assert report.max_drift_bound <= 0.02
    assert subspace.report().num_components[1] > 4


def test_drift_that_cannot_be_met_leaves_the_subspace_as_it_was(loras: dict[str, Path]) -> None:
    subspace = SharedSubspace.from_adapters(
        {"mrpc": loras["mrpc"]},
        num_components=4,
        pseudo_rank=4,
        drift_tolerance=0.02,
        max_components=6,
        progress=False,
    )
    before = subspace.state
    with pytest.raises(DriftToleranceError, match=r"self_attn.*drift"):
        subspace.add_adapters({name: loras[name] for name in ("sst2", "rte")}, progress=False)
    assert subspace.state is before
    assert subspace.tasks == ("mrpc",)


def test_explained_variance_chooses_the_number_of_directions(loras: dict[str, Path]) -> None:
    largest = []
    for threshold in (0.3, 0.6, 0.95, 1.0):
        subspace = SharedSubspace.from_adapters(
            loras, num_components=16, pseudo_rank=4, explained_variance=threshold, progress=False
        )
        report = subspace.report()
        assert report.explained_variance >= threshold - 1e-6
        largest.append(report.num_components[1])
    assert largest == sorted(set(largest))
    assert largest[-1] == 12


# ---- Removing -------------------------------------------------------------------------------------------------------


def test_a_removed_task_is_gone_and_the_others_stay_to_the_bit(
    subspace: SharedSubspace, loras: dict[str, Path], tmp_path: Path
) -> None:
    before = subspace.state
    subspace.remove_task("mrpc")
    assert subspace.tasks == ("sst2",)
    for module, layer in subspace.state.layers.items():
        old = before.layers[module]
        assert layer.tasks == ("sst2",)
        assert layer.basis_out is old.basis_out
        assert torch.equal(layer.coefficients_out[0], old.coefficients_out[old.index("sst2")])
        assert layer.records.drift_bounds[0] == old.records.drift_bounds[old.index("sst2")]
    subspace.save_pretrained(tmp_path / "tree")
    assert not (tmp_path / "tree" / "tasks" / "mrpc").exists()
    subspace.add_adapters({"mrpc": loras["mrpc"]}, progress=False)
    assert subspace.tasks == ("sst2", "mrpc")


def test_the_last_task_can_be_removed_saved_loaded_and_replaced(
    subspace: SharedSubspace, loras: dict[str, Path], tmp_path: Path
) -> None:
    for task in subspace.tasks:
        subspace.remove_task(task)
    subspace.save_pretrained(tmp_path / "tree")
    assert not (tmp_path / "tree" / "adapter_model.safetensors").exists()
    loaded = SharedSubspace.from_pretrained(tmp_path / "tree")
    assert_same_state(loaded.state, subspace.state)
    assert loaded.report().tasks == ()
    loaded.add_adapters({"rte": loras["rte"]}, progress=False)
    assert loaded.tasks == ("rte",)


@pytest.mark.parametrize("method", ["remove_task", "export_lora", "apply"])
def test_an_unknown_task_is_refused_with_the_ones_there_are(
    method: str,
    subspace: SharedSubspace,
    tiny_model: Callable[[str], PreTrainedModel],
    tmp_path: Path,
) -> None:
    before = subspace.state
    calls = {
        "remove_task": lambda: subspace.remove_task("rte"),
        "export_lora": lambda: subspace.export_lora("rte", tmp_path / "out"),
        "apply": lambda: subspace.apply(tiny_model("llama"), ["mrpc", "rte"]),
    }
    with pytest.raises(ValueError, match=r"no task 'rte' in the subspace, it has \['mrpc', 'sst2'\]"):
        calls[method]()
    assert subspace.state is before
    assert not (tmp_path / "out").exists()


# ---- Reports --------------------------------------------------------------------------------------------------------


def test_a_report_counts_what_is_stored(subspace: SharedSubspace, tree: Path) -> None:
    report = subspace.report()
    assert (report.modules, report.num_components, report.pseudo_rank) == (4, (6, 6), 4)
    # q_proj is 64 x 64 and v_proj 32 x 64, in two layers; k = 6 on both sides and p = 4.
    assert report.basis_bytes == 4 * 2 * 6 * (64 + 64 + 32 + 64)
    assert [task.parameters for task in report.tasks] == [4 * 2 * 6 * 4] * 2
    assert [task.bytes for task in report.tasks] == [4 * 4 * 2 * 6 * 4] * 2
    assert report.lora_bytes == 2 * 4 * 2 * 4 * (64 + 64 + 32 + 64)
    assert 0.5 < report.explained_variance < 1
    assert [task.name for task in report.tasks] == ["mrpc", "sst2"]
    for task in report.tasks:
        assert 0 < task.drift <= task.drift_bound
        weights = load_file(tree / "tasks" / task.name / "adapter_model.safetensors")
        coefficients = [tensor for name, tensor in weights.items() if "_coefficients_" in name]
        assert sum(tensor.numel() for tensor in coefficients) == task.parameters
    basis = load_file(tree / "subspace.safetensors")
    columns = [tensor for name, tensor in basis.items() if name.endswith((".alpha", ".beta"))]
    assert sum(4 * tensor.numel() for tensor in columns) == report.basis_bytes


def test_a_report_counts_heads(save_classifier: SaveLora) -> None:
    folder = save_classifier("two", 2)
    report = SharedSubspace.from_adapters([folder], pseudo_rank=4, progress=False).report()
    assert report.tasks[0].bytes == 4 * report.tasks[0].parameters + 4 * (2 * 64 + 2)


def test_a_report_is_json(subspace: SharedSubspace) -> None:
    values = json.loads(json.dumps(subspace.report().to_dict()))
    assert [task["name"] for task in values["tasks"]] == ["mrpc", "sst2"]
    assert values["num_components"] == [6, 6]


def test_a_subspace_says_what_it_is(subspace: SharedSubspace) -> None:
    assert repr(subspace) == "SharedSubspace(2 tasks, 4 modules, k=6, p=4)"
    assert subspace.base_model_name_or_path == "org/tiny"
    assert subspace.settings.num_components == 6


# ---- Base models ----------------------------------------------------------------------------------------------------


def test_the_base_model_is_what_the_adapters_name(save_lora: SaveLora, loras: dict[str, Path]) -> None:
    unknown = save_lora("unknown", base="")
    subspace = SharedSubspace.from_adapters({"unknown": unknown}, pseudo_rank=4, progress=False)
    assert not subspace.base_model_name_or_path
    subspace.add_adapters({"mrpc": loras["mrpc"]}, progress=False)
    assert subspace.base_model_name_or_path == "org/tiny"
    first = SharedSubspace.from_adapters([unknown, loras["mrpc"]], pseudo_rank=4, progress=False)
    assert first.base_model_name_or_path == "org/tiny"


def test_an_adapter_of_another_base_model_is_refused(save_lora: SaveLora, subspace: SharedSubspace) -> None:
    other = save_lora("other", base="org/other")
    before = subspace.state
    with pytest.raises(ValueError, match="adapter 'other' belongs to base model 'org/other', expected 'org/tiny'"):
        subspace.add_adapters([other], progress=False)
    assert subspace.state is before


@pytest.mark.parametrize("order", [("unknown", "mine", "other"), ("mine", "unknown", "other"), ("mine", "other")])
def test_adapters_of_two_base_models_make_no_subspace(order: tuple[str, ...], save_lora: SaveLora) -> None:
    bases = {"unknown": "", "mine": "org/tiny", "other": "org/other"}
    adapters = {name: save_lora(name, base=bases[name]) for name in order}
    with pytest.raises(ValueError, match="adapter 'other' belongs to base model 'org/other', expected 'org/tiny'"):
        SharedSubspace.from_adapters(adapters, pseudo_rank=4, progress=False)


def test_k_and_p_are_chosen_for_a_target(
    variants: dict[str, Path], tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    subspace = SharedSubspace.from_adapters(
        variants, num_components="auto", pseudo_rank="auto", target_error=0.2, progress=False
    )
    chosen, settings = subspace.chosen, subspace.settings
    assert (chosen.num_components, chosen.pseudo_rank) == (settings.num_components, settings.pseudo_rank)
    expected = {task: delta_weights(tiny_model("llama"), folder) for task, folder in variants.items()}
    errors = [
        float((layer.update_of(task).dense() - expected[task][module]).norm() / expected[task][module].norm())
        for module, layer in subspace.state.layers.items()
        for task in layer.tasks
        if expected[task][module].any()
    ]
    assert sum(errors) / len(errors) <= 0.2
    report = subspace.report()
    assert report.basis_bytes + sum(task.bytes for task in report.tasks) == chosen.bytes


def test_nothing_is_read_for_a_target_that_says_nothing() -> None:
    with pytest.raises(ValueError, match="pseudo_rank 'auto' with no target, expected one of target_error and"):
        SharedSubspace.from_adapters(["nowhere"], pseudo_rank="auto")
    with pytest.raises(ValueError, match=r"num_components is 'auto' and explained_variance is 0\.9"):
        SharedSubspace.from_adapters(["nowhere"], num_components="auto", target_error=0.1, explained_variance=0.9)
