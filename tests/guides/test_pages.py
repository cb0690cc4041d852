"""How the blocks of a page are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guides.pages import blocks_of, examples_of


TEXT = """# A page

```python
a = 1
```

<!-- not run: needs a GPU -->
```bash
nvidia-smi
```

<!-- not run: is about the next block alone -->

A sentence.

1. A step:

    ```bash
    ls
      pwd
    ```

```text
out
```
"""


def test_blocks_are_found_with_their_lines_and_reasons(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(TEXT, encoding="utf-8")
    python, gpu, step, output = blocks_of(tmp_path / "page.md")
    assert (python.code, python.line, python.not_run) == ("a = 1\n", 4, None)
    assert gpu.not_run == "needs a GPU"
    assert (step.code, step.not_run) == ("ls\n  pwd\n", None)
    assert output.language == "text" and not output.is_example
    assert examples_of(tmp_path / "page.md") == [python, step]


def test_an_open_block_is_named(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("```python\na = 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"page\.md:1"):
        blocks_of(tmp_path / "page.md")
