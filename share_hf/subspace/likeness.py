"""Which adapters are the same, or nearly: found by a sketch of their updates, told by the updates themselves.

A sketch is a random bilinear image of every update, ``Ω_out^T ΔW Ω_in``, summed over modules; the inner product of two
is that of the adapters, off by a few percent. So one Gram matrix of short vectors finds who may be alike, and only
those are compared, each with one other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .factors import LowRankUpdate, product_norm


_SIDE = 32  # of a sketch; the cosine of two is off by about 2 / 32
_MAY_BE_ALIKE = 0.8  # of sketches
NEAR = 0.95  # cosine of two adapters that are nearly the same, such as two checkpoints of one run
SAME = 1e-4  # relative distance of two that are the same; rounding in float16 is over it, in float32 far below


@dataclass(frozen=True)
class Alike:
    """Two adapters that are the same, or nearly.

    Args:
        task: One of them.
        other: The one that came before it.
        cosine: ``⟨ΔW_1, ΔW_2⟩ / (‖ΔW_1‖ ‖ΔW_2‖)`` over all modules.
        distance: ``‖ΔW_1 - ΔW_2‖ / max(‖ΔW_1‖, ‖ΔW_2‖)``.
    """

    task: str
    other: str
    cosine: float
    distance: float

    @property
    def same(self) -> bool:
        """Whether they are one adapter."""
        return self.distance <= SAME


class UpdateSketches:
    """Sketches of many adapters, made one module after another: (32²,) float64 numbers an adapter."""

    def __init__(self, tasks: Iterable[str]) -> None:
        self._sketches = {task: torch.zeros(_SIDE * _SIDE, dtype=torch.float64) for task in tasks}

    def add(self, images: Mapping[str, Tensor]) -> None:
        """Add the `sketches_of` one module."""
        for task, image in images.items():
            self._sketches[task] += image

    def candidates(self) -> dict[str, str]:
        """By task, the earlier one that it is most like, where they may be alike."""
        tasks = list(self._sketches)
        if len(tasks) < 2:
            return {}
        rows = torch.nn.functional.normalize(torch.stack([self._sketches[task] for task in tasks]), dim=1)
        cosines = (rows @ rows.T).tril(-1)
        # The first of those that are as near: all copies of an adapter are compared with the first of them.
        best, _ = cosines.max(1, keepdim=True)
        nearest = (cosines >= best - 1e-6).int().argmax(1).tolist()
        pairs = [(i, j) for i, j in enumerate(nearest) if cosines[i, j] > _MAY_BE_ALIKE]
        return {tasks[i]: tasks[j] for i, j in pairs}


def sketches_of(module: str, updates: Mapping[str, LowRankUpdate]) -> dict[str, Tensor]:
    """``Ω_out^T ΔW Ω_in`` (32²,) float64 of the updates of one module, by task."""
    if not updates:
        return {}
    n, d = next(iter(updates.values())).shape
    seed = int.from_bytes(hashlib.sha256(module.encode()).digest()[:4], "little")
    generator = torch.Generator().manual_seed(seed)
    out, in_ = (torch.randn(_SIDE, side, generator=generator) / _SIDE**0.5 for side in (n, d))
    images = {}
    for task, update in updates.items():
        sides = (update.out_factor.detach().cpu().float(), update.in_factor.detach().cpu().float())
        images[task] = ((out @ sides[0]).double() @ (in_ @ sides[1]).double().T).flatten()
    return images


def alike(
    candidates: Mapping[str, str],
    modules_of: Callable[[str], Mapping[str, LowRankUpdate]],
) -> tuple[Alike, ...]:
    """Those of the candidates that are the same or nearly, by their updates.

    Args:
        candidates: Task -> the one it is compared with.
        modules_of: The updates of a task by module.
    """
    found = []
    for task, other in candidates.items():
        ours, theirs = modules_of(task), modules_of(other)
        inner = ours_squared = theirs_squared = apart = 0.0
        for module in ours.keys() | theirs.keys():
            pair = [_factors(of[module]) if module in of else None for of in (ours, theirs)]
            if pair[0] is not None:
                ours_squared += _inner(pair[0], pair[0])
            if pair[1] is not None:
                theirs_squared += _inner(pair[1], pair[1])
            if pair[0] is not None and pair[1] is not None:
                inner += _inner(pair[0], pair[1])
                apart += _distance_squared(pair[0], pair[1])
            else:
                apart += _inner(*(2 * [pair[0] if pair[0] is not None else pair[1]]))
        largest = max(ours_squared, theirs_squared)
        if not ours_squared or not theirs_squared:
            continue
        compared = Alike(task, other, inner / (ours_squared * theirs_squared) ** 0.5, (apart / largest) ** 0.5)
        if compared.same or compared.cosine >= NEAR:
            found.append(compared)
    return tuple(found)


def groups_of(pairs: Sequence[Alike]) -> tuple[tuple[str, ...], ...]:
    """Tasks that are linked by pairs, a tuple a group, each with the one that came first at its beginning."""
    first: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    for pair in pairs:
        root = first.get(pair.other, pair.other)
        first[pair.task] = root
        groups.setdefault(root, [root]).append(pair.task)
    return tuple(map(tuple, groups.values()))


def _factors(update: LowRankUpdate) -> tuple[Tensor, Tensor]:
    return update.out_factor.detach().cpu().double(), update.in_factor.detach().cpu().double()


def _inner(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    return float(((first[0].T @ second[0]) * (first[1].T @ second[1])).sum())


def _distance_squared(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """The squared distance as the norm of one product: a difference of squares would lose half the digits."""
    return float(product_norm(torch.cat([first[0], second[0]], 1), torch.cat([first[1], -second[1]], 1)).square())
