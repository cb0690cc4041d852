"""Shared parts of the commands: opening the places that arguments name."""

from __future__ import annotations

import difflib
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from peft.utils import CONFIG_NAME

from share_hf import SharedSubspace
from share_hf.format.index import INDEX_FILE
from share_hf.format.replacing import holds

from .tables import names


def load(place: str, args: Namespace, *, revision: str | None = None) -> SharedSubspace:
    """Load the subspace in a folder or repository."""
    with naming_what_is_missing([place], INDEX_FILE):
        return SharedSubspace.from_pretrained(place, revision=revision, token=args.token)


@contextmanager
def naming_what_is_missing(places: Iterable[str], file: str) -> Iterator[None]:
    """Report which places are neither folders nor repositories, and which folder with such a file may be meant."""
    try:
        yield
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HFValidationError) as error:
        missing = [place for place in places if not Path(place).is_dir()]
        folders = {str(path.parent) for place in missing for path in Path(place).parent.glob(f"*/{file}")}
        near = [match for place in missing for match in difflib.get_close_matches(place, folders, n=1)]
        advice = f", did you mean {names(near)}?" if near else "; a private one needs --token or `hf auth login`"
        raise ValueError(f"{names(missing)}: no such folder, and no repository that could be read{advice}") from error


def expect_no_adapter(folder: Path, advice: str = "expected another folder") -> None:
    """Refuse to overwrite a subspace, or to write into the folder of an adapter."""
    if holds(folder, INDEX_FILE):
        raise ValueError(f"{folder} is already a shared subspace, {advice}")
    if holds(folder, CONFIG_NAME):
        raise ValueError(f"{folder} holds an adapter, expected another folder")
