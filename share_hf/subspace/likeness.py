"""Search for adapters that are the same or nearly the same, by sketches of their updates and then by the updates.

A sketch is a random bilinear image of every update, ``Ω_out^T ΔW Ω_in``, summed over modules. The inner product of two
sketches approximates the inner product of the adapters to within a few percent. One Gram matrix of short vectors
therefore finds the adapters that may be alike, and only these are compared, each with one other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .factors import LowRankUpdate, product_norm


_SIDE = 32  # side of a sketch; the cosine of two sketches is off by about 2 / 32
_MAY_BE_ALIKE = 0.8  # cosine of two sketches above which their adapters are compared
NEAR = 0.95  # least cosine of two adapters that are nearly the same, such as two checkpoints of one run
SAME = 1e-4  # largest relative distance of two equal adapters; float16 rounding exceeds it, float32 is far below


@dataclass(frozen=True)
class Alike:
    """Two adapters that are the same or nearly the same.

    Args:
        task: Name of one adapter.
        other: Name of the adapter that came before it.
        cosine: Cosine ``⟨ΔW_1, ΔW_2⟩ / (‖ΔW_1‖ ‖ΔW_2‖)`` over all modules.
        distance: Relative distance ``‖ΔW_1 - ΔW_2‖ / max(‖ΔW_1‖, ‖ΔW_2‖)`` over all modules.
    """

    task: str
    other: str
    cosine: float
    distance: float

    @property
    def same(self) -> bool:
        """Whether the two are the same adapter."""
        return self.distance <= SAME


class UpdateSketches:
    """Sketches of many adapters, (32²,) float64 each, computed one module after another."""

    def __init__(self, tasks: Iterable[str]) -> None:
        self._sketches = {task: torch.zeros(_SIDE * _SIDE, dtype=torch.float64) for task in tasks}

    def add(self, images: Mapping[str, Tensor]) -> None:
        """Add the sketches of one module, as returned by `sketches_of`."""
        for task, image in images.items():
            self._sketches[task] += image

    def candidates(self) -> dict[str, str]:
        """Return the earlier task that each task is most like, for tasks that may be alike."""
        tasks = list(self._sketches)
        if len(tasks) < 2:
            return {}
        rows = torch.nn.functional.normalize(torch.stack([self._sketches[task] for task in tasks]), dim=1)
        cosines = (rows @ rows.T).tril(-1)
        # Take the first of equally near tasks, so that all copies of an adapter are compared with its first copy.
        best, _ = cosines.max(1, keepdim=True)
        nearest = (cosines >= best - 1e-6).int().argmax(1).tolist()
        pairs = [(i, j) for i, j in enumerate(nearest) if cosines[i, j] > _MAY_BE_ALIKE]
        return {tasks[i]: tasks[j] for i, j in pairs}


def sketches_of(module: str, updates: Mapping[str, LowRankUpdate]) -> dict[str, Tensor]:
    """Return ``Ω_out^T ΔW Ω_in`` (32²,) float64 of the updates of one module, by task."""
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
    """Return the candidates whose updates are the same or nearly the same.

    Args:
        candidates: Mapping of each task to the task that it is compared with.
        modules_of: Function that returns the updates of a task by module.
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
    """Return groups of tasks that are linked by pairs, each starting with the task that came first."""
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
    """Return the squared distance from the norm of one product; a difference of squares would lose half the digits."""
    return float(product_norm(torch.cat([first[0], second[0]], 1), torch.cat([first[1], -second[1]], 1)).square())
