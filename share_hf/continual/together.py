"""Finding and checking the tasks of a stream that are learned together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import SaveStrategy

from ..engines.local import LocalEngine
from ..tuner.experts import Experts
from .arguments import ShareTrainingArguments
from .data import Data, TaskSplits, cannot_be_indexed
from .group_steps import schedule_of
from .problems import CLASSES, Problem


# One task, or several that are learned together.
Unit = tuple[str, ...]
Together = Sequence[str] | Sequence[Sequence[str]]

# Arguments that a group cannot honour, and what to use instead.
_REFUSED = {
    "eval_on_start": "False: they are evaluated when they are learned",
    "load_best_model_at_end": "False: each of them has another best step",
    "auto_find_batch_size": "False: the steps of each are planned ahead",
}


def groups_of(
    tasks: Mapping[str, TaskSplits], together: Together | None, args: ShareTrainingArguments, known: int
) -> list[Unit]:
    """Return the groups of tasks of a stream that are learned together.

    Args:
        tasks: Tasks of the stream, in order.
        together: Names of tasks that are learned together, or several such lists.
        args: Arguments of the stream.
        known: Number of tasks of the subspace that the stream continues from.

    Raises:
        ValueError: If a group does not consist of consecutive tasks, or cannot be learned together. The message names
            the tasks or the argument.
    """
    groups = [] if together is None else _groups_in(together)
    names = [name for group in groups for name in group]
    if unknown := [name for name in names if name not in tasks]:
        raise ValueError(f"together has {unknown}, expected names among tasks, which are {list(tasks)}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"together has {twice} twice, expected each task once")
    order = list(tasks)
    for group in groups:
        first = order.index(group[0])
        if order[first : first + len(group)] != list(group):
            raise ValueError(f"together has {list(group)}, expected tasks that follow one another in tasks, {order}")
        if known + first < args.num_init_tasks:
            raise ValueError(
                f"together has {group[0]!r}, which is number {known + first + 1} in the subspace, expected a basis "
                f"first: num_init_tasks = {args.num_init_tasks} tasks before it, or a subspace= that has them"
            )
        if streamed := [name for name in group if cannot_be_indexed(tasks[name].train)]:
            raise ValueError(
                f"together has {streamed}, whose training data is streamed, expected data with a length: batches that "
                "mix tasks are planned ahead"
            )
    if groups:
        _check_arguments(args)
    return groups


def units_of(tasks: Iterable[str], groups: Iterable[Unit]) -> list[Unit]:
    """Return the units of a stream in order: single tasks, and groups of tasks that are learned together.

    Args:
        tasks: Tasks of the stream, in order.
        groups: Groups of tasks that are learned together.
    """
    first_of = {group[0]: group for group in groups}
    in_groups = {name for group in groups for name in group}
    return [first_of.get(name, (name,)) for name in tasks if name in first_of or name not in in_groups]


def _groups_in(together: Together) -> list[Unit]:
    """Return the groups of at least two names; a list of one name is a task by itself."""
    if isinstance(together, str) or not isinstance(together, Sequence):
        raise ValueError(f"together is {together!r}, expected a list of names, or of such lists")
    are_names = [isinstance(entry, str) for entry in together]
    groups = [together] if all(are_names) else together
    if any(are_names) and not all(are_names):
        raise ValueError(f"together is {together!r}, expected names alone or lists of names alone")
    for group in groups:
        if not isinstance(group, Sequence) or not all(isinstance(name, str) for name in group):
            raise ValueError(f"together has {group!r}, expected a list of names")
    return [tuple(group) for group in groups if len(group) > 1]


def _check_arguments(args: ShareTrainingArguments) -> None:
    if args.method != "coefficients":
        raise ValueError(
            f"together is given and method is {args.method!r}, expected 'coefficients': tasks that change the basis "
            "are learned one after the other"
        )
    for name, expected in _REFUSED.items():
        if value := getattr(args, name, None):
            raise ValueError(f"{name} is {value!r}, expected {expected}, as some tasks are learned together")
    if args.eval_strategy != "no" or args.save_strategy == SaveStrategy.BEST:
        raise ValueError(
            f"eval_strategy is {args.eval_strategy.value!r} and save_strategy {args.save_strategy.value!r}, expected "
            "'no', and no 'best': tasks that are learned together are evaluated when they are learned"
        )
    strategy = getattr(args, "train_sampling_strategy", "random")
    if strategy != "random":
        raise ValueError(f"train_sampling_strategy is {strategy!r}, expected 'random': batches mix tasks")
    loading = args.accelerator_config
    if loading.split_batches or loading.dispatch_batches:
        raise ValueError(
            "accelerator_config has split_batches or dispatch_batches, expected neither: each process takes batches "
            "of its own"
        )
    schedule_of(args, 1)


def check_classes(groups: Iterable[Unit], problems: Mapping[str, Problem | None]) -> None:
    """Refuse groups with tasks that do not predict classes, as losses of groups are counted as those of classes.

    Args:
        groups: Groups of tasks that are learned together.
        problems: Problem of each task, None if the model is not a classifier.

    Raises:
        ValueError: If there is such a task. The message names the task and its kind.
    """
    for name in (name for group in groups for name in group):
        if (problem := problems[name]) is not None and problem.problem_type != CLASSES:
            raise ValueError(
                f"together has {name!r}, which is {problem.problem_type}, expected {CLASSES}: learn it by itself"
            )


def check_can_train_together(trainer: Trainer, groups: Iterable[Unit], tasks: Mapping[str, TaskSplits]) -> None:
    """Refuse data, engines and models with which tasks cannot be trained together.

    Args:
        trainer: Trainer with the engine and the model.
        groups: Groups of tasks that are learned together.
        tasks: Tasks of the stream.

    Raises:
        ValueError: If there is an obstacle. The message names it and what works instead.
    """
    for group in groups:
        _check_columns(trainer, {name: tasks[name].train for name in group})
    if not isinstance(trainer.engine, LocalEngine):
        raise ValueError(
            f"together is given, and {trainer.accelerator.distributed_type.value} divides gradients among processes, "
            "expected one process or DDP: each task has its own norm and its own steps"
        )
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"together is given, and one process has {trainer.args.n_gpu} GPUs, expected one, or a process for each "
            "by accelerate launch or torchrun"
        )
    if trainer.args.world_size > 1 and trainer.args.ddp_find_unused_parameters is False:
        raise ValueError(
            "together is given and ddp_find_unused_parameters is False, expected None or True: a task without a "
            "sample in a process has no gradients there"
        )
    if name := next((name for name, module in trainer.model.named_modules() if isinstance(module, Experts)), None):
        raise ValueError(
            f"together is given, and {name!r} has adapted experts in one parameter, expected other target_parameters: "
            "it is not known which samples an expert sees"
        )


def _check_columns(trainer: Trainer, data: Mapping[str, Data]) -> None:
    """Refuse examples of different columns: a collator uses the columns of the first example for the whole batch.

    Raises:
        ValueError: If the columns differ. The message names two tasks and their columns.
    """
    used = trainer._get_collator_with_removed_columns(lambda examples: examples[0])
    columns: dict[str, list[str]] = {}
    for task, examples in data.items():
        if isinstance(example := examples[0], Mapping):
            columns[task] = sorted(used([example]))
    for task, found in columns.items():
        first, expected = next(iter(columns.items()))
        if found != expected:
            raise ValueError(
                f"together has {task!r}, whose examples have {found}, and {first!r} with {expected}, expected the "
                "same columns: a batch mixes them"
            )


def check_optimizer(optimizer: Any) -> None:
    """Refuse optimizers that do not skip parameters without gradients, or do not count steps for each parameter.

    Args:
        optimizer: Optimizer of tasks that are learned together.

    Raises:
        ValueError: If the optimizer is one of them. The message names it.
    """
    kind = type(getattr(optimizer, "optimizer", optimizer))
    is_schedule_free = callable(getattr(optimizer, "train", None))
    if is_schedule_free or kind.__name__ in ("LOMO", "AdaLOMO", "AdaLomo", "Lomo"):
        raise ValueError(
            f"the optimizer is {kind.__name__}, expected one whose steps are counted for each parameter, as of "
            "adamw_torch or sgd: a task without a sample in a step must stay as it is"
        )
