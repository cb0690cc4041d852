"""Fixtures of this room: trees, and adapters to make them from."""

from tests.tree_fixtures import (  # noqa: F401
    copy_of,
    loras,
    save_classifier,
    save_lora,
    saved,
    subspace,
    tree,
    with_figures,
    without_figures,
)
