"""What runs a phase: one protocol, whatever divides the work.

A phase is an optimizer run. Between phases, adapters are whole and in float32 on every process, so that they can come,
go and be merged.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from torch import Tensor


if TYPE_CHECKING:  # datasets and pandas come along, which no command but `train` needs
    from transformers import Trainer


# What other libraries say of each other at every step, and no user can change.
NOISE = (
    ".*broadcast_buffers.*",
    ".*torch.distributed.*is deprecated.*",
    ".*is_gradient_checkpointing.*is deprecated.*",
)


class Engine(ABC):
    """The engine of a trainer of phases.

    Args:
        trainer: Trainer whose phases it runs.

    Attributes:
        writes: Name of the layout of the optimizer's state in its checkpoints.
        keeps_idle_adapters: Whether adapters that a phase does not train hold the same values after it, to the bit.
        is_broken_off: Whether a phase or an evaluation was begun that did not come to its end.
    """

    writes = "PyTorch"
    keeps_idle_adapters = True

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.is_broken_off = False

    def prepare(self) -> None:  # noqa: B027 - most engines need not
        """Prepare the model, once, when the trainer is made."""

    @contextmanager
    def train_ready(self) -> Iterator[None]:
        """A block in which a phase can be trained. `release` ends it, inside of the block."""
        with quietly():
            yield

    @abstractmethod
    def inference_ready(self) -> AbstractContextManager[None]:
        """A block in which the model can be run without training it."""

    @abstractmethod
    def release(self) -> None:
        """Take what a phase needed off the model: adapters are whole, and can come and go."""

    @abstractmethod
    def recover(self) -> None:
        """Take off what was left by a phase that was broken off, without asking other processes, which may be gone.

        Raises:
            RuntimeError: If they have parts of the adapters.
        """

    def after_backward(self) -> None:  # noqa: B027
        """Finish the gradients of a step, right before the optimizer takes it."""

    def gather(self) -> Mapping[str, Tensor] | None:
        """Whole float32 values of what is trained, by name, in the middle of a phase; None if the model has them."""
        return None


def unprepare(trainer: Trainer) -> None:
    """Undo what a model is prepared by for a phase or an evaluation: the next would wrap it again, or not at all."""
    trainer.accelerator._models.clear()
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    vars(trainer.model).pop("_is_accelerate_prepared", None)


@contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings that make the output of an engine unreadable."""
    with warnings.catch_warnings():
        for message in NOISE:
            warnings.filterwarnings("ignore", message, FutureWarning)
        yield
