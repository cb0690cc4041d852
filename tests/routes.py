"""Routes for tests that need no model, learned from made-up features."""

from __future__ import annotations

import torch
from torch import Tensor

from share_hf import SharedSubspace
from share_hf.state import SubspaceState, with_route
from share_hf.subspace.discriminants import FeatureSums


WIDTH, LAYERS = 6, (1, 2)
PROBE = torch.linspace(-1, 1, WIDTH)


def features(seed: int, count: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH, generator=generator) + 3 * torch.randn(WIDTH, generator=generator)


def routed(state: SubspaceState, task: str, seed: int, *, probe: Tensor = PROBE) -> SubspaceState:
    """Return the state with a route for a task."""
    sums = FeatureSums()
    sums.add(features(seed))
    return with_route(state, task, *sums.learned(), layers=LAYERS, probe=probe)


def learn(subspace: SharedSubspace, task: str, seed: int) -> None:
    """Learn a route in place."""
    subspace._held = routed(subspace.state, task, seed)


def scatter_of(state: SubspaceState) -> Tensor:
    return state.router.scatter.products


def assert_same_routes(found: SubspaceState, expected: SubspaceState) -> None:
    """Assert that routes are equal bit by bit."""
    assert found.router.layers == expected.router.layers
    assert torch.equal(found.router.probe, expected.router.probe)
    assert torch.equal(scatter_of(found), scatter_of(expected))
    assert found.router.scatter.degrees == expected.router.scatter.degrees
    known = {task: info.route for task, info in expected.tasks.items() if info.route is not None}
    assert [task for task, info in found.tasks.items() if info.route is not None] == list(known)
    for task, route in known.items():
        of = found.tasks[task].route
        assert of.measured == route.measured
        for name in ("mean", "variances", "distances"):
            assert torch.equal(getattr(of, name), getattr(route, name)), name
