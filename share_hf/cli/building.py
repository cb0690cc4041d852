"""Builds by commands: divided between the processes of a launcher, and continued after an interruption."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from share_hf import SharedSubspace, __version__
from share_hf.engines import Division, dividing_modules, naming_lost_ranks
from share_hf.format.files import sha256_of
from share_hf.format.index import INDEX_FILE
from share_hf.format.locating import find_adapter
from share_hf.format.lock import holding
from share_hf.format.unchanged import Stamp
from share_hf.format.unfinished import UnfinishedBuild
from share_hf.subspace import Purpose, RunHere, working_by

from . import NO_ROOM, is_launched
from .outcome import Outcome


Result = TypeVar("Result")

_NOT_INPUTS = ("debug", "folder", "from_file", "history", "json", "keep_originals", "progress", "quiet", "token")
_UNREADABLE = (ValueError, OSError, HfHubHTTPError, HFValidationError)


class Build:
    """One build of a folder, by one process or by all processes of a launcher.

    Args:
        division: Division of work between the processes.
        unfinished: Modules finished so far. Used on the first process only.
        folder: Folder that is built.
    """

    def __init__(self, division: Division, unfinished: UnfinishedBuild | None, folder: Path) -> None:
        self._division, self._unfinished, self._folder = division, unfinished, folder

    def end(self, save: Callable[[], None], told: Callable[[], Outcome]) -> Outcome | None:
        """Write the tree and return the outcome, on the first process only; None on the others.

        Args:
            save: Function that writes the tree. Called again if the disk is full and removing what this build keeps
                makes room.
            told: Function that returns the outcome.
        """

        def write() -> None:
            try:
                save()
            except OSError as error:
                if error.errno not in NO_ROOM or not self._unfinished.place.exists():
                    raise
                self._unfinished.remove()
                save()
            self._unfinished.remove()

        self._division.first(write)
        return told() if self._division.is_first else None

    def each_module(self, run: RunHere[Result], modules: Sequence[str], purpose: Purpose) -> Iterator[Result]:
        """Yield the result for each module, in order; those of a merge are kept, or taken from an earlier run."""
        if purpose != "merge":
            yield from self._division.each_module(run, modules, purpose)
            return
        kept = self._division.first(lambda: {module for module in modules if self._unfinished.has(module)})
        if kept and self._division.is_first:
            _say(f"{self._folder}: continuing, {len(kept)} of {len(modules)} modules are finished")
        results = self._division.each_module(run, [module for module in modules if module not in kept], purpose)
        for module in modules:
            if module in kept:
                result = self._division.first(partial(self._read, module))
                yield next(run([module])) if result is None else result
                continue
            result = next(results)
            if self._division.is_first:
                self._unfinished.write(module, result)
            yield result

    def _read(self, module: str) -> Any:
        """Read a finished module, on the first process, which has the files; None if it is damaged."""
        return self._unfinished.read(module)


def save(subspace: SharedSubspace, args: Namespace) -> None:
    """Write the tree of a command that builds a subspace."""
    subspace.save_pretrained(args.folder, history=args.history, keep_originals=args.keep_originals)


@contextmanager
def building(args: Namespace, places: Mapping[str, str]) -> Iterator[Build]:
    """Lock a folder while it is built.

    Args:
        args: Arguments of the command.
        places: Places of the adapters by task name, as far as they are known. What is kept of an interrupted run is
            used only if it matches them and the arguments.

    Raises:
        Exception: Error of one of the processes; on the others, a `RuntimeError` that names its rank. Nothing is kept
            of a build that is refused.
    """
    folder = Path(args.folder)
    if is_launched():
        PartialState(cpu=True)  # merges run on the CPU, and there may be more processes than GPUs
    watching = naming_lost_ranks("the same command continues it") if is_launched() else nullcontext()
    with watching, dividing_modules() as division, holding(folder) if division.is_first else nullcontext():
        unfinished = _unfinished(args, places) if division.is_first else None
        division.meet()  # the others read the folder once it is locked
        build = Build(division, unfinished, folder)
        try:
            with working_by(build.each_module):
                yield build
        except ValueError:
            if unfinished is not None:
                unfinished.remove()
            raise


def _unfinished(args: Namespace, places: Mapping[str, str]) -> UnfinishedBuild:
    unfinished = UnfinishedBuild(args.folder, _inputs(args, places))
    if unfinished.is_other:
        _say(
            f"{args.folder}: starting over, because the adapters or the settings differ from those of the interrupted "
            "run"
        )
    return unfinished


def _inputs(args: Namespace, places: Mapping[str, str]) -> dict[str, Any]:
    """Return everything a build depends on: command, existing tree, files of the adapters, and libraries."""
    given = {name: value for name, value in vars(args).items() if name not in _NOT_INPUTS}
    index = Path(args.folder) / INDEX_FILE
    return {
        "arguments": {name: value for name, value in given.items() if name not in ("adapters", "originals")},
        "tree": sha256_of(index) if index.is_file() else None,
        "adapters": [[name, _stamps(place, args.token)] for name, place in places.items()],  # their order counts
        "libraries": {"share_hf": __version__, "torch": torch.__version__},
    }


def _stamps(place: str, token: str | None) -> list[list[Any]]:
    """Return the files of an adapter and when they were written; none if not found, which its reader reports."""
    try:
        files = find_adapter(place, token=token)
        stamps = [Stamp.of(path) for path in (files.config, files.weights) if path is not None]
    except _UNREADABLE:
        return []
    return [[os.path.abspath(stamp.path), stamp.inode[1], *stamp.content] for stamp in stamps]


def _say(text: str) -> None:
    print(text, file=sys.stderr)
