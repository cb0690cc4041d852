"""Where adapters are, by the name that each gets as a task."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from .lora import LoraAdapter, read_lora
from .names import check_task_name


_SHOWN = 20  # broken adapters in a message

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


def read_loras(
    places: Mapping[str, str | Path], *, token: str | bool | None = None, progress: bool = True
) -> dict[str, LoraAdapter]:
    """Plain LoRAs by task name, all of them looked at before any is used.

    Args:
        places: Folders or hub ids by task name.
        token: For the hub.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: As for `read_lora`; where several cannot be used, naming each of them and what ails it.
    """
    loras, broken = {}, {}
    for name, place in tqdm(
        places.items(), desc="Reading adapters", unit="adapter", leave=False, disable=not progress
    ):
        try:
            loras[name] = read_lora(place, token=token)
        except ValueError as error:
            broken[name] = error
    if len(broken) == 1:
        raise next(iter(broken.values()))
    if broken:
        lines = [f"{name}: {error}" for name, error in list(broken.items())[:_SHOWN]]
        lines += [f"and {len(broken) - _SHOWN} more"] * (len(broken) > _SHOWN)
        raise ValueError("\n  ".join([f"{len(broken)} of {len(places)} adapters cannot be used", *lines]))
    return loras
