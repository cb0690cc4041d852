"""Download one file of a repository, unless it is larger than it may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download


def download(repo_id: str, name: str, *, limit: int | None = None, **options: Any) -> Path:
    """Download a file, or find it in the cache.

    Args:
        repo_id: Repository of the file.
        name: Path of the file in the repository.
        limit: Largest size in bytes that is accepted. None means any.
        **options: Options of `hf_hub_download`.

    Raises:
        ValueError: If the Hub reports a larger file. Nothing is downloaded in this case.
    """
    if limit is not None:
        size = hf_hub_download(repo_id, name, dry_run=True, **options).file_size
        if size is not None and size > limit:
            raise ValueError(f"{repo_id}: {name} has {size} bytes, expected at most {limit}")
    return Path(hf_hub_download(repo_id, name, **options))
