"""Print the lower bounds of what share_hf needs as constraints for pip, one `name==version` per line.

    pip install --no-deps -e .
    python .github/oldest.py > oldest.txt
    pip install -c oldest.txt -e .

The bounds are those of setup.py, as the installed package knows them, without the extras.
"""

from __future__ import annotations

import re
from importlib import metadata


def oldest(requirements: list[str]) -> list[str]:
    """Return each requirement without an extra, at its lower bound."""
    found = []
    for requirement in requirements:
        if "extra ==" in requirement:
            continue
        bound = re.fullmatch(r"([\w.-]+)>=([\w.]+)", requirement)
        if bound is None:
            raise ValueError(f"{requirement!r}: expected name>=version")
        found.append(f"{bound[1]}=={bound[2]}")
    return found


if __name__ == "__main__":
    print(*oldest(metadata.requires("share-hf") or []), sep="\n")
