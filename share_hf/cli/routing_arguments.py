"""Arguments of the command that finds the tasks that texts belong to. This module needs only the standard library."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_route(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `share-hf route`."""
    command.add_argument("place", metavar="FOLDER_OR_REPO", help="A subspace with routes: its folder or hub id")
    add = command.add_argument
    add("--text", action="append", metavar="TEXT", help="A text; may be given again. A tab is between two of a pair")
    add(
        "--file",
        type=Path,
        metavar="FILE",
        help="File of more texts, one a line, as of --text; lines on stdin if neither is given",
    )
    add("--base-model", metavar="ID", help="Folder or hub id of the base model (as the subspace has it)")
    add("--max-length", type=int, metavar="N", help="Most tokens of a text (as many as the model takes)")
    add(
        "--false-rejects",
        type=float,
        default=0.01,
        metavar="X",
        help="Fraction of a task's own texts that may be said to be of none, at most; 0 for no such answer "
        "(%(default)s)",
    )
    add("--revision", help="Revision of the repository: a task, a step, a branch, a tag or a commit")
