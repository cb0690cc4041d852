"""Places of adapters, by the name that each adapter gets as a task."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .locating import last_part
from .names import check_task_name, mended_name


Adapters = Mapping[str, str | os.PathLike] | Sequence[str | os.PathLike]


@dataclass(frozen=True)
class NamedPlaces:
    """Places of adapters, by task name.

    Args:
        places: Folders, files or Hub ids.
        mended: Original name of a place by task name, where the original cannot be the name of a task.
    """

    places: dict[str, str | Path]
    mended: dict[str, str] = field(default_factory=dict)


def named_places(adapters: Adapters, taken: Iterable[str] = ()) -> NamedPlaces:
    """Return folders, files or Hub ids by task name. In a list, the last part of a place becomes its task's name.

    Args:
        adapters: Places, at least one. An unusable name from a list is mended; a name given in a dict must be usable.
        taken: Names of the existing tasks.

    Raises:
        ValueError: If there are no places, or a name is unusable or taken.
    """
    if isinstance(adapters, (str, os.PathLike)):
        raise ValueError(f"adapters is {adapters!r}, expected a list of folders or Hub ids, or a dict by task name")
    if not adapters:
        raise ValueError("no adapters given, expected at least one")
    if isinstance(adapters, Mapping):
        named = NamedPlaces({name: _place(place) for name, place in adapters.items()})
    else:
        named = _named_by_place(map(_place, adapters))
    known = {name.lower(): name for name in taken}
    for name in named.places:
        folded = name.lower() if isinstance(name, str) else None
        check_task_name(name, [known[folded]] if folded in known else [])
        known[folded] = name
    return named


def name_of(place: str | Path) -> str:
    """Return the name that an adapter gets from its place, mended if no task can have it.

    Raises:
        ValueError: If no part of the place's name can be kept in a task's name.
    """
    text = last_part(place)
    try:
        check_task_name(text)
    except ValueError:
        try:
            return mended_name(text)
        except ValueError as error:
            raise ValueError(f"{place}: {error} (a dict gives each its name; share-hf: name=place)") from error
    return text


def _named_by_place(places: Iterable[str | Path]) -> NamedPlaces:
    named = NamedPlaces({})
    for place in places:
        name = name_of(place)
        if name in named.places:
            raise ValueError(
                f"two adapters are called {name!r}, expected a dict that gives each its task name: "
                f"{named.places[name]} and {place}"
            )
        named.places[name] = place
        if name != (text := last_part(place)):
            named.mended[name] = text
    return named


def _place(place: str | os.PathLike) -> str | Path:
    return place if isinstance(place, str) else Path(place)
