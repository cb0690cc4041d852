"""Plain LoRA adapters on disk, and trees made from them."""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from share_hf import SharedSubspace
from share_hf.state import SubspaceState
from tests.trees import BASE_NAME, BERT_LORA, bert_with_labels, lora_config, named, save_adapter


SaveLora = Callable[..., Path]


@pytest.fixture(autouse=True)
def without_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide matplotlib, which takes most of the time of a save, unless a test asks for it."""
    if "with_figures" not in request.fixturenames:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


@pytest.fixture
def with_figures() -> None:
    """Draw figures, in the tests that are about them."""


@pytest.fixture
def save_lora(tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path) -> SaveLora:
    """Write a plain LoRA of the tiny Llama, and return its folder."""

    def save(name: str = "lora", *, seed: int = 0, base: str = BASE_NAME, **config: Any) -> Path:
        folder = tmp_path / "adapters" / name
        return save_adapter(named(tiny_model("llama"), base), folder, lora_config(**config), seed)

    return save


@pytest.fixture
def save_classifier(tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path) -> SaveLora:
    """Write a plain LoRA of the tiny BERT with a head for a number of labels, and return its folder."""

    def save(name: str, num_labels: int, *, seed: int = 0, **config: Any) -> Path:
        model = named(bert_with_labels(tiny_model("bert"), num_labels))
        return save_adapter(model, tmp_path / "adapters" / name, lora_config(**{**BERT_LORA, **config}), seed)

    return save


@pytest.fixture(scope="session")
def loras(pristine_models: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three LoRAs of the tiny Llama by task name, which differ in everything but their targets."""
    root = tmp_path_factory.mktemp("loras")
    return {
        name: save_adapter(named(copy.deepcopy(pristine_models["llama"])), root / name, lora_config(), seed)
        for seed, name in enumerate(("mrpc", "sst2", "rte"))
    }


@pytest.fixture(scope="session")
def saved(loras: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[SubspaceState, Path]:
    """A subspace of two tasks that has seen more directions than it keeps, and a merge; and its tree."""
    made = SharedSubspace.from_adapters({"mrpc": loras["mrpc"]}, num_components=6, pseudo_rank=4, progress=False)
    made.add_adapters({"sst2": loras["sst2"]}, progress=False)
    folder = tmp_path_factory.mktemp("saved") / "tree"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        made.save_pretrained(folder)
    return made.state, folder


@pytest.fixture
def subspace(saved: tuple[SubspaceState, Path]) -> SharedSubspace:
    """The subspace of two tasks."""
    return SharedSubspace(saved[0])


@pytest.fixture
def tree(saved: tuple[SubspaceState, Path], tmp_path: Path) -> Path:
    """The subspace on disk, which a test may change."""
    return Path(shutil.copytree(saved[1], tmp_path / "tree"))


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Make a separate copy of a folder."""

    def copied(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / f"copy-of-{folder.name}"))

    return copied
