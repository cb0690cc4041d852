"""Random layers for property tests: shapes, settings and sequences of merges, including degenerate ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from share_hf.subspace import BasisKind, LayerSubspace, LowRankUpdate, SubspaceSettings


UpdateKind = Literal["random", "related", "duplicate columns", "zero columns", "combination", "zero"]
KINDS: tuple[UpdateKind, ...] = ("random", "related", "duplicate columns", "zero columns", "combination", "zero")


def examples(count: int) -> Callable[[Any], Any]:
    """Hypothesis settings for this folder: the same examples in every run, and no time limit on a busy machine."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


@dataclass(frozen=True)
class PlannedUpdate:
    """The properties of an update, without its numbers."""

    kind: UpdateKind
    rank: int
    exponent_out: float
    exponent_in: float


@dataclass(frozen=True)
class Stream:
    """A sequence of merges into one layer.

    Args:
        shape: Shape (n, d) of the layer.
        settings: Settings of every merge.
        plan: Updates of each merge.
        seed: Seed of the numbers in the updates.
    """

    shape: tuple[int, int]
    settings: SubspaceSettings
    plan: tuple[tuple[PlannedUpdate, ...], ...]
    seed: int

    def merges(self) -> list[dict[str, LowRankUpdate]]:
        """Return the updates of each merge by task name, in float64."""
        generator = torch.Generator().manual_seed(self.seed)
        common = [_normal(generator, features, 3) for features in self.shape]
        earlier: list[LowRankUpdate] = []
        merges = []
        for step, planned in enumerate(self.plan):
            updates = {}
            for j, plan in enumerate(planned):
                update = _update(generator, self.shape, plan, common, earlier)
                updates[f"task_{step}_{j}"] = update
                earlier.append(update)
            merges.append(updates)
        return merges

    def empty(self, dtype: torch.dtype = torch.float64) -> LayerSubspace:
        return LayerSubspace.empty(*self.shape, self.settings.pseudo_rank, dtype=dtype)


@st.composite
def streams(
    draw: st.DrawFn,
    basis: BasisKind = "joint",
    *,
    center: bool = False,
    kinds: tuple[UpdateKind, ...] = KINDS,
    largest_side: int = 40,
    most_merges: int = 5,
    largest_exponent: float = 3.0,
    wider_than_pseudo_rank: bool = True,
) -> Stream:
    """Streams whose updates have norms of about 10^(±2 `largest_exponent`)."""
    out_features, in_features = (draw(st.integers(2, largest_side)) for _ in range(2))
    num_components = draw(st.integers(1, min(out_features, in_features, 12)))
    pseudo_rank = draw(st.integers(1, min(num_components, 4)))
    exponents = st.floats(-largest_exponent, largest_exponent, width=16)
    update = st.builds(
        PlannedUpdate,
        kind=st.sampled_from(kinds),
        rank=st.integers(1, 6 if wider_than_pseudo_rank else pseudo_rank),
        exponent_out=exponents,
        exponent_in=exponents,
    )
    merge = st.lists(update, min_size=1, max_size=3).map(tuple)
    return Stream(
        (out_features, in_features),
        SubspaceSettings(num_components=num_components, pseudo_rank=pseudo_rank, basis=basis, center=center),
        tuple(draw(st.lists(merge, min_size=1, max_size=most_merges))),
        draw(st.integers(0, 2**31)),
    )


def random_update(
    generator: torch.Generator,
    shape: tuple[int, int],
    rank: int,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> LowRankUpdate:
    """Return an update with normally distributed factors."""
    out_factor, in_factor = (_normal(generator, features, rank) for features in shape)
    return LowRankUpdate((out_factor * scale).to(dtype), in_factor.to(dtype))


def dense_of(layer: LayerSubspace, task: str) -> Tensor:
    """Return the update (n, d) of a task as stored, in float64."""
    i = layer.index(task)
    out_factor = layer.basis_out.double() @ layer.coefficients_out[i].double()
    return out_factor @ (layer.basis_in.double() @ layer.coefficients_in[i].double()).T


def dense_learned(update: LowRankUpdate) -> Tensor:
    """Return the update (n, d) of an adapter, in float64."""
    return update.out_factor.double() @ update.in_factor.double().T


def _update(
    generator: torch.Generator,
    shape: tuple[int, int],
    plan: PlannedUpdate,
    common: list[Tensor],
    earlier: list[LowRankUpdate],
) -> LowRankUpdate:
    out_factor, in_factor = (_normal(generator, features, plan.rank) for features in shape)
    if plan.kind == "related":
        out_factor, in_factor = (
            side @ _normal(generator, side.shape[1], plan.rank) + 0.1 * noise
            for side, noise in zip(common, (out_factor, in_factor), strict=True)
        )
    elif plan.kind == "duplicate columns":
        out_factor = out_factor[:, :1].expand(-1, plan.rank)
    elif plan.kind == "zero columns":
        out_factor, in_factor = out_factor.clone(), in_factor.clone()
        out_factor[:, 1::2] = 0
        in_factor[:, 2::2] = 0
    elif plan.kind == "zero":
        out_factor = torch.zeros_like(out_factor)
    elif plan.kind == "combination" and earlier:
        sources = [earlier[-1], earlier[0]]
        out_factor, in_factor = (
            torch.cat([side / side.norm() if side.any() else side for side in sides], dim=1)
            for sides in ([u.out_factor for u in sources], [u.in_factor for u in sources])
        )
        mix_out, mix_in = (_normal(generator, out_factor.shape[1], plan.rank) for _ in range(2))
        out_factor, in_factor = out_factor @ mix_out, in_factor @ mix_in
    return LowRankUpdate(out_factor * 10**plan.exponent_out, in_factor * 10**plan.exponent_in)


def _normal(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)
