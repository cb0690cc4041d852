from tests.tree_fixtures import without_figures  # noqa: F401
