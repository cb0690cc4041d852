"""What reading and writing a tree takes: time that grows with its bytes, and the precision in which it was saved."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from share_hf import SharedSubspace
from share_hf.format.index import INDEX_FILE, ModuleEntry, TreeIndex, index_bytes, read_index
from share_hf.subspace import SubspaceSettings
from tests.trees import assert_same_state, files_of


def index_of(count: int) -> TreeIndex:
    """The index of many tasks in 200 modules."""
    tasks = tuple(f"task-{number}" for number in range(count))
    return TreeIndex(
        base_model_name_or_path="org/tiny",
        settings=SubspaceSettings(),
        modules={f"model.layers.{number}.q_proj": ModuleEntry((64, 64), (8, 8)) for number in range(200)},
        tasks=tasks,
        lineage=tuple({"merged": [task], "max_drift": 0.0, "id": f"{i:016x}"} for i, task in enumerate(tasks)),
        sha256={f"tasks/{task}/metrics.json": "0" * 64 for task in tasks},
        fingerprint="0" * 64,
    )


def test_the_time_to_read_an_index_grows_with_its_bytes(tmp_path: Path) -> None:
    def seconds_a_byte(count: int) -> float:
        content = index_bytes(index_of(count))
        (tmp_path / INDEX_FILE).write_bytes(content)
        times = []
        for _ in range(3):
            started = time.perf_counter()
            assert len(read_index(tmp_path).tasks) == count
            times.append(time.perf_counter() - started)
        return min(times) / len(content)

    small = seconds_a_byte(1_000)
    assert seconds_a_byte(4_000) < 3 * small
    assert seconds_a_byte(16_000) < 3 * small


def test_a_training_in_a_smaller_type_rounds_nothing_that_is_saved(
    subspace: SharedSubspace, tmp_path: Path, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    def save(folder: Path) -> dict[str, bytes]:
        subspace.save_pretrained(folder / "tree")
        subspace.export_lora("mrpc", folder / "lora")
        subspace.apply(tiny_model("llama")).save_pretrained(folder / "model")
        assert_same_state(SharedSubspace.from_pretrained(folder / "tree").state, subspace.state)
        return files_of(folder)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = save(tmp_path / "autocast")
    assert found == save(tmp_path / "plain")
