"""Tasks with different labels on one model for classification.

PEFT keeps one head shape for all adapters, so the model has the labels of the largest task. Labels that a smaller task
does not have are masked in the output of the head, so that neither loss nor prediction ever sees them. The saved head
of the task rules them out by itself.
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
    """Sets the outputs of a classification head beyond a task's own labels to the lowest number of their dtype.

    The task is the active adapter, or the adapter of each sample in a mixed batch, unless `of_task` overrides it.

    Args:
        model: Model for classification, with or without adapters.
        num_labels_of: Function that returns the number of labels of a task, or None if none of its outputs is masked.
    """

    def __init__(self, model: nn.Module, num_labels_of: Callable[[str], int | None]) -> None:
        self._num_labels_of = num_labels_of
        self._task: str | None = None
        self._masked: nn.Module | None = None
        self.attach(model)

    def attach(self, model: nn.Module) -> None:
        """Find the head of the model, which exists once the model has a task with a head."""
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
        """Use the labels of this task within the block, whichever adapter is active."""
        before, self._task = self._task, task
        try:
            yield
        finally:
            self._task = before

    def task_of(self, adapter: str) -> str:
        """Return the task whose labels are not masked while this adapter is active."""
        return self._task or adapter

    def num_labels_of(self, adapter: str) -> int | None:
        """Return the number of labels that are not masked while this adapter is active, None if none is masked."""
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
    """Return the task of each sample in a mixed batch; an empty list if one task applies to all samples."""
    batch = module.share_rows.current() if isinstance(module, MixedHead) else None
    return [] if batch is None else batch.names_of(samples)


class LabelSmootherOfTask:
    """Label smoothing over a task's own labels: a share of the masked ones would make the loss infinite.

    Args:
        smoother: The Trainer's label smoother, over all labels.
        num_labels: Function that returns the number of labels of the current task, or of the task of each sample in a
            mixed batch. None stands for all labels.
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
