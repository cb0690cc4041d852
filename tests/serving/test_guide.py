"""What the guide says is true: its commands exist, and its numbers are vLLM's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import get_args

import pytest

from share_hf.cli import parse
from share_hf.serving import lora_cache


GUIDE = (Path(__file__).parents[2] / "recipes" / "guides" / "serving.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"^share-hf (.+)$", GUIDE, re.MULTILINE)))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one(command: str) -> None:
    assert parse(shlex.split(command)).command in ("init", "export")


def test_every_variable_and_file_is_there() -> None:
    known = {value for name, value in vars(lora_cache).items() if name.endswith("_VARIABLE")}
    assert set(re.findall(r"SHARE_HF_\w+", GUIDE)) == known
    named = re.findall(r"`(tests/[\w/]+\.py)`", GUIDE)
    assert named and all((Path(__file__).parents[2] / name).is_file() for name in named)


def test_the_ranks_are_those_of_vllm() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed, which needs CUDA and its own version of torch")
    from vllm.config.lora import MaxLoRARanks

    ranges, ranks = (
        [cell.strip() for cell in re.search(rf"^\| {start} \|(.+)\|$", GUIDE, re.MULTILINE)[1].split("|")]
        for start in ("p", "`--max-lora-rank`")
    )
    assert [int(rank) for rank in ranks] == sorted(get_args(MaxLoRARanks))
    last = 0
    for cell, rank in zip(ranges, ranks, strict=True):
        first, _, end = cell.partition("–")
        assert (int(first), int(end or first)) == (last + 1, int(rank))
        last = int(rank)
