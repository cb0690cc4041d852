"""What a `SharedSubspace` consists of: what it holds, and how its tasks are applied, exported and edited."""

from .applying import Applying
from .editing import Editing
from .exporting import Exporting


__all__ = ["Applying", "Editing", "Exporting"]
