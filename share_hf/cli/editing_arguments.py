"""Arguments of the commands that export and edit tasks. This module needs only the standard library."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def add_export(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `share-hf export`."""
    command.usage = f"{command.prog} [options] FOLDER_OR_REPO (TASK | --all | --weights TASK=W,…) OUT"
    command.add_argument("place", metavar="FOLDER_OR_REPO", help="Folder or Hub id of the subspace")
    command.add_argument("task", metavar="TASK", nargs="?", help="Task to export")
    command.add_argument("out", metavar="OUT", type=Path, help="Folder or file to write to")
    command.add_argument("--all", action="store_true", help="Export every task, each into OUT/TASK")
    command.add_argument(
        "--weights",
        type=task_weights,
        metavar="TASK=W,…",
        help="Export the weighted sum of these tasks as one LoRA, such as mrpc=0.5,sst2=0.5",
    )
    command.add_argument(
        "--rank", type=int, metavar="R", help="Largest rank of the sum in a layer (default: the pseudo rank p)"
    )
    command.add_argument(
        "--style", choices=("peft", "diffusers"), default="peft", help="Format of the LoRA (default: %(default)s)"
    )
    command.add_argument(
        "--component",
        metavar="NAME",
        help="Model of a diffusion pipeline that the task is for, such as unet, with --style diffusers",
    )
    command.add_argument(
        "--merge-into",
        metavar="BASE",
        help="Folder or Hub id of the base model; writes this model with the task or the sum merged into its weights",
    )
    of_gguf = command.add_argument_group("LoRAs for llama.cpp and Ollama").add_argument
    of_gguf("--gguf", action="store_true", help="Write a GGUF file OUT, or OUT/TASK.gguf for each task with --all")
    of_gguf(
        "--base-model",
        metavar="BASE",
        help="Folder or Hub id of the base model, of which config.json is read (default: the subspace's base model)",
    )
    of_gguf("--dtype", choices=("float32", "float16"), help="Type of the factors in the file (default: float32)")


def add_tolerance(command: argparse.ArgumentParser) -> None:
    """Add `--tolerance` to a command that adds tasks."""
    command.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help=(
            "Relative error up to which a new task is only projected onto the basis of a layer, which stays as it is; "
            "above that, the task is merged (default: merge in every layer)"
        ),
    )


def add_base_model(command: argparse.ArgumentParser, of: str = "all the adapters") -> None:
    """Add `--base-model` to a command whose inputs may name one base model differently."""
    command.add_argument("--base-model", metavar="ID", help=f"Base model of {of}, if they use several names for it")


def add_keeping(command: argparse.ArgumentParser) -> None:
    """Add `--history` and `--keep-originals` to a command that saves a subspace."""
    keep = command.add_argument_group("kept beside the folder and never pushed").add_argument
    keep(
        "--history",
        type=int,
        metavar="N",
        help="Number of earlier versions to keep from now on, for `share-hf undo` (default: as before, or none)",
    )
    keep("--keep-originals", action="store_true", help="Record where the adapters' folders are, for `share-hf refit`")


def add_refit(command: argparse.ArgumentParser, located_adapter: Callable[[str], tuple[str, str]]) -> None:
    """Add the arguments of `share-hf refit`."""
    command.add_argument("folder", metavar="FOLDER", type=Path, help="Folder of the subspace")
    command.add_argument(
        "originals",
        metavar="TASK=ADAPTER",
        nargs="*",
        type=located_adapter,
        help="Folder or Hub id of the adapter that a task came from, if it is unknown or has moved",
    )


def add_undo(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `share-hf undo`."""
    command.add_argument(
        "folder", metavar="FOLDER", type=Path, help="Folder of a subspace that was saved with --history"
    )


def add_remove(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `share-hf remove`."""
    command.add_argument("folder", metavar="FOLDER", type=Path, help="Folder of the subspace")
    command.add_argument("tasks", metavar="TASK", nargs="+", help="Tasks to remove")


def add_rename(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `share-hf rename`."""
    command.add_argument("folder", metavar="FOLDER", type=Path, help="Folder of the subspace")
    command.add_argument("task", metavar="TASK", help="The task")
    command.add_argument("new_name", metavar="NEW_NAME", help="New name of the task")


def add_replace(command: argparse.ArgumentParser, located_adapter: Callable[[str], tuple[str, str]]) -> None:
    """Add the arguments of `share-hf replace`."""
    command.add_argument("folder", metavar="FOLDER", type=Path, help="Folder of the subspace")
    command.add_argument(
        "adapter",
        metavar="TASK=ADAPTER",
        type=located_adapter,
        help="Task, and the folder or Hub id of the LoRA that replaces it",
    )
    add_tolerance(command)


def check_export(args: argparse.Namespace, command: argparse.ArgumentParser) -> None:
    """Exit with 2 if the options of `share-hf export` contradict each other."""
    if (args.task is not None) + args.all + (args.weights is not None) != 1:
        command.error("expected one TASK, or --all, or --weights")
    if args.merge_into is not None and args.all:
        command.error("--merge-into writes one model, expected one TASK or --weights with it")
    if args.merge_into is not None and (args.style != "peft" or args.component or args.rank):
        command.error("--merge-into writes a model, expected no --style, --component or --rank with it")
    if args.rank is not None and args.weights is None:
        command.error("--rank is the rank of the sum of --weights, expected both")
    if args.component is not None and args.style != "diffusers":
        command.error("--component is for --style diffusers, expected both")
    if args.gguf and (args.merge_into is not None or args.style != "peft"):
        command.error("--gguf writes another kind of file, expected no --merge-into or --style with it")
    if not args.gguf and (args.base_model or args.dtype):
        command.error(f"{'--base-model' if args.base_model else '--dtype'} is for --gguf, expected both")


def task_weights(text: str) -> dict[str, float]:
    """Parse weights by task, such as `mrpc=0.5,sst2=0.5`.

    Raises:
        argparse.ArgumentTypeError: If the text has another form.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        task, equals, weight = part.strip().partition("=")
        if not task or not equals or task in weights:
            raise argparse.ArgumentTypeError(f"{text!r} has {part!r}, expected each task once, as TASK=WEIGHT")
        try:
            weights[task] = float(weight)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: {weight!r} is not a number") from None
    return weights
