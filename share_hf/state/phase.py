"""The phases in which a task is trained."""

from __future__ import annotations

from enum import Enum


class Phase(str, Enum):
    """Phase of learning, which is one optimizer run over what it trains. It also records how a task was learned.

    Attributes:
        INIT: Training of free factors of rank p, as in a LoRA, before there is a subspace to build on.
        ADAPT: Training of temporary factors and their coefficients (Sec. 3.2.2).
        COEFFICIENTS: Training of the coefficients of a new task in the frozen basis.
        FINETUNE: Training of the coefficients of a task that was merged (Sec. 3.2.3).
        ADAPTER: No training: the task arrived as a LoRA and was merged unchanged.
    """

    INIT = "init"
    ADAPT = "adapt"
    COEFFICIENTS = "coefficients"
    FINETUNE = "finetune"
    ADAPTER = "adapter"

    # A member converts to its value as text on every version of Python.
    __str__ = str.__str__
    __format__ = str.__format__
