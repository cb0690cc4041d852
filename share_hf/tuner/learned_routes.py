"""Learning of routes, from sums over the features that the base model computes for a task's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..state import SubspaceState, with_route
from ..subspace.discriminants import FeatureSums
from .routing import RoutingModel, base_alone, count_of, default_layers, features_of, probe_of


_IGNORED = -100  # label of tokens that have no loss


def tuner_of(model: nn.Module) -> nn.Module:
    """Return the module that computes features: the tuner of a PEFT model, or a base model itself.

    Raises:
        ValueError: If the model has adapters of another kind.
    """
    if not isinstance(model, PeftModel):
        if getattr(model, "peft_config", None):
            raise ValueError("model has adapters of transformers, expected the base model, or one of apply")
        return model
    if not isinstance(model.base_model, RoutingModel):
        kind = type(model.base_model).__name__
        raise ValueError(f"model has adapters of {kind}, expected the base model, or one of SharedSubspace.apply")
    return model.base_model


def layers_for(state: SubspaceState, tuner: nn.Module, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Return the layers to take features from: the existing router's, else the given ones, else the model's default.

    Raises:
        ValueError: If `layers` is invalid, or differs from the layers of the existing router.
    """
    known = state.router.layers if state.router is not None else None
    if layers is None:
        return known or default_layers(tuner.model if isinstance(tuner, RoutingModel) else tuner)
    if not layers or any(type(layer) is not int or layer < 0 for layer in layers):
        raise ValueError(f"layers is {layers!r}, expected indices of layers, 0 for the embeddings")
    if known is not None and tuple(layers) != known:
        raise ValueError(f"layers is {list(layers)}, expected {list(known)} as in the existing routes")
    return tuple(layers)


def with_learned_route(
    state: SubspaceState, task: str, tuner: nn.Module, sums: FeatureSums, layers: tuple[int, ...]
) -> SubspaceState:
    """Add a task's route, learned from the sums over its inputs, to a state."""
    try:
        features, scatter = sums.learned()
    except ValueError as error:
        raise ValueError(f"task {task!r}: {error}") from error
    with base_alone(tuner, 1):
        probe = probe_of(tuner.model if isinstance(tuner, RoutingModel) else tuner, layers)
    return with_route(state, task, features, scatter, layers=layers, probe=probe)


def sums_over(model: nn.Module, batches: Iterable[Mapping[str, Any]], layers: Sequence[int]) -> FeatureSums:
    """Sum over the features of inputs.

    Args:
        model: A `ShareModel`, or a base model.
        batches: Batches of inputs in the form that the model takes.
        layers: Layers to take features from. See `features_of`.

    Raises:
        ValueError: As for `features_of`, and if features are not finite.
    """
    sums, base = FeatureSums(), model.model if isinstance(model, RoutingModel) else model
    for batch in batches:
        with base_alone(model, count_of(batch)):
            features = features_of(base, prompts_of(batch), layers)
        sums.add(features)
    return sums


def prompts_of(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Hide the completions of a batch, which a route must not rely on: a request has a prompt alone.

    Args:
        batch: Batch in the form that the model takes. A completion begins at the first token that is its own label,
            which is how tokens are marked that a causal language model learns to generate. Batches with other labels
            or without labels are returned unchanged, as are texts that are all completion.

    Returns:
        Batch with an `attention_mask` (b, t) that ends before the completions.
    """
    ids, labels, mask = (batch.get(name) for name in ("input_ids", "labels", "attention_mask"))
    if not all(isinstance(value, Tensor) and value.ndim == 2 for value in (ids, labels, mask)):
        return batch
    if not ids.shape == labels.shape == mask.shape:
        return batch
    is_learned = labels != _IGNORED
    if not torch.equal(labels[is_learned], ids[is_learned]):  # labels of tokens, or of masked tokens
        return batch
    prompts = mask * (is_learned.cumsum(1) == 0)
    has_prompt = prompts.any(1, keepdim=True)
    return {**batch, "attention_mask": torch.where(has_prompt, prompts, mask)}
