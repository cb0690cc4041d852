# ruff: noqa: F401, F811 -- fixtures of other modules
"""`share-hf route`: which tasks texts belong to, from options, a file or a pipe."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from share_hf import SharedSubspace
from tests.facade.test_routing import learned, texts_of, word_tokenizer
from tests.test_cli import Output, as_before, share


Share = Callable[..., Output]


@pytest.fixture
def base(tiny_model_folder: Callable[[str], Path], copy_of: Callable[[Path], Path]) -> str:
    """The folder of the base model, with its tokenizer."""
    folder = copy_of(tiny_model_folder("llama"))
    word_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def routed(
    subspace: SharedSubspace, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path, share: Share
) -> str:
    """The folder of a subspace with routes."""
    learned(subspace, tiny_model("llama")).save_pretrained(tmp_path / "routed")
    return str(tmp_path / "routed")


def test_texts_are_sent_to_their_tasks_with_scores(share: Share, routed: str, base: str) -> None:
    ones, others = texts_of("mrpc", 2, seed=5), texts_of("sst2", 1, seed=6)
    options = [option for text in (*ones, *others) for option in ("--text", text)]
    code, out, err = share("route", routed, "--base-model", base, "--false-rejects", "0", *options, "--json")
    assert code == 0, err
    routes = json.loads(out)["routes"]
    assert [route["task"] for route in routes] == ["mrpc", "mrpc", "sst2"]
    assert [route["text"] for route in routes] == [*ones, *others]
    assert all(abs(sum(route["scores"].values()) - 1) < 1e-5 for route in routes)
    assert all(next(iter(route["scores"])) == route["task"] for route in routes)
    code, out, _ = share("route", routed, "--base-model", base, "--false-rejects", "0", *options)
    lines = out.splitlines()
    assert lines[0].split() == ["text", "task", "most", "likely"]
    assert len(lines) == 4 and lines[1].startswith(ones[0]) and "mrpc" in lines[1]


def test_a_file_and_a_pipe_hold_a_text_in_each_line(
    share: Share, routed: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts.txt").write_text("\n".join([*texts_of("sst2", 2), "", *texts_of("mrpc", 1)]) + "\n")
    command = ["route", routed, "--base-model", base, "--false-rejects", "0", "--json"]
    found = share(*command, "--file", str(tmp_path / "texts.txt"))[1]
    assert [route["task"] for route in json.loads(found)["routes"]] == ["sst2", "sst2", "mrpc"]
    monkeypatch.setattr("sys.stdin", io.StringIO((tmp_path / "texts.txt").read_text()))
    assert json.loads(share(*command)[1]) == json.loads(found)


def test_a_tab_is_between_the_texts_of_a_pair(share: Share, routed: str, base: str) -> None:
    pair = "\t".join(texts_of("mrpc", 2))
    code, out, err = share("route", routed, "--base-model", base, "--text", pair, "--json")
    assert code == 0, err
    assert json.loads(out)["routes"][0]["text"] == texts_of("mrpc", 2)


def test_a_text_of_none_of_the_tasks_is_reported(share: Share, routed: str, base: str) -> None:
    code, out, err = share(
        "route", routed, "--base-model", base, "--text", "<pad> </s> <sep>", "--false-rejects", "0.2"
    )
    assert code == 0, err
    assert out.splitlines()[1].split()[3] == "none"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "a\tb\tc"], "has more than one tab, expected one, between the texts of a pair"),
        (["--text", " "], "no text, expected --text, --file, or lines on stdin"),
        (["--file", "nowhere.txt"], "nowhere.txt: No such file or directory"),
        (["--text", "a", "--false-rejects", "2"], "false_rejects is 2.0, expected None or a number above 0"),
    ],
)
def test_unusable_arguments_are_named(share: Share, routed: str, base: str, options: list[str], message: str) -> None:
    code, _, err = share("route", routed, "--base-model", base, *options)
    assert (code, message in err) == (1, True), err


def test_a_tree_without_routes_and_a_base_model_that_is_not_there_are_named(
    share: Share, tree: Path, routed: str, base: str
) -> None:
    code, _, err = share("route", str(tree), "--base-model", base, "--text", "a")
    assert (code, "the subspace has no routes" in err) == (1, True), err
    code, _, err = share("route", routed, "--base-model", "nowhere/at-all", "--text", "a")
    assert (code, "nowhere/at-all: no model and tokenizer that can be read" in err) == (1, True), err
