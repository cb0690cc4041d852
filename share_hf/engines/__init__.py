"""Engines that run phases: one protocol for a single process, DDP, DeepSpeed and FSDP."""

from .checks import check_foreign_engine, check_heads, check_placement
from .choice import engine_for, engine_that_wrote, take_trained_values
from .division import Division, dividing_modules
from .engine import Engine
from .lost_ranks import naming_lost_ranks
from .processes import leave_to_gloo, on_first_process, together


__all__ = [
    "Division",
    "Engine",
    "check_foreign_engine",
    "check_heads",
    "check_placement",
    "dividing_modules",
    "engine_for",
    "engine_that_wrote",
    "leave_to_gloo",
    "naming_lost_ranks",
    "on_first_process",
    "take_trained_values",
    "together",
]
