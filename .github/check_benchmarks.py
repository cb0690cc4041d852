"""Check whether benchmarks still reach their goals, from what they wrote with `--json`.

    python recipes/benchmarks/size.py --quick --json size.json
    python .github/check_benchmarks.py size.json

Each goal is printed with its number. Goals of bytes, errors and counts must be met. A goal that depends on a clock may
be missed by the factor SLACK, since other programs use a shared machine too; more than that is a regression. Rows
that were not run are printed and do not count. Exit codes: 0; 1 for a regression, or if no goal was measured at all.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


SLACK = 3.0

# Numbers that are the same on every machine: counts, sizes, and errors of results.
EXACT = re.compile(
    r"bytes of|LoRA / task|operations of|widest activation|largest relative difference|error of|logits of"
)


def is_regression(row: Mapping[str, Any]) -> bool:
    """Return whether a row with a goal misses it by more than the clock explains."""
    if row["ok"] is not False:
        return False
    bound = re.fullmatch(r"([<>]=) (\S+)", row["goal"])
    if bound is None or EXACT.search(row["name"]):
        return True
    limit, value = float(bound[2]), float(row["value"])
    return value > limit * SLACK if bound[1] == "<=" else value < limit / SLACK


def main(paths: Sequence[str]) -> int:
    goals, regressions = 0, 0
    for path in paths:
        print(f"{path}:")
        for row in json.loads(Path(path).read_text(encoding="utf-8"))["rows"]:
            if row.get("reason"):
                print(f"  {row['name']}: {row['reason']}")
            if row["goal"] is None:
                continue
            goals += 1
            is_missed = is_regression(row)
            regressions += is_missed
            verdict = "REGRESSION" if is_missed else "ok" if row["ok"] else "missed, within the slack"
            print(f"  {row['name']}: {row['value']:.4g} {row['unit']} (goal {row['goal']}): {verdict}")
    print(f"{goals} goals, {regressions} regressions")
    return int(regressions > 0 or goals == 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
