"""Where the adapters are that tasks came from: hub ids with commit and checksum, and folders on this machine.

Those on the hub are noted in the lineage. Folders are nobody else's business: they are in `.<tree>.originals.json`
beside the tree, if that was asked for, which no push reads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .files import json_bytes, read_json, sha256_of, write_atomically
from .locating import Reference, find_adapter
from .lora import LoraAdapter, read_lora


def hub_original(place: str, *, revision: str | None = None, token: str | bool | None = None) -> dict[str, Any]:
    """The commit and the checksum of an adapter on the hub whose files are in the cache.

    Args:
        place: As for `find_adapter`, a reference to a repository.
        revision: Where the place names none.
        token: For the hub.
    """
    reference = Reference.parse(place)
    if reference is None:
        raise ValueError(f"{place}: expected a place on the hub")
    path = find_adapter(place, revision=revision, token=token).weights
    commit = path.parts[path.parts.index("snapshots") + 1] if "snapshots" in path.parts else None
    return {"place": str(replace(reference, revision=None)), "commit": commit, "sha256": sha256_of(path)}


def read_original(original: Mapping[str, Any], *, token: str | bool | None = None) -> LoraAdapter:
    """The adapter on the hub that a lineage notes.

    Raises:
        ValueError: If it is no longer what it was.
    """
    place, commit = original["place"], original.get("commit")
    found = hub_original(place, revision=commit, token=token)
    if found["sha256"] != original.get("sha256"):
        raise ValueError(
            f"{place}: sha256 is {found['sha256']}, expected {original.get('sha256')} as when it was added: name "
            "the adapter that the task came from"
        )
    return read_lora(place, component=original.get("component"), revision=commit, token=token)


def split_places(
    places: Mapping[str, str | Path], components: Mapping[str, str | None], *, token: str | bool | None = None
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What is to be noted of places by task: of repositories on the hub, and of what is on this machine.

    Args:
        places: Of adapters that have been read.
        components: The part of a pipeline that each is of, None where its file names none.
        token: For the hub.
    """
    here = {task: os.path.abspath(place) for task, place in places.items() if Path(place).exists()}
    there = {}
    for task, place in places.items():
        if task not in here:
            component = {} if components[task] is None else {"component": components[task]}
            there[task] = {**hub_original(str(place), token=token), **component}
    return there, here


def originals_file(tree: Path) -> Path:
    """The file beside a tree that names the folders its tasks came from."""
    real = Path(os.path.realpath(tree))
    return real.parent / f".{real.name}.originals.json"


def read_originals(tree: Path) -> dict[str, str]:
    """The folders by task; none where there is no such file.

    Raises:
        ValueError: If it is damaged.
    """
    path = originals_file(tree)
    if not path.is_file():
        return {}
    folders = read_json(path)
    if not all(isinstance(folder, str) for folder in folders.values()):
        raise ValueError(f"{path}: {json.dumps(folders)[:200]}, expected a folder by task")
    return folders


def write_originals(tree: Path, folders: Mapping[str, str]) -> None:
    """Name the folders by task beside a tree."""
    write_atomically(originals_file(tree), json_bytes(dict(folders)).decode())
