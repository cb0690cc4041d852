"""Heads that come with a task (`modules_to_save`): whether they fit a model, before it is touched."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn


def check_saved_modules(
    model: nn.Module, saved: Iterable[str], head: Collection[str], adapted: Iterable[str] = ()
) -> None:
    """Refuse an adapter that lacks weights of a module that it says it saves, or saves one that it adapts.

    Args:
        model: The base model, with or without adapters.
        saved: The `modules_to_save` of the adapter.
        head: Names of the weights that it has of them.
        adapted: Modules that it adapts.

    Raises:
        ValueError: Naming the module.
    """
    names = [name for name, _ in model.named_modules()]
    for module in saved:
        in_model = any(f".{name}".endswith(f".{module}") for name in names)
        if in_model and not any(f".{module}." in f".{name}" for name in head):
            raise ValueError(f"modules_to_save has {module!r}, but there are no weights of it")
        if any(f".{module}." in f".{name}." for name in adapted):
            raise ValueError(f"modules_to_save has {module!r}, which is adapted too, expected one of both")


def check_head_shapes(model: nn.Module, head: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse weights of a head that have no place, or another shape, in a model.

    Raises:
        ValueError: Naming the weight.
    """
    for name, shape in head.items():
        parameter = _original(model, name)
        if parameter is None:
            raise ValueError(f"{name!r} is stored with the task but not in the model, expected a model with this head")
        expected = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if expected != shape:
            raise ValueError(
                f"{name!r} is stored with shape {shape}, the model's is {expected}: load the base model with "
                f"num_labels={shape[0] if shape else 0}"
            )


def _original(model: nn.Module, name: str) -> Tensor | None:
    """A tensor of the base model by its name there, wherever adapters have wrapped its module."""
    found: object = model
    for part in name.split("."):
        if isinstance(found, AuxiliaryTrainingWrapper):
            found = found.original_module
        found = getattr(found, part, None)
    return found if isinstance(found, Tensor) else None
