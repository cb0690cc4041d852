"""Routing of inputs to their tasks by features of the base model.

The features of an input are the means of hidden states over its tokens, computed without adapters, so that they do
not change however many tasks are learned.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..format.names import listing
from ..state.routing import Router, check_same_features
from ..subspace.discriminants import Discriminants, TaskFeatures
from ..subspace.pooling import folded, pooled, to_the_left
from .experts import Experts


if TYPE_CHECKING:
    from .model import ShareModel


AUTO = "auto"
BASE = "__base__"

# Default heights of the layers that features are taken from. This is a rule, not a measurement of the tasks at hand:
# the last layers know what comes next, or what a text means; the middle ones know what kind of text it is.
_HEIGHTS = (1 / 3, 2 / 3)

# Names of a model's main input; the first one found determines the number of inputs.
_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")
# Arguments that go with tokens, (b, t, …), and are shifted to the left with them.
_OF_TOKENS = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids")
# Arguments of a model that say nothing about the input, or that the features must not depend on.
_LEFT_OUT = {"labels", "label_ids", "label", "position_ids", "past_key_values", "use_cache", "return_dict"}
_PROBE_LENGTH = 16


@dataclass(frozen=True)
class Routes:
    """Tasks that inputs are routed to.

    Args:
        names: Task of each input; None if the input belongs to none of the tasks.
        scores: Probability of the most likely task of each input, given equal prior probabilities of all tasks.
        tasks: Tasks that were considered.
        probabilities: Probabilities of the tasks, (inputs, tasks), float32.
    """

    names: tuple[str | None, ...]
    scores: tuple[float, ...]
    tasks: tuple[str, ...]
    probabilities: Tensor

    @classmethod
    def together(cls, parts: Iterable[Routes]) -> Routes:
        """Join the routes of several batches, at least one, that consider the same tasks."""
        parts = list(parts)
        return cls(
            names=tuple(name for part in parts for name in part.names),
            scores=tuple(score for part in parts for score in part.scores),
            tasks=parts[0].tasks,
            probabilities=torch.cat([part.probabilities for part in parts]),
        )


class TaskRouter:
    """Router of inputs to the tasks of a model.

    Args:
        router: The part that all tasks share.
        routes: Features of each task's inputs, by task.

    Attributes:
        false_rejects (`float`, *optional*): Largest fraction of a task's own inputs that may be assigned to no task,
            unless a call asks for another. None means that each input goes to some task. Defaults to 0.01.
    """

    def __init__(self, router: Router, routes: Mapping[str, TaskFeatures]) -> None:
        self.router, self.routes = router, dict(routes)
        self.false_rejects: float | None = 0.01
        self._found: dict[tuple[str, ...], Discriminants] = {}
        self._is_checked = False

    def route(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        tasks: Sequence[str] | None = None,
        false_rejects: float | EllipsisType | None = ...,
    ) -> Routes:
        """Find the tasks that inputs belong to.

        Args:
            model: A `ShareModel`, or the base model.
            inputs: Batch in the form that the model takes.
            tasks: Tasks to choose among. See `RoutingModel.route`.
            false_rejects: Largest fraction of inputs to reject falsely. See `RoutingModel.route`.

        Raises:
            ValueError: If the model is another base model, or an argument is invalid.
        """
        names = list(self.routes) if tasks is None else list(tasks)
        if unknown := [task for task in names if task not in self.routes]:
            raise ValueError(f"tasks has {unknown[0]!r}, expected those that have a route: {listing(self.routes)}")
        if not names:
            raise ValueError("no task has a route, expected at least one: learn it with SharedSubspace.learn_route")
        rejects = self.false_rejects if false_rejects is ... else false_rejects
        if rejects is not None and not 0 < rejects < 1:
            raise ValueError(f"false_rejects is {rejects!r}, expected None or a number above 0 and below 1")
        count, base = count_of(inputs), model.model if isinstance(model, RoutingModel) else model
        if not self._is_checked:
            with base_alone(model, 1):
                self._check_model(base)
            self._is_checked = True
        with base_alone(model, count):
            features = features_of(base, inputs, self.router.layers)
        return self.routes_of(features, names, rejects)

    def _check_model(self, model: nn.Module) -> None:
        """Refuse a base model other than the one the router was learned with, by running it on a few tokens."""
        if max(self.router.layers) > (depth := depth_of(model)):
            raise ValueError(
                f"{type(model).__name__} has {depth} layers, expected at least {max(self.router.layers)}, which the "
                "router was learned with: it belongs to another base model"
            )
        probe = probe_of(model, self.router.layers)
        width = self.router.width if probe is None else len(probe)
        check_same_features(self.router, self.router.layers, width, probe, f"the model ({type(model).__name__})")

    def routes_of(self, features: Tensor, tasks: Sequence[str], false_rejects: float | None) -> Routes:
        """Route inputs with these features (n, m) to the given tasks."""
        key = tuple(tasks)
        if key not in self._found:
            of_tasks = (self.routes[task] for task in key)
            self._found = {key: Discriminants(of_tasks, self.router.scatter)}
        found = self._found[key]
        probabilities = found.log_likelihoods(features).softmax(1)
        scores, places = probabilities.max(1)
        names: list[str | None] = [key[place] for place in places.tolist()]
        if false_rejects is not None:
            beyond = found.is_beyond(features, places.tolist(), false_rejects)
            names = [None if is_beyond else name for name, is_beyond in zip(names, beyond, strict=True)]
        return Routes(tuple(names), tuple(scores.tolist()), key, probabilities)


class RoutingModel:
    """The part of a tuner that routes inputs to their tasks."""

    router: TaskRouter | None = None

    def route(
        self,
        inputs: Mapping[str, Tensor] | Tensor | None = None,
        *,
        tasks: Sequence[str] | None = None,
        false_rejects: float | EllipsisType | None = ...,
        **more_inputs: Tensor,
    ) -> Routes:
        """
        Find the tasks that inputs belong to, by features of the base model, whatever adapter is active.

        Args:
            inputs (`Mapping[str, Tensor]` or `Tensor`, *optional*):
                Output of the tokenizer or the processor, or token ids. The entries may also be given as keywords.
            tasks (`Sequence[str]`, *optional*): Tasks to choose among. None means all tasks of the model that have a
                route.
            false_rejects (`float`, *optional*):
                Largest fraction of a task's own inputs that may be assigned to none of the tasks. None means that each
                input goes to some task. Defaults to `router.false_rejects`, which is 0.01 unless changed.

        Returns:
            [`~share_hf.tuner.routing.Routes`]: Names and scores.

        Raises:
            ValueError: If the model has no routes, or an argument is invalid.
        """
        given = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs or {})
        router = self._known_router()
        known = [task for task in self.peft_config if task in router.routes]
        if unknown := [task for task in tasks or () if task not in known]:
            raise ValueError(
                f"tasks has {unknown[0]!r}, expected some that the model has and that have a route: {listing(known)}"
            )
        return router.route(self, {**given, **more_inputs}, known if tasks is None else tasks, false_rejects)

    def _known_router(self) -> TaskRouter:
        if self.router is None:
            raise ValueError(
                "the model has no router, expected one of SharedSubspace.apply, of a subspace that learn_route or "
                "ShareTrainingArguments(routing=True) has taught the inputs of its tasks"
            )
        return self.router


def routed_if_auto(
    enable: Callable[..., AbstractContextManager[None]],
) -> Callable[..., AbstractContextManager[None]]:
    """Make `adapter_names="auto"` stand for the names of the tasks that the inputs of the call belong to.

    Args:
        enable: Method `_enable_peft_forward_hooks` of a `ShareModel`, which takes a name for each sample.
    """

    @wraps(enable)
    def enabled(model: ShareModel, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        names = kwargs.get("adapter_names")
        if not isinstance(names, str) or names != AUTO:
            return enable(model, *args, **kwargs)
        return _routed(enable, model, args, kwargs)

    return enabled


@contextmanager
def _routed(
    enable: Callable[..., AbstractContextManager[None]], model: ShareModel, args: tuple[Any, ...], kwargs: dict
) -> Iterator[None]:
    """Route the inputs of a call, if its arguments contain them, or else the inputs that reach the model in the block.

    `generate` passes its inputs. `forward` of PEFT's classes for tasks does not, but hands them to the model.
    """
    if model.training:
        raise ValueError("adapter_names='auto' routes only during inference, call model.eval() first")
    model._known_router()
    given = {**kwargs, **({"input_ids": args[0]} if args else {})}
    given.setdefault("input_ids", given.pop("inputs", None))
    if any(given.get(name) is not None for name in ("input_ids", "inputs_embeds", "input_features")):
        names = _names_for(model, given)
        with enable(model, *args, **{**kwargs, "adapter_names": names}):
            yield
        return
    with ExitStack() as stack:

        def choose(module: nn.Module, args: tuple[Any, ...], called_with: dict[str, Any]) -> None:
            handle.remove()
            bound = inspect.signature(module.forward).bind_partial(*args, **called_with).arguments
            names = _names_for(model, {**bound, **bound.get("kwargs", {})})
            stack.enter_context(enable(model, adapter_names=names))

        handle = model.model.register_forward_pre_hook(choose, with_kwargs=True)
        stack.callback(handle.remove)
        yield


def _names_for(model: ShareModel, given: Mapping[str, Any]) -> list[str]:
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    return [name or BASE for name in model.route(tensors).names]


@contextmanager
def base_alone(model: nn.Module, count: int) -> Iterator[None]:
    """Make a model compute the same as its base model within the block, without dropout and without gradients.

    Args:
        model: A `ShareModel`, or a base model.
        count: Number of inputs in each batch of the block.
    """
    modes = {module: module.training for module in model.modules() if module.training}
    model.eval()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.callback(_set_training, modes)
        experts = any(isinstance(module, Experts) for module in model.modules())
        if experts:  # adapters of experts cannot be switched per sample, and so not by two threads at once
            switched = [module for module in model.modules() if getattr(module, "_disable_adapters", None) is False]
            stack.callback(_set_disabled, switched, False)
            _set_disabled(switched, True)
        elif isinstance(model, RoutingModel):
            stack.enter_context(model._enable_peft_forward_hooks(adapter_names=[BASE] * count))
        yield


def _set_training(modes: Mapping[nn.Module, bool]) -> None:
    for module, training in modes.items():
        module.training = training


def _set_disabled(modules: Iterable[nn.Module], disabled: bool) -> None:
    for module in modules:
        module._disable_adapters = disabled


def features_of(model: nn.Module, inputs: Mapping[str, Any], layers: Sequence[int]) -> Tensor:
    """Compute the features (b, m) float32 of a batch with the base model; m is layers * d, at most 1,024.

    Args:
        model: Model of transformers. Of an encoder-decoder, only the encoder runs.
        inputs: Inputs in the form that the model takes. Those that its encoder does not take, such as labels, are
            left out.
        layers: Hidden states to use: 0 for the embeddings, i for the output of layer i.

    Raises:
        ValueError: If there is no input among them, or the model has no hidden states (b, t, d).
    """
    encoder = encoder_of(model)
    known = inspect.signature(encoder.forward).parameters
    takes_all = any(parameter.kind == parameter.VAR_KEYWORD for parameter in known.values())
    given = {
        name: value.to(_device_of(encoder))
        for name, value in inputs.items()
        if isinstance(value, Tensor)
        and name not in _LEFT_OUT
        and not name.startswith("decoder_")
        and (name in known or (takes_all and name in (*_INPUTS, *_OF_TOKENS)))
    }
    count_of(given)
    mask = given.get("attention_mask")
    tokens = given.get("input_ids", given.get("inputs_embeds"))
    if tokens is not None and mask is None:
        mask = _mask_of(model, given.get("input_ids"), tokens)
        given["attention_mask"] = mask
    if tokens is not None and mask.shape == tokens.shape[:2]:
        # With the padding last, positions are the same as without padding, for every model.
        of_tokens = {name: given[name] for name in _OF_TOKENS if name in given}
        given |= {name: to_the_left(value, mask) for name, value in of_tokens.items()}
        mask = given["attention_mask"]
    outputs = encoder(**given, output_hidden_states=True, return_dict=True)
    states = getattr(outputs, "hidden_states", None)
    if states is None or max(layers) >= len(states) or any(states[layer].ndim != 3 for layer in layers):
        found = None if states is None else [tuple(state.shape) for state in states][:3]
        raise ValueError(
            f"{type(encoder).__name__} has hidden states {found}, expected those of {max(layers)} layers of (b, t, d)"
        )
    chosen = [states[layer] for layer in layers]
    fits = mask is not None and mask.ndim == 2 and mask.shape == chosen[0].shape[:2]
    return folded(pooled(chosen, mask if fits else None))


def count_of(inputs: Mapping[str, Any]) -> int:
    """Return the number of inputs in a batch.

    Raises:
        ValueError: If the batch has no main input of a model, or this is empty.
    """
    found = next((inputs[name] for name in _INPUTS if isinstance(inputs.get(name), Tensor)), None)
    if found is None or found.ndim < 2 or not len(found):
        shape = None if found is None else tuple(found.shape)
        raise ValueError(f"inputs has {sorted(inputs)} of shape {shape}, expected a batch of one of {list(_INPUTS)}")
    return len(found)


def _mask_of(model: nn.Module, input_ids: Tensor | None, tokens: Tensor) -> Tensor:
    """Return the attention mask of tokens that come without one, inferred as in `generate`."""
    pad, end = (getattr(model.config, name, None) for name in ("pad_token_id", "eos_token_id"))
    ends = end if isinstance(end, (list, tuple)) else [end]
    if input_ids is None or pad is None or pad in ends:
        return torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    return (input_ids != pad).long()


def encoder_of(model: nn.Module) -> nn.Module:
    """Return the part of a model that computes hidden states: the encoder, or everything but the head.

    Raises:
        ValueError: If it is not a model of transformers.
    """
    if not hasattr(model, "config") or not hasattr(model, "base_model"):
        raise ValueError(
            f"model is a {type(model).__name__}, expected a model of transformers, which has hidden states"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        return model.get_encoder()
    return model.base_model


def depth_of(model: nn.Module) -> int:
    """Return the number of layers whose hidden states can be used as features.

    Raises:
        ValueError: If the model's configuration does not say.
    """
    encoder = encoder_of(model)
    config = encoder.config.get_text_config() if hasattr(encoder.config, "get_text_config") else encoder.config
    names = (
        ("encoder_layers", "num_layers", "num_hidden_layers") if config.is_encoder_decoder else ("num_hidden_layers",)
    )
    depth = next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)
    if depth is None:
        raise ValueError(f"{type(config).__name__} has no num_hidden_layers, expected it, or layers= to be given")
    return depth


def default_layers(model: nn.Module) -> tuple[int, ...]:
    """Return the layers that features are taken from by default: a third and two thirds of the way up."""
    depth = depth_of(model)
    return tuple(sorted({max(1, round(height * depth)) for height in _HEIGHTS}))


def probe_of(model: nn.Module, layers: Sequence[int]) -> Tensor | None:
    """Return features (m,), on the CPU, of a few tokens in every vocabulary; None if the model takes no tokens."""
    encoder = encoder_of(model)
    if "input_ids" not in inspect.signature(encoder.forward).parameters:
        return None
    size = encoder.get_input_embeddings().weight.shape[0]
    ids = torch.arange(_PROBE_LENGTH) * 37 % size
    features = features_of(model, {"input_ids": ids[None], "attention_mask": torch.ones(1, _PROBE_LENGTH)}, layers)
    return features[0].cpu()


def _device_of(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
