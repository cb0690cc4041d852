"""A stream with `routing=True` knows the inputs of its tasks when it ends, however it was run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, default_data_collator

from share_hf import ShareConfig, SharedSubspace, ShareTrainer, ShareTrainingArguments
from share_hf.tuner.learned_routes import prompts_of
from tests.continual.conftest import MakeTrainer
from tests.routes import assert_same_routes


def test_each_task_learned_has_a_route(
    make_trainer: MakeTrainer, classification_tasks: dict[str, DatasetDict], tmp_path: Path
) -> None:
    trainer = make_trainer(routing=True)
    trainer.train()
    assert trainer.subspace.routed_tasks == tuple(classification_tasks)
    saved = SharedSubspace.from_pretrained(tmp_path / "out" / "subspace")
    assert_same_routes(saved.state, trainer.subspace.state)
    name, data = next(iter(classification_tasks.items()))
    assert saved.state.tasks[name].route.measured == len(data["train"])
    ids = torch.tensor(data["train"]["input_ids"])
    assert set(trainer.model.eval().route(ids, false_rejects=None).names) <= set(classification_tasks)


def test_nothing_is_learned_unless_it_is_asked_for(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.train()
    assert trainer.subspace.routed_tasks == () and trainer.model.router is None
    assert list((tmp_path / "out" / "subspace").rglob("router*")) == []


def test_routing_changes_nothing_that_is_trained(make_trainer: MakeTrainer) -> None:
    states = []
    for routing in (False, True):
        trainer = make_trainer(folder=f"routing-{routing}", routing=routing)
        trainer.train()
        states.append(trainer.subspace.state)
    for module, layer in states[0].layers.items():
        assert torch.equal(layer.coefficients_out, states[1].layers[module].coefficients_out)


def test_a_stream_continues_with_its_routes(
    make_trainer: MakeTrainer, classification_tasks: dict[str, DatasetDict]
) -> None:
    whole = make_trainer(folder="whole", routing=True)
    whole.train()
    names = list(classification_tasks)
    begun = make_trainer(routing=True, tasks={name: classification_tasks[name] for name in names[:1]})
    begun.train()
    resumed = make_trainer(routing=True)
    resumed.train(resume_from_checkpoint=True)
    assert_same_routes(resumed.subspace.state, whole.subspace.state)
    assert resumed.model.router is not None


class CountedStream(IterableDataset):
    """A stream of examples whose number is known."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


def test_streamed_data_is_refused_before_anything_is_trained(
    make_trainer: MakeTrainer, classification_tasks: dict[str, DatasetDict]
) -> None:
    name, data = next(iter(classification_tasks.items()))
    streamed = {name: {"train": data["train"].to_iterable_dataset()}}
    with pytest.raises(ValueError, match=f"task '{name}' has training data that is streamed and routing is True"):
        make_trainer(routing=True, tasks=streamed, max_steps=2)
    with_length = {name: {"train": CountedStream(list(data["train"]))}}
    with pytest.raises(ValueError, match=f"task '{name}' has training data that is streamed and routing is True"):
        make_trainer(routing=True, tasks=with_length)


PADDING, IGNORED = 0, -100


def _batch(labels: list[list[int]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[5, 6, 7, 8], [PADDING, 5, 6, 7]])
    return {"input_ids": ids, "attention_mask": (ids != PADDING).long(), "labels": torch.tensor(labels)}


def test_a_route_is_learned_from_prompts_without_their_completions() -> None:
    batch = _batch([[IGNORED, IGNORED, 7, 8], [IGNORED, IGNORED, IGNORED, 7]])
    assert prompts_of(batch)["attention_mask"].tolist() == [[1, 1, 0, 0], [0, 1, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]


def test_what_follows_a_first_completion_is_no_prompt_either() -> None:
    batch = _batch([[IGNORED, 6, IGNORED, 8], [IGNORED, 5, 6, 7]])
    assert prompts_of(batch)["attention_mask"].tolist() == [[1, 0, 0, 0], [0, 1, 1, 1]]


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param([[0, 1, 2, IGNORED], [IGNORED, 1, 1, 0]], id="tokens"),
        pytest.param([[IGNORED, 9, IGNORED, IGNORED], [IGNORED, IGNORED, 8, IGNORED]], id="masked tokens"),
        pytest.param([[0], [1]], id="inputs"),
    ],
)
def test_labels_that_are_no_completions_hide_nothing(labels: list[list[int]]) -> None:
    batch = _batch(labels)
    assert prompts_of(batch) is batch


def test_a_causal_model_learns_the_same_route_from_prompts_with_completions_and_without(
    tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    draw = torch.Generator().manual_seed(0)
    prompts, completions = (torch.randint(5, 60, (64, length), generator=draw).tolist() for length in (4, 24))
    data = [
        {
            "input_ids": prompt + completion,
            "attention_mask": [1] * 28,
            "labels": [IGNORED] * 4 + completion,
        }
        for prompt, completion in zip(prompts, completions, strict=True)
    ]

    def learned(*, routing: bool) -> SharedSubspace:
        trainer = ShareTrainer(
            tiny_model("llama"),
            ShareTrainingArguments(
                str(tmp_path / f"routing-{routing}"),
                max_steps=1,
                routing=routing,
                report_to="none",
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
            ),
            ShareConfig(num_components=8, pseudo_rank=2, target_modules=["q_proj"]),
            tasks={"completed": Dataset.from_list(data)},
            data_collator=default_data_collator,
        )
        trainer.train()
        return trainer.subspace

    found, expected = learned(routing=True), learned(routing=False)
    expected.learn_route("completed", tiny_model("llama"), [{"input_ids": torch.tensor(prompts)}])
    routes = [subspace.state.tasks["completed"].route for subspace in (found, expected)]
    torch.testing.assert_close(routes[0].mean, routes[1].mean)
    torch.testing.assert_close(routes[0].distances, routes[1].distances)
