"""Arguments of the commands that export and edit tasks. Needs the standard library alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def add_export(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `share-hf export`."""
    command.usage = f"{command.prog} [options] FOLDER_OR_REPO (TASK | --all | --weights TASK=W,…) OUT"
    command.add_argument("place", metavar="FOLDER_OR_REPO", help="A subspace: its folder or hub id")
    command.add_argument("task", metavar="TASK", nargs="?", help="The task to export")
    command.add_argument("out", metavar="OUT", type=Path, help="Where to write the LoRA, or the model")
    command.add_argument("--all", action="store_true", help="Export every task, each into OUT/<task>")
    command.add_argument(
        "--weights",
        type=task_weights,
        metavar="TASK=W,…",
        help="Export the weighted sum of tasks as one LoRA, such as mrpc=0.5,sst2=0.5",
    )
    command.add_argument("--rank", type=int, metavar="R", help="Of that sum; the pseudo rank p if not given")
    command.add_argument(
        "--style", choices=("peft", "diffusers"), default="peft", help="Names of the tensors (%(default)s)"
    )
    command.add_argument("--component", metavar="NAME", help="Model of a pipeline of diffusers, such as unet")
    command.add_argument("--merge-into", metavar="BASE", help="Write this base model with the task in its weights")


def add_tolerance(command: argparse.ArgumentParser) -> None:
    """Add `--tolerance`, of commands that add tasks."""
    command.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="Project on the bases that explain a new task but for this relative part; merge the others (merge all); "
        "ranks follow that of `init`",
    )


def add_keeping(command: argparse.ArgumentParser) -> None:
    """Add `--history` and `--keep-originals`, of commands that save a subspace."""
    keep = command.add_argument_group("kept beside the folder, and never pushed").add_argument
    keep("--history", type=int, metavar="N", help="Predecessors from now on, for `share-hf undo` (none, or as before)")
    keep("--keep-originals", action="store_true", help="Names of the adapters' folders, for `share-hf refit`")


def add_refit(command: argparse.ArgumentParser, located_adapter: Callable[[str], tuple[str, str]]) -> None:
    """Add the arguments of `share-hf refit`."""
    command.add_argument("folder", metavar="FOLDER", type=Path, help="Of the subspace")
    command.add_argument(
        "originals",
        metavar="TASK=ADAPTER",
        nargs="*",
        type=located_adapter,
        help="Folder or hub id of the adapter that a task came from, where it is not known or elsewhere by now",
    )


def add_undo(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `share-hf undo`."""
    command.add_argument("folder", metavar="FOLDER", type=Path, help="Of a subspace that was saved with --history")


def add_remove(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `share-hf remove`."""
    command.add_argument("folder", metavar="FOLDER", type=Path, help="Of the subspace")
    command.add_argument("tasks", metavar="TASK", nargs="+", help="The tasks to forget")


def add_rename(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `share-hf rename`."""
    command.add_argument("folder", metavar="FOLDER", type=Path, help="Of the subspace")
    command.add_argument("task", metavar="TASK", help="The task")
    command.add_argument("new_name", metavar="NEW_NAME", help="Its new name")


def add_replace(command: argparse.ArgumentParser, located_adapter: Callable[[str], tuple[str, str]]) -> None:
    """Add the arguments of `share-hf replace`."""
    command.add_argument("folder", metavar="FOLDER", type=Path, help="Of the subspace")
    command.add_argument(
        "adapter", metavar="TASK=ADAPTER", type=located_adapter, help="The task, and the folder or hub id of a LoRA"
    )
    add_tolerance(command)


def check_export(args: argparse.Namespace, command: argparse.ArgumentParser) -> None:
    """Exit with 2 where the options of `share-hf export` contradict each other."""
    if (args.task is not None) + args.all + (args.weights is not None) != 1:
        command.error("expected one TASK, or --all, or --weights")
    if args.merge_into is not None and args.all:
        command.error("--merge-into makes one model, expected one TASK or --weights with it")
    if args.merge_into is not None and (args.style != "peft" or args.component or args.rank):
        command.error("--merge-into writes a model, expected no --style, --component or --rank with it")
    if args.rank is not None and args.weights is None:
        command.error("--rank is of the sum that --weights makes, expected both")


def task_weights(text: str) -> dict[str, float]:
    """Weights by task, from `mrpc=0.5,sst2=0.5`.

    Raises:
        argparse.ArgumentTypeError: If it is something else.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        task, equals, weight = part.strip().partition("=")
        if not task or not equals or task in weights:
            raise argparse.ArgumentTypeError(f"{text!r} has {part!r}, expected each task once, as TASK=WEIGHT")
        try:
            weights[task] = float(weight)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: {weight!r} is no number") from None
    return weights
