"""Refuse whole subspaces where single adapters are expected: the LoRA at their root is only one of their tasks."""

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
    """Refuse a whole subspace as the place of an adapter: its root LoRA would silently stand for all its tasks.

    A place that names the file of that LoRA asks for it alone, and so does the branch of a task on the Hub.

    Args:
        place: Folder, file, or place on the Hub from which a LoRA was read.
        token: Token for the Hub.

    Raises:
        ValueError: If it is a whole subspace, in which case the message gives the ways to use its tasks, or if its
            index is damaged.
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
    except EntryNotFoundError:  # also if, offline, the cache has the adapter but knows nothing of an index
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
