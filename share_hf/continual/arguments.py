"""Arguments of a stream of tasks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from ..hub.branches import branch_choice
from ..state import Phase
from ..tuner import ShareConfig


Method = Literal["share", "coefficients"]

# Options of transformers that no stream can honour, and what to use instead. All of them are off by default.
REFUSED_ARGUMENTS = {
    "bf16_full_eval": "False: it would round what tasks have learned; load the base model in torch.bfloat16",
    "fp16_full_eval": "False: it would round what tasks have learned; load the base model in torch.float16",
    "enable_jit_checkpoint": (
        "False: a phase that it ends early would be merged half trained; save_steps says how much of a phase is lost "
        "when a stream is killed"
    ),
    "eval_use_gather_object": "False: a Trainer forgets it after its first evaluation",
    "optim_target_modules": "None: GaLore and APOLLO project the gradients of whole weights, which tasks do not train",
    "parallelism_config": "None: tasks are trained under DDP, DeepSpeed or FSDP",
}


# Parameters of `Trainer` that no stream can honour, and what to use instead. By default, all are None or hold only
# None.
REFUSED_PARAMETERS = {
    "train_dataset": "tasks={name: data}: a stream learns from them alone",
    "model_init": "model: a stream learns all its tasks in one model; make a trainer for each trial of a search",
    "optimizers": (
        "optim and optim_args in the arguments, or optimizer_cls_and_kwargs=(class, keywords): each phase trains "
        "other parameters, with an optimizer of its own"
    ),
}


@dataclass
class ShareTrainingArguments(TrainingArguments):
    """
    Arguments of [`ShareTrainer`]: those of [`~transformers.TrainingArguments`], which apply to every phase, and
    arguments for streams and single phases. `max_steps`, if given, is the length of every phase.

    Args:
        method (`Literal["share", "coefficients"]`, *optional*, defaults to `"share"`):
            Method by which a task is learned once there is a subspace: `"share"` trains temporary factors and merges
            (Sec. 3.2.2), `"coefficients"` trains only the task's coefficients in the frozen basis.
        num_init_tasks (`int`, *optional*, defaults to `2`):
            Number of tasks at the start of the stream that are trained as free factors of rank p, as a LoRA is, before
            others build on the subspace that these tasks span.
        init_learning_rate (`float`, *optional*): Learning rate of the init phase. None means `learning_rate`.
        finetune_learning_rate (`float`, *optional*):
            Learning rate of the finetune phase. None means `learning_rate`.
        init_num_train_epochs (`float`, *optional*):
            Number of epochs of the init phase. None means `num_train_epochs`. Cannot be combined with `max_steps`.
        finetune_num_train_epochs (`float`, *optional*, defaults to `0`):
            Number of epochs in which a task's coefficients are trained after its merge (Sec. 3.2.3). With `max_steps`,
            any number above 0 adds the phase, which then takes `max_steps` steps.
        samples_per_task (`int`, *optional*, defaults to `4`):
            Number of consecutive samples of one task where tasks are learned together: a batch of 32 mixes 8 tasks,
            each of which takes its steps as if it were trained alone in batches of 4.
        evaluate_seen_tasks (`bool`, *optional*, defaults to `True`):
            Whether to evaluate all tasks learned so far after each task.
        evaluate_before (`bool`, *optional*, defaults to `False`):
            Whether to evaluate each task also before it is learned: with the model alone, and with the adapter of the
            previous task, as forward transfer requires.
        score_metric (`str`, *optional*):
            Name of the metric that serves as a task's score, where higher is better. None means the first metric of
            the task's own function in `compute_metrics`, or of its kind of task. With one function for all tasks, or a
            `task_scorer`, None means `"accuracy"` if present, else minus the loss.
        routing (`bool`, *optional*, defaults to `False`):
            Whether to learn a route to each task as well, in one more pass over its training data with the base model,
            so that inputs find their task, as [`SharedSubspace.learn_route`] does. Routes to tasks of a causal
            language model are learned from prompts without their completions. Neither ZeRO-3, FSDP nor streamed data
            is supported.
        hub_branches (`str` or `list[str]`, *optional*):
            Tasks that get a branch when the subspace is pushed: `"all"`, `"new"`, `"none"` or names of tasks, as in
            [`SharedSubspace.push_to_hub`].
        ddp_broadcast_buffers (`bool`, *optional*, defaults to `False`):
            Same as in [`~transformers.TrainingArguments`], but off by default: the bases are buffers, which DDP would
            send to all processes at every step, although they are the same on all of them.

    Raises:
        ValueError: If an option is out of its range, contradicts another one, or is one that no stream can honour.
    """

    method: Method = field(
        default="share",
        metadata={"help": "How a task is learned in the subspace: 'share' (temporary factors) or 'coefficients'."},
    )
    num_init_tasks: int = field(
        default=2,
        metadata={"help": "Number of tasks that are trained as a LoRA before others build on their subspace."},
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
    samples_per_task: int = field(
        default=4, metadata={"help": "Number of consecutive samples of one task where tasks are learned together."}
    )
    evaluate_seen_tasks: bool = field(
        default=True, metadata={"help": "Evaluate all tasks learned so far after each task."}
    )
    evaluate_before: bool = field(
        default=False, metadata={"help": "Evaluate each task also before it is learned, for forward transfer."}
    )
    score_metric: str | None = field(
        default=None, metadata={"help": "Metric that serves as a task's score; one for its kind of task if not given."}
    )
    routing: bool = field(
        default=False, metadata={"help": "Learn a route to each task as well, so that inputs find their task."}
    )
    hub_branches: list[str] | None = field(
        default=None, metadata={"help": "Tasks that get a branch on the Hub, or one of 'all', 'new' and 'none'."}
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "Whether DDP sends all buffers, including the bases, at every step."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_init_tasks < 1:
            raise ValueError(
                f"num_init_tasks is {self.num_init_tasks}, expected at least 1: the first task makes the subspace"
            )
        if self.samples_per_task < 1:
            raise ValueError(f"samples_per_task is {self.samples_per_task}, expected at least 1")
        if self.finetune_num_train_epochs < 0:
            raise ValueError(f"finetune_num_train_epochs is {self.finetune_num_train_epochs}, expected 0 or more")
        if self.init_num_train_epochs is not None and self.max_steps > 0:
            raise ValueError(
                f"init_num_train_epochs is {self.init_num_train_epochs} and max_steps {self.max_steps}, expected one "
                "of them: max_steps is the length of every phase"
            )
        for name, expected in REFUSED_ARGUMENTS.items():
            if value := getattr(self, name, None):  # versions of transformers differ in what they have
                raise ValueError(f"{name} is {value!r}, expected {expected}")
        # Wider than the annotation, which HfArgumentParser reads.
        self.hub_branches = branch_choice(self.hub_branches)  # type: ignore[assignment]
        if self.push_to_hub:
            if self.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
                strategy = HubStrategy(self.hub_strategy).value
                raise ValueError(
                    f"hub_strategy is {strategy!r}, expected 'every_save' (a push after every task) or 'end': the "
                    "checkpoints of a phase are not pushed"
                )
            if self.hub_revision not in (None, "main"):
                raise ValueError(f"hub_revision is {self.hub_revision!r}, expected none: branches belong to tasks")


def check_parameters(args: ShareTrainingArguments, parameters: Mapping[str, Any]) -> None:
    """Refuse parameters of `Trainer` that no stream can honour.

    Args:
        args: Arguments of the stream.
        parameters: Keyword arguments that [`ShareTrainer`] passes on.

    Raises:
        ValueError: If there is such a parameter. The message names it and what to use instead.
    """
    if args.method not in get_args(Method):
        raise ValueError(f"method is {args.method!r}, expected one of {get_args(Method)}")
    for name, expected in REFUSED_PARAMETERS.items():
        value = parameters.get(name)
        if value is not None and not (isinstance(value, tuple) and set(value) == {None}):
            raise ValueError(f"{name} is given, expected {expected}")
    optimizer, keywords = parameters.get("optimizer_cls_and_kwargs") or (None, {})
    kind = getattr(optimizer, "__name__", optimizer)
    if bound := sorted({"params", "model", "optimizer_dict"} & keywords.keys()):
        raise ValueError(
            f"optimizer_cls_and_kwargs has {bound} for {kind}, expected none: each phase trains other parameters"
        )
    for name in ("init_learning_rate", "finetune_learning_rate"):
        if "lr" in keywords and getattr(args, name) is not None:
            raise ValueError(
                f"{name} is {getattr(args, name)} and optimizer_cls_and_kwargs has an 'lr' for all phases, expected "
                "one of them: without 'lr', the optimizer has the rate of the phase"
            )


def arguments_of_phase(args: ShareTrainingArguments, phase: Phase, folder: Path) -> ShareTrainingArguments:
    """Return the arguments of one phase, with its learning rate, its epochs and a folder of its own."""
    own = copy.copy(args)
    own.output_dir = str(folder)
    own.push_to_hub = False  # the subspace goes to the Hub, not the checkpoints of a phase
    if phase == Phase.INIT:
        own.learning_rate = _first_given(args.init_learning_rate, args.learning_rate)
        own.num_train_epochs = _first_given(args.init_num_train_epochs, args.num_train_epochs)
    if phase == Phase.FINETUNE:
        own.learning_rate = _first_given(args.finetune_learning_rate, args.learning_rate)
        own.num_train_epochs = args.finetune_num_train_epochs
    return own


def training_facts(
    args: ShareTrainingArguments, config: ShareConfig, optimizer: tuple[type, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Return the training facts for the model card. `optimizer` is its class and keyword arguments, if given."""
    name, keywords = (optimizer[0].__name__, optimizer[1]) if optimizer is not None else (args.optim, {})
    rate = keywords.get("lr", args.learning_rate)
    return {
        "method": args.method,
        "num_init_tasks": args.num_init_tasks,
        "learning_rate": rate,
        "init_learning_rate": _first_given(args.init_learning_rate, rate),
        "num_train_epochs": args.num_train_epochs,
        "finetune_num_train_epochs": args.finetune_num_train_epochs,
        "train_batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "optimizer": str(getattr(name, "value", name)),
        "seed": args.seed,
        "num_temporary": config.num_temporary,
        "temporary_init": config.temporary_init,
        "init_std": config.init_std,
    }


def _first_given(own: float | None, of_all: float) -> float:
    return own if own is not None else of_all
