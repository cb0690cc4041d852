"""Adapters that adapt the same layers under two names are refused; adapters of two parts of one model are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from share_hf import SharedSubspace
from share_hf.state import SubspaceState, merge_tasks, reconcile, without_task
from share_hf.state.state import TaskInfo
from share_hf.subspace import LowRankUpdate, SubspaceSettings
from tests.tree_fixtures import SaveLora
from tests.trees import BERT_LORA, lora_config, named, save_adapter


def merged(state: SubspaceState, **tasks: Mapping[str, tuple[int, int]]) -> SubspaceState:
    """Return a state with tasks that have random updates, with these shapes by module."""
    updates = {
        task: {name: LowRankUpdate(torch.randn(n, 2), torch.randn(d, 2)) for name, (n, d) in modules.items()}
        for task, modules in tasks.items()
    }
    return merge_tasks(state, updates, {task: TaskInfo() for task in tasks})[0]


def layers(before: str, shape: tuple[int, int] = (8, 8)) -> dict[str, tuple[int, int]]:
    return {f"{before}.{i}.self_attn.q_proj": shape for i in range(2)}


@pytest.fixture
def empty() -> SubspaceState:
    return SubspaceState(SubspaceSettings(num_components=4, pseudo_rank=2))


ONE_LAYER = [
    ("encoder.layer", "bert.encoder.layer"),
    ("layers", "model.layers"),
    ("language_model.model.layers", "model.language_model.layers"),
    ("model.layers", "model.language_model.layers"),
    ("vision_tower.encoder.layers", "model.vision_tower.encoder.layers"),
]
TWO_LAYERS = [
    ("model.encoder.layers", "model.decoder.layers"),
    ("text_model.encoder.layers", "vision_model.encoder.layers"),
    ("encoder.block", "decoder.block"),
    ("query.encoder.layer", "passage.encoder.layer"),
]


@pytest.mark.parametrize(("first", "second"), [*ONE_LAYER, *(pair[::-1] for pair in ONE_LAYER)])
def test_one_layer_under_two_names_is_refused_at_once_and_later(first: str, second: str, empty: SubspaceState) -> None:
    message = "task '.' adapts .*, which are the same layer in two classes or versions of transformers"
    with pytest.raises(ValueError, match=message):
        merged(empty, a=layers(first), b=layers(second))
    state = merged(empty, a=layers(first))
    with pytest.raises(ValueError, match=message):
        merged(state, b=layers(second))
    with pytest.raises(ValueError, match=message):
        reconcile(merged(empty, a=layers(first)), merged(empty, b=layers(second)))


@pytest.mark.parametrize(("first", "second"), TWO_LAYERS)
def test_two_parts_of_a_model_are_taken(first: str, second: str, empty: SubspaceState) -> None:
    assert len(merged(empty, a=layers(first), b=layers(second)).layers) == 4


def test_layers_of_two_shapes_are_two(empty: SubspaceState) -> None:
    state = merged(empty, text=layers("model.layers"), image=layers("model.vision_model.layers", (8, 6)))
    assert len(state.layers) == 4


def test_layers_that_one_task_adapts_both_are_two(empty: SubspaceState) -> None:
    both = {**layers("model.layers"), **layers("model.vision_model.layers")}
    state = merged(empty, both=both, text=layers("model.layers"), image=layers("model.vision_model.layers"))
    assert state.tasks.keys() == {"both", "text", "image"}


def test_the_names_of_a_task_that_was_removed_do_not_count(empty: SubspaceState) -> None:
    state = without_task(merged(empty, a=layers("encoder.layer")), "a")
    assert merged(state, b=layers("bert.encoder.layer")).tasks.keys() == {"b"}


def test_an_adapter_of_the_model_without_a_head_is_refused_beside_one_of_the_model_with_it(
    tiny_model: Callable[[str], PreTrainedModel], save_classifier: SaveLora, tmp_path: Path
) -> None:
    config = lora_config(**{**BERT_LORA, "task_type": "FEATURE_EXTRACTION"})
    bare = save_adapter(named(tiny_model("bert").bert), tmp_path / "bare", config, seed=1)
    subspace = SharedSubspace.from_adapters([save_classifier("two", 2)], pseudo_rank=4, progress=False)
    before = subspace.state
    with pytest.raises(ValueError, match=r"task 'bare' .*encoder\.layer\.0.* the same layer in two classes"):
        subspace.add_adapters([bare], progress=False)
    assert subspace.state is before
