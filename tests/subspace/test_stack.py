from __future__ import annotations

import pytest
import torch
from torch import Tensor

from share_hf.subspace.stack import TASKS_PER_CHUNK, UpdateStack


# The first new update is of rank 1, the second of rank 3.
GIVEN = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64).unsqueeze(2)


def make_stack(tasks: int) -> tuple[UpdateStack, list[Tensor]]:
    """Return a stack of `tasks` old and two new updates in (9, 8) coordinates, and its weighted updates."""
    generator = torch.Generator().manual_seed(tasks)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    stack = UpdateStack(
        rotation_out=torch.linalg.qr(normal(9, 5)).Q,
        rotation_in=torch.linalg.qr(normal(8, 4)).Q,
        old_out=normal(tasks, 2, 5),
        old_in=normal(tasks, 2, 4),
        new_out=normal(2, 3, 9) * GIVEN,
        new_in=normal(2, 3, 8) * GIVEN,
        new_ranks=torch.tensor([1, 3]),
        old_weights=normal(tasks).abs(),
        new_weights=torch.tensor([0.5, 3.0], dtype=torch.float64),
        outside=torch.zeros(2, dtype=torch.float64),
    )
    old = [
        weight * (stack.rotation_out @ out.T) @ (stack.rotation_in @ in_.T).T
        for weight, out, in_ in zip(stack.old_weights, stack.old_out, stack.old_in, strict=True)
    ]
    new = [
        0.5 * stack.new_out[0, :1].T @ stack.new_in[0, :1],
        3.0 * stack.new_out[1].T @ stack.new_in[1],
    ]
    return stack, old + new


TASK_COUNTS = [0, 1, TASKS_PER_CHUNK, TASKS_PER_CHUNK + 1, 2 * TASKS_PER_CHUNK + 3]


@pytest.mark.parametrize("tasks", TASK_COUNTS)
def test_the_second_moment_is_that_of_the_dense_updates(tasks: int) -> None:
    stack, dense = make_stack(tasks)

    moment_out, moment_in = sum(u @ u.T for u in dense), sum(u.T @ u for u in dense)
    tolerance = 1e-13 * float(moment_out.norm())
    torch.testing.assert_close(stack.second_moment(), moment_out, rtol=0, atol=tolerance)
    torch.testing.assert_close(stack.mirrored.second_moment(), moment_in, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kept", range(9))
@pytest.mark.parametrize("tasks", [0, 3, TASKS_PER_CHUNK + 1])
def test_the_second_moment_within_some_inputs_is_that_of_the_projected_updates(tasks: int, kept: int) -> None:
    stack, dense = make_stack(tasks)
    directions = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    projection = directions[:, :kept] @ directions[:, :kept].T

    moment = stack.second_moment_within(stack.second_moment(), directions[:, :kept], directions[:, kept:])

    expected = sum(update @ projection @ update.T for update in dense)
    torch.testing.assert_close(moment, expected, rtol=0, atol=1e-12 * float(stack.second_moment().norm()))


@pytest.mark.parametrize("tasks", [0, 1, TASKS_PER_CHUNK + 1])
def test_factor_columns_are_the_factors_of_all_updates_unweighted(tasks: int) -> None:
    stack, _ = make_stack(tasks)

    columns = stack.factor_columns()

    old = [stack.rotation_out @ out.T for out in stack.old_out]
    torch.testing.assert_close(
        columns, torch.cat([*old, stack.new_out[0, :1].T, stack.new_out[1].T], dim=1), rtol=1e-12, atol=1e-13
    )
