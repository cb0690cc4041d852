"""Hooks of the build: links as in docstrings, tables of the commands' options, links to files of the repository."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.pages import Page


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))

from hugging_face_docstrings import with_links  # noqa: E402


# A line of a page that stands for the options of a command.
_OPTIONS = re.compile(r"^<!-- options of ([a-z]+) -->$", re.MULTILINE)
_TO_REPOSITORY = re.compile(r"\]\((\.\.?/[^)#\s]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"^(```.*?^```)$", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Return a page with its links, and with the options of the commands that it names."""
    markdown = _OPTIONS.sub(lambda match: options_of(match[1]), markdown)
    parts = _FENCE.split(markdown)
    parts[::2] = [_to_repository(with_links(part), page, config) for part in parts[::2]]
    return "".join(parts)


def _to_repository(text: str, page: Page, config: MkDocsConfig) -> str:
    """Point links to files outside the site to the repository, if its address is known."""

    def link(match: re.Match[str]) -> str:
        target = (Path(page.file.abs_src_path).parent / match[1]).resolve()
        if not target.is_relative_to(ROOT) or target.is_relative_to(config.docs_dir) or not target.exists():
            return match[0]
        base = config.repo_url or "https://github.com"
        return f"]({base.rstrip('/')}/blob/main/{target.relative_to(ROOT).as_posix()}{match[2] or ''})"

    return _TO_REPOSITORY.sub(link, text)


def options_of(command: str) -> str:
    """Return the arguments of a command as a table, from its parser, which needs only the standard library."""
    parser = _parsers()[command]
    rows = []
    for action in parser._actions:
        if action.dest in ("help", *_COMMON):
            continue
        names = ", ".join(f"`{name}`" for name in action.option_strings)
        values = "" if action.nargs == 0 else _values(action)
        name = " ".join(part for part in (names, f"`{values}`" if values else "") if part)
        meaning = (action.help or "").replace("%(default)s", str(action.default)).replace("|", "\\|")
        rows.append(f"| {name.replace('|', chr(92) + '|')} | {meaning} |")
    if not rows:
        return "This command has no arguments of its own."
    return "\n".join(["| argument | meaning |", "|---|---|", *rows])


_COMMON = ("token", "json", "quiet", "debug")


def _values(action: argparse.Action) -> str:
    if action.choices is not None:
        return " | ".join(map(str, action.choices))
    name = str(action.metavar or action.dest.upper())
    return {"*": f"[{name} …]", "+": f"{name} …", "?": f"[{name}]"}.get(str(action.nargs), name)


def _parsers() -> dict[str, argparse.ArgumentParser]:
    # As setup.py installs it: on its own, since `import share_hf` waits for torch.
    import importlib.util

    name = "share_hf_cli"
    if name not in sys.modules:
        place = ROOT / "share_hf" / "cli" / "__init__.py"
        spec = importlib.util.spec_from_file_location(name, place, submodule_search_locations=[str(place.parent)])
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    columns = os.environ.get("COLUMNS")
    try:
        os.environ["COLUMNS"] = "200"
        return sys.modules[name].build_parser()[1]
    finally:
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)
