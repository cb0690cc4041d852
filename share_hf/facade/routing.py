"""What a subspace learns of the inputs of its tasks, so that inputs find their task by themselves."""

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
    """Routes: off until the first is learned. Whatever fails leaves the subspace as it was."""

    @property
    def routed_tasks(self) -> tuple[str, ...]:
        """The tasks that inputs can find by themselves."""
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
        Learn what the inputs of a task look like. No data of other tasks is needed, and none is kept of this one.

        The task's folder gets the mean features of its inputs, a few kilobytes, and the covariance that all tasks
        share gets a part more. The order in which tasks are learned makes no difference, to the bit. A model that
        [`~SharedSubspace.apply`] makes from then on has the route; one that was made before gets it here.

        Args:
            task (`str`): A task of the subspace.
            model (`torch.nn.Module`):
                The base model, or one that [`~SharedSubspace.apply`] made of it; adapters are off meanwhile.
            data (`Iterable[Mapping[str, Any]]`):
                The task's inputs, best all that it was trained on: batches as the model takes them, such as those of a
                `DataLoader`; or, with a tokenizer, examples with one column of text, or two that are a pair. Labels
                are not looked at.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): Tokenizer of the base model.
            max_length (`int`, *optional*): Most tokens of a text; as many as the model takes if not given.
            batch_size (`int`, *optional*, defaults to `32`): Examples in a batch, with a tokenizer.
            layers (`Sequence[int]`, *optional*):
                Hidden states that the features are means of: 0 for the embeddings, i for what layer i puts out. A
                third and two thirds of the way up if not given. All tasks of a subspace have the same.

        Raises:
            ValueError: If there is no such task, the data is too little or unusable, or another task's route is of
                another base model or of other layers.
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
        Tell which tasks texts belong to. No adapter is needed for it.

        Args:
            texts (`Sequence[str | tuple[str, str]]`): Texts, or pairs of them.
            model (`torch.nn.Module`): As for [`~SharedSubspace.learn_route`].
            tokenizer (`PreTrainedTokenizerBase`): As for [`~SharedSubspace.learn_route`], as is `max_length`.
            batch_size (`int`, *optional*, defaults to `32`): Texts in a batch.
            tasks (`Sequence[str]`, *optional*): Tasks to choose among; all with a route if not given.
            false_rejects (`float`, *optional*, defaults to `0.01`):
                How many of a task's own inputs may be said to be of none of the tasks, at most; None to send each to
                some task.

        Returns:
            [`~share_hf.tuner.routing.Routes`]: Names and scores.

        Raises:
            ValueError: If the subspace has no routes, or they were learned with another base model.
        """
        router, tuner = router_of(self.state), tuner_of(model)
        if router is None:
            raise ValueError("the subspace has no routes, expected one at least: learn_route learns it")
        if not texts:
            raise ValueError("texts is empty, expected one at least")
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
    """Batches of examples with one text each, or a pair of texts that the tokenizer joins as a pair.

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
        raise ValueError(f"an example has columns of text {columns}, expected one, or two that are a pair")
    texts = ([example[name] for example in batch] for name in columns)
    return dict(tokenizer(*texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt"))
