"""Knowledge of a subspace about the inputs of its tasks, which routes an input to its task.

Each task keeps the means of its own features. The shared scatter is a sum over tasks, whose newest parts are kept
separate. From these, two writers who started from one subspace see which parts both have, and each part counts once.
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

# Number of parts of the scatter that are kept separate. Joining two writers is exact for up to this many tasks that
# they learned since they split.
MOST_PARTS = 4
# Least cosine of the features of a probe in two copies of one model. Quantized copies are off by a few percent.
_SAME_MODEL = 0.8


@dataclass(frozen=True)
class Router:
    """Data that all tasks of a subspace share for routing.

    Args:
        layers: Hidden states that features are taken from: 0 for the embeddings, i for the output of layer i.
        probe: (m,) float32, features of `PROBE`, which differ for another base model. None for a model without tokens.
        parts: Scatter of the tasks learned last, by its identity.
        settled: Sum of the scatter of all other tasks; None if there are none yet.
        settled_identities: Identities of the scatter in that sum.
    """

    layers: tuple[int, ...]
    probe: Tensor | None = None
    parts: Mapping[str, FeatureScatter] = field(default_factory=dict)
    settled: FeatureScatter | None = None
    settled_identities: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Number of features m of an input."""
        known = self.settled or next(iter(self.parts.values()))
        return len(known.products)

    @property
    def scatter(self) -> FeatureScatter:
        """Scatter of all tasks learned so far, including removed ones."""
        settled = [] if self.settled is None else [self.settled]
        return reduce(add, [*settled, *self.parts.values()])

    def with_part(self, part: FeatureScatter) -> Router:
        """Return a router that includes the scatter of a task exactly once."""
        identity = part.identity
        if identity in {*self.parts, *self.settled_identities}:
            return self
        return replace(self, parts={**self.parts, identity: part})._settled()

    def _settled(self) -> Router:
        """Return the router with at most `MOST_PARTS` separate parts, and the oldest ones moved into the sum."""
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
    """Check that features can be compared with the features of a router.

    Args:
        ours: Router to compare with.
        layers: Layers that the features are taken from.
        width: Number of features.
        probe: Features of the probe, or None.
        place: Description of where the features come from, for messages.

    Raises:
        ValueError: If the features come from another base model or other layers.
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
    """Return a state whose router has learned the inputs of one more task, or relearned those of a known one.

    Args:
        state: State that holds the task; not changed.
        task: Name of the task.
        features: Statistics of the features of the task's inputs.
        scatter: Scatter of the task, which is added to the shared one.
        layers: Layers that the features are taken from.
        probe: Features of the probe. See `Router`.

    Raises:
        ValueError: If the features of the other tasks come from another base model or other layers.
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
    """Join the routers of two writers, counting once whatever both have.

    Raises:
        ValueError: If their features come from different base models or different layers.
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
            "The scatter of %d tasks that only one side has can no longer be separated from what both have, so it is "
            "left out; their means stay.",
            len(lost),
        )
    parts = {name: part for name, part in {**theirs.parts, **ours.parts}.items() if name not in settled}
    return replace(first, parts=parts)._settled()


def with_routes_of(state: SubspaceState, ours: SubspaceState) -> SubspaceState:
    """Add to the joint state of two writers the routes of its tasks that only we have learned."""
    known = {task: info.route for task, info in ours.tasks.items() if info.route is not None}
    tasks = {
        task: replace(info, route=known[task]) if info.route is None and task in known else info
        for task, info in state.tasks.items()
    }
    return replace(state, tasks=tasks, router=joined_router(ours.router, state.router))
