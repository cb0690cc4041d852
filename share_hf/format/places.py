"""Where adapters are, by the name that each gets as a task."""

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
        places: Folders, files or hub ids.
        mended: By task name, what its place is called, where no task can be called that.
    """

    places: dict[str, str | Path]
    mended: dict[str, str] = field(default_factory=dict)


def named_places(adapters: Adapters, taken: Iterable[str] = ()) -> NamedPlaces:
    """Folders or hub ids by task name; in a list, the last part of each is its task's name.

    Args:
        adapters: At least one. A name in a list that no task can have is mended; one that is given must be usable.
        taken: Names of the tasks there are.

    Raises:
        ValueError: If there are none, or a name is unusable or taken.
    """
    if isinstance(adapters, (str, os.PathLike)):
        raise ValueError(f"adapters is {adapters!r}, expected a list of folders or hub ids, or a dict by task name")
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
    """The name that an adapter gets from its place; one that no task can have is mended.

    Raises:
        ValueError: If nothing of the place's name can stay in a task's.
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
