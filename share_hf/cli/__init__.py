"""The command line `share-hf`: its arguments, its output and its exit codes.

Needs the standard library alone, and is installed under the name `share_hf_cli` too: `import share_hf` waits for torch
and PEFT, `share-hf --help` should not.
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

from .editing_arguments import (
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


FAILED, INTERRUPTED = 1, 130
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a quota, a limit on the length of files

Commands = dict[str, argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Its name and arguments; those of the process if not given.

    Returns:
        Exit code: 0, 1 if the command failed, 130 if it was interrupted. Wrong arguments exit with 2.
    """
    args = parse(sys.argv[1:] if argv is None else argv)
    debug = args.debug or os.environ.get("SHARE_HF_DEBUG", "0") not in ("", "0")
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            if not debug:
                warnings.simplefilter("ignore")
                # Both warn when they are imported; DeepSpeed sets the level of its logger anew.
                logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
                logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
            from . import commands  # torch and all

            outcome = commands.run(args, debug=debug)
    except KeyboardInterrupt:
        return _fail("interrupted, run the command again", INTERRUPTED, as_json=args.json)
    except Exception as error:
        if debug:
            traceback.print_exc()
        expected = isinstance(error, (ValueError, OSError, RuntimeError)) and str(error)
        message = " ".join(str(error).split()) if expected else repr(error)
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            message += "; nothing has changed, make room there, and run the command again"
        return _fail(message, FAILED, as_json=args.json)
    _print(json.dumps(outcome.facts, indent=2) if args.json else outcome.text)
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command, its options anywhere between them. Exits with 2 if they are wrong."""
    parser, commands = build_parser()
    if not argv or argv[0] not in commands:
        return parser.parse_args(argv or ["--help"])
    args = commands[argv[0]].parse_intermixed_args(argv[1:])
    if args.command == "export":
        check_export(args, commands["export"])
    if "from_file" in args and not (args.adapters or args.from_file):
        commands[args.command].error("expected an ADAPTER, or --from-file")
    return args


def build_parser() -> tuple[argparse.ArgumentParser, Commands]:
    """The parser, and that of each command."""
    parser = _Parser(
        prog="share-hf",
        description="Many LoRA adapters of one base model as one shared subspace and a few kilobytes a task.",
        epilog="`share-hf COMMAND --help` shows its options and an example. Exit codes: 0, 1 on failure, 2 on wrong "
        "arguments, 130 on Ctrl-C.",
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
    """Name and place of an adapter, from `name=place` or a place whose last part is the name."""
    name, equals, place = text.partition("=")
    if not equals or "/" in name or Path(text).is_dir():
        name, place = Path(text).name, text
    return name, os.path.expanduser(place)


def number_or_auto(text: str) -> int | str:
    """A whole number, or `"auto"`."""
    if text != "auto" and not re.fullmatch(r"-?\d+", text):
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}, expected a whole number or auto")
    return text if text == "auto" else int(text)


def size_in_bytes(text: str) -> int:
    """Bytes from a number with or without a unit, such as `1500000` or `1.5MB`."""
    if (match := re.fullmatch(r"([\d.]+) ?([KMG]?)B?", text, flags=re.IGNORECASE)) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, expected such as 1500000 or 1.5MB")
    return int(float(match[1]) * 1000 ** ("KMG".index(match[2].upper()) + 1 if match[2] else 0))


class _Parser(argparse.ArgumentParser):
    """Says what a mistyped command or option may have been."""

    def error(self, message: str) -> NoReturn:
        if found := re.search(r"invalid choice: '?([\w-]+)|unrecognized arguments: (--[\w-]+)", message):
            choices = re.findall(r"[\w-]+", message.partition("choose from")[2])
            known = choices or re.findall(r"--[a-z-]+", self.format_help())
            if near := difflib.get_close_matches(found[1] or found[2], known, n=1):
                message += f", did you mean {near[0]}?"
        super().error(message)


class _Version(argparse.Action):
    """Finds the version out only if it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        try:
            version = metadata.version("share-hf")
        except metadata.PackageNotFoundError:  # `python -m share_hf.cli` where nothing is installed
            from share_hf import __version__ as version
        print(f"share-hf {version}")
        parser.exit()


