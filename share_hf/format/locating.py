"""Find the files of an adapter: in a folder, by the name of a file, or in a repository on the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import is_offline_mode
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RevisionNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from .download import download
from .files import read_json
from .names import HUB_ID


# Names that diffusers gives to the LoRA of a pipeline.
PIPELINE_WEIGHTS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
PICKLED = frozenset({".bin", ".pt", ".pth", ".ckpt"})
_SUFFIXES = PICKLED | {".safetensors"}
_PEFT_WEIGHTS = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
_SHOWN = 5

_REFERENCE = re.compile(
    rf"(?P<repo>{HUB_ID.pattern})(?:@(?P<revision>[^:@\s]+))?(?::(?P<path>[^:@/\\\s][^:@\\]*))?", re.ASCII
)


@dataclass(frozen=True)
class Reference:
    """A place on the Hub, written as `org/repo@revision:subfolder`.

    Args:
        repo_id: Id of the repository.
        revision: Branch, tag or commit. None means the default branch.
        path: Folder or file in the repository. An empty path means its root.
    """

    repo_id: str
    revision: str | None = None
    path: str = ""

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{self.repo_id}{revision}" + (f":{self.path}" if self.path else "")

    @classmethod
    def parse(cls, text: str) -> Reference | None:
        """Return the place to which a text refers, or None if it cannot be a place on the Hub."""
        match = _REFERENCE.fullmatch(text)
        path = (match["path"] or "").rstrip("/") if match else ""
        if match is None or ".." in path.split("/"):
            return None
        return cls(match["repo"], match["revision"], path)


@dataclass(frozen=True)
class AdapterFiles:
    """Files of an adapter on this machine.

    Args:
        weights: File with tensors by name, in safetensors format or saved by torch.
        config: PEFT configuration. None for the LoRA of a pipeline, which has none.
    """

    weights: Path
    config: Path | None


def last_part(place: str | Path) -> str:
    """Return what a person calls an adapter: the last part of its place, ignoring names that all adapters share."""
    reference = None if isinstance(place, Path) or Path(place).exists() else Reference.parse(place)
    path = PurePosixPath(Path(place).as_posix())
    if reference is not None:
        path = PurePosixPath(reference.repo_id, reference.path)
    if path.suffix in _SUFFIXES and (reference is not None or Path(place).is_file()):
        return path.parent.name if path.name in {*_PEFT_WEIGHTS, *PIPELINE_WEIGHTS} else path.stem
    return path.name if path.name not in ("", "..") else Path(place).resolve().name


def is_weights_file(path: str) -> bool:
    """Return whether a path in a repository is the name of a weights file rather than of a folder."""
    return PurePosixPath(path).suffix in _SUFFIXES


def find_adapter(location: str | Path, *, revision: str | None = None, **download_options: Any) -> AdapterFiles:
    """Find the files of an adapter, and download them if needed.

    Args:
        location: Folder, weights file, or place on the Hub.
        revision: Revision of the repository, if the place names none.
        **download_options: Options of `hf_hub_download`.

    Raises:
        ValueError: If there is no such place, or no adapter in it.
        LocalEntryNotFoundError: If the Hub is out of reach and the cache has nothing from the repository.
    """
    path = Path(location)
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        return AdapterFiles(path, _config_beside(path))
    reference = None if isinstance(location, Path) else Reference.parse(location)
    if reference is None:
        raise ValueError(f"{location}: no such folder or file")
    if revision is not None and reference.revision is not None:
        raise ValueError(f"{location}: revision= is {revision!r} too, expected only one of the two")
    options = {"revision": reference.revision or revision, **download_options}
    try:
        return _on_hub(location, reference, options)
    except RevisionNotFoundError as error:
        raise ValueError(f"{location}: no revision {options['revision']!r} in this repository") from error


def _in_folder(folder: Path) -> AdapterFiles:
    config = folder / CONFIG_NAME
    if config.is_file():
        if weights := next((folder / name for name in _PEFT_WEIGHTS if (folder / name).is_file()), None):
            return AdapterFiles(weights, config)
        raise ValueError(f"{folder}: no {SAFETENSORS_WEIGHTS_NAME} in it, expected the folder of a PEFT adapter")
    if weights := next((folder / name for name in PIPELINE_WEIGHTS if (folder / name).is_file()), None):
        return AdapterFiles(weights, None)
    files = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in _PEFT_WEIGHTS)
    if len(files) == 1 and not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        return AdapterFiles(folder / files[0], _config_beside(folder / files[0]))
    message = f"{folder}: no {CONFIG_NAME} in it, expected the folder of a PEFT adapter"
    if files:
        message += f"; name one of its files instead: {_some(files)}"
    elif within := sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}")):
        message += f"; name the adapters in it instead: {_some(within)}"
    raise ValueError(message)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _config_beside(weights: Path) -> Path | None:
    """Return the configuration of a weights file: PEFT's in its folder, or one with the file's own name."""
    if weights.suffix not in _SUFFIXES:
        raise ValueError(f"{weights}: expected a folder, or a file of weights ({', '.join(sorted(_SUFFIXES))})")
    own, common = weights.with_suffix(".json"), weights.with_name(CONFIG_NAME)
    if weights.name not in _PEFT_WEIGHTS and own.is_file():
        with suppress(ValueError, json.JSONDecodeError):  # galleries of LoRAs put descriptions in such a file
            if "peft_type" in read_json(own):
                return own
    if common.is_file():
        return common
    if weights.name in _PEFT_WEIGHTS:
        raise ValueError(f"{weights.parent}: no {CONFIG_NAME} in it, expected the folder of a PEFT adapter")
    return None


def _on_hub(location: str, reference: Reference, options: dict[str, Any]) -> AdapterFiles:
    path = PurePosixPath(reference.path)
    if is_weights_file(reference.path):
        weights = _first(location, reference, [path.as_posix()], options, path.name)
        required = path.name in _PEFT_WEIGHTS
        return AdapterFiles(weights, _config_on_hub(location, reference, path.parent, options, required=required))
    config = _config_on_hub(location, reference, path, options, required=False)
    names = PIPELINE_WEIGHTS if config is None else _PEFT_WEIGHTS
    expected = CONFIG_NAME if config is None else names[0]
    weights = _first(location, reference, [(path / name).as_posix() for name in names], options, expected)
    return AdapterFiles(weights, config)


def _config_on_hub(
    location: str, reference: Reference, folder: PurePosixPath, options: dict[str, Any], *, required: bool
) -> Path | None:
    try:
        return download(reference.repo_id, (folder / CONFIG_NAME).as_posix(), **options)
    except EntryNotFoundError as error:
        if required or _is_out_of_reach(error):
            raise _nothing_there(location, CONFIG_NAME, error) from error
        return None


def _first(location: str, reference: Reference, names: Sequence[str], options: dict[str, Any], expected: str) -> Path:
    """Download the first of these files that the repository has."""
    missing: EntryNotFoundError | None = None
    for name in names:
        try:
            return download(reference.repo_id, name, **options)
        except EntryNotFoundError as error:
            missing = missing or error
            if _is_out_of_reach(error):
                break
    raise _nothing_there(location, expected, missing) from missing


def _is_out_of_reach(error: EntryNotFoundError) -> bool:
    """Return whether the Hub did not answer. Each try takes a while, so it is not asked for other files."""
    return isinstance(error, LocalEntryNotFoundError) and not is_offline_mode()


def _nothing_there(location: str, name: str, error: EntryNotFoundError | None) -> Exception:
    if isinstance(error, LocalEntryNotFoundError):
        return LocalEntryNotFoundError(f"{location}: no such folder, and no repository in the cache or within reach")
    return ValueError(f"{location}: no {name} in this repository, expected a PEFT adapter")
