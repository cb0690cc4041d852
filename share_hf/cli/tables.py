"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns under their names, the first aligned to the left."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def size(count: float) -> str:
    """Bytes, with three digits."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def drift(value: float) -> str:
    """A relative drift: 0 where it is rounding."""
    return f"{value:.2g}" if value >= 1e-6 else "0"


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def names(tasks: Iterable[str]) -> str:
    return ", ".join(tasks) or "none"
