"""Tasks with different labels on one model for classification.

PEFT keeps one head shape for all adapters, so the model has the labels of the largest task. What a smaller one does
not have is masked where the head is computed, so neither loss nor prediction ever sees it; the head that is kept
rules it out by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.trainer_pt_utils import LabelSmoother

from ..tuner.head import layer_of_labels, shape_of
from ..tuner.mixed_heads import MixedHead


class LabelMask:
    """Sets the outputs of a classification head past a task's own labels to the lowest number there is.

    The task is that of the active adapter, or of each sample's adapter in a mixed batch, unless `of_task` says
    otherwise.

    Args:
        model: A model for classification, with adapters or not.
        num_labels_of: Tells the number of labels of a task; None for one of which nothing is masked.
    """

    def __init__(self, model: nn.Module, num_labels_of: Callable[[str], int | None]) -> None:
        self._num_labels_of = num_labels_of
        self._task: str | None = None
        self._masked: nn.Module | None = None
        self.attach(model)

    def attach(self, model: nn.Module) -> None:
        """Find the head of the model, which is there as soon as a task with a head is."""
        config = getattr(model, "config", None)
        if self._masked is not None or not hasattr(config, "num_labels"):
            return
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                tensors = module.original_module.state_dict(keep_vars=True).items()
                shapes = {f"head.{name}": shape_of(tensor) for name, tensor in tensors}
                if layer_of_labels(shapes, config.num_labels) is not None:
                    self._masked = module
        if self._masked is not None:
            self._masked.register_forward_hook(self._mask)

    @contextmanager
    def of_task(self, task: str) -> Iterator[None]:
        """Within the block, the labels are those of this task, whatever adapter is active."""
        before, self._task = self._task, task
        try:
            yield
        finally:
            self._task = before

    def task_of(self, adapter: str) -> str:
        """The task whose labels are not masked while this adapter is active."""
        return self._task or adapter

    def num_labels_of(self, adapter: str) -> int | None:
        """Number of labels that are not masked while this adapter is active, None if none is masked."""
        return self._num_labels_of(self.task_of(adapter))

    def _mask(self, module: ModulesToSaveWrapper, args: tuple[Any, ...], logits: Tensor) -> Tensor:
        of_model = logits.shape[-1]
        names = _names_of_samples(module, len(logits)) or module.active_adapters[:1] or [""]
        limits = [of_model if (own := self.num_labels_of(name)) is None else own for name in names]
        if min(limits) >= of_model:
            return logits
        limit = torch.tensor(limits, device=logits.device).view(-1, *[1] * (logits.ndim - 1))
        beyond = torch.arange(of_model, device=logits.device) >= limit
        return logits.masked_fill(beyond, torch.finfo(logits.dtype).min)


def _names_of_samples(module: ModulesToSaveWrapper, samples: int) -> list[str]:
    """The task of each sample in a mixed batch; none where there is one task for all."""
    batch = module.share_rows.current() if isinstance(module, MixedHead) else None
    return [] if batch is None else batch.names_of(samples)


class LabelSmootherOfTask:
    """Smooths over a task's own labels: a share of what is masked would make the loss endless.

    Args:
        smoother: The Trainer's, over all labels.
        num_labels: Called for the number of labels of the task at work, or of the task of each sample in a mixed
            batch; None for all.
    """

    def __init__(self, smoother: LabelSmoother, num_labels: Callable[[], int | Sequence[int | None] | None]) -> None:
        self._smoother = smoother
        self._num_labels = num_labels

    def __call__(self, model_output: Any, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
        limits = self._num_labels()
        if limits is None or isinstance(limits, int):
            return self._smoother({"logits": logits[..., :limits]}, labels, *args, **kwargs)
        losses = []
        for limit in dict.fromkeys(limits):
            rows = torch.tensor([own == limit for own in limits], device=logits.device)
            losses.append(self._smoother({"logits": logits[rows][..., :limit]}, labels[rows], *args, **kwargs))
        return torch.stack(losses).sum()
