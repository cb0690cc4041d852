"""The commands do what the page about the command line says."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from share_hf import SharedSubspace
from share_hf.cli import build_parser, main
from share_hf.state import ContinualMetrics
from tests.facade.test_routing import learned, texts_of, word_tokenizer
from tests.format.test_old_trees import VERSION_1
from tests.guides.pages import GUIDES
from tests.hub_server.fixtures import Hub


PAGE = GUIDES / "cli.md"
COMMANDS = tuple(build_parser()[1])

_ROW = re.compile(r"^\| `([^`]+)` \| (.+?) \| (.+) \|$", re.MULTILINE)
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (float, int),
    "boolean": (bool,),
    "null": (type(None),),
    "list": (list,),
    "any": (object,),
}


@dataclass
class Schema:
    """What may be at a place of a JSON document.

    Args:
        types: Names of the types that are allowed there.
        keys: Schemas of its keys; `*` is any key, and `[]` each element of a list.
        needed: Keys that are always present.
    """

    types: set[str] = field(default_factory=set)
    keys: dict[str, Schema] = field(default_factory=dict)
    needed: set[str] = field(default_factory=set)

    def at(self, path: str, *, needed: bool) -> Schema:
        place = self
        for key in [] if path == "." else path.replace("[]", ".[]").split("."):
            if needed and key not in ("*", "[]"):
                place.needed.add(key)
            place = place.keys.setdefault(key, Schema())
        return place

    def take(self, other: Schema) -> None:
        self.types |= other.types
        self.needed |= other.needed
        for key, schema in other.keys.items():
            self.keys.setdefault(key, Schema()).take(schema)

    def check(self, value: Any, path: str) -> None:
        """Fail if a value differs from the documentation."""
        kinds = {kind for name in self.types for kind in _TYPES[name]}
        exact = isinstance(value, tuple(kinds)) and (type(value) is not bool or {bool, object} & kinds)
        if kinds and exact:
            return
        if isinstance(value, dict) and self.keys.keys() - {"[]"}:
            assert self.needed <= value.keys(), f"{path}: lacks {self.needed - value.keys()}"
            for key, entry in value.items():
                inner = self.keys.get(key) or self.keys.get("*")
                assert inner is not None, f"{path}.{key}: is not documented"
                inner.check(entry, f"{path}.{key}")
        elif isinstance(value, list) and "[]" in self.keys:
            for entry in value:
                self.keys["[]"].check(entry, f"{path}[]")
        else:
            raise AssertionError(f"{path}: {value!r}, expected {self.types or self.keys.keys()}")


def sections() -> dict[str, str]:
    """Return the text under each heading of the page."""
    parts = re.split(r"^#{2,3} (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def schema_of(section: str) -> Schema:
    """Return what the tables of a section say about the JSON."""
    schema = Schema()
    text = sections()[section]
    for path, kind, meaning in _ROW.findall(text.partition("| field | type | meaning |")[2]):
        needed = not meaning.startswith("Only")
        place = schema.at(path, needed=needed)
        if kind.startswith("as of "):
            *inner, source = re.findall(r"`([^`]+)`", kind)
            # A section that refers to itself means what was read of it so far.
            other = schema if source == section else schema_of(source)
            place.take(other.at(inner[0], needed=False) if inner else other)
        else:
            place.types |= {*kind.split(" or ")}
    return schema


Share = Callable[..., Any]


@pytest.fixture
def share(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Share:
    """Run a command with `--json`, and check what it prints against the page."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.chdir(tmp_path)

    def run(command: str, *argv: str) -> Any:
        capsys.readouterr()
        code = main([command, *argv, "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        found = json.loads(out)
        schema_of(command).check(found, command)
        return found

    return run


def test_the_page_has_every_command_and_option() -> None:
    assert [title for title in sections() if title in COMMANDS] == list(COMMANDS)
    for name, text in sections().items():
        if name in COMMANDS:
            assert f"<!-- options of {name} -->" in text
            assert f"share-hf {name} " in text


def test_the_schema_is_one_that_refuses() -> None:
    schema_of("rename").check({"renamed": "a", "to": "b", "tasks": ["b"]}, "rename")
    for wrong in ({"renamed": "a", "to": "b"}, {"renamed": 1, "to": "b", "tasks": []}):
        with pytest.raises(AssertionError):
            schema_of("rename").check(wrong, "rename")
    with pytest.raises(AssertionError, match="not documented"):
        schema_of("rename").check({"renamed": "a", "to": "b", "tasks": [], "more": 1}, "rename")
    with pytest.raises(AssertionError):
        schema_of("pull").check({"changed": 1}, "pull")


def test_what_the_page_says_of_json_is_what_is_printed(share: Share, loras: dict[str, Path]) -> None:
    mrpc, sst2, rte = map(str, loras.values())
    small = ["--num-components", "6", "--pseudo-rank", "4"]
    share("init", "sub", mrpc, sst2, f"again={sst2}", *small, "--history", "3", "--keep-originals")
    auto = ["--num-components", "auto", "--pseudo-rank", "auto", "--target-error", "0.4"]
    assert "chosen" in share("init", "auto", mrpc, sst2, *auto)
    ranks = share("init", "ranks", mrpc, sst2, *small, "--tolerance", "0.2", "--coefficient-dtype", "bfloat16")
    assert {"tolerance", "coefficient_dtype"} <= ranks["settings"].keys()
    share("add", "sub", rte, "nothing=nowhere/at-all", "--skip-bad")
    share("info", "sub")
    share("audit", mrpc, sst2, f"again={sst2}")
    share("audit", "sub")
    share("export", "sub", "mrpc", "mrpc-lora")
    share("export", "sub", "--all", "loras")
    share("export", "sub", "--weights", "mrpc=0.5,sst2=0.5", "both")
    share("rename", "sub", "rte", "entailment")
    share("replace", "sub", f"entailment={mrpc}")
    share("refit", "sub")
    share("undo", "sub")
    share("remove", "sub", "again")
    share("upgrade", "sub")
    share("env")


def test_so_does_a_merged_model(
    share: Share, loras: dict[str, Path], tiny_model_folder: Callable[[str], Path]
) -> None:
    share("init", "sub", str(loras["mrpc"]), str(loras["sst2"]))
    share("export", "sub", "mrpc", "model", "--merge-into", str(tiny_model_folder("llama")))


def test_so_do_those_that_need_a_hub(share: Share, hub: Hub, loras: dict[str, Path]) -> None:
    share("init", "sub", str(loras["mrpc"]), str(loras["sst2"]))
    share("push", "sub", "org/share-subspace")
    assert share("pull", "org/share-subspace", "copy")["changed"]
    share("upgrade", "org/share-subspace")
    assert hub.repository("org/share-subspace") is not None


def test_so_do_an_old_tree_and_a_stream_that_was_measured(
    share: Share, subspace: SharedSubspace, copy_of: Callable[[Path], Path]
) -> None:
    old = copy_of(VERSION_1)
    share("info", str(old))
    assert share("upgrade", str(old))["upgraded"]
    measured = ContinualMetrics(tasks=list(subspace.tasks), matrix=[[0.5, None], [0.4, 0.6]], baseline=[0.1, 0.2])
    SharedSubspace(replace(subspace.state, metrics=measured.as_dict())).save_pretrained("measured")
    assert share("info", "measured")["metrics"]["forgetting"] == pytest.approx(0.1)


def test_so_do_routes(
    share: Share,
    subspace: SharedSubspace,
    tiny_model: Callable[[str], PreTrainedModel],
    tiny_model_folder: Callable[[str], Path],
    copy_of: Callable[[Path], Path],
) -> None:
    base = copy_of(tiny_model_folder("llama"))
    word_tokenizer().save_pretrained(base)
    learned(subspace, tiny_model("llama")).save_pretrained("routed")
    texts = [option for text in texts_of("mrpc", 2, seed=5) for option in ("--text", text)]
    share("route", "routed", "--base-model", str(base), *texts)
    share("route", "routed", "--base-model", str(base), "--text", "\t".join(texts_of("mrpc", 2, seed=5)))


def test_errors_are_json_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["info", str(tmp_path / "nothing"), "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out).keys() == {"error"}
    assert err.startswith("error: ")
