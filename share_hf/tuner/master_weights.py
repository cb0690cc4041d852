"""Float32 values of the modules that a task keeps whole, such as its head, while they are trained."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .mixed_heads import head_wrappers


_HALF = (torch.float16, torch.bfloat16)


class MasterWeights:
    """Keeps modules of tasks in float32 on a model that is loaded in half precision, until they are released.

    PEFT copies such a module in the dtype of the model. In bfloat16, an optimizer step smaller than about 1/512 of a
    weight is lost, as most steps at the end of a schedule are. In float16, gradients could not be unscaled. What the
    model computes around the module stays in the dtype of the model.

    Args:
        model: Model with PEFT adapters.
        tasks: Names of the adapters that are trained.
    """

    def __init__(self, model: nn.Module, tasks: Collection[str]) -> None:
        self._dtypes: dict[nn.Parameter, torch.dtype] = {}
        self._hooks: list[RemovableHandle] = []
        for wrapper in head_wrappers(model).values():
            for task in wrapper.modules_to_save.keys() & set(tasks):
                self._take(wrapper.modules_to_save[task])

    def _take(self, module: nn.Module) -> None:
        half = {parameter: parameter.dtype for parameter in module.parameters() if parameter.dtype in _HALF}
        if not half:
            return
        outside = next(iter(half.values()))
        for parameter in half:
            parameter.data = parameter.data.float()
        self._dtypes |= half

        def cast_inputs(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            return _cast((args, kwargs), outside, torch.float32)

        def cast_outputs(module: nn.Module, args: Any, output: Any) -> Any:
            return _cast(output, torch.float32, outside)

        self._hooks += [
            module.register_forward_pre_hook(cast_inputs, with_kwargs=True),
            module.register_forward_hook(cast_outputs),
        ]

    def release(self) -> None:
        """Round the modules to the dtype that they had."""
        for hook in self._hooks:
            hook.remove()
        for parameter, dtype in self._dtypes.items():
            parameter.data, parameter.grad = parameter.data.to(dtype), None
        self._dtypes, self._hooks = {}, []


def _cast(values: Any, found: torch.dtype, wanted: torch.dtype) -> Any:
    """Cast all tensors of one dtype, wherever they are in nested values, to another."""
    return recursively_apply(lambda tensor: tensor.to(wanted), values, test_type=lambda x: _is_of(x, found))


def _is_of(value: Any, dtype: torch.dtype) -> bool:
    return isinstance(value, Tensor) and value.dtype == dtype
