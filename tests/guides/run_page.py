"""Runs the examples of a page in the current folder: `python -m tests.guides.run_page PAGE`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.guides.pages import Block, examples_of


def run(page: Path) -> None:
    """Run the examples of a page. The first one that fails raises."""
    module = ModuleType("__main__")  # dataclasses and pickle look up the module of their classes
    sys.modules["__main__"] = module
    for block in examples_of(page):
        print(f"--- {page.name}:{block.line} ({block.language})", flush=True)
        if block.language == "python":
            run_python(block, page, vars(module))
        else:
            subprocess.run(["bash", "-eu", "-o", "pipefail", "-c", block.code], check=True)


def run_python(block: Block, page: Path, namespace: dict[str, Any]) -> None:
    code = "\n" * (block.line - 1) + block.code  # so that a traceback names lines of the page
    exec(compile(code, str(page), "exec"), namespace)
    sys.stdout.flush()


if __name__ == "__main__":
    run(Path(sys.argv[1]))
