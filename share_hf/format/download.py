"""One file of a repository, refused before it is downloaded where it cannot be what it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download


def download(repo_id: str, name: str, *, limit: int | None = None, **options: Any) -> Path:
    """Download a file, or find it in the cache.

    Args:
        repo_id: Repository of the file.
        name: Path of the file in it.
        limit: Most bytes that the file may have.
        **options: As for `hf_hub_download`.

    Raises:
        ValueError: If the hub says that the file is larger; nothing was downloaded then.
    """
    if limit is not None:
        size = hf_hub_download(repo_id, name, dry_run=True, **options).file_size
        if size is not None and size > limit:
            raise ValueError(f"{repo_id}: {name} has {size} bytes, expected at most {limit}")
    return Path(hf_hub_download(repo_id, name, **options))
