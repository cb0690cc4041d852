"""Origins of the adapters that became tasks: Hub ids with commit and checksum, and folders on this machine.

The lineage records those on the Hub. Folders are private: they are recorded, on request, in
`.<tree>.originals.json` beside the tree, which no push reads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub.file_download import repo_folder_name

from .files import json_bytes, read_json, sha256_of, write_atomically
from .locating import Reference
from .lora import LoraAdapter, read_lora


@dataclass(frozen=True)
class LocalOriginal:
    """An adapter on this machine.

    Args:
        place: Folder or file of the adapter.
        component: Component of a pipeline to which it belongs, if its file names one.
    """

    place: str
    component: str | None = None


def read_original(original: Mapping[str, Any], *, token: str | bool | None = None) -> LoraAdapter:
    """Read an adapter on the Hub that a lineage records.

    Raises:
        ValueError: If it has changed since it was recorded.
    """
    place, component = original["place"], original.get("component")
    lora = read_lora(place, component=component, revision=original.get("commit"), token=token)
    if (found := sha256_of(lora.file)) != original.get("sha256"):
        raise ValueError(
            f"{place}: sha256 is {found}, expected {original.get('sha256')} as when it was added: name the adapter "
            "that the task came from"
        )
    return lora


def split_places(
    places: Mapping[str, str | Path], loras: Mapping[str, LoraAdapter]
) -> tuple[dict[str, dict[str, Any]], dict[str, LocalOriginal]]:
    """Return what to record of each task's place, separately for repositories on the Hub and places on this machine.

    Args:
        places: Place from which each adapter was read.
        loras: Adapters that were read there.
    """
    there, here = {}, {}
    for task, lora in loras.items():
        place = places[task]
        reference = None if isinstance(place, Path) else Reference.parse(place)
        commit = None if reference is None else _commit_of(lora.file, reference.repo_id)
        if commit is None:  # outside the cache of the Hub, this may be a folder with the name of a repository
            here[task] = LocalOriginal(os.path.abspath(place), lora.component)
            continue
        noted = {"place": str(replace(reference, revision=None)), "commit": commit, "sha256": sha256_of(lora.file)}
        there[task] = noted if lora.component is None else {**noted, "component": lora.component}
    return there, here


def _commit_of(path: Path, repo_id: str) -> str | None:
    """Return the commit of a file in a cache's `models--org--repo/snapshots/<commit>`; None for any other file."""
    folder = repo_folder_name(repo_id=repo_id, repo_type="model")
    parts = path.parts
    places = [i for i in range(2, len(parts)) if parts[i - 2 : i] == (folder, "snapshots")]
    return parts[places[0]] if places else None


def originals_file(tree: Path) -> Path:
    """Return the file beside a tree that names the folders from which its tasks came."""
    real = Path(os.path.realpath(tree))
    return real.parent / f".{real.name}.originals.json"


def read_originals(tree: Path) -> dict[str, LocalOriginal]:
    """Read the adapters on this machine by task. The result is empty if there is no such file.

    Raises:
        ValueError: If the file is damaged.
    """
    path = originals_file(tree)
    if not path.is_file():
        return {}
    return {task: _from_json(path, content) for task, content in read_json(path).items()}


def write_originals(tree: Path, originals: Mapping[str, LocalOriginal]) -> None:
    """Write the adapters on this machine, by task, to the file beside a tree."""
    content = {task: _as_json(original) for task, original in originals.items()}
    write_atomically(originals_file(tree), json_bytes(content).decode())


def _as_json(original: LocalOriginal) -> str | dict[str, str]:
    """Return the place alone if there is no component to record."""
    if original.component is None:
        return original.place
    return {"place": original.place, "component": original.component}


def _from_json(path: Path, content: Any) -> LocalOriginal:
    fields = {"place": content} if isinstance(content, str) else content
    if not isinstance(fields, dict) or not all(isinstance(value, str) for value in fields.values()):
        raise ValueError(f"{path}: {json.dumps(content)[:200]}, expected a folder by task")
    if "place" not in fields:
        raise ValueError(f"{path}: {json.dumps(content)[:200]}, expected the place of an adapter")
    return LocalOriginal(fields["place"], fields.get("component"))
