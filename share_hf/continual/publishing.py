"""Publishing a stream's subspace to the Hub according to the stream's arguments."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from huggingface_hub import CommitInfo

from ..engines import on_first_process
from ..hub.branches import BranchChoice
from ..shared_subspace import SharedSubspace
from ..state import SubspaceState
from .arguments import ShareTrainingArguments


def publish(
    subspace: SharedSubspace, repo_id: str, args: ShareTrainingArguments, **options: Any
) -> tuple[SubspaceState, CommitInfo]:
    """Push a subspace from the first process.

    Args:
        subspace: Subspace to push.
        repo_id: Id of the repository.
        args: Arguments of the stream, which supply the options that are not given.
        **options: Same as in [`SharedSubspace.push_to_hub`]. None leaves an option to the arguments.

    Returns:
        The state of the subspace that the Hub now holds, and the commit, on every process.
    """
    of_stream = {
        "token": args.hub_token,
        "private": args.hub_private_repo,
        "branches": _branches(args.hub_branches, subspace.tasks),
    }
    given = {name: value for name, value in options.items() if value is not None}

    def push() -> tuple[SubspaceState, CommitInfo]:
        commit = subspace.push_to_hub(repo_id, **{**of_stream, **given})
        return subspace.state, commit

    return on_first_process(push, known=subspace.state)


def _branches(choice: BranchChoice | None, learned: Collection[str]) -> BranchChoice | None:
    """Return the choice without tasks that are yet to be learned."""
    if choice is None or isinstance(choice, str):
        return choice
    return [task for task in choice if task in learned]
