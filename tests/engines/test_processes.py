"""What processes send each other: unchanged tensors, and only those that the others do not have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from share_hf.engines.processes import _put_together, _taken_apart
from share_hf.state import SubspaceState, TaskInfo, merge_tasks, without_task
from share_hf.subspace import LowRankUpdate, SubspaceSettings


def state_of(*tasks: str, features: int = 256) -> SubspaceState:
    state = SubspaceState(SubspaceSettings(num_components=16, pseudo_rank=4))
    for task in tasks:
        updates = {f"layer{i}": LowRankUpdate(torch.randn(features, 4), torch.randn(features, 4)) for i in range(3)}
        state, _ = merge_tasks(state, {task: updates}, {task: TaskInfo(head={"classifier.weight": torch.randn(3, 8)})})
    return state


def tensors_in(state: SubspaceState) -> Iterator[Tensor]:
    for layer in state.layers.values():
        yield from (layer.basis_out, layer.basis_in, layer.coefficients_out, layer.coefficients_in)
        yield from (layer.records.norms, layer.records.drift_bounds, layer.spectrum_out)
    for info in state.tasks.values():
        yield from info.head.values()


def test_a_state_comes_together_as_it_was() -> None:
    state = state_of("a", "b")
    content, tensors = _taken_apart(state)
    again = _put_together(content, [tensor.clone() for tensor in tensors])
    assert again.tasks.keys() == state.tasks.keys() and again.lineage == state.lineage
    for found, expected in zip(tensors_in(again), tensors_in(state), strict=True):
        assert torch.equal(found, expected) and found is not expected


def test_no_tensor_is_pickled() -> None:
    small, large = (_taken_apart(state_of("a", features=features))[0] for features in (64, 4096))
    assert len(large) <= len(small) + 64


def test_what_both_have_is_not_sent() -> None:
    before = state_of("a", "b")
    after = replace(without_task(before, "b"), base_model_name_or_path="org/model")
    shared = _taken_apart(before)[1]
    content, sent = _taken_apart(after, shared)
    bases = {id(basis) for layer in before.layers.values() for basis in (layer.basis_out, layer.basis_in)}
    assert not bases & {id(tensor) for tensor in sent}
    assert sum(tensor.nbytes for tensor in sent) < sum(tensor.nbytes for tensor in shared) / 10
    # The other process has copies of its own, in the same order.
    there = [tensor.clone() for tensor in shared]
    again = _put_together(content, there + sent)
    for module, layer in after.layers.items():
        assert torch.equal(again.layers[module].basis_out, layer.basis_out)
        assert torch.equal(again.layers[module].coefficients_out, layer.coefficients_out)
    assert {id(layer.basis_out) for layer in again.layers.values()} <= {id(tensor) for tensor in there}
