"""A stream with `routing=True` knows the inputs of its tasks when it ends, however it was run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from torch.utils.data import IterableDataset

from share_hf import SharedSubspace
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
