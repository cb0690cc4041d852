"""Where an adapter's configuration was loaded from, so that the basis it was saved with can be found."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.config import PeftConfig, PeftConfigMixin

from ..hub.basis_file import SUBSPACE_FILE, StoredBasis, read_bases
from ..hub.index import INDEX_FILE, check_file, read_index


_DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "repo_type")


@dataclass(frozen=True)
class AdapterOrigin:
    """A folder or repository, the adapter's place in it, and how to download from it."""

    location: str
    subfolder: str | None = None
    download_options: dict[str, Any] = field(default_factory=dict)


def known_bases(config: PeftConfig) -> dict[str, StoredBasis]:
    """The bases that belong to a configuration: given in memory, or saved beside it; none for a fresh one.

    Raises:
        ValueError: If the configuration was loaded from a place without bases, or they are damaged.
    """
    if (bases := getattr(config, "_share_bases", None)) is not None:
        return bases
    origin = getattr(config, "_share_origin", None)
    if origin is None:
        return {}
    path = find_beside_adapter(origin)
    bases = read_bases(path)
    if (path.parent / INDEX_FILE).is_file():
        check_file(path.parent, read_index(path.parent), SUBSPACE_FILE)
    return bases


def attach_bases(config: PeftConfig, bases: Mapping[str, StoredBasis]) -> None:
    """Let a configuration made in this process bring these bases along, as one loaded from a folder does."""
    config._share_bases = dict(bases)


def find_beside_adapter(origin: AdapterOrigin) -> Path:
    """`subspace.safetensors` in the adapter's folder, its parent or its grandparent, downloaded if need be.

    Raises:
        ValueError: If there is none.
    """
    folder = Path(origin.location, origin.subfolder or "")
    if folder.is_dir():
        for candidate in (folder, folder.absolute().parent, folder.absolute().parent.parent):
            if (path := candidate / SUBSPACE_FILE).is_file():
                return path
    elif not Path(origin.location).is_dir():
        place = PurePosixPath(origin.subfolder or ".")
        for candidate in dict.fromkeys((place, place.parent, place.parent.parent)):
            try:
                for name in (INDEX_FILE, SUBSPACE_FILE):
                    path = hf_hub_download(origin.location, str(candidate / name), **origin.download_options)
            except EntryNotFoundError:
                continue
            return Path(path)
    raise ValueError(f"{folder}: no {SUBSPACE_FILE} in this folder, its parent or its grandparent")


def remember_origins() -> None:
    """Make every loader of PEFT configurations leave a note of its source on SHARE ones.

    One wrapper serves PEFT's loaders and transformers' own; the note is no field, so it is never saved.
    """
    original = PeftConfigMixin.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(
        cls: type[PeftConfigMixin], pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfigMixin:
        config = original(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if config.peft_type == "SHARE":
            options = {name: kwargs[name] for name in _DOWNLOAD_OPTIONS if kwargs.get(name) is not None}
            config._share_origin = AdapterOrigin(str(pretrained_model_name_or_path), subfolder, options)
        return config

    PeftConfigMixin.from_pretrained = classmethod(from_pretrained)
