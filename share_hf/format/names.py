"""Names of tasks: they must be valid for a folder, a branch, a PEFT adapter and an attribute of a module alike."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from torch import nn


# Valid ids of repositories on the Hub, with or without an organization.
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

_LONGEST = 64
_PATTERN = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_-]{{0,{_LONGEST - 1}}}")
_REFUSED = re.compile(r"main|default|ref|HEAD|step-\d{4}-.*|[0-9a-f]{40}", re.IGNORECASE)

# Names that a folder cannot have on Windows.
_DEVICES = re.compile(r"con|prn|aux|nul|com[0-9]|lpt[0-9]", re.IGNORECASE)

_ATTRIBUTES = frozenset(dir(nn.ModuleDict())) | frozenset(dir(nn.ParameterDict()))

# Parameters of the layers in a head: PEFT distinguishes them from adapters by their names.
_PARAMETERS = frozenset({"weight", "bias"})


def check_task_name(name: str, taken: Iterable[str] = ()) -> None:
    """Refuse a name that some part of the stack cannot handle, before anything is written.

    Args:
        name: Name of a new task.
        taken: Names of the existing tasks.

    Raises:
        ValueError: If the name is not 1 to 64 letters, digits, `_` and `-` starting with a letter or digit, has a
            meaning of its own (`main`, `default`, a commit, a step tag, an attribute of `torch.nn.ModuleDict`, a
            parameter of a layer, a device of Windows), or is taken, ignoring case.
    """
    _check_usable(name)
    if _DEVICES.fullmatch(name):
        raise ValueError(f"task name {name!r} is a device on Windows, expected another name: no folder can have it")
    if name in _PARAMETERS:
        raise ValueError(f"task name {name!r} is a parameter of the layers of a head, expected another name")
    for other in taken:
        if other.lower() == name.lower():
            raise ValueError(_taken(name, other))


def mended_name(text: str) -> str:
    """Return a task name that `check_task_name` accepts, as close as possible to a text such as a folder's name.

    Raises:
        ValueError: If no letter or digit of the text can be kept.
    """
    letters = (letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", "".join(letters)).strip("-_")
    if not name:
        raise ValueError(f"no task can be called {text!r}, expected another name")
    try:
        check_task_name(name[:_LONGEST])
    except ValueError:  # the name has a meaning of its own
        name = f"task-{name}"
    return name[:_LONGEST].rstrip("-_")


def check_stored_names(names: Iterable[str]) -> None:
    """Refuse the tasks of a tree if a name is unusable or occurs twice.

    Older trees may have names that `check_task_name` now refuses.

    Raises:
        ValueError: If a name is unusable, or occurs twice when case is ignored.
    """
    folded: dict[str, str] = {}
    for name in names:
        _check_usable(name)
        if (other := folded.get(name.lower())) is not None:
            raise ValueError(_taken(name, other))
        folded[name.lower()] = name


def _check_usable(name: str) -> None:
    if not isinstance(name, str) or not _PATTERN.fullmatch(name):
        raise ValueError(
            f"task name {name!r} is not usable, expected 1 to 64 letters, digits, '_' or '-', starting with a letter "
            "or digit"
        )
    if _REFUSED.fullmatch(name):
        raise ValueError(f"task name {name!r} is reserved, expected another name: it would be read as a revision")
    if name in _ATTRIBUTES:
        raise ValueError(f"task name {name!r} is an attribute of torch.nn.ModuleDict, expected another name")


def _taken(name: str, other: str) -> str:
    if name == other:
        return f"task {name!r} already exists, expected a new name"
    return f"task name {name!r} differs from {other!r} only in case, which some file systems ignore"


def listing(names: Iterable[str], limit: int = 20) -> str:
    """Return names for a message, no more than a person reads."""
    names = list(names)
    return str(names) if len(names) <= limit else f"{names[:limit]} and {len(names) - limit} more"
