"""A stream's subspace on the hub, as the arguments of the stream say."""

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
        subspace: The subspace.
        repo_id: Where.
        args: What is not among the options.
        **options: As for [`SharedSubspace.push_to_hub`]; None where the arguments decide.

    Returns:
        The subspace as it is on the hub then, and the commit, on every process.
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
    """The choice, without tasks that are still to be learned."""
    if choice is None or isinstance(choice, str):
        return choice
    return [task for task in choice if task in learned]
