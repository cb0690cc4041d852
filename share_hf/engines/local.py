"""One process, or several under DDP: every process has the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from peft import PeftModel

from ..tuner.master_weights import MasterWeights
from .engine import Engine, unprepare


class LocalEngine(Engine):
    """The Trainer's own preparation of the model, undone after each phase."""

    @contextmanager
    def train_ready(self) -> Iterator[None]:
        with super().train_ready():
            model = cast(PeftModel, self.trainer.model)
            masters = MasterWeights(model, model.active_adapters)
            try:
                yield
            finally:
                masters.release()

    @contextmanager
    def inference_ready(self) -> Iterator[None]:
        try:
            yield
        finally:
            unprepare(self.trainer)

    def release(self) -> None:
        unprepare(self.trainer)

    def recover(self) -> None:
        unprepare(self.trainer)
