"""Groups of adapters that were trained from the same random A, found by the cosine of small sketches of A.

PEFT draws A at random, and A moves little in training, so adapters trained from the same seed look alike for a reason
unrelated to their tasks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .factors import LowRankUpdate
from .threads import for_each_module, tasks_by_module


SKETCH_BUCKETS = 512  # a power of two; the cosine of two sketches is off by about 1 / sqrt(512)
SAME_INITIALIZATION = 0.3  # about seven times that error

# Numbers of a sketch, as computed or as read from a file.
Numbers = Tensor | Sequence[float]


def initialization_sketch(updates: Mapping[str, LowRankUpdate]) -> Tensor:
    """Return the count-sketch of an adapter's A over all its modules, (512,) float32 of unit norm, or zero if A is.

    The place and the sign of an entry come from integer arithmetic on the name of the module and the position of the
    entry in A (r, d), counted row by row. They are the same on every machine, and for the leading rows of adapters of
    different ranks.

    Args:
        updates: Updates by module; A^T is the `in_factor`.
    """
    return initialization_sketches({"": updates})[""]


def initialization_sketches(adapters: Mapping[str, Mapping[str, LowRankUpdate]]) -> dict[str, Tensor]:
    """Return the `initialization_sketch` of each of many adapters, computed for one module after another."""
    by_module = tasks_by_module(adapters)
    sketches = torch.zeros(len(adapters), SKETCH_BUCKETS, dtype=torch.float64)
    positions = {task: i for i, task in enumerate(adapters)}

    def sketch(module: str) -> Tensor:
        return _module_sketches(module, [adapters[task] for task in by_module[module]])

    for tasks, of_module in zip(by_module.values(), for_each_module(sketch, by_module), strict=True):
        sketches[[positions[task] for task in tasks]] += of_module
    sketches /= sketches.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return dict(zip(adapters, sketches.float(), strict=True))


def _module_sketches(module: str, adapters: Sequence[Mapping[str, LowRankUpdate]]) -> Tensor:
    """Return count-sketches (adapters, 512) float64 of A in one module."""
    signed = torch.zeros(len(adapters), 2, SKETCH_BUCKETS, dtype=torch.float64)
    places = torch.zeros(0, dtype=torch.long)
    for sums, updates in zip(signed.flatten(1), adapters, strict=True):
        entries = updates[module].in_factor.detach().cpu().double().T.flatten()
        if len(entries) > len(places):
            hashes = entry_hashes(module, len(entries))
            # The first half takes the entries that are added, the second half the entries that are subtracted.
            places = hashes % SKETCH_BUCKETS + (1 - (hashes >> 32 & 1)) * SKETCH_BUCKETS
        sums.scatter_add_(0, places[: len(entries)], entries)
    return signed[:, 0] - signed[:, 1]


def group_by_initialization(
    sketches: Mapping[str, Numbers | None], threshold: float = SAME_INITIALIZATION
) -> tuple[tuple[str, ...], ...]:
    """Group tasks whose sketches have a cosine above `threshold` (single linkage), in the order given.

    Args:
        sketches: Result of `initialization_sketch` by task, possibly rounded in a file. A task without a sketch (None)
            is in no group.
        threshold: Cosine above which two tasks are linked. Two unrelated sketches reach 0.3 once in 10^11.
    """
    known = {
        task: torch.as_tensor(sketch, dtype=torch.float64, device="cpu")
        for task, sketch in sketches.items()
        if sketch is not None
    }
    if not known:
        return ()
    rows = torch.nn.functional.normalize(torch.stack(list(known.values())), dim=1)
    linked = rows @ rows.T > threshold
    names, left, groups = list(known), torch.ones(len(known), dtype=torch.bool), []
    while left.any():
        members = torch.zeros_like(left)
        members[left.nonzero()[0]] = True
        frontier = members
        while frontier.any():
            frontier = linked[frontier].any(0) & ~members
            members = members | frontier
        left &= ~members
        groups.append(tuple(names[i] for i in members.nonzero().flatten().tolist()))
    return tuple(groups)


def entry_hashes(module: str, count: int) -> Tensor:
    """Return hashes (count,) int64 of the places 0, 1, ... in a module, by splitmix64 seeded with its name."""
    seed = int.from_bytes(hashlib.sha256(module.encode()).digest()[:8], "little", signed=True)
    hashes = torch.arange(count) * -0x61C8864680B583EB + seed
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        logical_shift = (hashes >> shift) & ((1 << 64 - shift) - 1)
        hashes = (hashes ^ logical_shift) * factor
    return hashes
