"""The pages of the documentation, and the blocks in them that are examples.

Python blocks of a page run in order in one process and one namespace, bash blocks with `bash -eu`, all in one folder.
A block after a comment `<!-- not run: reason -->` is not run. A page with the comment `<!-- with a hub -->` has its
own Hub on this machine; all others are offline.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[2]
GUIDES = ROOT / "recipes" / "guides"
README = ROOT / "README.md"

EXAMPLES = ("python", "bash")
OUTPUTS = ("bibtex", "text", "console", "json", "jinja", "yaml")

_OPENING = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<language>[^`\n]*)$")
_NOT_RUN = re.compile(r"^<!-- not run: *(?P<reason>.*?) *-->$")
_WITH_A_HUB = "<!-- with a hub -->"


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        language: Language after the fence.
        code: Its lines, without the indentation of the fence.
        line: Number of its first line in the page.
        not_run: Reason why it is not run; None if it is run.
    """

    language: str
    code: str
    line: int
    not_run: str | None = None

    @property
    def is_example(self) -> bool:
        return self.language in EXAMPLES


def pages() -> list[Path]:
    """Return the README and all other pages, ordered by name."""
    return [README, *sorted(GUIDES.rglob("*.md"))]


def page_id(page: Path) -> str:
    return page.name if page == README else page.relative_to(GUIDES).as_posix()


def wants_a_hub(page: Path) -> bool:
    return _WITH_A_HUB in page.read_text(encoding="utf-8")


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page in order.

    Raises:
        ValueError: If a fence is not closed.
    """
    blocks: list[Block] = []
    reason: str | None = None
    opened: tuple[int, re.Match[str]] | None = None
    code: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if opened is not None:
            start, match = opened
            if line.strip() == match["fence"]:
                blocks.append(Block(match["language"].strip(), "\n".join(code) + "\n", start + 1, reason))
                opened, reason = None, None
            else:
                code.append(line.removeprefix(match["indent"]))
        elif match := _OPENING.match(line):
            opened, code = (number, match), []
        elif match := _NOT_RUN.match(line.strip()):
            reason = match["reason"]
        elif line.strip():
            reason = None
    if opened is not None:
        raise ValueError(f"{page}:{opened[0]}: the block is not closed")
    return blocks


def examples_of(page: Path) -> list[Block]:
    """Return the blocks of a page that are run."""
    return [block for block in blocks_of(page) if block.is_example and block.not_run is None]
