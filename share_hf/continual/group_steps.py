"""The steps of an optimizer that trains several tasks, each as if it were alone with its samples.

A step's loss is the sum over all samples, divided by their number. A sample's loss depends only on the parameters of
its own task, so one factor turns each task's gradient into the gradient of the mean over the task's own samples. A
task without a sample in a step has no gradients there, and torch optimizers skip parameters without gradients: their
moments, step counts and values, including weight decay, stay unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler


# Label that no loss counts.
IGNORED = -100


def items_of_samples(labels: Tensor | None, samples: int, *, are_shifted: bool) -> Tensor:
    """Return how many items of each sample a loss counts (samples,): labels, predicted tokens, or the sample itself.

    Args:
        labels: Labels (samples, ...), None if the batch has none.
        samples: Number of samples.
        are_shifted: Whether each label is predicted at the position before it.
    """
    if labels is None or labels.ndim == 0:
        return torch.ones(samples, dtype=torch.int64)
    counted = labels[..., 1:] if are_shifted and labels.ndim > 1 else labels
    return counted.ne(IGNORED).reshape(samples, -1).sum(1)


def scale_by_task(parameters: Sequence[Sequence[nn.Parameter]], factors: Tensor, max_norm: float) -> Tensor:
    """Scale the gradients of each task, and clip them by their own norm, as `clip_grad_norm_` would.

    Args:
        parameters: Trained parameters of each task.
        factors: Factors (tasks,) that gradients are multiplied by before they are clipped.
        max_norm: Largest norm of a task's gradients. Infinity disables clipping.

    Returns:
        Norms (tasks,) before clipping, zero where a task has no gradients.
    """
    gradients = [[p.grad for p in of_task if p.grad is not None] for of_task in parameters]
    together = [gradient for of_task in gradients for gradient in of_task]
    owners = torch.tensor([i for i, of_task in enumerate(gradients) for _ in of_task], dtype=torch.int64)
    owners = owners.to(factors.device)
    squares = torch.zeros_like(factors)
    if together:
        norms = torch.stack([norm.to(factors) for norm in torch._foreach_norm(together)])
        squares.index_add_(0, owners, norms.square())
    norms = squares.sqrt() * factors
    scales = factors * (max_norm / (norms + 1e-6)).clamp(max=1.0)
    for of_task, scale in zip(gradients, scales.unbind(), strict=True):
        for device, each in _by_device(of_task).items():
            torch._foreach_mul_(each, scale.to(device))
    return norms


def _by_device(tensors: Sequence[Tensor]) -> dict[torch.device, list[Tensor]]:
    found: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.device, []).append(tensor)
    return found


def divide_among_tasks(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Sequence[nn.Parameter]]) -> None:
    """Give each task parameter groups of its own in an optimizer that has not taken a step yet.

    Each task then has its own learning rate.

    Args:
        optimizer: Optimizer whose groups, with or without weight decay, hold the parameters of all tasks.
        parameters: Trained parameters of each task.
    """
    owner = {parameter: task for task, of_task in parameters.items() for parameter in of_task}
    groups = []
    for group in optimizer.param_groups:
        of_tasks: dict[str, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            of_tasks.setdefault(owner[parameter], []).append(parameter)
        groups += [{**group, "params": of_task, "task": task} for task, of_task in of_tasks.items()]
    optimizer.param_groups[:] = groups


class TaskSchedules(LambdaLR):
    """A learning rate for each task, which follows the schedule by the steps that the task has taken part in.

    Args:
        optimizer: Optimizer whose groups have the name of their task under `"task"`.
        schedules: Function of each task from its step to the factor of its learning rate.

    Attributes:
        task_steps (`dict[str, int]`): Number of steps of each task so far.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedules: Mapping[str, Callable[[int], float]]) -> None:
        self.task_steps = dict.fromkeys(schedules, 0)
        super().__init__(
            optimizer,
            [lambda _, task=group["task"]: schedules[task](self.task_steps[task]) for group in optimizer.param_groups],
        )

    def step(self, epoch: int | None = None) -> None:
        """Count a step of the tasks that have gradients, and set the learning rates of all tasks.

        Args:
            epoch (`int`, *optional*): Number of the epoch, which is not used.
        """
        groups = self.optimizer.param_groups
        for task in {group["task"]: None for group in groups if any(p.grad is not None for p in group["params"])}:
            self.task_steps[task] += 1
        super().step()


def schedule_of(args: TrainingArguments, steps: int) -> Callable[[int], float]:
    """Return the schedule of the arguments over `steps` steps: a function from a step to the factor of the rate.

    Raises:
        ValueError: If the schedule does not depend on steps alone.
    """
    rate = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    schedule = get_scheduler(
        args.lr_scheduler_type,
        optimizer=rate,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    if not isinstance(schedule, LambdaLR):
        raise ValueError(
            f"lr_scheduler_type is {args.lr_scheduler_type!r}, expected a schedule by steps: tasks that are learned "
            "together have no common metric to follow"
        )
    return schedule.lr_lambdas[0]


class TaskLosses:
    """Mean losses of tasks since the last log.

    Args:
        tasks: Number of tasks.
    """

    def __init__(self, tasks: int) -> None:
        self._sums_and_items = torch.zeros(2, tasks)

    def add(self, logits: Tensor, labels: Tensor, numbers: Sequence[int], items: Tensor, *, are_shifted: bool) -> None:
        """Add the losses of a batch.

        Args:
            logits: Logits (samples, ..., labels).
            labels: Labels (samples, ...), integers or floating-point numbers.
            numbers: Number of the task of each sample.
            items: Items of each sample (samples,), as `items_of_samples` returns them.
            are_shifted: Whether each label is predicted at the position before it.
        """
        self._sums_and_items = self._sums_and_items.to(logits.device)  # no wait for the device until a log
        with torch.no_grad():
            for number in dict.fromkeys(numbers):
                rows = [row for row, other in enumerate(numbers) if other == number]
                self._sums_and_items[0, number] += _summed_loss(logits[rows], labels[rows], are_shifted=are_shifted)
                self._sums_and_items[1, number] += items[rows].sum()

    def take(self, reduce: Callable[[Tensor], Tensor]) -> list[float | None]:
        """Return the mean loss of each task, None where it had no sample, and start anew.

        Args:
            reduce: Function that returns the sum, or the mean, of a tensor over all processes.
        """
        sums, items = reduce(self._sums_and_items).tolist()
        self._sums_and_items = torch.zeros_like(self._sums_and_items)
        return [total / count if count else None for total, count in zip(sums, items, strict=True)]


def _summed_loss(logits: Tensor, labels: Tensor, *, are_shifted: bool) -> Tensor:
    if labels.is_floating_point():
        logits = logits.reshape(labels.shape).float()
        loss = F.binary_cross_entropy_with_logits if labels.ndim > 1 and labels.shape[-1] > 1 else F.mse_loss
        return loss(logits, labels.float(), reduction="sum")
    if are_shifted:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return F.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, reduction="sum")
