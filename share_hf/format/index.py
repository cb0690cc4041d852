"""`share_config.json`: the contents of a tree, and the checksums that tell whether it is intact.

Fields: `format_version`; `kind` ("tree", or "checkpoint" for the folder of a `PeftModel`, which has the bases but not
the layout of a tree); `share_hf_version`; `base_model_name_or_path`; `settings` (the fields of
`SubspaceSettings`); `modules` (module -> `shape` [n, d], `num_components` [k_out, k_in] and, since format version 3,
the `layout` of a module that is not a dense layer: its `kind` and `kernel`); `tasks` (names in the order in which they
were learned); `default_task`; `lineage` (one object per step); `branches` (task -> its drift when its branch on the
Hub was written, if it was over 0); `branched` (the tasks that have a branch or are to get one; null means all);
`replaced` (task -> the commit of its branch that the push of this tree replaces: if the branch is still at this
commit, it was not written again); `sha256` (path in the tree -> checksum, for every file that loading depends on; for
a task, this is its `metrics.json`, which has the checksums of its other files); `digest` (checksum of all other
fields); and since format version 2, `fingerprint` (of the bases of all layers, see `fingerprint_of_all`). Format
version 3 is written only if the tree has something that version 2 lacks: a `layout` of one of the `modules`, which
older versions would take for a dense layer; in `settings`, `coefficient_dtype` (see `coefficients`) or `tolerance`,
with which a task has its own rank in each layer; and `router`, by which inputs find their tasks (see `router_file`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal

from peft.utils import CONFIG_NAME

from ..state import Layout
from ..state.layout import as_json, from_json
from ..subspace import SubspaceSettings
from ..version import __version__
from .files import json_bytes, read_json, sha256_of
from .locating import Reference
from .names import check_stored_names
from .router_file import RouterEntry


INDEX_FILE = "share_config.json"
# Version of a tree that uses nothing newer. A tree that needs a newer version is written as that version.
FORMAT_VERSION = 2
NEWEST_FORMAT_VERSION = 3

# Room for the names and one-dimensional tensors of a safetensors file, in addition to its matrices.
_BYTES_BESIDE_MATRICES = 2**20


@dataclass(frozen=True)
class ModuleEntry:
    """A target module: (n, d) of its weight, (k_out, k_in) of its basis, and its layout unless it is a dense layer."""

    shape: tuple[int, int]
    num_components: tuple[int, int]
    layout: Layout | None = None


@dataclass(frozen=True)
class BranchRecords:
    """What an index records of the branches of its repository. None of it is about files on disk.

    Args:
        drifts: Drift of a task when its branch was written, by task, if it was over 0.
        tasks: Tasks that have a branch or are to get one. None means all.
        replaced: Commit to be replaced, by task whose branch was to be written again.
    """

    drifts: Mapping[str, float] = field(default_factory=dict)
    tasks: tuple[str, ...] | None = None
    replaced: Mapping[str, str] = field(default_factory=dict)


NO_BRANCHES = BranchRecords()


@dataclass(frozen=True)
class TreeIndex:
    """The content of `share_config.json`."""

    base_model_name_or_path: str | None
    settings: SubspaceSettings
    modules: Mapping[str, ModuleEntry]
    tasks: tuple[str, ...]
    kind: Literal["tree", "checkpoint"] = "tree"
    default_task: str | None = None
    lineage: tuple[Mapping[str, Any], ...] = ()
    branches: Mapping[str, float] = field(default_factory=dict)
    branched: tuple[str, ...] | None = None
    replaced: Mapping[str, str] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)
    fingerprint: str | None = None
    router: RouterEntry | None = None
    format_version: int = FORMAT_VERSION

    @property
    def has_fingerprints(self) -> bool:
        """Whether coefficients record the basis to which they belong, as they do since format version 2."""
        return self.format_version >= 2

    @property
    def branch_records(self) -> BranchRecords:
        """Records of the branches of the tree's repository."""
        return BranchRecords(self.branches, self.branched, self.replaced)

    @property
    def is_tree(self) -> bool:
        """Whether this is a whole tree, rather than the checkpoint of a model."""
        return self.kind == "tree"

    @property
    def routed_tasks(self) -> tuple[str, ...]:
        """Tasks that inputs can find by themselves."""
        return () if self.router is None else self.router.tasks

    @property
    def root_task(self) -> str | None:
        """Default task, or the newest task if there is none."""
        return self.default_task or next(reversed(self.tasks), None)

    def basis_bytes(self) -> int:
        """Return the largest possible size in bytes of this tree's `subspace.safetensors`."""
        matrices = sum(
            n * k for entry in self.modules.values() for n, k in zip(entry.shape, entry.num_components, strict=True)
        )
        return 4 * matrices + _BYTES_BESIDE_MATRICES


