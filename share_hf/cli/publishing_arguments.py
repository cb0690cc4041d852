"""Arguments of the commands that exchange a subspace with the Hub. This module needs only the standard library."""

from __future__ import annotations

import argparse
from pathlib import Path

from .editing_arguments import add_base_model


def add_push(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `share-hf push`."""
    command.add_argument("folder", metavar="FOLDER", type=Path, help="Folder of the subspace")
    command.add_argument("repo_id", metavar="REPO_ID", help="Id of the repository, which is created if needed")
    add_base_model(command, "both sides")
    access = command.add_mutually_exclusive_group()
    access.add_argument("--private", action="store_true", default=None, help="Make a newly created repository private")
    access.add_argument(
        "--public",
        dest="private",
        action="store_false",
        default=None,
        help="Make a newly created repository public",
    )
    add = command.add_argument
    add("--create-pr", action="store_true", help="Open a pull request instead of pushing to main")
    add("-m", "--commit-message", metavar="TEXT", help="Message of the commit on main (default: names of new tasks)")
    add("--commit-description", metavar="TEXT", help="Description of the commit on main")
    add("--default-task", metavar="TASK", help="Task whose LoRA is at the root (default: as before, or the newest)")
    add(
        "--branches",
        action="append",
        metavar="WHICH",
        help="Tasks that get a branch: all, new, none, or the name of a task; may be repeated with more names "
        "(default: all, if there are at most 100)",
    )
    add(
        "--branch-tolerance",
        type=float,
        default=0.05,
        metavar="X",
        help="Drift above which the branch of a task is written again (default: %(default)s)",
    )
    add("--card-template", type=Path, metavar="FILE", help="Jinja template to use for the model card")
    add(
        "--max-attempts",
        type=int,
        default=50,
        metavar="N",
        help="Number of attempts while others push at the same time (default: %(default)s)",
    )


def add_pull(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `share-hf pull`."""
    command.add_argument("repo_id", metavar="REPO_ID", help="Id of the repository")
    command.add_argument(
        "folder", metavar="FOLDER", type=Path, help="Folder of the subspace, or a new folder to write it to"
    )
    command.add_argument("--revision", help="Revision of the repository: a task, a step, a branch, a tag or a commit")
    add_base_model(command, "both sides")