def _add_common(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("options of every command")
    group.add_argument("--token", help="User access token of the hub; that of `hf auth login` if not given")
    group.add_argument("--json", action="store_true", help="Print JSON, and nothing else, on stdout")
    group.add_argument("--quiet", action="store_true", help="No progress bars")
    group.add_argument("--debug", action="store_true", help="Warnings and a traceback; also SHARE_HF_DEBUG=1")


def _add_adapters(
    command: argparse.ArgumentParser,
    help: str = "A LoRA, as name=place or a place whose last part is the name: a folder, a file of weights, or "
    "org/repo@revision:subfolder",
) -> None:
    command.add_argument("adapters", metavar="ADAPTER", nargs="*", type=located_adapter, help=help)
    add = command.add_argument
    add("--from-file", metavar="LIST", type=Path, help="More of them: a line each, # before a comment")
    add("--skip-bad", action="store_true", help="Leave out adapters that cannot be used, and say why")
    _add_component(command)


def _add_component(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--component", metavar="NAME", help="Of pipelines' LoRAs: the model that is meant, such as unet"
    )


def _add_base_model(command: argparse.ArgumentParser, of: str = "Of all the adapters") -> None:
    command.add_argument("--base-model", metavar="ID", help=f"{of}, where they call it by several names")


def _add_place(command: argparse.ArgumentParser) -> None:
    command.add_argument("place", metavar="FOLDER_OR_REPO", help="A subspace: its folder or hub id")


def _init(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="FOLDER", type=Path, help="Where to write; no subspace yet")
    _add_adapters(command)
    _add_base_model(command)
    add = command.add_argument_group("settings of the subspace, for good").add_argument
    add(
        "--num-components",
        type=number_or_auto,
        default=32,
        metavar="K",
        help="Cap on the directions of a layer, or auto (%(default)s)",
    )
    add("--pseudo-rank", type=number_or_auto, default=8, metavar="P", help="Rank of a task, or auto (%(default)s)")
    add("--target-error", type=float, metavar="X", help="Mean relative error that auto reaches with the fewest bytes")
    add("--target-bytes", type=size_in_bytes, metavar="N", help="Size auto makes the best of: bytes, or 20MB, 64KB")
    add(
        "--basis", choices=("joint", "factor"), default="joint", help="All updates alike, or the paper's (%(default)s)"
    )
    add("--center", action="store_true", help="Subtract the mean column first; factor only")
    add("--explained-variance", type=float, metavar="X", help="Take the fewest directions that explain this fraction")
    add("--drift-tolerance", type=float, metavar="X", help="Largest relative drift that merges may add up to")
    add("--max-components", type=int, metavar="K", help="How far layers may grow for it, or auto looks")
    add(
        "--tolerance",
        type=float,
        metavar="X",
        help="Error up to which a task takes a smaller rank (not that of `add`)",
    )
    add(
        "--coefficient-dtype",
        choices=("float32", "bfloat16", "4bit"),
        default="float32",
        help="What coefficients are stored in, rounding certified (%(default)s)",
    )
    add_keeping(command)


def _add(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="FOLDER", type=Path, help="Of the subspace")
    _add_adapters(command)
    add_tolerance(command)
    _add_base_model(command)
    add_keeping(command)


def _replace(command: argparse.ArgumentParser) -> None:
    add_replace(command, located_adapter)
    _add_component(command)
    _add_base_model(command, "Of the adapter and the subspace")


def _refit(command: argparse.ArgumentParser) -> None:
    add_refit(command, located_adapter)
    _add_component(command)
    add_keeping(command)


def _info(command: argparse.ArgumentParser) -> None:
    _add_place(command)
    command.add_argument("--revision", help="Of the repository: a task, a step, a branch, a tag or a commit")


def _audit(command: argparse.ArgumentParser) -> None:
    _add_adapters(command, "One subspace, or two or more LoRAs: folders, files or hub ids, or name=place")
    command.add_argument("--num-components", type=int, default=32, metavar="K", help="For LoRAs (%(default)s)")
    _add_base_model(command)
    command.add_argument(
        "--target-error",
        type=float,
        action="append",
        metavar="X",
        help="Advise k and p for this mean error of ΔW; may be given again (0.1 and 0.25)",
    )
    command.add_argument("--figure", type=Path, metavar="FILE", help="Draw the curve, and the error of each adapter")
    command.add_argument("--per-module", action="store_true", help="A line a module, not one for all layers of a kind")


def _push(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="FOLDER", type=Path, help="Of the subspace")
    command.add_argument("repo_id", metavar="REPO_ID", help="The repository, created if need be")
    _add_base_model(command, "Of both sides")
    access = command.add_mutually_exclusive_group()
    access.add_argument("--private", action="store_true", default=None, help="Of a repository that is created")
    access.add_argument("--public", dest="private", action="store_false", default=None, help="Of such a repository")
    add = command.add_argument
    add("--create-pr", action="store_true", help="Open a pull request instead")
    add("-m", "--commit-message", metavar="TEXT", help="Tells the new tasks if not given")
    add("--commit-description", metavar="TEXT", help="Of the commit on main")
    add("--default-task", metavar="TASK", help="Whose LoRA is at the root; the newest, or as chosen before")
    add(
        "--branches",
        action="append",
        metavar="WHICH",
        help="Tasks that get a branch: all, new, none, or a task, and another by giving it again (all of up to 100)",
    )
    add("--branch-tolerance", type=float, default=0.05, metavar="X", help="Drift that rewrites a branch (%(default)s)")
    add("--card-template", type=Path, metavar="FILE", help="A Jinja template of your own for the model card")
    add("--max-attempts", type=int, default=50, metavar="N", help="While others push at the same time (%(default)s)")


def _pull(command: argparse.ArgumentParser) -> None:
    command.add_argument("repo_id", metavar="REPO_ID", help="The repository")
    command.add_argument("folder", metavar="FOLDER", type=Path, help="Of the subspace, or where to write one")
    command.add_argument("--revision", help="A task, a step, a branch, a tag or a commit")
    _add_base_model(command, "Of both sides")


# Summary, example and arguments.
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
    "remove": ("Forget tasks of a subspace", "share-hf remove share-subspace mrpc sst2", add_remove),
    "rename": ("Give a task another name", "share-hf rename share-subspace mrpc paraphrases", add_rename),
    "replace": (
        "Put another adapter in the place of a task",
        "share-hf replace share-subspace mrpc=adapters/mrpc-2",
        _replace,
    ),
    "refit": (
        "Build the bases anew from the adapters that tasks came from",
        "share-hf refit share-subspace mrpc=adapters/mrpc",
        _refit,
    ),
    "undo": ("Take back the last step, where its history is kept", "share-hf undo share-subspace", add_undo),
    "push": ("Publish a subspace on the hub", "share-hf push share-subspace org/share-subspace --private", _push),
    "pull": ("Get a subspace, or what is new in it", "share-hf pull org/share-subspace share-subspace", _pull),
    "upgrade": ("Rewrite a subspace in the newest format", "share-hf upgrade org/share-subspace", _add_place),
}


def _fail(message: str, code: int, *, as_json: bool) -> int:
    print(f"error: {message}", file=sys.stderr)
    if as_json:
        _print(json.dumps({"error": message}))
    return code


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `share-hf info … | head`: not here, nor when Python flushes at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
