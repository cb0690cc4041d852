"""Subspaces with coefficients in few bits and individual ranks, on the Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from share_hf import SharedSubspace
from tests.hub_server.fixtures import Hub
from tests.tree_fixtures import SaveLora
from tests.trees import assert_same_state, logits


REPO = "org/small"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "4bit"])
def test_what_is_pushed_is_loaded_and_extended_by_others(
    dtype: str, hub: Hub, save_lora: SaveLora, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    loras: dict[str, Path] = {name: save_lora(name, seed=i) for i, name in enumerate(("mrpc", "sst2", "rte"))}
    ours = SharedSubspace.from_adapters(
        {task: loras[task] for task in ("mrpc", "sst2")},
        num_components=12,
        pseudo_rank=4,
        coefficient_dtype=dtype,
        tolerance=0.4,
        progress=False,
    )
    ours.push_to_hub(REPO)
    theirs = SharedSubspace.from_pretrained(REPO)
    assert_same_state(theirs.state, ours.state)
    theirs.add_adapters({"rte": loras["rte"]}, progress=False)
    theirs.push_to_hub(REPO)
    ours.remove_task("mrpc")
    ours.push_to_hub(REPO)
    found = SharedSubspace.from_pretrained(REPO)
    assert found.tasks == ("sst2", "rte")
    assert found.settings == ours.settings
    assert "rte" in SharedSubspace.from_pretrained(REPO, revision="rte").state.tasks
    model = PeftModel.from_pretrained(tiny_model("llama"), REPO, subfolder="tasks/rte").eval()
    assert torch.equal(logits(model), logits(found.apply(tiny_model("llama"), ["rte"])))
    native = tiny_model("llama")
    native.load_adapter(REPO, "rte", adapter_kwargs={"subfolder": "tasks/rte"})
    assert torch.equal(logits(native.eval()), logits(model))
