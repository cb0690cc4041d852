"""The parts of a `SharedSubspace`: what it holds, and how its tasks are applied, exported, edited and routed to."""

from .applying import Applying
from .editing import Editing
from .exporting import Exporting
from .routing import Routing


__all__ = ["Applying", "Editing", "Exporting", "Routing"]
