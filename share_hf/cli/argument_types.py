"""Parsers of option values. This module needs only the standard library."""

from __future__ import annotations

import argparse
import re


def number_or_auto(text: str) -> int | str:
    """Parse a whole number, or `"auto"`."""
    if text != "auto" and not re.fullmatch(r"-?\d+", text):
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}, expected a whole number or auto")
    return text if text == "auto" else int(text)


def size_in_bytes(text: str) -> int:
    """Parse a number of bytes with or without a unit, such as `1500000` or `1.5MB`."""
    if (match := re.fullmatch(r"([\d.]+) ?([KMG]?)B?", text, flags=re.IGNORECASE)) is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size, expected a number of bytes such as 1500000, or a size such as 1.5MB"
        )
    return int(float(match[1]) * 1000 ** ("KMG".index(match[2].upper()) + 1 if match[2] else 0))


def relative_error(text: str) -> float:
    """Parse a sensible target for a mean relative error: above 0, and below 1, the error of an update of zero."""
    try:
        error = float(text)
    except ValueError:
        error = -1.0
    if not 0 < error < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a relative error, expected a number above 0 and below 1")
    return error
