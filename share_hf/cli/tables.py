"""Numbers and tables formatted for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format columns under their names, with the first one aligned to the left."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *cells[1:]]) for line, cells in zip(lines, aligned, strict=True)
    )


def size(count: float) -> str:
    """Format a number of bytes, to three digits."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 999.5:
            return f"{count:.3g} {unit}"
    return f"{count / 1000:.3g} GB"


def drift(value: float) -> str:
    """Format a relative drift; rounding errors are shown as 0."""
    return f"{value:.2g}" if value >= 1e-6 else "0"


def count(number: int, noun: str) -> str:
    """Format a number of things, such as `1 task` and `2 tasks`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def names(tasks: Iterable[str]) -> str:
    return ", ".join(tasks)


def some(texts: Iterable[str], separator: str = ", ", limit: int = 20) -> str:
    """Join texts in one line, up to a number that people can read."""
    texts = list(texts)
    return separator.join(texts[:limit]) + (f" and {len(texts) - limit} more" if len(texts) > limit else "")
