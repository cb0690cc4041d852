"""Determine which modules are kept whole with a task: the names in `modules_to_save`, resolved as PEFT does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peft import TaskType
from peft.utils.constants import EMBEDDING_LAYER_NAMES, SEQ_CLS_HEAD_NAMES
from torch import Tensor


# Modules that PEFT's classes for a task keep in addition to those that a configuration names.
_HEADS = {
    TaskType.SEQ_CLS: SEQ_CLS_HEAD_NAMES,
    TaskType.TOKEN_CLS: SEQ_CLS_HEAD_NAMES,
    TaskType.QUESTION_ANS: ["qa_outputs"],
}

# Last parts of the names that embeddings and language model heads have in transformers.
EMBEDDINGS = frozenset(
    [*EMBEDDING_LAYER_NAMES, "wte", "word_embeddings", "shared", "embed_in", "embed_out", "tok_embeddings"]
)


def saved_names(modules_to_save: Iterable[str] | None, task_type: str | None) -> list[str]:
    """Return the names of modules that PEFT keeps with an adapter of this configuration, including its defaults."""
    return list(dict.fromkeys([*(modules_to_save or []), *_HEADS.get(task_type, [])]))


def is_saved(module: str, saved: Iterable[str]) -> bool:
    """Return whether PEFT keeps this module of the base model. PEFT compares the ends of names, not their parts."""
    return any(module.endswith(name) for name in saved)


def saved_module_of(name: str, saved: Iterable[str]) -> str | None:
    """Return the outermost module that is kept whole and contains this tensor or module, or None.

    Args:
        name: Name of the tensor or module in the base model.
        saved: Names returned by `saved_names`.
    """
    saved = list(saved)
    end = name.find(".")
    while end != -1:
        if is_saved(name[:end], saved):
            return name[:end]
        end = name.find(".", end + 1)
    return None


def targets_beside(targets: list[str], saved: Iterable[str]) -> list[str]:
    """Return the target modules that are not kept whole: PEFT refuses to wrap a module that it has adapted."""
    saved = list(saved)
    return [target for target in targets if saved_module_of(f"{target}.", saved) is None] or targets


def num_labels_of(head: Mapping[str, Tensor]) -> int | None:
    """Return the outputs of a classification head with layers in any order; None if it has no linear layer."""
    shapes = [
        tuple(tensor.shape)
        for name, tensor in head.items()
        if name.endswith(".weight") and tensor.ndim == 2 and name.split(".")[-2] not in EMBEDDINGS
    ]
    inputs = {shape[1] for shape in shapes}
    # No layer takes the outputs of the last one. They equal the inputs of a layer in number only by chance.
    last = [shape[0] for shape in shapes if shape[0] not in inputs] or [shape[0] for shape in shapes]
    return min(last, default=None)
