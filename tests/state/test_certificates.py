"""Bounds hold for what a subspace stores, whatever was done to its tasks, in any order and with any settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from share_hf.state import (
    SubspaceState,
    TaskInfo,
    merge_tasks,
    reconcile,
    refitted,
    renamed_task,
    with_learned_coefficients,
    without_task,
)
from share_hf.subspace import LayerSubspace, LowRankUpdate, SubspaceSettings

from ..subspace.streams import examples


SHAPES = {"m0": (20, 14), "m1": (3, 17)}
STEPS = ("add", "add many", "project", "learn", "rename", "remove", "refit", "partial refit", "other writer")


@dataclass
class Known:
    """What each task was learned as.

    Args:
        updates: Updates by task and module, of the tasks that came as adapters.
        dense: Dense updates by task and module, in float64.
    """

    updates: dict[str, dict[str, LowRankUpdate]] = field(default_factory=dict)
    dense: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class History:
    """A subspace that goes through random steps, and what is known about its tasks."""

    def __init__(self, settings: SubspaceSettings, seed: int) -> None:
        self.state, self.known, self.count = SubspaceState(settings=settings), Known(), 0
        self.generator = torch.Generator().manual_seed(seed)
        self.common = {m: [self.normal(n, 4) for n in shape] for m, shape in SHAPES.items()}
        self.state = self.added(self.state, 2)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def adapter(self) -> dict[str, LowRankUpdate]:
        rank = int(torch.randint(1, 6, (), generator=self.generator))
        scale = 10 ** float(self.normal())
        updates = {}
        for module, (n, d) in SHAPES.items():
            near = [common @ self.normal(4, rank) for common in self.common[module]]
            decay = 0.6 ** torch.arange(rank, dtype=torch.float64)
            out = scale * (near[0] + 0.3 * self.normal(n, rank)) * decay
            updates[module] = LowRankUpdate(out, near[1] + 0.3 * self.normal(d, rank))
        return updates

    def added(self, state: SubspaceState, count: int, tolerance: float | None = None) -> SubspaceState:
        new = {f"t{self.count + i}": self.adapter() for i in range(count)}
        self.count += count
        self.known.updates |= new
        self.known.dense |= {
            task: {module: update.dense() for module, update in updates.items()} for task, updates in new.items()
        }
        return merge_tasks(state, new, {task: TaskInfo() for task in new}, tolerance=tolerance)[0]

    def learned(self, state: SubspaceState) -> SubspaceState:
        task, p = f"t{self.count}", state.settings.pseudo_rank
        self.count += 1
        coefficients, self.known.dense[task] = {}, {}
        for module, layer in state.layers.items():
            out, in_ = (self.normal(k, min(p, layer.pseudo_rank)).float() for k in layer.num_components)
            coefficients[module] = out, in_
            bases = layer.basis_out.double(), layer.basis_in.double()
            self.known.dense[task][module] = (bases[0] @ out.double()) @ (bases[1] @ in_.double()).T
        return with_learned_coefficients(state, {task: coefficients}, {task: TaskInfo()})

    def renamed(self, state: SubspaceState) -> SubspaceState:
        old, new = next(iter(state.tasks)), f"t{self.count}"
        self.count += 1
        for of in (self.known.updates, self.known.dense):
            if old in of:
                of[new] = of[old]
        return renamed_task(state, old, new)

    def do(self, step: str) -> None:
        state, updates = self.state, self.known.updates
        originals = {task: updates[task] for task in state.tasks if task in updates}
        if step == "add":
            self.state = self.added(state, 1)
        elif step == "add many":
            self.state = self.added(state, 40)
        elif step == "project":
            self.state = self.added(state, 2, tolerance=0.9)
        elif step == "learn":
            self.state = self.learned(state)
        elif step == "rename":
            self.state = self.renamed(state)
        elif step == "remove":
            self.state = without_task(state, next(reversed(state.tasks))) if len(state.tasks) > 1 else state
        elif step == "refit":
            self.state, _ = refitted(state, originals)
        elif step == "partial refit":
            self.state, _ = refitted(state, dict(list(originals.items())[::2]))
        else:
            self.state = reconcile(self.learned(self.added(state, 1)), self.renamed(self.added(state, 2)))

    def check(self) -> None:
        for module, layer in self.state.layers.items():
            for i, task in enumerate(layer.tasks):
                norm, bound = float(layer.records.norms[i]), float(layer.records.drift_bounds[i])
                true = self.known.dense[task][module]
                assert norm == pytest.approx(float(true.norm()), rel=1e-6)
                change = float((layer.update_of(task, torch.float64).dense() - true).norm())
                assert change <= bound * norm + 1e-12 * norm, (task, module, change / norm, bound)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "4bit"])
@pytest.mark.parametrize("basis", ["joint", "factor"])
@examples(15)
@given(
    steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=5),
    tolerance=st.none() | st.floats(0.0, 0.6),
    seed=st.integers(0, 2**31),
)
def test_bounds_hold_after_any_steps(
    basis: str, dtype: str, steps: list[str], tolerance: float | None, seed: int
) -> None:
    settings = SubspaceSettings(
        num_components=6, pseudo_rank=4, basis=basis, coefficient_dtype=dtype, tolerance=tolerance
    )
    history = History(settings, seed)
    history.check()
    for step in steps:
        history.do(step)
        history.check()


def ranks_of(layer: LayerSubspace) -> Iterator[tuple[str, int]]:
    return zip(layer.tasks, layer.ranks.tolist(), strict=True)


def test_a_tolerated_rank_is_not_cut_again_by_a_refit_of_others() -> None:
    history = History(SubspaceSettings(num_components=8, pseudo_rank=4, tolerance=0.5), 0)
    for _ in range(3):
        before = {
            m: dict(zip(layer.tasks, layer.ranks.tolist(), strict=True)) for m, layer in history.state.layers.items()
        }
        history.do("partial refit")
        for module, layer in history.state.layers.items():
            ranks = dict(zip(layer.tasks, layer.ranks.tolist(), strict=True))
            assert ranks == before[module]
        history.check()
    assert min(rank for ranks in before.values() for rank in ranks.values()) < 4
