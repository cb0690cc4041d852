"""Patterns of names in foreign configurations: matched as PEFT does, but in a time that is known before.

Python's regular expressions may take for ever on a short name, and whoever writes a configuration chooses them. What
is bounded here is in how many ways a pattern can be tried on a name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar


try:
    from re import _parser
except ImportError:  # Python 3.10
    import sre_parse as _parser


Value = TypeVar("Value")

# The fields that say together which modules an adapter targets.
_TARGETING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")

_LITERAL = re.compile(r"[\w.-]+")  # PEFT writes names, whose dots it takes for any character; nobody means that
_USUAL_LENGTH = 128  # of the name of a module, at most
_QUICK = 10**6  # ways a name
_LONGEST_MATCHING = 10**9  # ways for an adapter: seconds

_REPEATS = {"MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"}


def is_name(text: str) -> bool:
    """Whether a pattern is the name of a module, or the end of one."""
    return _LITERAL.fullmatch(text) is not None


def without_slow_patterns(target: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """The fields of a configuration with the names of its modules in place of patterns that may take long to match.

    Args:
        target: Any fields of a configuration, each pattern a regular expression.
        modules: The modules that the adapter has weights for.
    """
    patterns = [value for name in _TARGETING[:2] if isinstance(value := target.get(name), str)]
    within = target.get("layers_pattern") or []
    patterns += [rf"(?:^|.*?\.){pattern}\.\d+\." for pattern in ([within] if isinstance(within, str) else within)]
    if all(_ways_to_match(pattern, _USUAL_LENGTH) <= _QUICK for pattern in patterns):
        return dict(target)
    return {**target, **dict.fromkeys(_TARGETING[1:]), "target_modules": sorted(modules)}


def values_by_module(
    path: Path, field: str, patterns: Mapping[str, Value], modules: Collection[str]
) -> dict[str, Value]:
    """By module, the value of the first pattern that matches the end of its name; without those that none matches.

    Args:
        path: The configuration, for messages.
        field: Name of the patterns there.
        patterns: Names, ends of names, or regular expressions for them.
        modules: Names of modules.

    Raises:
        ValueError: If that might take longer than seconds.
    """
    if not patterns:
        return {}
    order = {pattern: number for number, pattern in enumerate(patterns)}
    values = list(patterns.values())
    expressions = {number: rf"(.*\.)?({pattern})$" for pattern, number in order.items() if not is_name(pattern)}
    longest = max(map(len, modules), default=0)
    ways = len(modules) * sum(_ways_to_match(expression, longest) for expression in expressions.values())
    if ways > _LONGEST_MATCHING:
        raise ValueError(
            f"{path}: {field} has patterns that may take for ever to match, such as "
            f"{max(patterns, key=lambda pattern: _ways_to_match(pattern, longest))[:80]!r}, expected names of modules"
        )
    compiled = {number: re.compile(expression) for number, expression in expressions.items()}
    found = {}
    for module in modules:
        numbers = [order[end] for end in _ends_of(module) if end in order and is_name(end)]
        numbers += [number for number, expression in compiled.items() if expression.match(module)]
        if numbers:
            found[module] = values[min(numbers)]
    return found


def _ends_of(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _ways_to_match(pattern: str, length: int) -> float:
    """In how many ways a pattern may be tried on a text of this length, at most; infinite if it is no pattern."""
    try:
        return _ways(_parser.parse(pattern), length)
    except (re.error, RecursionError, OverflowError):
        return float("inf")


def _ways(parsed: Iterable[tuple[Any, Any]], length: int) -> float:
    ways = 1.0
    for kind, value in parsed:
        ways *= _ways_of_part(str(kind), value, length)
    return ways


def _ways_of_part(kind: str, value: Any, length: int) -> float:
    if kind in _REPEATS:
        least, most, body = value
        most = min(int(most), length)
        choices = most - min(int(least), most) + 1
        within = _ways(body, length)
        try:
            return choices * within**most
        except OverflowError:
            return float("inf")
    if kind == "BRANCH":
        return sum(_ways(branch, length) for branch in value[1])
    if kind in {"SUBPATTERN", "ASSERT", "ASSERT_NOT"}:
        return _ways(value[-1], length)
    if kind == "ATOMIC_GROUP":
        return _ways(value, length)
    if kind == "GROUPREF_EXISTS":
        return sum(_ways(branch, length) for branch in value[1:] if branch is not None)
    return 1.0
