"""What is kept whole with a task (`modules_to_save`): what it has to be, and whether it fits a model."""

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

# Bias of a label that a task does not have, in a head with the labels of its model.
NEVER_PREDICTED = -1e4

# Fraction of a model's parameters: where more have no mark, the marks do not tell what was loaded.
_LARGEST_REST = 0.25

_Shape = tuple[int, ...]

# PEFT cannot wrap them: they have no forward.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def saved_tensors(model: nn.Module, saved: Iterable[str]) -> dict[str, Tensor]:
    """The base model's own tensors of the modules that PEFT keeps with a task, by name in the base model.

    Args:
        model: The base model, with or without adapters.
        saved: The `modules_to_save` of the task.
    """
    saved = list(saved)
    return dict(_saved_tensors("", _without_adapters(model), saved)) if saved else {}


def check_apart(adapted: Iterable[str], saved: Collection[str]) -> None:
    """Refuse to adapt a module that is kept whole, be it by another task: PEFT wraps a module in one way only.

    Raises:
        ValueError: Naming the module.
    """
    for module in adapted:
        if (kept := saved_module_of(f"{module}.", saved)) is not None:
            raise ValueError(f"modules_to_save has {kept!r}, but {module!r} is adapted too, expected one of both")


def check_head(
    model: nn.Module,
    saved: Iterable[str],
    head: Mapping[str, _Shape],
    *,
    may_lack_labels: bool = False,
) -> None:
    """Refuse what is kept with a task, unless it is what PEFT loads into a model for these `modules_to_save`.

    Args:
        model: The base model, with or without adapters.
        saved: The `modules_to_save` of the task.
        head: Shapes of the tensors that are kept, by name in the base model.
        may_lack_labels: Whether classification heads may have fewer labels than the model's.

    Raises:
        ValueError: Naming the tensor or module.
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
    """Refuse what is kept with a task, as `check_head` does; `expected` are the shapes of the base model's tensors."""
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
    """A task's head with all labels of a model, those that it lacks ruled out: PEFT keeps one shape for all tasks.

    Args:
        of_model: Shapes of the model's own tensors of the head, by name.
        head: The task's, by name.
    """
    fitting = dict(head)
    for name, shape in of_model.items():
        if name.endswith(".weight") and tuple(head[name].shape) != shape:
            fitting |= rule_out_labels(head, name.removesuffix(".weight"), head[name].shape[0], shape[0])
    return fitting


def rule_out_labels(
    head: Mapping[str, Tensor], layer: str, num_labels: int, of_model: int, *, several: bool = False
) -> dict[str, Tensor]:
    """Tensors of the last layer of a head, of which labels from `num_labels` on are never predicted.

    A bias rules them out in predictions and probabilities. Without one, only a row of weights in the convex hull of
    the others never has the largest logit whatever the input is: their mean is the farthest from all of them. Where
    each label is predicted by the sign of its own logit, zeros predict it never.

    Args:
        head: Tensors by name.
        layer: The layer that computes the logits.
        num_labels: Number of labels of the task.
        of_model: Rows that the layer is to have.
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
    """The layer that computes the logits: the last one with an output for each label, in the order of the model."""
    layers = [
        name.removesuffix(".weight")
        for name, shape in names_and_shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and shape[0] == num_labels and not _is_embedding(name)
    ]
    return layers[-1] if layers else None


def parts_to_keep(model: nn.Module, task_type: str | None) -> list[str]:
    """Modules that a new task has to keep, so that it is the same wherever its base model is loaded.

    These are the modules that the base model's checkpoint lacks: every process starts them from other random values.
    transformers marks the tensors that a checkpoint has. Where there are no marks (a model made from a configuration,
    a copy), all that is outside the pretrained body counts, unless the model is a language model. A classifier keeps
    all of it, as PEFT's own classes keep its `classifier`.

    Args:
        model: The base model, with or without adapters.
        task_type: Task type of the configuration.
    """
    base = _without_adapters(model)
    tensors = dict(_parameters("", base))
    unmarked = {name for name, tensor in tensors.items() if not getattr(tensor, "_is_hf_initialized", False)}
    body, embeddings = _body_of(base), _embeddings_of(base)
    outside = {name for name in tensors if body and not name.startswith(f"{body}.")} - embeddings
    inside = unmarked - outside - embeddings
    # Weights that were quantized, or loaded by other means, have no mark either.
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
    """Whether a model gives each of its inputs, a text, an image, a video or a sound, one of its labels.

    Args:
        model: The base model, with or without adapters.
        task_type: Task type of the configuration. PEFT has one for texts alone.
    """
    return task_type == TaskType.SEQ_CLS or type(_without_adapters(model)).__name__ in CLASSIFIERS


def shape_of(tensor: Tensor) -> _Shape:
    """The shape of a tensor, also where DeepSpeed has parted it among processes."""
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
    """The largest modules that hold nothing but parameters to keep, and single layers that hold one."""
    prefix = f"{name}." if name else ""
    within = {tensor for tensor in tensors if tensor.startswith(prefix)}
    is_layer = next(module.children(), None) is None
    if name and not isinstance(module, _CONTAINERS) and (is_layer or within <= kept):
        yield name
        return
    direct = {f"{prefix}{own}" for own, _ in module.named_parameters(recurse=False)} & kept
    if direct:
        logger.warning_once(
            f"{sorted(direct)} start from other random values in every process, and modules_to_save cannot keep them "
            "with a task: load the base model from a checkpoint that has them."
        )
    for child_name, child in _children(name, module):
        if any(tensor.startswith(f"{child_name}.") for tensor in kept):
            yield from _modules_of(child_name, child, kept, within)


def _body_of(base: nn.Module) -> str:
    """Name of the pretrained body within a model for a task; empty where the model is the body, or none is known."""
    body = getattr(base, "base_model", base)
    prefix = getattr(base, "base_model_prefix", "")
    return prefix if body is not base and isinstance(getattr(base, prefix, None), nn.Module) else ""


def _is_language_model(base: nn.Module) -> bool:
    return bool(_embeddings_of(base, inputs=False))


def _embeddings_of(base: nn.Module, *, inputs: bool = True) -> set[str]:
    """Parameters of the embeddings: they are trained where they are asked for only."""
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
    """Whether a tensor is of a linear layer that has fewer outputs than the model's, and is the same otherwise."""
    weight = f"{name.rpartition('.')[0]}.weight"
    shape, of_model = head.get(weight, ()), expected.get(weight, ())
    same_inputs = len(shape) == 2 == len(of_model) and shape[1] == of_model[1]
    return same_inputs and head[name][0] == shape[0] < of_model[0] == expected[name][0] and not _is_embedding(name)


def _is_embedding(name: str) -> bool:
    return len(parts := name.split(".")) > 1 and parts[-2] in EMBEDDINGS
