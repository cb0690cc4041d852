"""DeepSpeed's ZeRO: adapters that it partitions are put together again after each phase.

DeepSpeed casts the whole model to its precision and keeps float32 values of trained parameters in its optimizer.
ZeRO-3 also partitions every parameter and hooks into every module. The parameters of the base model stay partitioned;
the parameters of adapters, which are small, become plain ones on every process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from transformers.integrations.deepspeed import deepspeed_init

from ..tuner.model import ShareModel, share_layers
from .engine import Engine, quietly, unprepare


class DeepSpeedEngine(Engine):
    """ZeRO-1 and ZeRO-2: every process has the whole model and a part of the optimizer."""

    writes = "DeepSpeed"
    keeps_idle_adapters = False  # DeepSpeed casts them too

    @contextmanager
    def inference_ready(self) -> Iterator[None]:
        # Parameters are whole. The Trainer would look for a DeepSpeed engine even if nothing has been trained yet.
        trainer = self.trainer
        enabled, trainer.is_deepspeed_enabled = trainer.is_deepspeed_enabled, False
        try:
            yield
        finally:
            trainer.is_deepspeed_enabled = enabled
            unprepare(trainer)

    def release(self) -> None:
        self._release(self.gather() or {})

    def recover(self) -> None:
        self._release({})

    def gather(self) -> dict[str, Tensor] | None:
        in_phase = self.trainer.deepspeed is not None and self.is_broken_off
        return trained_parameters(self.trainer.model) if in_phase else None

    def _release(self, trained: Mapping[str, Tensor]) -> None:
        if self.trainer.deepspeed is not None:
            self._take_off(trained)
        else:
            unprepare(self.trainer)

    def _take_off(self, trained: Mapping[str, Tensor]) -> None:
        self.trainer.model_wrapped = self.trainer.model
        make_adapters_whole(self.trainer.model, trained)


class ZeRO3Engine(DeepSpeedEngine):
    """ZeRO-3: every process has a part of each parameter, and gathers the parameter where it is used."""

    writes = "ZeRO-3"

    @contextmanager
    def train_ready(self) -> Iterator[None]:
        with without_empty_parameters(self.trainer.model), super().train_ready():
            yield

    @contextmanager
    def inference_ready(self) -> Iterator[None]:
        trainer = self.trainer
        with without_empty_parameters(trainer.model), quietly():
            deepspeed_init(trainer, num_training_steps=0, inference=True)
            trainer.deepspeed = trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
            self.is_broken_off = True
            yield
            self._take_off({})
            self.is_broken_off = False

    def recover(self) -> None:
        raise RuntimeError(
            "a phase was interrupted under ZeRO-3, which leaves adapters in parts, expected a new process: "
            "resume_from_checkpoint=True continues from what was saved"
        )

    def _take_off(self, trained: Mapping[str, Tensor]) -> None:
        trainer = self.trainer
        trainer.accelerator.free_memory()
        trainer.deepspeed = None
        for parameter in trainer.model.parameters():
            if hasattr(parameter, "ds_id"):
                # A parameter that was gathered in the inference mode of a scorer, and kept, would block gradients.
                parameter.partition()
        for module in trainer.model.modules():
            # The engine binds these functions to a module. A copy of it, such as a new task's head, would call them.
            for name in ("pre_bwd_fn", "post_bwd_fn"):
                vars(module).pop(name, None)
        super()._take_off(trained)


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return whole float32 values of the trained parameters, by name, on the CPU of every process."""
    from deepspeed.utils import safe_get_full_fp32_param

    values = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = safe_get_full_fp32_param(parameter)
            values[name] = (parameter.data if value is None else value).detach().float().cpu().clone()
    return values


def make_adapters_whole(model: nn.Module, trained: Mapping[str, Tensor]) -> None:
    """Replace the parameters of all adapters and heads by plain float32 ones on every process.

    Args:
        model: Model with Share adapters.
        trained: Values of parameters by name. Other parameters keep their current values.
    """
    import deepspeed

    adapters = [
        (module, name, f"{path}.{name}", parameter)
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if f".{ShareModel.prefix}" in path or ".modules_to_save." in path
    ]
    partitioned = [parameter for *_, parameter in adapters if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned):
        whole = [
            (trained[path].to(parameter.device) if path in trained else parameter.data.float()).clone()
            for _, _, path, parameter in adapters
        ]
    for (module, name, _, parameter), value in zip(adapters, whole, strict=True):
        setattr(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))


@contextmanager
def without_empty_parameters(model: nn.Module) -> Iterator[None]:
    """Remove tasks with empty parameters from layers within the block, as ZeRO-3 cannot partition these.

    Coefficients are empty where all updates of a layer are zero so far. The layer computes the same without the task.
    """
    taken: list[tuple[nn.ParameterDict, str, nn.Parameter]] = []
    for layer in share_layers(model).values():
        for task in layer.tasks:
            holders = [getattr(layer, name) for name in layer.adapter_layer_names]
            found = [(holder, task, holder[task]) for holder in holders if task in holder]
            if any(parameter.numel() == 0 for *_, parameter in found):
                taken += found
    for holder, task, _ in taken:
        del holder[task]
    try:
        yield
    finally:
        for holder, task, parameter in taken:
            holder[task] = parameter
