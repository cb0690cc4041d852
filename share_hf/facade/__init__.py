"""What a `SharedSubspace` consists of: what it holds, and how its tasks are exported, edited and routed to."""

from .editing import Editing
from .exporting import Exporting
from .routing import Routing


__all__ = ["Editing", "Exporting", "Routing"]
