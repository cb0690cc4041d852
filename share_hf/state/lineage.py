"""The lineage of a subspace: one entry for each step that changed it, from which two writers see what they share.

An entry is JSON. It holds what the step did (`merged`, `learned` or `removed`), and an `id` that stands for the step
and all steps before it. If a task was renamed, the entry has `removed` and `learned`, and both names in `renamed`. If
all bases were fitted anew, it has the tasks in `refit`. For tasks that came from adapters on the Hub, `originals` has
repository, commit and checksum. For tasks that came from another lineage, `origins` has the ids of the steps that each
task had there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor


Lineage = tuple[Mapping[str, Any], ...]


def extended(lineage: Lineage, coefficients: Iterable[Tensor], facts: Mapping[str, Any]) -> Lineage:
    """Return a lineage with one more entry.

    Args:
        lineage: Lineage before the step; not changed.
        coefficients: Coefficients that the step wrote. Two steps with the same facts but different results are
            different steps.
        facts: Description of the step, as JSON.
    """
    before = lineage[-1]["id"] if lineage else ""
    digest = hashlib.sha256(json.dumps([before, facts], sort_keys=True).encode())
    for side in coefficients:
        digest.update(side.float().cpu().contiguous().numpy().tobytes())
    return (*lineage, {**facts, "id": digest.hexdigest()[:16]})


def added_by(entry: Mapping[str, Any]) -> list[str]:
    """Return the tasks that a step added or trained further."""
    return list(entry.get("merged", [])) + ([entry["learned"]] if "learned" in entry else [])


def shared_steps(first: Lineage, second: Lineage) -> int:
    """Return the number of entries, from the beginning, that two lineages have in common."""
    shared = 0
    for ours, theirs in zip(first, second, strict=False):
        if ours["id"] != theirs["id"]:
            break
        shared += 1
    return shared


def tasks_touched(lineage: Lineage) -> set[str]:
    """Return the tasks that some step added, trained further, or fitted anew."""
    return {task for entry in lineage for task in (*added_by(entry), *entry.get("refit", ()))}


def steps_of_tasks(lineage: Lineage) -> dict[str, list[str]]:
    """Return the ids of the steps that added each task or trained it further, in order.

    A task that came from another lineage keeps the steps that it had there, so its writer can recognize it. Tasks that
    have been removed since are included.
    """
    steps: dict[str, list[str]] = {}
    for entry in lineage:
        origins = entry.get("origins", {})
        for task in added_by(entry):
            steps.setdefault(task, []).extend(origins.get(task, [entry["id"]]))
    return steps


def renamings(lineage: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Map the names of renamed tasks to their names before these steps, for tasks that were not changed otherwise."""
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
    """Return the adapter on the Hub that each task came from, as recorded by its step.

    Tasks that have been trained further since are left out, because they no longer match that adapter.
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
    """Return the tag of the state right after each task was learned.

    The number in the tag counts the tasks learned so far, including the task itself and tasks that have been removed
    since. A renamed task keeps its number.
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
