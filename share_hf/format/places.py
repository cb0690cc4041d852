"""Where adapters are, by the name that each gets as a task."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .names import check_task_name


Adapters = Mapping[str, str | os.PathLike] | Sequence[str | os.PathLike]


def named_places(adapters: Adapters, taken: Iterable[str] = ()) -> dict[str, str | Path]:
    """Folders or hub ids by task name; in a list, the last part of each is its task's name.

    Args:
        adapters: At least one.
        taken: Names of the tasks there are.

    Raises:
        ValueError: If there are none, or a name is unusable or taken.
    """
    if isinstance(adapters, (str, os.PathLike)):
        raise ValueError(f"adapters is {adapters!r}, expected a list of folders or hub ids, or a dict by task name")
    if not adapters:
        raise ValueError("no adapters given, expected at least one")
    if isinstance(adapters, Mapping):
        named = dict(adapters)
    else:
        named = {}
        for location in adapters:
            name = Path(location).name
            if name in named:
                raise ValueError(f"two adapters are called {name!r}, expected a dict that gives each its task name")
            named[name] = location
    known = list(taken)
    for name in named:
        check_task_name(name, known)
        known.append(name)
    return {name: place if isinstance(place, str) else Path(place) for name, place in named.items()}
