"""Names of tasks: what a folder, a branch, a PEFT adapter and an attribute of a module can all be called."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn


# What a repository of the hub can be called, with its organization or without.
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_REFUSED = re.compile(r"main|default|ref|HEAD|step-\d{4}-.*|[0-9a-f]{40}", re.IGNORECASE)


def check_task_name(name: str, taken: Iterable[str] = ()) -> None:
    """Refuse a name that some part of the stack could not carry, before anything is written.

    Args:
        name: The name of a new task.
        taken: Names of the tasks there are.

    Raises:
        ValueError: If the name is not 1 to 64 letters, digits, `_` and `-` starting with a letter or digit, has a
            meaning of its own (`main`, `default`, a commit, a step tag, an attribute of `torch.nn.ModuleDict`), or is
            taken, in this or another case.
    """
    if not isinstance(name, str) or not _PATTERN.fullmatch(name):
        raise ValueError(
            f"task name {name!r} is not usable, expected 1 to 64 letters, digits, '_' or '-', "
            "the first a letter or digit"
        )
    if _REFUSED.fullmatch(name):
        raise ValueError(f"task name {name!r} is reserved, expected another name: it would be read as a revision")
    if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise ValueError(f"task name {name!r} is an attribute of torch.nn.ModuleDict, expected another name")
    for other in taken:
        if other == name:
            raise ValueError(f"task {name!r} exists already, expected a new name")
        if other.lower() == name.lower():
            raise ValueError(f"task name {name!r} equals {other!r} but for case, which some file systems cannot tell")


def listing(names: Iterable[str], limit: int = 20) -> str:
    """Names for a message, not more than a person reads."""
    names = list(names)
    return str(names) if len(names) <= limit else f"{names[:limit]} and {len(names) - limit} more"
