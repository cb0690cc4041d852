"""The messages that the page about troubleshooting quotes are messages of the library."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.guides.pages import GUIDES, ROOT


PAGE = GUIDES / "troubleshooting.md"
_HOLE = "…"


def quoted() -> list[str]:
    """Return the messages in the headings of the page."""
    headings = re.findall(r"^### (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [message for heading in headings for message in re.findall(r'"([^"]+)"', heading)]


@cache
def messages() -> tuple[str, ...]:
    """Return every text in the source of the library, with a hole for each value."""
    texts: set[str] = set()
    for path in (ROOT / "share_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                texts.add("".join(part.value if isinstance(part, ast.Constant) else _HOLE for part in node.values))
    return tuple(text.replace("'", "").replace('"', "") for text in texts)


def test_the_page_quotes_messages() -> None:
    assert len(quoted()) > 30


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_is_one_of_the_library(message: str) -> None:
    # A hole of the page stands for a hole of the message, or for words between two of them.
    parts = [re.escape(part.strip()) for part in message.replace("'", "").split(_HOLE)]
    pattern = re.compile(rf"\s*\S*{_HOLE}.*?".join(parts), flags=re.DOTALL)
    assert any(pattern.search(text) for text in messages()), message
