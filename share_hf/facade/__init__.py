"""What a `SharedSubspace` consists of: what it holds, how its tasks are exported, and how they are edited."""

from .editing import Editing
from .exporting import Exporting


__all__ = ["Editing", "Exporting"]
