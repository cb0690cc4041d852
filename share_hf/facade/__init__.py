"""What a `SharedSubspace` consists of: what it holds, how its tasks are exported, edited, and found by their inputs."""

from .editing import Editing
from .exporting import Exporting
from .routing import Routing


__all__ = ["Editing", "Exporting", "Routing"]
