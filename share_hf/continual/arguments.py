"""Arguments of a stream of tasks."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from ..state import Phase
from ..tuner import ShareConfig


Method = Literal["share", "coefficients"]


@dataclass
class ShareTrainingArguments(TrainingArguments):
    """
    Arguments of [`ShareTrainer`]: those of [`~transformers.TrainingArguments`], which apply to every phase, and what
    a phase may have of its own.

    Args:
        method (`Literal["share", "coefficients"]`, *optional*, defaults to `"share"`):
            How a task is learned once there is a subspace: with temporary factors and a merge (Sec. 3.2.2), or by its
            coefficients alone in the frozen basis.
        num_init_tasks (`int`, *optional*, defaults to `2`):
            How many tasks, the first ones, are trained as free factors of rank p, as a LoRA is, before others build on
            the subspace that they span.
        init_learning_rate (`float`, *optional*): Learning rate of the init phase; `learning_rate` if not given.
        finetune_learning_rate (`float`, *optional*):
            Learning rate of the finetune phase; `learning_rate` if not given.
        init_num_train_epochs (`float`, *optional*): Epochs of the init phase; `num_train_epochs` if not given.
        finetune_num_train_epochs (`float`, *optional*, defaults to `0`):
            Epochs in which a task's coefficients are trained after its merge (Sec. 3.2.3).
        evaluate_seen_tasks (`bool`, *optional*, defaults to `True`):
            Whether all tasks learned so far are evaluated after each task.
        evaluate_before (`bool`, *optional*, defaults to `False`):
            Whether each task is also evaluated before it is learned: with the model alone, and with the adapter of the
            task before it, as forward transfer needs.
        score_metric (`str`, *optional*):
            The metric that is a task's score, higher better; `"accuracy"` if it is measured, or else minus the loss.
        ddp_broadcast_buffers (`bool`, *optional*, defaults to `False`):
            As of [`~transformers.TrainingArguments`], but off: the bases are buffers, which DDP would send to all
            processes at every step, though they are the same there.
    """

    method: Method = field(
        default="share",
        metadata={"help": "How a task is learned in the subspace: 'share' (temporary factors) or 'coefficients'."},
    )
    num_init_tasks: int = field(
        default=2, metadata={"help": "How many tasks are trained as a LoRA before others build on their subspace."}
    )
    init_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the init phase; learning_rate if not given."}
    )
    finetune_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the finetune phase; learning_rate if not given."}
    )
    init_num_train_epochs: float | None = field(
        default=None, metadata={"help": "Epochs of the init phase; num_train_epochs if not given."}
    )
    finetune_num_train_epochs: float = field(
        default=0.0, metadata={"help": "Epochs of training a task's coefficients after its merge."}
    )
    evaluate_seen_tasks: bool = field(
        default=True, metadata={"help": "Evaluate all tasks learned so far after each task."}
    )
    evaluate_before: bool = field(
        default=False, metadata={"help": "Evaluate each task also before it is learned, for forward transfer."}
    )
    score_metric: str | None = field(
        default=None, metadata={"help": "The metric that is a task's score; accuracy, or minus the loss."}
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "Whether DDP sends all buffers, the bases among them, at every step."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_init_tasks < 1:
            raise ValueError(f"num_init_tasks is {self.num_init_tasks}, expected at least 1: a subspace needs a task")
        if self.finetune_num_train_epochs < 0:
            raise ValueError(f"finetune_num_train_epochs is {self.finetune_num_train_epochs}, expected 0 or more")
        if self.push_to_hub:
            if self.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
                raise ValueError(
                    f"hub_strategy is {self.hub_strategy.value!r}, expected 'every_save' (a push after every task) or "
                    "'end': the checkpoints of a phase stay where it is trained"
                )
            if self.hub_revision not in (None, "main"):
                raise ValueError(f"hub_revision is {self.hub_revision!r}, expected none: branches are tasks")


def arguments_of_phase(args: ShareTrainingArguments, phase: Phase, folder: Path) -> ShareTrainingArguments:
    """The arguments of one phase, with its rate and its epochs, and a folder of its own."""
    own = copy.copy(args)
    own.output_dir = str(folder)
    own.push_to_hub = False  # what goes to the hub is the subspace, not the checkpoints of a phase
    if phase == Phase.INIT:
        own.learning_rate = args.init_learning_rate or args.learning_rate
        own.num_train_epochs = args.init_num_train_epochs or args.num_train_epochs
    if phase == Phase.FINETUNE:
        own.learning_rate = args.finetune_learning_rate or args.learning_rate
        own.num_train_epochs = args.finetune_num_train_epochs
    return own


def training_facts(args: ShareTrainingArguments, config: ShareConfig) -> dict[str, Any]:
    """What the model card tells of how tasks are trained."""
    return {
        "method": args.method,
        "num_init_tasks": args.num_init_tasks,
        "learning_rate": args.learning_rate,
        "init_learning_rate": args.init_learning_rate or args.learning_rate,
        "num_train_epochs": args.num_train_epochs,
        "finetune_num_train_epochs": args.finetune_num_train_epochs,
        "train_batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "seed": args.seed,
        "num_temporary": config.num_temporary,
        "init_std": config.init_std,
    }
