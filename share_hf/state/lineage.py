"""The lineage of a subspace: one entry for each step that changed it, by which two writers know what they share.

An entry is JSON: what the step did (`merged`, `learned` or `removed`), and an `id` that stands for the step and all
before it. Where a task got another name, the entry has `removed` and `learned`, and both names in `renamed`. Where
all bases were fitted anew, it has the tasks in `refit`. Of tasks that came from adapters on the hub, `originals` has
repository, commit and checksum. Where tasks came from another lineage, `origins` has, by task, the ids of the steps
that they had there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor


Lineage = tuple[Mapping[str, Any], ...]


def extended(lineage: Lineage, coefficients: Iterable[Tensor], facts: Mapping[str, Any]) -> Lineage:
    """A lineage with one more entry.

    Args:
        lineage: Not changed.
        coefficients: What the step wrote: two steps of the same facts and other results are different steps.
        facts: What the step did, as JSON.
    """
    before = lineage[-1]["id"] if lineage else ""
    digest = hashlib.sha256(json.dumps([before, facts], sort_keys=True).encode())
    for side in coefficients:
        digest.update(side.float().cpu().contiguous().numpy().tobytes())
    return (*lineage, {**facts, "id": digest.hexdigest()[:16]})


def added_by(entry: Mapping[str, Any]) -> list[str]:
    """The tasks that a step added, or trained further."""
    return list(entry.get("merged", [])) + ([entry["learned"]] if "learned" in entry else [])


def shared_steps(first: Lineage, second: Lineage) -> int:
    """How many entries, from the beginning, two lineages have in common."""
    shared = 0
    for ours, theirs in zip(first, second, strict=False):
        if ours["id"] != theirs["id"]:
            break
        shared += 1
    return shared


def tasks_touched(lineage: Lineage) -> set[str]:
    """The tasks that some step added, trained further, or fitted anew."""
    return {task for entry in lineage for task in (*added_by(entry), *entry.get("refit", ()))}


def steps_of_tasks(lineage: Lineage) -> dict[str, list[str]]:
    """By task, the ids of the steps that added it or trained it further, in their order.

    A task that came from another lineage keeps the steps that it had there, by which its writer knows it again. Tasks
    that were removed since have theirs too.
    """
    steps: dict[str, list[str]] = {}
    for entry in lineage:
        origins = entry.get("origins", {})
        for task in added_by(entry):
            steps.setdefault(task, []).extend(origins.get(task, [entry["id"]]))
    return steps


def renamings(lineage: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """By name, the name that a task had before these steps, of those that were renamed and nothing else since."""
    before: dict[str, str] = {}
    for entry in lineage:
        if "renamed" in entry:
            old, new = entry["renamed"]
            before[new] = before.pop(old, old)
            continue
        for task in added_by(entry):
            before.pop(task, None)
        before.pop(entry.get("removed", ""), None)
    return before


def hub_originals(lineage: Lineage) -> dict[str, Mapping[str, Any]]:
    """By task, where on the hub the adapter is that it came from, as its step noted it.

    A task that was trained further since is no longer what that adapter is.
    """
    known: dict[str, Mapping[str, Any]] = {}
    for entry in lineage:
        if "renamed" in entry:
            old, new = entry["renamed"]
            known.pop(new, None)
            if old in known:
                known[new] = known.pop(old)
            continue
        for task in added_by(entry):
            known.pop(task, None)
        known.pop(entry.get("removed", ""), None)
        known |= entry.get("originals", {})
    return known


def step_tags(lineage: Iterable[Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, str]:
    """By task, the tag that stands for the state right after it was learned.

    Its number is how many tasks had been learned with it, those counted that were removed since. A task that got
    another name keeps its number.
    """
    count, numbers = 0, {}
    for entry in (*lineage, {"merged": tasks}):
        if "renamed" in entry and entry["renamed"][0] in numbers:
            numbers[entry["renamed"][1]] = numbers.pop(entry["renamed"][0])
            continue
        for name in added_by(entry):
            if name not in numbers:
                count += 1
                numbers[name] = count
        numbers.pop(entry.get("removed"), None)
    return {task: f"step-{numbers[task]:04d}-{task}" for task in tasks}
