"""Routes: what a subspace learns about the inputs of its tasks, so that each input finds its task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import Tensor, nn

from ..tuner.learned_routes import layers_for, sums_over, tuner_of, with_learned_route
from ..tuner.routing import Routes
from ..tuner.transfer import load_router, router_of
from .held import HeldSubspace


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_LABELS = ("label", "labels")


class Routing(HeldSubspace):
    """Routing of inputs to tasks, off until the first route is learned.

    An operation that fails leaves the subspace unchanged.
    """

    @property
    def routed_tasks(self) -> tuple[str, ...]:
        """Names of the tasks that inputs can be routed to."""
        if self._rest is not None:
            return self._rest.index.routed_tasks
        return tuple(task for task, info in self._held.tasks.items() if info.route is not None)

    def learn_route(
        self,
        task: str,
        model: nn.Module,
        data: Iterable[Mapping[str, Any]],
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
        batch_size: int = 32,
        layers: Sequence[int] | None = None,
    ) -> None:
        """
        Learn what the inputs of a task look like. This needs no data of other tasks and keeps no data of this one.

        The mean features of the task's inputs, a few kilobytes, are added to its folder, and its share is added to the
        covariance that all tasks have in common. The result does not depend on the order in which tasks are learned,
        bit for bit. A model that [`~SharedSubspace.apply`] returns from then on has the route; if `model` came from an
        earlier call, it gets the route here.

        Args:
            task (`str`): Task of the subspace.
            model (`torch.nn.Module`):
                Base model, or a model that [`~SharedSubspace.apply`] returned for it. Its adapters are disabled
                meanwhile.
            data (`Iterable[Mapping[str, Any]]`):
                Inputs of the task, ideally everything that it was trained on: batches as the model takes them, such as
                a `DataLoader` yields, or, with a tokenizer, examples with one column of text or two that form a pair.
                Labels are ignored, except that they mark completions, which are left out: a request is a prompt alone.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): Tokenizer of the base model.
            max_length (`int`, *optional*):
                Maximum number of tokens of a text. None means as many as the model takes.
            batch_size (`int`, *optional*, defaults to `32`): Number of examples in a batch, with a tokenizer.
            layers (`Sequence[int]`, *optional*):
                Hidden states whose means are the features: 0 for the embeddings, i for the output of layer i. None
                means those a third and two thirds of the way up. All tasks of a subspace use the same layers.

        Raises:
            ValueError: If there is no such task, the data is unusable or too little, or the route of another task
                belongs to another base model or to other layers.
        """
        self._check_known(task)
        tuner = tuner_of(model)
        state = self.state
        layers = layers_for(state, tuner, layers)
        batches = data if tokenizer is None else tokenized(data, tokenizer, max_length, batch_size)
        self._held = with_learned_route(state, task, tuner, sums_over(tuner, batches, layers), layers)
        if isinstance(model, PeftModel):
            load_router(model, self._held)

    def route(
        self,
        texts: Sequence[str | tuple[str, str]],
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        batch_size: int = 32,
        tasks: Sequence[str] | None = None,
        false_rejects: float | None = 0.01,
    ) -> Routes:
        """
        Find the tasks that texts belong to. This needs no adapter.

        Args:
            texts (`Sequence[str | tuple[str, str]]`): Texts, or pairs of texts.
            model (`torch.nn.Module`): Same as in [`~SharedSubspace.learn_route`].
            tokenizer (`PreTrainedTokenizerBase`): Same as in [`~SharedSubspace.learn_route`], as is `max_length`.
            batch_size (`int`, *optional*, defaults to `32`): Number of texts in a batch.
            tasks (`Sequence[str]`, *optional*): Tasks to choose among. None means all tasks that have a route.
            false_rejects (`float`, *optional*, defaults to `0.01`):
                Largest fraction of a task's own inputs that may be assigned to none of the tasks. None assigns every
                text to some task.

        Returns:
            [`~share_hf.tuner.routing.Routes`]: The task of each text, with its score.

        Raises:
            ValueError: If the subspace has no routes, or they were learned with another base model.
        """
        router, tuner = router_of(self.state), tuner_of(model)
        if router is None:
            raise ValueError("the subspace has no routes, expected at least one: learn it with learn_route")
        if not texts:
            raise ValueError("texts is empty, expected at least one")
        pairs = [(text,) if isinstance(text, str) else text for text in texts]
        if odd := [pair for pair in pairs if len(pair) != len(pairs[0])]:
            raise ValueError(f"texts has {odd[0]!r}, expected texts alone, or pairs alone")
        examples = ({str(i): text for i, text in enumerate(pair)} for pair in pairs)
        return Routes.together(
            router.route(tuner, batch, tasks, false_rejects)
            for batch in tokenized(examples, tokenizer, max_length, batch_size)
        )


def tokenized(
    examples: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    batch_size: int = 32,
) -> Iterator[dict[str, Tensor]]:
    """Yield tokenized batches of examples with one text each, or with two texts, which are encoded as a pair.

    Raises:
        ValueError: If an example has no text, or more than two.
    """
    batch: list[Mapping[str, Any]] = []
    for example in examples:
        batch.append(example)
        if len(batch) == batch_size:
            yield _encoded(batch, tokenizer, max_length)
            batch = []
    if batch:
        yield _encoded(batch, tokenizer, max_length)


def _encoded(
    batch: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> dict[str, Tensor]:
    columns = [name for name, value in batch[0].items() if isinstance(value, str) and name not in _LABELS]
    if not 1 <= len(columns) <= 2:
        raise ValueError(f"an example has text columns {columns}, expected one, or two that form a pair")
    texts = ([example[name] for example in batch] for name in columns)
    return dict(tokenizer(*texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt"))