def index_bytes(index: TreeIndex) -> bytes:
    """Return `share_config.json`, with its digest, in the oldest format version that can express its content."""
    plain = index.settings.is_plain and not any(entry.layout for entry in index.modules.values()) and not index.router
    content = {
        **asdict(index),
        "settings": index.settings.to_dict(),
        "format_version": FORMAT_VERSION if plain else NEWEST_FORMAT_VERSION,
        "share_hf_version": __version__,
    }
    del content["router"]
    if index.router is not None:
        content["router"] = index.router.as_json()
    for module, entry in index.modules.items():
        del content["modules"][module]["layout"]
        if entry.layout is not None:
            content["modules"][module]["layout"] = as_json(entry.layout)
    content["digest"] = _digest(content)
    return json_bytes(content)


def read_index(folder: Path) -> TreeIndex:
    """Read and check `share_config.json`.

    Raises:
        ValueError: If it is damaged, was edited, or has a newer format. The message says what was found and expected.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        held = "holds an adapter" if (folder / CONFIG_NAME).is_file() else "holds no subspace"
        raise ValueError(f"{path}: no such file, expected the folder of a shared subspace; {folder} {held}")
    content = read_json(path)
    version = content.get("format_version")
    if not isinstance(version, int) or version < 1:
        hint = "" if "format_version" in content else " (a file of another program may have this name, as lorashare's)"
        raise ValueError(f"{path}: format_version is {version!r}, expected {FORMAT_VERSION}{hint}")
    if version > NEWEST_FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version is {version}, expected at most {NEWEST_FORMAT_VERSION}: the tree was written "
            "by a newer share_hf, upgrade with `pip install -U share-hf`"
        )
    digest = content.pop("digest", None)
    if digest != _digest(content):
        raise ValueError(
            f"{path}: digest is {digest!r}, expected {_digest(content)!r}: the file was edited or damaged"
        )
    try:
        tasks, default_task = content["tasks"], content["default_task"]
        if not isinstance(tasks, list):
            raise ValueError(f"tasks is {tasks!r}, expected a list")
        check_stored_names(tasks)
        if default_task is not None and default_task not in tasks:
            raise ValueError(f"default_task is {default_task!r}, expected one of {tasks}")
        return TreeIndex(
            base_model_name_or_path=content["base_model_name_or_path"],
            settings=SubspaceSettings.from_dict(content["settings"]),
            modules={name: _module(name, entry) for name, entry in content["modules"].items()},
            tasks=tuple(tasks),
            kind=content["kind"],
            default_task=default_task,
            lineage=_lineage(content["lineage"]),
            branches={task: float(drift) for task, drift in content["branches"].items()},
            branched=_names("branched", content.get("branched")),
            replaced={task: str(commit) for task, commit in content.get("replaced", {}).items()},
            sha256={relative: str(checksum) for relative, checksum in content["sha256"].items()},
            fingerprint=str(content["fingerprint"]) if version >= 2 else None,
            router=RouterEntry.from_json(content["router"], tuple(tasks)) if "router" in content else None,
            format_version=version,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: a field is missing or of the wrong type ({error!r})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_file(
    folder: Path,
    sha256: Mapping[str, str],
    relative: str,
    *,
    listed_in: str = INDEX_FILE,
    content: bytes | None = None,
) -> None:
    """Compare the checksum of a file with the recorded one.

    Args:
        folder: Folder of a tree.
        sha256: Checksums by path.
        relative: Path of the file in the folder.
        listed_in: File from which the checksums come.
        content: Content of the file if it was read already. None means to read it.

    Raises:
        ValueError: If the file is missing or is not the file that was saved.
    """
    if relative not in sha256:
        raise ValueError(f"{folder / listed_in}: sha256 has no entry for {relative!r}")
    if content is None and not (folder / relative).is_file():
        raise ValueError(f"{folder / relative}: no such file, but {listed_in} lists it")
    found = sha256_of(folder / relative) if content is None else hashlib.sha256(content).hexdigest()
    if found != sha256[relative]:
        raise ValueError(
            f"{folder / relative}: sha256 is {found}, expected {sha256[relative]}: the file was truncated or edited"
        )


def _module(name: str, entry: Mapping[str, Any]) -> ModuleEntry:
    shape, num_components = entry["shape"], entry["num_components"]
    for field_name, pair, least in (("shape", shape, 1), ("num_components", num_components, 0)):
        whole = isinstance(pair, list) and len(pair) == 2 and all(type(side) is int and side >= least for side in pair)
        if not whole:
            raise ValueError(f"{field_name} of {name!r} is {pair!r}, expected two integers of at least {least}")
    if any(k > side for k, side in zip(num_components, shape, strict=True)):
        raise ValueError(f"num_components of {name!r} is {num_components}, expected at most its shape {shape}")
    layout = entry.get("layout")
    if layout is not None:
        try:
            layout = from_json(layout)
            layout.check_shape(tuple(shape))
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from error
    return ModuleEntry(tuple(shape), tuple(num_components), layout)


def _lineage(entries: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("lineage is not a list of steps")
    for entry in entries:
        merged = entry.get("merged", [])
        names = [entry["id"], entry.get("learned", ""), entry.get("removed", "")]
        renamed = entry.get("renamed", ["", ""])
        if not isinstance(renamed, list) or len(renamed) != 2:
            raise ValueError(f"lineage has a step {entry!r}, expected renamed to be two names")
        names += renamed
        refit, originals = entry.get("refit", []), entry.get("originals", {})
        if not isinstance(refit, list) or not isinstance(originals, dict):
            raise ValueError(f"lineage has a step {entry!r}, expected refit to be names, and originals by task")
        if not all(map(_is_original, originals.values())):
            raise ValueError(
                f"lineage has a step {entry!r}, expected originals to have a place on the Hub, a commit and a sha256"
            )
        names += refit
        origins = entry.get("origins", {})
        if not isinstance(origins, dict) or not all(isinstance(ids, list) and ids for ids in origins.values()):
            raise ValueError(f"lineage has a step {entry!r}, expected origins to have lists of ids by task")
        names += [step for steps in origins.values() for step in steps]
        if not isinstance(merged, list) or not all(isinstance(name, str) for name in (*names, *merged)):
            raise ValueError(f"lineage has a step {entry!r}, expected an id and names of tasks")
    return tuple(entries)


def _is_original(original: Any) -> bool:
    """Return whether this is a record of an adapter as `originals.split_places` makes it."""
    if not isinstance(original, dict) or not all(isinstance(original.get(name), str) for name in ("place", "sha256")):
        return False
    rest = (original.get("commit"), original.get("component"))
    return Reference.parse(original["place"]) is not None and all(isinstance(text, (str, NoneType)) for text in rest)


def _names(field_name: str, names: Any) -> tuple[str, ...] | None:
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{field_name} is {names!r}, expected names of tasks, or null")
    return tuple(names)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
