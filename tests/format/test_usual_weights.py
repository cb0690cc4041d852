"""Files of weights whose contents are known from their bytes, for which no other file is mistaken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load, save

from share_hf import SharedSubspace
from share_hf.format.basis_file import SUBSPACE_FILE, read_bases
from share_hf.format.index import read_index
from share_hf.format.lora import PEFT_PREFIX
from share_hf.format.usual_weights import UsualWeights
from tests.trees import assert_same_state, sign_anew


@pytest.fixture
def content(tree: Path) -> bytes:
    return (tree / "tasks" / "mrpc" / SAFETENSORS_WEIGHTS_NAME).read_bytes()


@pytest.fixture
def usual(tree: Path) -> UsualWeights:
    """The file of a task of the tree that adapts all modules."""
    index = read_index(tree)
    endings = ("share_coefficients_out", "share_coefficients_in", "share_fingerprint")
    names = {module: tuple(f"{PEFT_PREFIX}{module}.{ending}" for ending in endings) for module in index.modules}
    assert UsualWeights.exist_in(index)
    return UsualWeights(names, index, read_bases(tree / SUBSPACE_FILE))


def test_the_coefficients_are_those_that_safetensors_reads(usual: UsualWeights, content: bytes) -> None:
    tensors = load(content)
    found = usual.coefficients_in(content)
    assert usual.size == len(content)
    assert len(found) * 3 == len(tensors)
    for module, sides in found.items():
        for name, side in zip(("out", "in"), sides, strict=True):
            expected = tensors[f"{PEFT_PREFIX}{module}.share_coefficients_{name}"]
            assert torch.equal(torch.from_numpy(side), expected)


def test_the_coefficients_do_not_hold_the_file(usual: UsualWeights, content: bytes) -> None:
    for sides in usual.coefficients_in(content).values():
        assert all(side.flags.writeable for side in sides)


def test_another_byte_anywhere_but_in_the_numbers_is_another_file(usual: UsualWeights, content: bytes) -> None:
    tensors = load(content)
    numbers = sum(tensor.nbytes for tensor in tensors.values() if tensor.dtype == torch.float32)
    start = 8 + int.from_bytes(content[:8], "little")
    places = [*range(start), *range(start + numbers, len(content))]
    assert len(content) - len(places) == numbers
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1
        assert usual.coefficients_in(bytes(changed)) is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_makes_it_another_file(usual: UsualWeights, content: bytes, value: float) -> None:
    start = 8 + int.from_bytes(content[:8], "little")
    changed = bytearray(content)
    changed[start + 8 : start + 12] = np.float32(value).tobytes()
    assert usual.coefficients_in(bytes(changed)) is None


def test_large_numbers_are_finite(usual: UsualWeights, content: bytes) -> None:
    tensors = {name: tensor.clone() for name, tensor in load(content).items()}
    for tensor in tensors.values():
        if tensor.dtype == torch.float32:
            tensor.fill_(3e38)
    found = usual.coefficients_in(save(dict(sorted(tensors.items())), {"format": "pt"}))
    assert all((side == np.float32(3e38)).all() for sides in found.values() for side in sides)


@pytest.mark.parametrize("change", ["cut", "longer", "a head", "a name", "no metadata", "half precision"])
def test_a_file_that_holds_something_else_is_another_file(usual: UsualWeights, content: bytes, change: str) -> None:
    tensors = load(content)
    first = next(iter(tensors))
    changed = {
        "cut": lambda: content[:-1],
        "longer": lambda: content + b"\0",
        "a head": lambda: save({**tensors, f"{PEFT_PREFIX}head": torch.ones(2)}, {"format": "pt"}),
        "a name": lambda: content.replace(first.encode(), first[:-1].encode() + b"_"),
        "no metadata": lambda: save(tensors),
        "half precision": lambda: save({name: tensor.half() for name, tensor in tensors.items()}, {"format": "pt"}),
    }[change]()
    assert changed != content
    assert usual.coefficients_in(changed) is None


def test_a_file_that_another_writer_laid_out_is_read_all_the_same(tree: Path, content: bytes) -> None:
    """The file has no metadata, and is signed like the tree's own."""
    expected = SharedSubspace.from_pretrained(tree).state
    (tree / "tasks" / "mrpc" / SAFETENSORS_WEIGHTS_NAME).write_bytes(save(load(content)))
    sign_anew(tree, f"tasks/mrpc/{SAFETENSORS_WEIGHTS_NAME}")
    assert_same_state(SharedSubspace.from_pretrained(tree).state, expected)
