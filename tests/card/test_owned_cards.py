"""Cards that owners have edited, and files that are not cards: the owner's text stays, and nothing else is copied."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from share_hf import SharedSubspace
from share_hf.card import MAX_CARD_BYTES
from share_hf.card.card import GENERATED_BEGIN, GENERATED_END
from tests.hub_server.fixtures import Hub


REPO = "org/share-subspace"
UNREADABLE = {
    "no UTF-8": (b"---\nlicense: mit\n---\nCaf\xe9\n", "not UTF-8"),
    "too large": (b"x" * (MAX_CARD_BYTES + 1), f"bytes, expected .*at most {MAX_CARD_BYTES}"),
    "broken metadata": (
        b"---\nlicense: [\n---\nText\n",
        "the metadata of the model card cannot be read .*expected YAML",
    ),
}


@pytest.mark.parametrize(("content", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_card_that_cannot_be_read_is_reported_and_left_as_it_is(
    content: bytes, message: str, subspace: SharedSubspace, tree: Path
) -> None:
    (tree / "README.md").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        subspace.save_pretrained(tree)
    assert (tree / "README.md").read_bytes() == content
    (tree / "README.md").unlink()
    subspace.save_pretrained(tree)
    assert SharedSubspace.from_pretrained(tree).tasks == subspace.tasks


@pytest.mark.parametrize(("content", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_card_on_the_hub_that_cannot_be_read_stops_no_reader(
    content: bytes, message: str, hub: Hub, subspace: SharedSubspace
) -> None:
    head = subspace.push_to_hub(REPO).oid
    repository = hub.repository(REPO)
    commit = repository.branches["main"]
    blob = type(commit.files["README.md"])(content)  # as git would have pushed it, which does not check metadata
    repository.branches["main"] = repository._keep(
        replace(commit, files={**commit.files, "README.md": blob}, parent=commit)
    )
    assert SharedSubspace.from_pretrained(REPO).tasks == subspace.tasks
    with pytest.raises(ValueError, match=message):
        subspace.push_to_hub(REPO)
    assert repository.branches["main"].parent.oid == head


def test_the_text_behind_a_link_is_not_copied_into_a_card(
    subspace: SharedSubspace, tree: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes").write_text("Not for others.")
    (tree / "README.md").unlink()
    (tree / "README.md").symlink_to(tmp_path / "notes")
    with pytest.raises(ValueError, match=r"README\.md: is a link to .*notes, expected a file"):
        subspace.save_pretrained(tree)
    assert (tmp_path / "notes").read_text() == "Not for others."


@pytest.mark.parametrize("marker", [GENERATED_BEGIN, GENERATED_END])
def test_a_marker_in_a_field_ends_no_generated_part(marker: str, subspace: SharedSubspace, tree: Path) -> None:
    metrics = {"score": marker, "tasks": ["mrpc", "sst2"], "matrix": [[0.5, None], [0.4, 0.6]]}
    marked = SharedSubspace(replace(subspace.state, metrics=metrics))
    (tree / "README.md").write_text((tree / "README.md").read_text() + "\nThanks to everybody.\n")
    sizes = set()
    for _ in range(3):
        marked.save_pretrained(tree)
        sizes.add((tree / "README.md").stat().st_size)
    card = (tree / "README.md").read_text()
    assert len(sizes) == 1 and card.count("## Tasks") == 1 and card.endswith("Thanks to everybody.\n")
