"""Adapters given to a command, in its arguments or in a file, and the results of reading them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from share_hf.format.collection import Reading
from share_hf.format.locating import last_part
from share_hf.format.places import NamedPlaces, name_of

from . import located_adapter
from .outcome import Outcome


_MOST_BYTES = 2**24  # size limit of a list, far above any that a person maintains


def adapters_of(args: Namespace) -> NamedPlaces:
    """Return the places of the adapters that a command is given, by task name.

    Raises:
        ValueError: If two adapters have the same name, or a list cannot be read.
    """
    located = [*args.adapters, *(_listed(args.from_file) if args.from_file is not None else ())]
    named = NamedPlaces({})
    for given, place in located:
        if not place:
            raise ValueError(f"adapter {given!r} has no place, expected name=place or a place")
        name = _name_by_place(place) if given == Path(place).name else given
        if name in named.places:
            raise ValueError(
                f"{named.places[name]} and {place} are both called {name!r}, expected name=place for one of them"
            )
        named.places[name] = place
        if name not in (given, last := last_part(place)):
            named.mended[name] = last
    return named


def _name_by_place(place: str) -> str:
    if "*" in place and not Path(place).exists():
        raise ValueError(f"{place}: no such folder or file")
    return name_of(place)


def of_reading(args: Namespace) -> dict[str, Any]:
    """Return the options with which the adapters are read."""
    names = ("base_model", "component", "skip_bad", "token", "progress")
    return {name: getattr(args, name) for name in names}


def with_reading(outcome: Outcome, reading: Reading) -> Outcome:
    """Add the results of reading the adapters to the outcome of a command."""
    lines = reading.lines()
    text = "\n".join([*lines, "", outcome.text]) if lines else outcome.text
    return Outcome(text, {**outcome.facts, **asdict(reading)})


def _listed(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the names and places in a list, one per line, skipping blank lines and comments."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"{path}: expected a list of adapters, one per line, of at most {_MOST_BYTES} bytes")
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a list of adapters, one per line, as text ({error})") from error
    places = [place for line in lines if (place := line.partition(" #")[0].strip()) and not place.startswith("#")]
    if not places:
        raise ValueError(f"{path}: lists no adapters, expected one per line")
    yield from map(located_adapter, places)
