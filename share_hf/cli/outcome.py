"""What a command found or did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a command found or did, for a person and as JSON."""

    text: str
    facts: dict[str, Any]
