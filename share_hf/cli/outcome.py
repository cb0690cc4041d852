"""The outcome of a command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """The outcome of a command, as text for people and as JSON."""

    text: str
    facts: dict[str, Any]
