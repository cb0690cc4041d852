"""How a task is trained, or was."""

from __future__ import annotations

from enum import Enum


class Phase(str, Enum):
    """A phase of learning: one optimizer run over what it trains. Also tells how a task came into the subspace.

    Attributes:
        INIT: Free factors of rank p, as in a LoRA, before there is a subspace to build on.
        ADAPT: Temporary factors and their coefficients (Sec. 3.2.2).
        COEFFICIENTS: The coefficients of a new task in the frozen basis.
        FINETUNE: The coefficients of a task that was merged (Sec. 3.2.3).
        ADAPTER: None of them: the task arrived as a LoRA and was merged as it was.
    """

    INIT = "init"
    ADAPT = "adapt"
    COEFFICIENTS = "coefficients"
    FINETUNE = "finetune"
    ADAPTER = "adapter"

    # A member reads as its value wherever text is made of it, on every version of Python.
    __str__ = str.__str__
    __format__ = str.__format__
