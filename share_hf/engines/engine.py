"""The protocol of engines, which run phases however the work is divided.

A phase is an optimizer run. Between phases, adapters are whole and in float32 on every process, so that they can be
added, removed and merged.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from torch import Tensor


if TYPE_CHECKING:  # the import also loads datasets and pandas, which only the `train` command needs
    from transformers import Trainer


# Warnings that other libraries raise about each other at every step, and that no user can act on.
NOISE = (
    ".*broadcast_buffers.*",
    ".*torch.distributed.*is deprecated.*",
    ".*is_gradient_checkpointing.*is deprecated.*",
)


class Engine(ABC):
    """Base class of the engines that run the phases of a trainer.

    Args:
        trainer: Trainer whose phases the engine runs.

    Attributes:
        writes: Name of the layout of the optimizer's state in the engine's checkpoints.
        keeps_idle_adapters: Whether adapters that a phase does not train stay bit-identical.
        is_broken_off: Whether a phase or an evaluation has begun and not (yet) come to its end.
    """

    writes = "PyTorch"
    keeps_idle_adapters = True

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.is_broken_off = False

    def prepare(self) -> None:  # noqa: B027 - most engines need not
        """Prepare the model once, when the trainer is created."""

    @contextmanager
    def train_ready(self) -> Iterator[None]:
        """Return a context in which a phase can be trained. `release` ends the phase inside the block."""
        with quietly():
            yield

    @abstractmethod
    def inference_ready(self) -> AbstractContextManager[None]:
        """Return a context in which the model can be run without training it."""

    @abstractmethod
    def release(self) -> None:
        """Remove what a phase needed from the model: adapters become whole, and can be added and removed."""

    @abstractmethod
    def recover(self) -> None:
        """Remove what an interrupted phase left, without communicating with other processes, which may be gone.

        Raises:
            RuntimeError: If other processes hold parts of the adapters.
        """

    def after_backward(self) -> None:  # noqa: B027
        """Finish the gradients of a step right before the optimizer takes it."""

    def gather(self) -> Mapping[str, Tensor] | None:
        """Return whole float32 values of trained parameters, by name, during a phase; None if the model has them."""
        return None


def unprepare(trainer: Trainer) -> None:
    """Undo the preparation of a model for a phase or an evaluation: the next would wrap it again, or not at all."""
    getattr(trainer.accelerator, "_models", []).clear()
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    vars(trainer.model).pop("_is_accelerate_prepared", None)


@contextmanager
def quietly() -> Iterator[None]:
    """Silence the warnings that make the output of an engine unreadable."""
    with warnings.catch_warnings():
        for message in NOISE:
            warnings.filterwarnings("ignore", message, FutureWarning)
        yield
