"""Adapters that are not plain LoRAs of the subspace's model are refused with what was found, and change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, VeraConfig
from torch import Tensor
from transformers import PreTrainedModel

from share_hf import ShareConfig, SharedSubspace
from tests.tree_fixtures import SaveLora
from tests.trees import edit_json, edit_tensors, files_of, named, save_adapter


LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
LORA_B = LORA_A.replace("lora_A", "lora_B")


@pytest.fixture
def refused(subspace: SharedSubspace) -> Callable[..., None]:
    """Assert that an adapter is refused with a message, by an existing subspace and by a new one."""

    def check(folder: Path, message: str, name: str = "new") -> None:
        before = subspace.state
        files = files_of(folder) if folder.is_dir() else {}
        with pytest.raises(ValueError, match=message):
            subspace.add_adapters({name: folder}, progress=False)
        assert subspace.state is before
        with pytest.raises(ValueError, match=message):
            SharedSubspace.from_adapters({name: folder}, pseudo_rank=4, progress=False)
        assert (files_of(folder) if folder.is_dir() else {}) == files

    return check


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]), "'IA3'"),
        (VeraConfig(target_modules=["q_proj"], r=4), "'VERA'"),
        (ShareConfig(target_modules=["q_proj"], num_components=8, pseudo_rank=4), "'SHARE', expected 'LORA', export"),
    ],
    ids=["ia3", "vera", "share"],
)
def test_another_method_is_refused(
    config: Any,
    found: str,
    refused: Callable[..., None],
    tiny_model: Callable[[str], PreTrainedModel],
    tmp_path: Path,
) -> None:
    folder = save_adapter(named(tiny_model("llama")), tmp_path / "other", config, seed=0)
    refused(folder, f"adapter_config.json: peft_type is {found}")


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"alora_invocation_tokens": [5, 6]}, r"alora_invocation_tokens is \[5, 6\]"),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices is .*1, 2"),
        ({"layer_replication": [(0, 2), (1, 2)]}, r"layer_replication is \[\[0, 2\], \[1, 2\]\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_lora_that_is_more_than_an_update_of_linear_layers_is_refused(
    config: dict[str, Any], found: str, refused: Callable[..., None], save_lora: SaveLora
) -> None:
    refused(save_lora("special", **config), found)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_bias", True),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "OLoRA"),
        ("use_qalora", True),
        ("use_bdlora", {"target_modules_bd_a": ["q_proj"]}),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"beta": 1e-4}),
    ],
)
def test_a_configuration_that_says_so_is_refused_too(
    field: str, value: object, refused: Callable[..., None], save_lora: SaveLora
) -> None:
    folder = save_lora("special")
    edit_json(folder / "adapter_config.json", lambda config: config.update({field: value}))
    refused(folder, f"adapter_config.json: {field} is ")


@pytest.mark.parametrize("value", [None, "8", [8], "NaN"])
def test_a_scale_that_is_not_a_number_is_refused(
    value: object, refused: Callable[..., None], save_lora: SaveLora
) -> None:
    folder = save_lora("special")
    edit_json(folder / "adapter_config.json", lambda config: config.update(lora_alpha=value))
    refused(folder, "adapter_config.json: lora_alpha is .*, expected a number")
    edit_json(folder / "adapter_config.json", lambda config: config.update(lora_alpha=8, alpha_pattern={"q": value}))
    refused(folder, "adapter_config.json: q is .*, expected a number")


# ---- Weights --------------------------------------------------------------------------------------------------------


def _set(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def _with(entry: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor[0, -1] = entry
        return tensor

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(LORA_A), r"'model.layers.0.self_attn.q_proj' has no lora_A"),
        (lambda tensors: tensors.pop(LORA_B), r"'model.layers.0.self_attn.q_proj' has no lora_B"),
        (lambda tensors: tensors.clear(), "no lora_A and lora_B in it, expected a LoRA"),
        (lambda tensors: tensors.update(extra=torch.ones(2)), "unexpected tensor 'extra'"),
        (_set(LORA_A, lambda a: a[:-1]), r"lora_A and lora_B of .*q_proj' are \(3, 64\) and \(64, 4\)"),
        (_set(LORA_B, lambda b: b.flatten()), r"are \(4, 64\) and \(256,\)"),
        (_set(LORA_A, _with(float("nan"))), f"'{LORA_A}' has NaN or infinite entries"),
        (_set(LORA_B, _with(float("-inf"))), f"'{LORA_B}' has NaN or infinite entries"),
        (
            lambda tensors: tensors.update({LORA_A: torch.ones(0, 64), LORA_B: torch.ones(64, 0)}),
            r"are \(0, 64\) and \(64, 0\)",
        ),
    ],
    ids=["no-A", "no-B", "empty", "extra", "ranks-differ", "no-matrix", "nan", "inf", "rank-0"],
)
def test_weights_that_are_not_a_lora_are_refused(
    change: Callable[[dict[str, Tensor]], Any], message: str, refused: Callable[..., None], save_lora: SaveLora
) -> None:
    folder = save_lora("damaged")
    edit_tensors(folder / "adapter_model.safetensors", change)
    refused(folder, f"adapter_model.safetensors: .*{message}")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights_are_refused(keep: int, refused: Callable[..., None], save_lora: SaveLora) -> None:
    path = save_lora("damaged") / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(path.parent, "adapter_model.safetensors: not a readable safetensors file")


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_an_adapter_is_refused(
    missing: str, refused: Callable[..., None], save_lora: SaveLora
) -> None:
    folder = save_lora("half")
    (folder / missing).unlink()
    refused(folder, f"half: no {missing} in it")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"', "\x00", "[" * 100_000])
def test_a_configuration_that_is_not_a_json_object_is_refused(
    content: str, refused: Callable[..., None], save_lora: SaveLora
) -> None:
    folder = save_lora("damaged")
    (folder / "adapter_config.json").write_text(content)
    refused(folder, "adapter_config.json: (not valid JSON|holds a .*, expected a JSON object)")


@pytest.mark.parametrize("location", ["nowhere/at/all", Path("no/where"), "/absolute/nowhere"])
def test_a_folder_that_is_not_there_is_refused(location: str | Path, subspace: SharedSubspace) -> None:
    before = subspace.state
    with pytest.raises(ValueError, match=f"{location}: no such folder"):
        subspace.add_adapters({"new": location}, progress=False)
    assert subspace.state is before


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_trained_bias_is_refused(bias: str, refused: Callable[..., None], save_classifier: SaveLora) -> None:
    refused(save_classifier("biased", 2, bias=bias), f"since bias is '{bias}', expected 'none': a trained bias")


class _Print:
    """An object that runs something when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return print, ("unpickled",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": _Print()}, "not a file of tensors saved by torch"),
        ({"weight": [torch.ones(2)]}, "holds a dict, expected only tensors by name"),
        (torch.ones(2), "holds a Tensor, expected only tensors by name"),
        ({LORA_A: torch.tensor([[float("nan")]])}, "has NaN or infinite entries"),
        ({}, "no lora_A and lora_B in it, expected a LoRA"),
    ],
    ids=["code", "list", "no-dict", "nan", "empty"],
)
def test_pickled_weights_that_are_more_than_tensors_are_refused(
    content: object,
    message: str,
    refused: Callable[..., None],
    save_lora: SaveLora,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = save_lora("old")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(content, folder / "adapter_model.bin")
    refused(folder, f"adapter_model.bin: .*{message}")
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("classifier.bias", (3,), r"weight and bias of 'classifier' are \(2, 64\) and \(3,\)"),
        ("classifier.bias", (2, 1), r"weight and bias of 'classifier' are \(2, 64\) and \(2, 1\)"),
        ("classifier.weight", (0,), r"'classifier.weight' is \(0,\), expected weights: DeepSpeed and FSDP"),
    ],
)
def test_a_head_that_no_layer_can_have_is_refused(
    name: str, shape: tuple[int, ...], message: str, save_classifier: SaveLora
) -> None:
    folder = save_classifier("damaged", 2)
    key = f"base_model.model.{name}"
    edit_tensors(folder / "adapter_model.safetensors", lambda tensors: tensors.update({key: torch.ones(shape)}))
    with pytest.raises(ValueError, match=message):
        SharedSubspace.from_adapters([folder], pseudo_rank=4, progress=False)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("alpha_pattern", ["q_proj"], "alpha_pattern is .*, expected an object"),
        ("alpha_pattern", {"(": 3}, r"alpha_pattern is '\(', which is not a regular expression"),
        ("base_model_name_or_path", 5, "base_model_name_or_path is 5, expected text or null"),
        ("target_modules", [1], r"target_modules is \[1\], which is not valid there in a PEFT configuration"),
        ("task_type", "CHESS", "task_type is 'CHESS', which is not valid there in a PEFT configuration"),
    ],
)
def test_a_field_that_no_configuration_has_is_refused(
    field: str, value: object, message: str, refused: Callable[..., None], save_lora: SaveLora
) -> None:
    folder = save_lora("special")
    edit_json(folder / "adapter_config.json", lambda config: config.update({field: value}))
    refused(folder, f"adapter_config.json: {message}")


