"""Write a whole tree for people: with its model card and its figures."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..format.index import INDEX_FILE, NO_BRANCHES, BranchRecords, TreeIndex
from ..format.tree import CARD_FILE, FIGURES_FOLDER, writing_tree
from ..state import SubspaceState
from .card import CardOptions, read_card, write_card
from .figures import write_figures


def write_tree(
    state: SubspaceState,
    folder: Path,
    *,
    card: CardOptions | None = None,
    branches: BranchRecords = NO_BRANCHES,
    known: Mapping[str, str] | None = None,
    there: TreeIndex | None = None,
    draft: bool = False,
) -> dict[str, str]:
    """Write a whole tree; a crash writes none of it. Other files in the folder stay.

    Args:
        state: Subspace to write.
        folder: Folder to write to.
        card: Options for the model card. Its text outside the generated part is always kept.
        branches: Same as in `format.tree.write_root`.
        known: Checksums that an earlier call returned for this folder, if nobody else has written it since. Files that
            are there already are not written again.
        there: Same as in `format.tree.write_root`.
        draft: Whether to leave out the figures and the audit, which take longer than all the rest of a small tree.

    Returns:
        Checksums, by path, of all files that loading depends on.
    """
    card = card or CardOptions()
    if (folder / CARD_FILE).is_file() and (card.existing is None or (folder / INDEX_FILE).is_file()):
        if (folder / CARD_FILE).is_symlink():
            raise ValueError(
                f"{folder / CARD_FILE}: is a link to {os.readlink(folder / CARD_FILE)}, expected a file: the text of "
                "another file would be copied into the model card"
            )
        card = replace(card, existing=read_card(folder / CARD_FILE))
    if draft:
        card = replace(card, audit=())
    with writing_tree(state, folder, branches=branches, known=known, there=there) as writer:
        if not draft:
            write_figures(state, writer.scratch / FIGURES_FOLDER)
        write_card(state, writer.scratch, card)
    return writer.sha256
