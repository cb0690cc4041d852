"""Names of base models: one model has an id on the Hub, a folder in the cache and copies on disk."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from ..state import SubspaceState
from .files import read_json, sha256_of
from .names import HUB_ID


_CONFIG_FILE = "config.json"
_WEIGHTS = (".safetensors", ".bin")
_CACHED = re.compile(r"(?:.*[/\\])?models--([^/\\]+)[/\\]snapshots[/\\][^/\\]+")
_ADDRESS = re.compile(r"https?://(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)(?:/tree/main)?")
_SHA256 = re.compile(r"[0-9a-f]{64}")

# Suffix of the 4-bit copies that Unsloth keeps beside its models.
_QUANTIZED = re.compile(r"(?:-unsloth)?-bnb-4bit$")

# Entries of a configuration that record how and by what it was saved, not what the model is.
_INCIDENTAL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "unsloth_fixed"}
_IN_BITS = {"quantization_config"}


def base_name(name: str | None) -> str | None:
    """Return a base model's name as it is written everywhere: the Hub id instead of its cache folder or address."""
    stripped = (name or "").strip().rstrip("/\\") or (name or "").strip()
    if match := _CACHED.fullmatch(stripped):
        return match[1].replace("--", "/")
    if match := _ADDRESS.fullmatch(stripped):
        return match[1]
    return stripped or None


def published_name(name: str | None) -> str | None:
    """Return the name if it is one on the Hub, else None, to keep paths of the writer's machine private."""
    name = base_name(name)
    if name is None or not HUB_ID.fullmatch(name) or name.startswith(".") or os.path.exists(name):
        return None
    return name


def check_base_name(name: object) -> None:
    """Refuse a base model name, given by a user, that names nothing.

    Raises:
        ValueError: If it is neither None nor text with a name in it. The message shows what was found.
    """
    if name is not None and (not isinstance(name, str) or base_name(name) is None):
        raise ValueError(f"base_model is {name!r}, expected a Hub id or a folder")


def common_base(names: Mapping[str, str | None], base: str | None = None) -> str | None:
    """Return the one base model of several adapters. An adapter that does not name its base model fits any.

    Args:
        names: Base model of each adapter, as the adapter names it.
        base: Base model that the adapters must have. None means that of the first adapter that names one.

    Returns:
        The name of the base model, on the Hub where there is one; None if no name is known.

    Raises:
        ValueError: If an adapter has another base model. The message names the adapter.
    """
    base = base_name(base)
    known = {None, base}
    for adapter, name in names.items():
        if (found := base_name(name)) in known:
            continue
        if base is not None and not is_same_model(found, base):
            raise of_another_base(adapter, found, base)
        known.add(found)
        base = base if published_name(base) else found
    return base


def of_another_base(adapter: str, found: str | None, base: str) -> ValueError:
    """Return the error for an adapter whose base model's name stands for another model than the expected one."""
    return ValueError(
        f"adapter {adapter!r} belongs to base model {found!r}, expected {base!r}; if both are the same model, name it "
        "with base_model= (share-hf: --base-model)"
    )


def named_alike(
    ours: SubspaceState, theirs: SubspaceState, base_model: str | None = None
) -> tuple[SubspaceState, SubspaceState]:
    """Return two subspaces of one base model, with one name for it.

    Args:
        ours: First subspace.
        theirs: Second subspace, from another writer.
        base_model: Name that both get, whatever they call their base model. It is not checked.

    Raises:
        ValueError: If they may belong to different base models. The message names both.
    """
    names = ours.base_model_name_or_path, theirs.base_model_name_or_path
    if base_model is None and None in names:
        return ours, theirs
    if base_model is None and not is_same_model(*names):
        raise ValueError(
            f"the other subspace belongs to base model {names[1]!r}, expected {names[0]!r}; if both are the same "
            "model, name it with base_model= (share-hf: --base-model)"
        )
    name = base_name(base_model) or published_name(names[1]) or names[0]
    return replace(ours, base_model_name_or_path=name), replace(theirs, base_model_name_or_path=name)


def is_same_model(first: str, second: str) -> bool:
    """Return whether two names certainly stand for one model: also a 4-bit copy, or the same files on this machine."""
    if first == second:
        return True
    folders = [_folder_of(name) for name in (first, second)]
    configs = [_config_of(folder) for folder in folders]
    if None not in map(published_name, (first, second)) and _QUANTIZED.sub("", first) == _QUANTIZED.sub("", second):
        return None in configs or _without(configs[0], _IN_BITS) == _without(configs[1], _IN_BITS)
    if None in configs or configs[0] != configs[1]:
        return False
    ours, theirs = (_weights_of(folder) for folder in folders)
    if not ours or ours.keys() != theirs.keys():
        return False
    pairs = [(path, theirs[name]) for name, path in ours.items()]
    # Compare sizes first: checksums take a minute for ten gigabytes.
    return all(a.stat().st_size == b.stat().st_size for a, b in pairs) and all(
        _checksum(a) == _checksum(b) for a, b in pairs
    )


def _folder_of(name: str) -> Path | None:
    """Return a model's folder on this machine, its own or its snapshot in the cache; None if there is none."""
    if os.path.isdir(folder := os.path.expanduser(name)):
        return Path(folder)
    with suppress(HFValidationError):
        cached = try_to_load_from_cache(name, _CONFIG_FILE)
        return Path(cached).parent if isinstance(cached, str) else None
    return None


def _config_of(folder: Path | None) -> dict[str, Any] | None:
    """Return a model's configuration without its incidental entries; None if there is none that can be read."""
    if folder is None or not (folder / _CONFIG_FILE).is_file():
        return None
    try:
        config = read_json(folder / _CONFIG_FILE)
    except ValueError:
        return None
    return _without(config, _INCIDENTAL)


def _without(config: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


def _weights_of(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir() if path.suffix in _WEIGHTS and path.is_file()}


def _checksum(path: Path) -> str:
    """Return the SHA-256 of a file. The cache names large files by their SHA-256, so those need not be read."""
    blob = path.resolve()
    return blob.name if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) else sha256_of(path)
