"""What a card says about how coefficients are stored: one line if it is unusual, and nothing otherwise."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest
from safetensors.torch import load_file

from share_hf import SharedSubspace


DTYPE, RANKS = "Coefficients are stored in", "In each layer, a task takes the smallest rank"


def card_of(loras: dict[str, Path], tree: Path, **options: object) -> str:
    subspace = SharedSubspace.from_adapters(loras, num_components=8, pseudo_rank=4, progress=False, **options)  # type: ignore[arg-type]
    subspace.save_pretrained(tree)
    return (tree / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("dtype", "told"), [("bfloat16", "bfloat16"), ("4bit", "4 bits")])
def test_a_card_names_the_type_of_the_coefficients(
    dtype: str, told: str, loras: dict[str, Path], tmp_path: Path
) -> None:
    card = card_of(loras, tmp_path / "tree", coefficient_dtype=dtype)
    assert f"\n{DTYPE} {told}; the drift above includes this rounding. Made with [share_hf]" in card
    assert RANKS not in card


def test_a_card_states_the_tolerance_and_the_mean_of_the_ranks(loras: dict[str, Path], tmp_path: Path) -> None:
    card = card_of(loras, tmp_path / "tree", tolerance=0.6)
    files = (tmp_path / "tree" / "tasks").glob("*/adapter_model.safetensors")
    ranks = [
        tensor.shape[1] for path in files for name, tensor in load_file(path).items() if "coefficients_in" in name
    ]
    assert 1 <= mean(ranks) < 4
    assert (
        f"\n{RANKS} that keeps its relative error under 0.6; the average rank is {mean(ranks):.2g}. Made with "
        "[share_hf]" in card
    )
    assert DTYPE not in card


def test_both_are_stated_and_neither_where_neither_is_used(loras: dict[str, Path], tmp_path: Path) -> None:
    both = card_of(loras, tmp_path / "both", tolerance=0.6, coefficient_dtype="4bit")
    assert both.index(RANKS) < both.index(DTYPE)
    usual = card_of(loras, tmp_path / "usual")
    assert "tasks of rank p = 4, basis `joint`. Made with [share_hf]" in usual
    assert DTYPE not in usual and RANKS not in usual
