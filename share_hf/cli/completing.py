"""Completion in the shell: commands, options, files and the tasks of a subspace. Needs the optional `argcomplete`.

A shell asks by running `share-hf` with `_ARGCOMPLETE` set, at each press of the Tab key: nothing is imported for it
that takes long.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


_ASKED = "_ARGCOMPLETE"
_INDEX = Path("share_config.json")  # `share_hf.format.index` has its name too, but waits for torch
_MOST_BYTES = 2**26

# Of the arguments that are tasks of the subspace in the argument before them.
_TASKS = ("task", "tasks", "adapter", "originals")
# Those with the task before an equals sign.
_ASSIGNED = ("adapter", "originals")


def complete(build_parser: Callable[[], tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]]) -> None:
    """Answer a shell that asks how a line goes on, and exit; return where none asks.

    Args:
        build_parser: Makes the parser, and that of each command.
    """
    if _ASKED not in os.environ:
        return
    try:
        import argcomplete
    except ImportError:
        raise SystemExit(1) from None
    parser, commands = build_parser()
    for command in commands.values():
        for action in command._actions:
            if action.dest in _TASKS:
                action.completer = _assigned_tasks if action.dest in _ASSIGNED else _tasks  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser)


def _tasks(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """The tasks of the subspace in the folder that the line has; those of a repository would take the network."""
    folder = getattr(parsed_args, "folder", None) or getattr(parsed_args, "place", None)
    path = Path(os.path.expanduser(str(folder or "")), _INDEX)
    try:
        if path.stat().st_size > _MOST_BYTES:
            return []
        tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"]
        given = getattr(parsed_args, "tasks", None) or ()
        return [task for task in tasks if isinstance(task, str) and task not in given]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _assigned_tasks(parsed_args: argparse.Namespace, prefix: str = "", **_: Any) -> list[str]:
    """Tasks with their equals sign; behind one, files."""
    task, equals, place = prefix.partition("=")
    if not equals:
        return [f"{task}=" for task in _tasks(parsed_args)]
    parent = Path(os.path.expanduser(place)).parent if not place.endswith("/") else Path(os.path.expanduser(place))
    head = place[: len(place) - len(place.rpartition("/")[2])]
    try:
        names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in parent.iterdir())
    except OSError:
        return []
    return [f"{task}={head}{name}" for name in names if not name.startswith(".")]
