"""The command line `share-hf`: its arguments, its output and its exit codes.

This module needs only the standard library, and is also installed under the name `share_hf_cli`: `import share_hf`
waits for torch and PEFT, and `share-hf --help` should not.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from .argument_types import number_or_auto, relative_error, size_in_bytes
from .completing import complete
from .editing_arguments import (
    add_base_model,
    add_export,
    add_keeping,
    add_refit,
    add_remove,
    add_rename,
    add_replace,
    add_tolerance,
    add_undo,
    check_export,
)
from .publishing_arguments import add_pull, add_push
from .routing_arguments import add_route


FAILED, INTERRUPTED = 1, 130
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a quota, a limit on the size of files

# Commands that the processes of a launcher run together; the first process runs the others alone.
DIVIDED = ("init", "add", "refit")

Commands = dict[str, argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Name and arguments of the command. None means those of the process.

    Returns:
        Exit code: 0 on success, 1 if the command failed, 130 if it was interrupted. Wrong arguments exit with 2. Under
        a launcher, only the first process prints.
    """
    complete(build_parser)
    args = parse(sys.argv[1:] if argv is None else argv)
    if not is_first() and args.command not in DIVIDED:
        return 0
    debug = args.debug or os.environ.get("SHARE_HF_DEBUG", "0") not in ("", "0")
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            if not debug:
                warnings.simplefilter("ignore")
                # Both warn when they are imported, and DeepSpeed resets the level of its logger.
                logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
                logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
            if args.command == "env":
                from . import environment

                outcome = environment.env()
            else:
                from . import commands  # torch and all

                outcome = commands.run(args, debug=debug)
    except KeyboardInterrupt:
        return _fail("interrupted; run the command again", INTERRUPTED, as_json=args.json)
    except Exception as error:
        if debug:
            traceback.print_exc()
        message = _told(error)
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            message += "; nothing has changed, so free some space there and run the command again"
        return _fail(message, FAILED, as_json=args.json)
    if is_first():
        _print(json.dumps(outcome.facts, indent=2) if args.json else outcome.text)
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of a command, whose options may be anywhere among them. Exit with 2 if they are wrong."""
    parser, commands = build_parser()
    if not argv or argv[0] not in commands:
        return parser.parse_args(argv or ["--help"])
    try:
        args = commands[argv[0]].parse_intermixed_args(argv[1:])
    except AttributeError as error:
        # If it is interrupted, argparse fails to restore the state that it has not saved yet.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    if args.command == "export":
        check_export(args, commands["export"])
    if "from_file" in args and not (args.adapters or args.from_file):
        commands[args.command].error("expected an ADAPTER, or --from-file")
    if args.command == "audit":
        _check_audit(args, commands["audit"])
    return args


def build_parser() -> tuple[argparse.ArgumentParser, Commands]:
    """Build the parser, and the parsers of the commands by name."""
    parser = _Parser(
        prog="share-hf",
        description="Store many LoRA adapters of one base model as one shared subspace and a few kilobytes per task.",
        epilog="`share-hf COMMAND --help` shows its options and an example. Exit codes: 0 on success, 1 on failure, "
        "2 on wrong arguments, 130 on Ctrl-C.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="Show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (summary, example, add_arguments) in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary}.",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.set_defaults(command=name)
        add_arguments(command)
        _add_common(command)
    return parser, commands.choices


def located_adapter(text: str) -> tuple[str, str]:
    """Return name and place of an adapter, from `name=place` or from a place whose last part is the name."""
    name, equals, place = text.partition("=")
    if not equals or "/" in name or Path(text).is_dir():
        name, place = Path(text).name, text
    return name, os.path.expanduser(place)


def _check_audit(args: argparse.Namespace, command: argparse.ArgumentParser) -> None:
    """Exit with 2 if one subspace is given with an option for LoRAs; for LoRAs, fill in the default of k."""
    if len(args.adapters) == 1 and args.from_file is None:
        for_loras = ("num_components", "skip_bad", "component", "base_model")
        if given := [f"--{name.replace('_', '-')}" for name in for_loras if getattr(args, name)]:
            command.error(f"{given[0]} is for LoRAs, expected two or more LoRAs, or one subspace without this option")
    elif args.num_components is None:
        args.num_components = 32


class _Parser(argparse.ArgumentParser):
    """Parser that suggests what a mistyped command or option may have been."""

    def error(self, message: str) -> NoReturn:
        if found := re.search(r"invalid choice: '?([\w-]+)|unrecognized arguments: (--[\w-]+)", message):
            choices = re.findall(r"[\w-]+", message.partition("choose from")[2])
            known = choices or re.findall(r"--[a-z-]+", self.format_help())
            if near := difflib.get_close_matches(found[1] or found[2], known, n=1):
                message += f", did you mean {near[0]}?"
        super().error(message)


class _Version(argparse.Action):
    """Action that looks up the version only on request."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        try:
            version = metadata.version("share-hf")
        except metadata.PackageNotFoundError:  # `python -m share_hf.cli` where nothing is installed
            from share_hf import __version__ as version
        print(f"share-hf {version}")
        parser.exit()


