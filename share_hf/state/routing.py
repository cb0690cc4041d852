"""What a subspace knows of the inputs of its tasks, by which an input finds its task.

The means of a task's features are the task's own. The scatter that all share is a sum over tasks, of which the newest
parts are still told apart: two writers who began from one subspace know by that which parts both have, and each is
counted once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers.utils import logging

from ..subspace.discriminants import FeatureScatter, TaskFeatures


if TYPE_CHECKING:
    from .state import SubspaceState


logger = logging.get_logger(__name__)

# Parts of the scatter that are told apart; what two writers have learned since they were one is exact up to as many.
MOST_PARTS = 4
# Cosine of a probe's features in two copies of one model, at the least: quantized ones are off by a few percent.
_SAME_MODEL = 0.8


@dataclass(frozen=True)
class Router:
    """What all tasks of a subspace share for routing.

    Args:
        layers: Hidden states that features are of: 0 for the embeddings, i for what layer i puts out.
        probe: (m,) float32, the features of `PROBE`: another base model has others. None of a model without tokens.
        parts: Scatter of the tasks learned last, by its identity.
        settled: The sum of the scatter of all others; None before there is one.
        settled_identities: What is in that sum.
    """

    layers: tuple[int, ...]
    probe: Tensor | None = None
    parts: Mapping[str, FeatureScatter] = field(default_factory=dict)
    settled: FeatureScatter | None = None
    settled_identities: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """How many features an input has (m)."""
        known = self.settled or next(iter(self.parts.values()))
        return len(known.products)

    @property
    def scatter(self) -> FeatureScatter:
        """The scatter of all tasks learned so far, removed ones included."""
        settled = [] if self.settled is None else [self.settled]
        return reduce(add, [*settled, *self.parts.values()])

    def with_part(self, part: FeatureScatter) -> Router:
        """A router that has a task's scatter too, once."""
        identity = part.identity
        if identity in {*self.parts, *self.settled_identities}:
            return self
        return replace(self, parts={**self.parts, identity: part})._settled()

    def _settled(self) -> Router:
        """The same with no more parts than are told apart, the oldest taken into the sum."""
        excess = list(self.parts)[: max(0, len(self.parts) - MOST_PARTS)]
        if not excess:
            return self
        settled = [] if self.settled is None else [self.settled]
        return replace(
            self,
            parts={name: part for name, part in self.parts.items() if name not in excess},
            settled=reduce(add, [*settled, *(self.parts[name] for name in excess)]),
            settled_identities=(*self.settled_identities, *excess),
        )


def check_same_features(ours: Router, layers: tuple[int, ...], width: int, probe: Tensor | None, place: str) -> None:
    """Refuse features that a router's own cannot be compared with.

    Args:
        ours: The router.
        layers: The layers that they are of.
        width: How many they are.
        probe: Those of the probe.
        place: What has them, for messages.

    Raises:
        ValueError: If they are of another base model, or of other layers.
    """
    if (layers, width) != (ours.layers, ours.width):
        raise ValueError(
            f"{place} has {width} features of layers {list(layers)}, expected {ours.width} of {list(ours.layers)} as "
            "the router has: it was learned with another base model, or other layers"
        )
    if probe is None or ours.probe is None:
        return
    likeness = float(nn.functional.cosine_similarity(probe.cpu(), ours.probe, dim=0))
    if likeness < _SAME_MODEL:
        raise ValueError(
            f"{place} has features of cosine {likeness:.2f} with the router's for the same tokens, expected at least "
            f"{_SAME_MODEL}: the router was learned with another base model"
        )


def with_route(
    state: SubspaceState,
    task: str,
    features: TaskFeatures,
    scatter: FeatureScatter,
    *,
    layers: tuple[int, ...],
    probe: Tensor | None = None,
) -> SubspaceState:
    """A state whose router knows the inputs of one more task, or knows a task's anew.

    Args:
        state: Not changed.
        task: One of its tasks.
        features: What is kept of the task's texts.
        scatter: The part of the shared scatter that is theirs.
        layers: The layers that the features are of.
        probe: As of `Router`.

    Raises:
        ValueError: If the other tasks' features are of another base model, or of other layers.
    """
    router = state.router
    if router is None:
        router = Router(layers, probe)
    else:
        check_same_features(router, layers, len(scatter.products), probe, f"task {task!r}")
    routed = replace(
        state,
        tasks={**state.tasks, task: replace(state.tasks[task], route=features)},
        router=router.with_part(scatter),
    )
    return routed.with_step(routed=[task], scatter=scatter.identity)


def joined_router(ours: Router | None, theirs: Router | None) -> Router | None:
    """The router of two writers: whatever both have counts once.

    Raises:
        ValueError: If their features are of different base models, or of other layers.
    """
    if ours is None or theirs is None:
        return theirs or ours
    check_same_features(theirs, ours.layers, ours.width, ours.probe, "this subspace")
    first, second = (
        (theirs, ours) if len(theirs.settled_identities) >= len(ours.settled_identities) else (ours, theirs)
    )
    settled = set(first.settled_identities)
    if lost := set(second.settled_identities) - settled - first.parts.keys():
        logger.warning(
            "The scatter of %d tasks that only one side has can no longer be told apart from what both have, and is "
            "left out; their means stay.",
            len(lost),
        )
    parts = {name: part for name, part in {**theirs.parts, **ours.parts}.items() if name not in settled}
    return replace(first, parts=parts)._settled()


def with_routes_of(state: SubspaceState, ours: SubspaceState) -> SubspaceState:
    """A state of two writers that also has the routes of its tasks that only we have learned."""
    known = {task: info.route for task, info in ours.tasks.items() if info.route is not None}
    tasks = {
        task: replace(info, route=known[task]) if info.route is None and task in known else info
        for task, info in state.tasks.items()
    }
    return replace(state, tasks=tasks, router=joined_router(ours.router, state.router))
