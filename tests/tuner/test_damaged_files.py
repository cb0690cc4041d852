"""Folders that are not what they should be are refused by name, and the model is left unchanged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from share_hf.tuner import share_layers

from .cases import LLAMA, K, logits, snapshot, with_random_bases, with_tasks


Q_PROJ = "model.layers.0.self_attn.q_proj"
SUBSPACE = "subspace.safetensors"
INDEX = "share_config.json"


def edited(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return damage


def without_checksum(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    """Damage that only a comparison with the coefficients or the model can find."""

    def damage_both(file: Path) -> None:
        damage(file)
        (file.parent / INDEX).unlink()

    return damage_both


def put(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return edited(lambda tensors: tensors.update({name: value(tensors[name]).contiguous()}))


def with_nan(tensor: Tensor) -> Tensor:
    tensor[3, 1] = torch.nan
    return tensor


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def drop_module(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith(f"{Q_PROJ}.")]:
        del tensors[name]


# What is damaged, and what the error says. All but the last three can be seen in the file alone.
DAMAGES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "missing": (Path.unlink, [f"no {SUBSPACE} in this folder, its parent or its grandparent"]),
    "empty": (lambda file: file.write_bytes(b""), [SUBSPACE, "not a readable safetensors file"]),
    "truncated": (truncate, [SUBSPACE, "not a readable safetensors file"]),
    "not-safetensors": (lambda file: file.write_text("{}" * 99), [SUBSPACE, "not a readable safetensors file"]),
    "nan": (put(f"{Q_PROJ}.beta", with_nan), [SUBSPACE, f"'{Q_PROJ}.beta' has NaN", "expected finite numbers"]),
    "dtype": (
        put(f"{Q_PROJ}.alpha", Tensor.double),
        [SUBSPACE, f"'{Q_PROJ}.alpha' is torch.float64, expected torch.float32"],
    ),
    "flat": (
        put(f"{Q_PROJ}.beta", Tensor.flatten),
        [SUBSPACE, f"'{Q_PROJ}.beta' has shape (512,), expected a matrix"],
    ),
    "wide": (
        put(f"{Q_PROJ}.beta", lambda tensor: tensor.T),
        [SUBSPACE, f"'{Q_PROJ}.beta' has shape (8, 64), expected a matrix with no more columns than rows"],
    ),
    "columns": (
        put(f"{Q_PROJ}.alpha", lambda tensor: tensor[:, :-1]),
        [SUBSPACE, f"'{Q_PROJ}.spectrum_in' has shape (8,), expected (7,)"],
    ),
    "not-orthonormal": (
        put(f"{Q_PROJ}.beta", lambda tensor: tensor * 1.01),
        [SUBSPACE, f"columns of '{Q_PROJ}.beta' are not orthonormal"],
    ),
    "no-alpha": (
        edited(lambda tensors: tensors.pop(f"{Q_PROJ}.alpha")),
        [SUBSPACE, "expected"],
    ),
    "other-tensor": (
        edited(lambda tensors: tensors.update({"extra": torch.zeros(1)})),
        [SUBSPACE, "unexpected tensor 'extra'"],
    ),
    "checksum": (put(f"{Q_PROJ}.beta", torch.neg), [SUBSPACE, "sha256"]),
    "rows": (
        without_checksum(put(f"{Q_PROJ}.beta", lambda tensor: torch.linalg.qr(tensor[:-1]).Q)),
        [f"{Q_PROJ}.share_fingerprint' is", "the coefficients do not belong to the basis"],
    ),
    "other-basis": (
        without_checksum(put(f"{Q_PROJ}.beta", torch.neg)),
        [f"{Q_PROJ}.share_fingerprint' is", "the coefficients do not belong to the basis"],
    ),
    "no-module": (without_checksum(edited(drop_module)), [f"{Q_PROJ}.share_coefficients_in' belongs to none of the"]),
}


@pytest.fixture
def folder(tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path) -> Path:
    model = with_random_bases(with_tasks(tiny_model("llama"), LLAMA, "one", "two"))
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def assert_says(error: pytest.ExceptionInfo[ValueError], parts: list[str]) -> None:
    assert [part for part in parts if part not in str(error.value)] == [], str(error.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_first_task_with_a_damaged_basis_is_refused(
    damage: str, folder: Path, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    inflict, parts = DAMAGES[damage]
    inflict(folder / SUBSPACE)
    base = tiny_model("llama")
    before = snapshot(base)
    with pytest.raises(ValueError) as error:
        PeftModel.from_pretrained(base, folder / "one", adapter_name="one")
    assert_says(error, parts)
    assert snapshot(base) == before
    assert not share_layers(base)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_further_task_with_a_damaged_basis_is_refused_and_the_model_keeps_its_tasks(
    damage: str, is_trainable: bool, folder: Path, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    inflict, parts = DAMAGES[damage]
    model = PeftModel.from_pretrained(tiny_model("llama"), folder / "one", adapter_name="one", is_trainable=True)
    other = shutil.copytree(folder, tmp_path / "elsewhere" / "a" / "b")
    inflict(other / SUBSPACE)
    before, expected = snapshot(model), logits(model, LLAMA.batch())
    with pytest.raises(ValueError) as error:
        model.load_adapter(other / "two", "two", is_trainable=is_trainable)
    assert_says(error, parts)
    assert snapshot(model) == before
    assert torch.equal(logits(model, LLAMA.batch()), expected)
    model.load_adapter(folder / "two", "two")


def test_a_damaged_basis_is_refused_by_transformers_load_adapter_too(
    folder: Path, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    base = tiny_model("llama")
    base.load_adapter(str(folder / "one"), adapter_name="one")
    before = snapshot(base)
    put(f"{Q_PROJ}.beta", with_nan)(folder / SUBSPACE)
    with pytest.raises(ValueError, match=f"'{Q_PROJ}.beta' has NaN"):
        base.load_adapter(str(folder / "two"), adapter_name="two")
    assert snapshot(base) == before


def test_a_task_of_another_subspace_is_refused_with_what_to_do_instead(
    folder: Path, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    other = with_random_bases(with_tasks(tiny_model("llama"), LLAMA, "two"))
    other.save_pretrained(tmp_path / "other")
    model = PeftModel.from_pretrained(tiny_model("llama"), folder / "one", adapter_name="one")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"merge the two subspaces, or export the task as a LoRA and add it"):
        model.load_adapter(tmp_path / "other" / "two", "two")
    assert snapshot(model) == before


def test_a_subspace_of_a_model_of_another_size_is_refused(
    folder: Path, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    base = tiny_model("llama")
    for layer in base.model.layers:
        layer.self_attn.q_proj = torch.nn.Linear(64, 48)
    with pytest.raises(ValueError, match=rf"basis of '{Q_PROJ}' is for a layer of shape \(64, 64\), .* is \(48, 64\)"):
        PeftModel.from_pretrained(base, folder / "one")
    assert not share_layers(base)


def test_a_basis_smaller_than_the_cap_is_not_damage(
    tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "one")
    for layer in share_layers(model).values():
        layer.set_basis(layer.share_basis_out[:, : K - 2], layer.share_basis_in[:, : K - 1])
        layer.set_coefficients("one", torch.ones(K - 2, 4), torch.ones(K - 1, 4))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "one")
    assert torch.equal(logits(loaded, LLAMA.batch()), logits(model, LLAMA.batch()))
