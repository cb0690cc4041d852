"""Modules kept whole with a task (`modules_to_save`): which modules these are, and whether they fit a model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from peft import TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.utils import logging

from ..format.model_classes import CLASSIFIERS
from ..format.saved_modules import EMBEDDINGS, is_saved, saved_module_of


logger = logging.get_logger(__name__)

# Bias of a label that a task does not have, in a head extended to the labels of its model.
NEVER_PREDICTED = -1e4

# Largest fraction of a model's parameters that may be unmarked. Above it, the marks do not show what was loaded.
_LARGEST_REST = 0.25

_Shape = tuple[int, ...]

# Modules that PEFT cannot wrap, because they have no forward.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def saved_tensors(model: nn.Module, saved: Iterable[str]) -> dict[str, Tensor]:
    """Return the base model's own tensors of the modules that PEFT keeps with a task, by name in the base model.

    Args:
        model: Base model, with or without adapters.
        saved: The `modules_to_save` of the task.
    """
    saved = list(saved)
    return dict(_saved_tensors("", _without_adapters(model), saved)) if saved else {}


def check_apart(adapted: Iterable[str], saved: Collection[str]) -> None:
    """Refuse to adapt a module that is kept whole, even by another task: PEFT wraps a module in one way only.

    Raises:
        ValueError: If a module would be adapted and kept whole. Names the module.
    """
    for module in adapted:
        if (kept := saved_module_of(f"{module}.", saved)) is not None:
            raise ValueError(
                f"modules_to_save has {kept!r}, but {module!r} is adapted too, expected only one of the two"
            )


def check_head(
    model: nn.Module,
    saved: Iterable[str],
    head: Mapping[str, _Shape],
    *,
    may_lack_labels: bool = False,
) -> None:
    """Refuse the modules kept with a task unless PEFT loads exactly these into a model for these `modules_to_save`.

    Args:
        model: Base model, with or without adapters.
        saved: The `modules_to_save` of the task.
        head: Shapes of the kept tensors, by name in the base model.
        may_lack_labels: Whether classification heads may have fewer labels than the model's.

    Raises:
        ValueError: If something does not fit. Names the tensor or module.
    """
    saved = list(saved)
    expected = {name: shape_of(tensor) for name, tensor in saved_tensors(model, saved).items()}
    check_shapes(saved, head, expected, may_lack_labels=may_lack_labels)


def check_shapes(
    saved: Collection[str],
    head: Mapping[str, _Shape],
    expected: Mapping[str, _Shape],
    *,
    may_lack_labels: bool = False,
) -> None:
    """Refuse kept modules as `check_head` does, where `expected` are the shapes of the base model's tensors."""
    for name in expected:
        if name not in head:
            raise ValueError(
                f"modules_to_save has {saved_module_of(name, saved)!r}, but its {name!r} is not stored with the task"
            )
    for name, shape in head.items():
        if name not in expected:
            raise ValueError(f"{name!r} is stored with the task but not in the model, expected a model with this head")
        if shape == expected[name] or (may_lack_labels and _lacks_labels(name, head, expected)):
            continue
        advice = "expected the base model that the task was learned on"
        if _is_embedding(name):
            advice = f"resize the model's vocabulary with resize_token_embeddings({shape[0] if shape else 0})"
        elif shape and shape[1:] == expected[name][1:]:
            advice = f"load the base model with num_labels={shape[0]}"
        raise ValueError(f"{name!r} is stored with shape {shape}, the model's is {expected[name]}: {advice}")