# ---- What does not fit together -------------------------------------------------------------------------------------


def test_an_adapter_of_other_shapes_is_refused_with_the_module(save_lora: SaveLora, subspace: SharedSubspace) -> None:
    folder = save_lora("wide")
    edit_tensors(folder / "adapter_model.safetensors", _set(LORA_A, lambda a: torch.ones(4, 65)))
    before = subspace.state
    with pytest.raises(ValueError, match=r"q_proj': the update of task 'wide' is \(64, 65\), the layer is \(64, 64\)"):
        subspace.add_adapters([folder], progress=False)
    assert subspace.state is before


def test_one_bad_adapter_among_good_ones_changes_nothing(
    save_lora: SaveLora, subspace: SharedSubspace, loras: dict[str, Path]
) -> None:
    before = subspace.state
    with pytest.raises(ValueError, match="use_dora is True"):
        subspace.add_adapters({"rte": loras["rte"], "dora": save_lora("dora", use_dora=True)}, progress=False)
    assert subspace.state is before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_components": 4, "pseudo_rank": 5}, "pseudo_rank is 5, expected at most num_components = 4"),
        ({"num_components": 0}, "num_components is 0, expected a positive integer"),
        ({"num_components": 2.5}, "num_components is 2.5, expected a positive integer"),
        ({"pseudo_rank": True}, "pseudo_rank is True, expected a positive integer"),
        ({"basis": "best"}, "basis is 'best', expected 'joint' or 'factor'"),
        ({"center": True}, "center=True needs basis='factor'"),
        ({"explained_variance": 1.5}, r"explained_variance is 1.5, expected a fraction in \(0, 1\]"),
        ({"drift_tolerance": 0.0}, "drift_tolerance is 0.0, expected a positive number"),
        ({"max_components": 8}, "max_components is 8, expected at least num_components = 32"),
    ],
)
def test_settings_that_no_layer_can_have_are_refused(
    settings: dict[str, Any], message: str, loras: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match=message):
        SharedSubspace.from_adapters(loras, progress=False, **settings)


def test_no_adapters_and_one_bare_folder_are_refused(loras: dict[str, Path]) -> None:
    for nothing in ([], {}, ()):
        with pytest.raises(ValueError, match="no adapters given, expected at least one"):
            SharedSubspace.from_adapters(nothing)
    with pytest.raises(ValueError, match="expected a list of folders or Hub ids, or a dict by task name"):
        SharedSubspace.from_adapters(str(loras["mrpc"]))


def test_folders_of_one_name_need_a_dict(loras: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="two adapters are called 'mrpc', expected a dict"):
        SharedSubspace.from_adapters([loras["mrpc"], loras["sst2"].parent / "mrpc"])


def test_a_large_configuration_is_refused_unread(
    refused: Callable[..., None], save_lora: SaveLora, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_lora("large")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "filler": "x" * 65 * 2**20}))
    monkeypatch.setattr(json, "loads", lambda text: pytest.fail("the file was parsed"))
    refused(folder, r"adapter_config.json: \d+ bytes, expected at most 67108864")


def test_an_adapter_without_damage_is_taken(save_lora: SaveLora, subspace: SharedSubspace) -> None:
    subspace.add_adapters([save_lora("good")], progress=False)
    assert subspace.tasks[-1] == "good"
