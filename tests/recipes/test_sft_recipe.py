"""The recipe with SFTTrainer as a person runs it: with data in both forms, a quantized model, and no arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from share_hf import SharedSubspace

from .test_recipes import TASKS, launch, refusal, shown_average


pytest.importorskip("trl", reason="trl is not installed")

SMALL = ["--train_examples", "48", "--num_train_epochs", "1"]


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    """A task of chats in one jsonl file, and one of texts and labels in a folder of splits."""
    rows = [json.loads(line) for line in (TASKS / "giver" / "train.jsonl").read_text().splitlines()[:60]]
    chats = [
        [
            {"role": "system", "content": "Who gave it away?"},
            {"role": "user", "content": row["text"]},
            {"role": "assistant", "content": row["label"]},
        ]
        for row in rows
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    (tmp_path / "count").mkdir()
    for split, kept in (("train", 48), ("test", 16)):
        lines = (TASKS / "count" / f"{split}.jsonl").read_text().splitlines()[:kept]
        (tmp_path / "count" / f"{split}.jsonl").write_text("\n".join(lines))
    return [f"giver={tmp_path / 'chats.jsonl'}", f"count={tmp_path / 'count'}"]


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True], ids=["float32", "4bit"])
def test_sft_stream_leaves_a_tree_that_loads(quantized: bool, tmp_path: Path, places: list[str]) -> None:
    flags = [*SMALL, "--output_dir", "out"]
    if quantized:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed", exc_type=ImportError)
        flags.append("--load_in_4bit")
    output = launch("sft_stream.py", "--tasks", *places, *flags, cwd=tmp_path)
    subspace = SharedSubspace.from_pretrained(tmp_path / "out" / "subspace")
    assert subspace.tasks == ("giver", "count")
    assert [subspace.state.tasks[name].learned_by for name in subspace.tasks] == ["init", "adapt"]
    assert subspace.state.metrics["average"] == pytest.approx(shown_average(output), abs=6e-4)
    assert [len([score for score in row if score is not None]) for row in subspace.state.metrics["matrix"]] == [1, 2]


def test_data_of_another_form_says_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 20)
    said = refusal("sft_stream.py", "--tasks", f"odd={tmp_path / 'odd.jsonl'}", cwd=tmp_path)
    assert "expected 'messages', or 'text' and 'label'" in said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_without_arguments_every_task_is_learned_from_chance_and_none_forgotten(tmp_path: Path) -> None:
    launch("sft_stream.py", cwd=tmp_path)
    metrics = SharedSubspace.from_pretrained(tmp_path / "sft-stream" / "subspace").state.metrics
    assert len(metrics["tasks"]) == 3
    assert all(score < 0.3 for score in metrics["baseline"])
    assert all(score >= 0.85 for score in metrics["matrix"][-1])