def with_labels_of(of_model: Mapping[str, _Shape], head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Extend a task's head to all labels of a model and rule out those it lacks: PEFT keeps one shape for all tasks.

    Args:
        of_model: Shapes of the model's own tensors of the head, by name.
        head: Tensors of the task's head, by name.
    """
    fitting = dict(head)
    for name, shape in of_model.items():
        if name.endswith(".weight") and tuple(head[name].shape) != shape:
            fitting |= rule_out_labels(head, name.removesuffix(".weight"), head[name].shape[0], shape[0])
    return fitting


def rule_out_labels(
    head: Mapping[str, Tensor], layer: str, num_labels: int, of_model: int, *, several: bool = False
) -> dict[str, Tensor]:
    """Return tensors for the last layer of a head that never predict the labels from `num_labels` on.

    A bias rules these labels out in predictions and probabilities. Without a bias, only a row of weights in the convex
    hull of the others never has the largest logit, whatever the input. The mean of the others is used because it is
    the farthest from all of them. If each label is predicted by the sign of its own logit, zeros never predict it.

    Args:
        head: Tensors by name.
        layer: Name of the layer that computes the logits.
        num_labels: Number of labels of the task.
        of_model: Number of rows that the layer is to have.
        several: Whether an input may have several labels.
    """
    weight, bias = head[f"{layer}.weight"], head.get(f"{layer}.bias")
    missing = of_model - weight.shape[0]
    if bias is None:
        own = weight[:num_labels]
        row = torch.zeros_like(own[:1]) if several else own.float().mean(dim=0, keepdim=True).to(own.dtype)
        return {f"{layer}.weight": torch.cat([own, row.expand(of_model - num_labels, *own.shape[1:])])}
    return {
        f"{layer}.weight": torch.cat([weight, weight.new_zeros(missing, *weight.shape[1:])]),
        f"{layer}.bias": torch.cat([bias[:num_labels], bias.new_full((of_model - num_labels,), NEVER_PREDICTED)]),
    }


def layer_of_labels(names_and_shapes: Mapping[str, _Shape], num_labels: int) -> str | None:
    """Find the layer that computes the logits: the last one, in model order, with an output for each label."""
    layers = [
        name.removesuffix(".weight")
        for name, shape in names_and_shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and shape[0] == num_labels and not _is_embedding(name)
    ]
    return layers[-1] if layers else None


def parts_to_keep(model: nn.Module, task_type: str | None) -> list[str]:
    """Return the modules that a new task has to keep to be the same wherever its base model is loaded.

    These are the modules that the base model's checkpoint lacks, which every process initializes with different random
    values. transformers marks the tensors that a checkpoint has. If there are no marks (a model made from a
    configuration, or a copy), everything outside the pretrained body counts, unless the model is a language model. A
    classifier always keeps everything outside the body, just as PEFT's own classes keep its `classifier`.

    Args:
        model: Base model, with or without adapters.
        task_type: Task type of the configuration.
    """
    base = _without_adapters(model)
    tensors = dict(_parameters("", base))
    unmarked = {name for name, tensor in tensors.items() if not getattr(tensor, "_is_hf_initialized", False)}
    body, embeddings = _body_of(base), _embeddings_of(base)
    outside = {name for name in tensors if body and not name.startswith(f"{body}.")} - embeddings
    inside = unmarked - outside - embeddings
    # Weights that were quantized or loaded by other means have no mark either.
    is_marked = len(unmarked) <= _LARGEST_REST * len(tensors)
    if not is_marked or getattr(base, "is_quantized", False):
        inside = set()
    if not classifies_inputs(base, task_type):
        if is_marked:
            outside &= unmarked
        elif _is_language_model(base):
            outside = set()
    return list(_modules_of("", base, outside | inside, tensors.keys()))


def classifies_inputs(model: nn.Module, task_type: str | None) -> bool:
    """Return whether a model assigns one of its labels to each input: a text, an image, a video or a sound.

    Args:
        model: Base model, with or without adapters.
        task_type: Task type of the configuration. PEFT has such a type for texts only.
    """
    return task_type == TaskType.SEQ_CLS or type(_without_adapters(model)).__name__ in CLASSIFIERS


def shape_of(tensor: Tensor) -> _Shape:
    """Return the shape of a tensor, even if DeepSpeed has partitioned it among processes."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def _saved_tensors(name: str, module: nn.Module, saved: list[str]) -> Iterator[tuple[str, Tensor]]:
    for child_name, child in _children(name, module):
        if is_saved(child_name, saved):
            for tensor_name, tensor in child.state_dict(keep_vars=True).items():
                yield f"{child_name}.{tensor_name}", tensor
        else:
            yield from _saved_tensors(child_name, child, saved)


def _children(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for child_name, child in module.named_children():
        yield f"{name}.{child_name}" if name else child_name, _without_adapters(child)


def _without_adapters(module: nn.Module) -> nn.Module:
    """The module that adapters have been wrapped around."""
    if hasattr(module, "get_base_model"):
        module = module.get_base_model()
    while isinstance(module, (AuxiliaryTrainingWrapper, BaseTunerLayer)):
        module = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.get_base_layer()
    return module


def _parameters(name: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for own_name, parameter in module.named_parameters(recurse=False):
        yield f"{name}.{own_name}" if name else own_name, parameter
    for child_name, child in _children(name, module):
        yield from _parameters(child_name, child)


def _modules_of(name: str, module: nn.Module, kept: Collection[str], tensors: Collection[str]) -> Iterator[str]:
    """Yield the largest modules that hold only parameters to keep, and single layers that hold at least one."""
    prefix = f"{name}." if name else ""
    within = {tensor for tensor in tensors if tensor.startswith(prefix)}
    is_layer = next(module.children(), None) is None
    if name and not isinstance(module, _CONTAINERS) and (is_layer or within <= kept):
        yield name
        return
    direct = {f"{prefix}{own}" for own, _ in module.named_parameters(recurse=False)} & kept
    if direct:
        logger.warning_once(
            f"{sorted(direct)} start from different random values in every process, and modules_to_save cannot keep "
            "them with a task: load the base model from a checkpoint that has them."
        )
    for child_name, child in _children(name, module):
        if any(tensor.startswith(f"{child_name}.") for tensor in kept):
            yield from _modules_of(child_name, child, kept, within)


def _body_of(base: nn.Module) -> str:
    """Name of the pretrained body within a model for a task; empty if the model is the body, or none is known."""
    body = getattr(base, "base_model", base)
    prefix = getattr(base, "base_model_prefix", "")
    return prefix if body is not base and isinstance(getattr(base, prefix, None), nn.Module) else ""


def _is_language_model(base: nn.Module) -> bool:
    return bool(_embeddings_of(base, inputs=False))


def _embeddings_of(base: nn.Module, *, inputs: bool = True) -> set[str]:
    """Names of the embeddings' parameters, which are trained only on request."""
    getters = ["get_output_embeddings", *(["get_input_embeddings"] if inputs else [])]
    found = set()
    for getter in getters:
        try:
            layer = getattr(base, getter, lambda: None)()
        except NotImplementedError:  # a model without a vocabulary
            continue
        found |= {id(parameter) for parameter in layer.parameters()} if isinstance(layer, nn.Module) else set()
    return {name for name, parameter in _parameters("", base) if id(parameter) in found}


def _lacks_labels(name: str, head: Mapping[str, _Shape], expected: Mapping[str, _Shape]) -> bool:
    """Return whether a tensor is from a linear layer that differs from the model's only in having fewer outputs."""
    weight = f"{name.rpartition('.')[0]}.weight"
    shape, of_model = head.get(weight, ()), expected.get(weight, ())
    same_inputs = len(shape) == 2 == len(of_model) and shape[1] == of_model[1]
    return same_inputs and head[name][0] == shape[0] < of_model[0] == expected[name][0] and not _is_embedding(name)


def _is_embedding(name: str) -> bool:
    return len(parts := name.split(".")) > 1 and parts[-2] in EMBEDDINGS
