"""Loaders of PEFT and transformers beside a writer: they load one saved version, never a mixture, and never fail."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from share_hf import SharedSubspace
from share_hf.card import write_tree
from share_hf.state import SubspaceState
from share_hf.tuner import share_layers
from tests.hub_server.faults import Run
from tests.hub_server.fixtures import Hub
from tests.trees import leave_aside


REPO = "org/share-subspace"

Load = Callable[[PreTrainedModel, Path], nn.Module]


def by_from_pretrained(model: PreTrainedModel, tree: Path) -> nn.Module:
    return PeftModel.from_pretrained(model, tree, subfolder="tasks/mrpc", adapter_name="mrpc")


def by_load_adapter(model: PreTrainedModel, tree: Path) -> nn.Module:
    """The second adapter is loaded under an existing name, so that its basis replaces that of the first."""
    peft_model = by_from_pretrained(model, tree)
    peft_model.load_adapter(tree / "tasks" / "mrpc", "mrpc")
    return peft_model


def by_transformers(model: PreTrainedModel, tree: Path) -> nn.Module:
    model.load_adapter(str(tree), "mrpc", adapter_kwargs={"subfolder": "tasks/mrpc"})
    return model


LOADERS = pytest.mark.parametrize("load", [by_from_pretrained, by_load_adapter, by_transformers])


@pytest.fixture
def newer(subspace: SharedSubspace, loras: dict[str, Path]) -> SubspaceState:
    """The subspace of the tree after a merge that changed its bases."""
    extended = SharedSubspace(subspace.state)
    extended.add_adapters({"rte": loras["rte"]}, progress=False)
    return extended.state


def updates(model: nn.Module) -> dict[str, Tensor]:
    """Return dense updates (n, d) of the task, by module."""
    return {
        name: (layer.share_basis_out @ layer.share_coefficients_out["mrpc"])
        @ (layer.share_basis_in @ layer.share_coefficients_in["mrpc"]).T
        for name, layer in share_layers(model).items()
    }


def is_of(model: nn.Module, state: SubspaceState) -> bool:
    expected = {name: layer.update_of("mrpc").dense() for name, layer in state.layers_of("mrpc").items()}
    return all(torch.allclose(update, expected[name], atol=1e-6) for name, update in updates(model).items())


def _write_for_ever(states: tuple[SubspaceState, SubspaceState], folder: Path) -> None:
    while True:
        for state in states:
            write_tree(state, folder, draft=True)


@pytest.fixture
def busy_tree(subspace: SharedSubspace, newer: SubspaceState, tree: Path) -> Iterator[Path]:
    """A tree that another process saves all the time, in alternating versions."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("runs a forked copy of this process")
    writer = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=((newer, subspace.state), tree))
    writer.start()
    yield tree
    assert writer.is_alive()
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()


@LOADERS
def test_loads_beside_a_writer_are_of_one_version(
    load: Load,
    subspace: SharedSubspace,
    newer: SubspaceState,
    busy_tree: Path,
    tiny_model: Callable[[str], PreTrainedModel],
) -> None:
    base, versions = tiny_model("llama"), [0, 0]
    for _ in range(40):
        model = load(copy.deepcopy(base), busy_tree)
        found = [is_of(model, state) for state in (subspace.state, newer)]
        assert any(found)
        versions[found.index(True)] += 1
    assert all(versions)


@LOADERS
def test_a_tree_that_a_crash_left_aside_is_loaded(
    load: Load, subspace: SharedSubspace, tree: Path, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    leave_aside(tree)
    assert is_of(load(tiny_model("llama"), tree), subspace.state)
    assert not tree.exists()


@pytest.mark.parametrize("number", range(8))
def test_a_push_at_any_request_of_a_load_leaves_it_of_one_commit(
    number: int,
    subspace: SharedSubspace,
    newer: SubspaceState,
    hub: Hub,
    tmp_path: Path,
    tiny_model: Callable[[str], PreTrainedModel],
) -> None:
    subspace.push_to_hub(REPO)
    write_tree(newer, tmp_path / "newer", draft=True)
    requests = 0

    def nth(_: object) -> bool:
        nonlocal requests
        requests += 1
        return requests == number + 1

    hub.server.faults.add(nth, Run(lambda: HfApi().upload_folder(repo_id=REPO, folder_path=tmp_path / "newer")))
    model = PeftModel.from_pretrained(tiny_model("llama"), REPO, subfolder="tasks/mrpc", adapter_name="mrpc")
    assert requests > number
    assert is_of(model, subspace.state) or is_of(model, newer)
    assert SharedSubspace.from_pretrained(REPO).tasks == tuple(newer.tasks)
