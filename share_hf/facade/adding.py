"""Adding new tasks from adapters that have been read."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers.utils import logging

from ..format.collection import Collection, Reading
from ..format.originals import LocalOriginal, split_places
from ..format.places import NamedPlaces
from ..state import SubspaceState, earlier_names, merge_tasks
from ..subspace import MergeReport


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Added:
    """Result of adding adapters to a state.

    Args:
        state: State with the new tasks.
        report: Drift of every task.
        folders: Original adapter of each new task whose adapter is on this machine.
        reading: Result of reading the adapters, including which of them the subspace already had.
    """

    state: SubspaceState
    report: MergeReport
    folders: dict[str, LocalOriginal]
    reading: Reading


def with_collection(
    state: SubspaceState,
    collection: Collection,
    named: NamedPlaces,
    *,
    tolerance: float | None = None,
    progress: bool = False,
) -> Added:
    """Return a state with the adapters of a collection merged into it.

    Args:
        state: State to merge into. It is not changed.
        collection: Adapters to merge.
        named: Places that the adapters were read from.
        tolerance: Same as in `merge_tasks`.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: As in `merge_tasks`, or if an adapter changed while it was read.
        DriftToleranceError: If the drift tolerance cannot be met.
    """
    on_hub, folders = split_places(named.places, collection.loras)
    merged, report = merge_tasks(
        state,
        collection.updates,
        collection.infos(),
        layouts=collection.layouts,
        originals=on_hub,
        tolerance=tolerance,
        progress=progress,
    )
    collection.expect_unchanged()
    known = Reading(known=earlier_names(merged, report.new_tasks))
    for line in known.lines():
        logger.warning(line)
    return Added(merged, report, folders, replace(collection.reading, known=known.known))
