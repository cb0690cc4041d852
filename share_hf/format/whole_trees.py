"""Whole subspaces where single adapters are expected: the LoRA at their root is one of their tasks only."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from huggingface_hub.errors import EntryNotFoundError
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from .download import download
from .files import MAX_JSON_BYTES
from .index import INDEX_FILE, TreeIndex, read_index
from .locating import Reference, is_weights_file
from .names import listing


def expect_no_tree(place: str | Path, *, token: str | bool | None = None) -> None:
    """Refuse a place of an adapter that is a whole subspace: its root LoRA would stand for all its tasks unnoticed.

    The name of that LoRA's file asks for it alone, and so does the branch of a task on the hub.

    Args:
        place: A folder, a file, or a place on the hub, of which a LoRA was read.
        token: For the hub.

    Raises:
        ValueError: If it is one, with the ways there are to use its tasks; or if its index is damaged.
    """
    path = Path(place)
    if path.exists():
        if (path / INDEX_FILE).is_file():
            _refuse(str(place), read_index(path), str(path / SAFETENSORS_WEIGHTS_NAME))
        return
    reference = None if isinstance(place, Path) else Reference.parse(place)
    if reference is None or is_weights_file(reference.path):
        return
    within = PurePosixPath(reference.path)
    try:
        found = download(
            reference.repo_id,
            (within / INDEX_FILE).as_posix(),
            limit=MAX_JSON_BYTES,
            revision=reference.revision,
            token=token,
        )
    except EntryNotFoundError:  # or nothing that is known of it offline, where the adapter was in the cache
        return
    index = read_index(found.parent)
    if reference.revision is not None and reference.revision == index.default_task:
        return
    weights = (within / SAFETENSORS_WEIGHTS_NAME).as_posix()
    _refuse(str(place), index, str(Reference(reference.repo_id, reference.revision, weights)))


def _refuse(place: str, index: TreeIndex, weights: str) -> None:
    if not index.is_tree:
        return
    raise ValueError(
        f"{place}: is a shared subspace of the tasks {listing(index.tasks)}, expected a single adapter; export its "
        f"tasks first (`share-hf export {place} --all OUT`) and name those, or name {weights} for its default task "
        f"{index.root_task!r} alone"
    )
