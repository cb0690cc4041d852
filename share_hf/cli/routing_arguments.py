"""Arguments of the command that finds the tasks that texts belong to. This module needs only the standard library."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_route(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `share-hf route`."""
    command.add_argument("place", metavar="FOLDER_OR_REPO", help="Folder or Hub id of a subspace with routes")
    add = command.add_argument
    add(
        "--text",
        action="append",
        metavar="TEXT",
        help="Text to route; may be repeated. A tab separates the two texts of a pair",
    )
    add(
        "--file",
        type=Path,
        metavar="FILE",
        help="File with more texts, one per line. Without --text and --file, texts are read from stdin",
    )
    add(
        "--base-model",
        metavar="ID",
        help="Folder or Hub id of the base model (default: the one that the subspace names)",
    )
    add(
        "--max-length",
        type=int,
        metavar="N",
        help="Largest number of tokens of a text (default: as many as the model takes)",
    )
    add(
        "--false-rejects",
        type=float,
        default=0.01,
        metavar="X",
        help=(
            "Largest fraction of a task's own texts that may be assigned to no task; 0 assigns every text to a task "
            "(default: %(default)s)"
        ),
    )
    add("--revision", help="Revision of the repository: a task, a step, a branch, a tag or a commit")
