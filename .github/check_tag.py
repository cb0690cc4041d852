"""Check whether a release may be built: its tag is the version of the package, and the changelog has that version.

    python .github/check_tag.py v0.1.0

Exit codes: 0 if it may; 1 if not, with one line that says why. Needs only the standard library.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]


def fault_of(tag: str, root: Path = ROOT) -> str | None:
    """Return what is wrong with a tag, or None."""
    source = (root / "share_hf" / "version.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        return 'share_hf/version.py has no line of the form `__version__ = "1.2.3"`'
    version = found[1]
    if tag != f"v{version}":
        return f"the tag is {tag!r}, but share_hf/version.py says {version!r}: expected the tag 'v{version}'"
    changelog = (root / ".github" / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## \[{re.escape(version)}\]", changelog, re.MULTILINE):
        return f".github/CHANGELOG.md has no section [{version}]"
    return None


def main() -> int:
    if len(sys.argv) != 2:
        print(f"usage: {sys.argv[0]} TAG", file=sys.stderr)
        return 2
    if fault := fault_of(sys.argv[1]):
        print(f"error: {fault}", file=sys.stderr)
        return 1
    print(f"{sys.argv[1]} is the version of the package.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
