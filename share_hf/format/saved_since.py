"""Merge what others have saved in a folder since a subspace last read or wrote it."""

from __future__ import annotations

from pathlib import Path

from ..state import Lineage, SubspaceState, reconcile
from .base_model import named_alike
from .index import INDEX_FILE, read_index
from .replacing import holds, reading_whole
from .tree import read_tree


def with_saved(state: SubspaceState, folder: Path, seen: Lineage | None) -> SubspaceState:
    """Return a state merged with what others have saved in a folder.

    Args:
        state: State that is about to be saved there.
        folder: Folder to save in, which need not exist.
        seen: Lineage that the folder is known to have had. None means that it is unknown and the folder is to be
            replaced.

    Raises:
        ValueError: If the two cannot be merged. The message names the folder.
    """
    if seen is None or not holds(folder, INDEX_FILE):
        return state
    found = reading_whole(folder, INDEX_FILE, read_index)
    if found.lineage == seen:
        return state
    try:
        return reconcile(*named_alike(state, read_tree(folder)))
    except ValueError as error:
        raise ValueError(
            f"{folder}: somebody else has saved there since, and the two versions cannot be merged: {error}; save to "
            "another folder, or load this one again"
        ) from error
