"""Match patterns of names in foreign configurations as PEFT does, but in a time that is known in advance.

Python's regular expressions may take forever on a short name, and whoever writes a configuration chooses them. This
module bounds the number of ways in which a pattern can be tried on a name.
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

# Fields that together determine which modules an adapter targets.
_TARGETING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")

_LITERAL = re.compile(r"[\w.-]+")  # names as PEFT writes them; it lets their dots match anything, which nobody intends
_USUAL_LENGTH = 128  # upper limit for names of modules
_QUICK = 10**6  # ways per name
_LONGEST_MATCHING = 10**9  # ways per adapter, which take seconds

_REPEATS = {"MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"}


def is_name(text: str) -> bool:
    """Return whether a pattern is the name of a module, or the end of one."""
    return _LITERAL.fullmatch(text) is not None


def without_slow_patterns(target: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """Return the fields of a configuration, with module names in place of patterns that may take long to match.

    Args:
        target: Fields of a configuration, in which each pattern is a regular expression.
        modules: Modules for which the adapter has weights.
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
    """Return, by module, the value of the first pattern that matches the end of its name. Others have no entry.

    Args:
        path: Path of the configuration, for messages.
        field: Field of the configuration that has the patterns.
        patterns: Values by pattern: a name, the end of a name, or a regular expression for either.
        modules: Names of modules.

    Raises:
        ValueError: If matching might take longer than seconds.
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
            f"{path}: {field} has patterns that may take forever to match, such as "
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
    """Return an upper bound on the ways to try a pattern on a text of this length; infinite if it is not a pattern."""
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