def _add_common(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("options of every command")
    group.add_argument("--token", help="User access token for the Hub (default: that of `hf auth login`)")
    group.add_argument("--json", action="store_true", help="Print JSON, and nothing else, on stdout")
    group.add_argument("--quiet", action="store_true", help="Show no progress bars")
    group.add_argument("--debug", action="store_true", help="Show warnings and tracebacks, as SHARE_HF_DEBUG=1 does")


def _add_adapters(
    command: argparse.ArgumentParser,
    help: str = "A LoRA, as name=place, or as a place whose last part is the name. A place is a folder, a file of "
    "weights, or org/repo@revision:subfolder",
) -> None:
    command.add_argument("adapters", metavar="ADAPTER", nargs="*", type=located_adapter, help=help)
    add = command.add_argument
    add("--from-file", metavar="LIST", type=Path, help="File that lists adapters, one per line; # starts a comment")
    add("--skip-bad", action="store_true", help="Leave out adapters that cannot be used, and say why")
    _add_component(command)


def _add_component(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--component", metavar="NAME", help="Model of a diffusion pipeline that the LoRAs are for, such as unet"
    )


def _add_place(command: argparse.ArgumentParser) -> None:
    command.add_argument("place", metavar="FOLDER_OR_REPO", help="Folder or Hub id of the subspace")


def _init(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "folder", metavar="FOLDER", type=Path, help="Folder to write the subspace to, which must not hold one yet"
    )
    _add_adapters(command)
    add_base_model(command)
    add = command.add_argument_group("settings of the subspace, which cannot be changed later").add_argument
    add(
        "--num-components",
        type=number_or_auto,
        default=32,
        metavar="K",
        help="Cap on the directions per layer, or auto (default: %(default)s)",
    )
    add("--pseudo-rank", type=number_or_auto, default=8, metavar="P", help="Task rank, or auto (default: %(default)s)")
    add(
        "--target-error",
        type=float,
        metavar="X",
        help="Mean relative error of ΔW that auto reaches with the fewest bytes",
    )
    add(
        "--target-bytes",
        type=size_in_bytes,
        metavar="N",
        help="Size of bases and coefficients within which auto reaches the smallest error: a number of bytes, or a "
        "size such as 20MB or 64KB",
    )
    add(
        "--basis",
        choices=("joint", "factor"),
        default="joint",
        help="Basis: joint weighs all updates equally, factor is the paper's (default: %(default)s)",
    )
    add("--center", action="store_true", help="Subtract the mean column first, only with --basis factor")
    add("--explained-variance", type=float, metavar="X", help="Variance fraction to reach with the fewest directions")
    add("--drift-tolerance", type=float, metavar="X", help="Largest relative drift that merges may add up to")
    add(
        "--max-components",
        type=int,
        metavar="K",
        help="Largest k to which layers may grow to meet --drift-tolerance, and which auto considers",
    )
    add(
        "--tolerance",
        type=float,
        metavar="X",
        help="Relative error up to which a task takes a rank below P in a layer; differs from --tolerance of `add`",
    )
    add(
        "--coefficient-dtype",
        choices=("float32", "bfloat16", "4bit"),
        default="float32",
        help="Type in which coefficients are stored; the certified drift includes the rounding (default: %(default)s)",
    )
    add_keeping(command)


def _add(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="FOLDER", type=Path, help="Folder of the subspace")
    _add_adapters(command)
    add_tolerance(command)
    add_base_model(command)
    add_keeping(command)


def _replace(command: argparse.ArgumentParser) -> None:
    add_replace(command, located_adapter)
    _add_component(command)
    add_base_model(command, "the adapter and the subspace")


def _refit(command: argparse.ArgumentParser) -> None:
    add_refit(command, located_adapter)
    _add_component(command)
    add_keeping(command)


def _info(command: argparse.ArgumentParser) -> None:
    _add_place(command)
    command.add_argument("--revision", help="Revision of the repository: a task, a step, a branch, a tag or a commit")


def _audit(command: argparse.ArgumentParser) -> None:
    _add_adapters(command, "One subspace, or two or more LoRAs: folders, files or Hub ids, or name=place")
    command.add_argument(
        "--num-components", type=int, metavar="K", help="Cap on the directions per layer, for LoRAs (default: 32)"
    )
    add_base_model(command)
    command.add_argument(
        "--target-error",
        type=relative_error,
        action="append",
        metavar="X",
        help="Mean relative error of ΔW for which to recommend k and p; may be repeated (default: 0.1 and 0.25)",
    )
    command.add_argument(
        "--figure",
        type=Path,
        metavar="FILE",
        help="PNG, PDF or SVG file in which to draw the curve and the error of each adapter",
    )
    command.add_argument(
        "--per-module", action="store_true", help="Show one line for each module instead of one for each kind of layer"
    )


# Summary, example and arguments of each command.
_COMMANDS: dict[str, tuple[str, str, Callable[[argparse.ArgumentParser], None]]] = {
    "init": (
        "Make a subspace from LoRA adapters",
        "share-hf init share-subspace adapters/mrpc sst2=org/lora-sst2 --num-components 64",
        _init,
    ),
    "add": ("Merge more adapters into a subspace", "share-hf add share-subspace rte=adapters/rte", _add),
    "info": ("Show tasks, sizes, drift and scores", "share-hf info org/share-subspace --revision mrpc", _info),
    "audit": ("Test whether adapters share a subspace", "share-hf audit adapters/mrpc adapters/sst2", _audit),
    "export": ("Write tasks as plain LoRA adapters", "share-hf export share-subspace mrpc mrpc-lora", add_export),
    "remove": ("Remove tasks from a subspace", "share-hf remove share-subspace mrpc sst2", add_remove),
    "rename": ("Give a task another name", "share-hf rename share-subspace mrpc paraphrases", add_rename),
    "replace": (
        "Replace a task with another adapter",
        "share-hf replace share-subspace mrpc=adapters/mrpc-2",
        _replace,
    ),
    "refit": (
        "Rebuild the bases from the adapters that tasks came from",
        "share-hf refit share-subspace mrpc=adapters/mrpc",
        _refit,
    ),
    "undo": ("Undo the last step of a subspace that keeps a history", "share-hf undo share-subspace", add_undo),
    "route": (
        "Tell which task each text belongs to",
        'share-hf route share-subspace --text "It never stops being fun."',
        add_route,
    ),
    "push": ("Publish a subspace on the Hub", "share-hf push share-subspace org/share-subspace --private", add_push),
    "pull": ("Download a subspace, or what is new in it", "share-hf pull org/share-subspace share-subspace", add_pull),
    "upgrade": ("Rewrite a subspace in the newest format", "share-hf upgrade org/share-subspace", _add_place),
    "env": ("List the versions and devices for a bug report", "share-hf env", lambda command: None),
}


def _told(error: Exception) -> str:
    """Format an error for people: as several lines if it lists several faults, otherwise as one line."""
    if not (isinstance(error, (ValueError, OSError, RuntimeError)) and str(error)):
        return repr(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    title, *faults = str(error).split("\n  ")
    return "\n  ".join(" ".join(line.split()) for line in (title, *faults) if line.strip())


def is_launched() -> bool:
    """Return whether a launcher started this process among others: torchrun, accelerate, or an MPI launcher."""
    # Some clusters set WORLD_SIZE for every program, but only launchers set LOCAL_RANK.
    size = _first_set(("WORLD_SIZE",) if "LOCAL_RANK" in os.environ else (), "SIZE")
    return size not in (None, "1")


def is_first() -> bool:
    """Return whether this process is the first of its launcher, or alone, without waiting for torch to be imported."""
    return not is_launched() or _first_set(("RANK",), "RANK") in (None, "0")


def _first_set(names: Sequence[str], of_mpi: str) -> str | None:
    """Return the first of these variables that is set, else the variable of an MPI."""
    names = [*names, *(f"{mpi}_{of_mpi}" for mpi in ("PMI", "OMPI_COMM_WORLD", "MV2_COMM_WORLD"))]
    return next((os.environ[name] for name in names if name in os.environ), None)


def _fail(message: str, code: int, *, as_json: bool) -> int:
    if not is_first():
        return code
    print(f"error: {message}", file=sys.stderr)
    if as_json:
        _print(json.dumps({"error": message}))
    return code


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `share-hf info … | head`: raise neither here nor when Python flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
