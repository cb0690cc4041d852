"""A Trainer for a stream of tasks in one shared subspace."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, get_args

from huggingface_hub import CommitInfo
from peft import PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import HubStrategy, TrainOutput
from transformers.utils import logging

from ..engines import check_placement, naming_lost_ranks, on_first_process
from ..format.names import check_task_name
from ..shared_subspace import Adapters, SharedSubspace
from ..state import ContinualMetrics, SubspaceState
from ..subspace import MergeReport
from ..tuner import ShareConfig
from ..tuner.renaming import named_as_in
from ..tuner.transfer import load_bases, load_tasks, share_config_for
from .arguments import Method, ShareTrainingArguments, check_parameters, training_facts
from .data import (
    EVALUATION_SPLITS,
    TRAIN_SPLIT,
    Data,
    TaskData,
    TaskDetails,
    TaskSplits,
    accuracy,
    split_data,
    task_details,
)
from .phases import PLACEHOLDER, RefusedTaskError, config_for, put_back
from .publishing import publish
from .scoring import TaskScorer
from .stream import STREAM_STATE_FILE, Stream, StreamPosition
from .task_trainer import TaskTrainer


logger = logging.get_logger(__name__)


class ShareTrainer(TaskTrainer):
    """
    Learns a stream of tasks with Share: old tasks stay, without their data.

    Each task is learned in phases, each an optimizer run of its own: the first tasks as free factors of rank p
    (`init`), later ones by temporary factors beside the basis (`adapt`) or by coefficients alone; a merge then updates
    the basis and all tasks' coefficients, and the new ones may be trained further (`finetune`). After each task the
    subspace is saved to `<output_dir>/subspace`, and `train(resume_from_checkpoint=True)` continues a stream that was
    interrupted anywhere.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The base model, without adapters.
        args ([`ShareTrainingArguments`], *optional*):
            Arguments of the phases.
        share_config ([`ShareConfig`], *optional*):
            k, p, φ and the target modules.
        tasks (`Mapping[str, Dataset | DatasetDict]`, *optional*):
            The stream, in its order: task name to its data, of `datasets` or `torch`, streamed or not. The `train`
            split is learned; the `test` split, or else `validation` or `eval`, scores the task. With `eval_strategy`,
            `validation` or `eval`, or else `test`, is evaluated while it trains, unless `eval_dataset` is given. Data
            that is streamed needs `max_steps` and, for a classification, a `ClassLabel` that tells its labels.
        subspace ([`SharedSubspace`], *optional*):
            A subspace to continue. Its tasks stay.
        adapters (`Mapping[str, str]` or `Sequence[str]`, *optional*):
            LoRA adapters to initialize the subspace from instead (Sec. 3.2.1).
        dataset_ids (`Mapping[str, str]`, *optional*):
            By task, the hub id of its data set, for the model card.
        task_scorer (`Callable`, *optional*):
            Called with model, task name and evaluation data instead of the Trainer's own evaluation; returns metrics.
        **kwargs:
            As for [`~transformers.Trainer`], but for `train_dataset`, `model_init` and `optimizers`, which are
            refused. Without an `lr` among its keywords, `optimizer_cls_and_kwargs` has the learning rate of the phase.

    Raises:
        ValueError: If a task's name or data is unusable, the model has adapters already, or an option is one that no
            stream can honour.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: ShareTrainingArguments | None = None,
        share_config: ShareConfig | None = None,
        tasks: Mapping[str, TaskData] | None = None,
        *,
        subspace: SharedSubspace | None = None,
        adapters: Adapters | None = None,
        dataset_ids: Mapping[str, str] | None = None,
        task_scorer: TaskScorer | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(model, PeftModel) or getattr(model, "peft_config", None):
            raise ValueError(
                "model has adapters already, expected the base model; pass its tasks as subspace= instead"
            )
        if subspace is not None and adapters is not None:
            raise ValueError("subspace and adapters are both given, expected one of them")
        if model is None:
            raise ValueError("model is None, expected the base model")
        args = args if args is not None else ShareTrainingArguments(output_dir="tmp_trainer")
        if not isinstance(args, ShareTrainingArguments):
            raise ValueError(f"args is a {type(args).__name__}, expected ShareTrainingArguments")
        if args.method not in get_args(Method):
            raise ValueError(f"method is {args.method!r}, expected one of {get_args(Method)}")
        check_parameters(args, kwargs)
        check_placement(model)
        if adapters is not None:
            settings = (share_config or ShareConfig()).subspace_settings()
            state = on_first_process(
                lambda: SharedSubspace.from_adapters(adapters, **vars(settings), progress=not args.disable_tqdm).state
            )
            subspace = SharedSubspace(state)
        if subspace is not None:
            subspace = SharedSubspace(named_as_in(model, subspace.state))
        # Within a phase, the task that is trained is evaluated, unless there is data for all of them.
        evaluates = args.eval_strategy != "no" or args.eval_on_start
        self._selects = evaluates and kwargs.get("eval_dataset") is None
        self._max_steps = args.max_steps
        if self._selects:
            kwargs["eval_dataset"] = {}
        share_config = config_for(model, share_config, subspace)
        stream = Stream(
            Path(args.output_dir),
            subspace.state if subspace is not None else SubspaceState(share_config.subspace_settings()),
            ContinualMetrics(training=training_facts(args, share_config, kwargs.get("optimizer_cls_and_kwargs"))),
            saves=lambda: self.args.should_save,
        )
        is_classifier = share_config.task_type == TaskType.SEQ_CLS
        self._num_labels = model.config.num_labels if is_classifier else None
        splits: dict[str, TaskSplits] = {}
        details: dict[str, TaskDetails] = {}
        for name, data in (tasks or {}).items():
            check_task_name(name, [*stream.state.tasks, *splits])
            splits[name], details[name] = self._read_task(name, data)
        if is_classifier and "compute_metrics" not in kwargs:
            if args.batch_eval_metrics:
                raise ValueError(
                    "batch_eval_metrics is True, expected compute_metrics with it: accuracy takes all batches at once"
                )
            kwargs["compute_metrics"] = accuracy
        super().__init__(
            _with_adapters(model, stream.state, share_config),
            args,
            stream=stream,
            share_config=share_config,
            tasks=splits,
            details=details,
            dataset_ids=dataset_ids or {},
            task_scorer=task_scorer,
            **kwargs,
        )
        if self._selects:
            self.eval_dataset = None  # until there is a task
        if is_classifier:
            # Classifiers take the keyword that tells the items of a whole step, but return the mean over their own
            # batch: taken for a sum over all, it would count once for each process and accumulated batch.
            self.model_accepts_loss_kwargs = False

    @property
    def subspace(self) -> SharedSubspace:
        """The subspace as learned so far."""
        return self._stream.subspace

    @property
    def metrics(self) -> dict[str, Any]:
        """The matrix R[i][j], average, forgetting, backward and forward transfer, drift and parameter counts."""
        return self._stream.metrics.as_dict()

    @property
    def metrics_table(self) -> str:
        """The matrix and the summary as text."""
        return self._stream.metrics.table()

    @naming_lost_ranks()
    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Learn the whole stream.

        Args:
            resume_from_checkpoint (`bool` or `str`, *optional*):
                `True` to continue where an earlier run in `output_dir` was interrupted, or to begin if there was none;
                or the `output_dir` of an earlier run. Of a phase, the steps since its last checkpoint are done again:
                `save_strategy` says when one is written.
            trial (`dict`, *optional*): Not supported; a search makes a trainer for each trial.
            ignore_keys_for_eval (`list[str]`, *optional*):
                Outputs of the model that are left out of the predictions of evaluations.

        Returns:
            `TrainOutput`: Steps and mean loss over the phases that were run, and the metrics of the stream.
        """
        if not self.tasks:
            raise ValueError("no tasks to train on, expected tasks={name: dataset, ...}")
        if trial is not None:
            raise ValueError("trial is given, expected none: make a trainer for each trial of a search")
        self.ignore_keys_for_eval = ignore_keys_for_eval
        begun = self._restore(resume_from_checkpoint) if resume_from_checkpoint else StreamPosition()
        outputs = []
        for position, name in enumerate(self.tasks):
            learned = name in self._stream.state.tasks and name != begun.task
            if position < begun.position or learned:
                continue
            stage = begun.stage if begun.task == name else None
            outputs += self._learn(name, resumed_stage=stage)
            is_last = position + 1 == len(self.tasks)
            if self.args.push_to_hub and self.args.hub_strategy == HubStrategy.EVERY_SAVE and not is_last:
                self._push_while_training(upcoming_tasks=list(self.tasks)[position + 1 :])
        if self.args.push_to_hub:
            self.push_to_hub()
        steps = sum(output.global_step for output in outputs)
        loss = sum(output.global_step * output.training_loss for output in outputs)
        return TrainOutput(steps, loss / max(steps, 1), self.metrics)

    @naming_lost_ranks()
    def learn_task(self, name: str, train_dataset: Data, eval_dataset: Data | None = None) -> MergeReport | None:
        """
        Learn one more task and merge it.

        Args:
            name (`str`): A new task's name.
            train_dataset (`Dataset`): What it is learned from.
            eval_dataset (`Dataset`, *optional*): What it is scored on, now and after later tasks.

        Returns:
            [`~share_hf.subspace.MergeReport`], *optional*: None if the basis did not change (`coefficients`).

        Raises:
            ValueError: If name or data is unusable; nothing has changed then.
            RefusedTaskError: If what was trained is not finite. Trainer and files are as before.
            DriftToleranceError: If the tolerated drift cannot be met. Whatever ends the learning before its merge, the
                trainer is as before, and may learn the task again.
            RuntimeError: If an earlier phase was broken off under ZeRO-3: that needs a new process.
        """
        data = {TRAIN_SPLIT: train_dataset}
        if eval_dataset is not None:
            data[EVALUATION_SPLITS[0]] = eval_dataset
        check_task_name(name, [*self._stream.state.tasks, *self.tasks])
        self.tasks[name], self._details[name] = self._read_task(name, data)
        self._merge_report = None
        state, metrics = self._stream.state, copy.deepcopy(self._stream.metrics)
        try:
            for _ in self._learn(name):
                pass
        except RefusedTaskError:
            # With a task that was merged, but did not survive its finetuning.
            self._stream.state, self._stream.metrics = state, metrics
            load_tasks(self.model, state)
            self._withdraw_task(name)
            self._stream.save_subspace(draft=False)
            self._stream.save_position(len(self.tasks), self.trained_steps)
            raise
        except BaseException:
            if name not in self._stream.state.tasks:
                self._stream.metrics = metrics
                self._withdraw_task(name)
            raise
        return self._merge_report

    def evaluate_tasks(self) -> dict[str, dict[str, float]]:
        """Metrics of every task learned so far that has evaluation data, by task. The active adapter stays."""
        learned = [task for task in self.tasks if task in self._stream.state.tasks]
        return {task: self._evaluate_task(task) for task in learned if self.tasks[task].evaluation is not None}

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo:
        """
        Publish the subspace to `hub_model_id`, as [`SharedSubspace.push_to_hub`] does.

        Tasks that somebody else pushed meanwhile are merged, and are adapters of the model from then on.

        Args:
            commit_message (`str`, *optional*): Message of the commit; tells the new tasks if not given.
            blocking (`bool`, *optional*, defaults to `True`): Only `True`: a push may change the subspace.
            token (`str`, *optional*): `hub_token` if not given.
            revision (`str`, *optional*): Only `"main"`: branches are tasks.
            private (`bool`, *optional*): `hub_private_repo` if not given.
            **kwargs: As for [`SharedSubspace.push_to_hub`].

        Returns:
            `CommitInfo`: The commit.
        """
        if not blocking or revision not in (None, "main"):
            raise ValueError(f"blocking is {blocking} and revision {revision!r}, expected True and None")
        state, commit = self._publish(commit_message=commit_message, token=token, private=private, **kwargs)
        self._take_published(state)
        return commit

    def _publish(self, **options: Any) -> tuple[SubspaceState, CommitInfo]:
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=options.get("token"), private=options.get("private"))
        return publish(self.subspace, self.hub_model_id, self.args, **options)

    def _take_published(self, state: SubspaceState) -> None:
        if state.lineage != self._stream.state.lineage:
            self._load_subspace(state)
            self._stream.save_subspace()

    def _push_while_training(self, upcoming_tasks: Collection[str]) -> None:
        try:
            state, _ = self._publish(upcoming_tasks=upcoming_tasks)
        except Exception as error:  # whatever ails the network or the repository, the stream goes on
            logger.warning("The subspace was not pushed (%s); the push after the next task catches up.", error)
        else:
            self._take_published(state)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the adapters of the model, and publish the subspace with `push_to_hub`.

        Args:
            output_dir (`str`, *optional*): Where; the trainer's own folder if not given.
        """
        super().save_model(output_dir, _internal_call)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub()

    def _read_task(self, name: str, data: TaskData) -> tuple[TaskSplits, TaskDetails]:
        splits = split_data(name, data, max_steps=self._max_steps)
        return splits, task_details(name, data, splits, selects=self._selects, labels_of_model=self._num_labels)

    def _withdraw_task(self, name: str) -> None:
        """Take a task that was not learned out of the stream and the model."""
        self.tasks.pop(name, None)
        self._details.pop(name, None)
        put_back(self.model, self._stream.state, name, self.share_config)

    def _restore(self, resumed: str | bool) -> StreamPosition:
        """Take up an interrupted stream, or begin if there is none.

        Raises:
            ValueError: If what is there is damaged, or belongs to a stream with other settings or tasks.
        """
        is_named = isinstance(resumed, str) and resumed.lower() != "true"  # as a command line has it
        folder = Path(resumed) if is_named else self._stream.folder
        begun = self._stream.restore(folder, list(self.tasks))
        if begun is None:
            if is_named:
                raise ValueError(
                    f"{folder}: no {STREAM_STATE_FILE} there, expected the output_dir of an earlier stream"
                )
            if self.is_world_process_zero():
                logger.warning("%s: no stream to resume there, it begins.", folder)
            return StreamPosition()
        self._load_subspace(self._stream.state)
        self.trained_steps = begun.trained_steps
        logger.info("Resuming at task %d (%s, %s)", begun.position + 1, begun.task, begun.stage)
        return begun

    def _load_subspace(self, state: SubspaceState) -> None:
        """Make a subspace the stream's, and its tasks the adapters of the model."""
        load_bases(self.model, state)
        for task in state.tasks:
            if task not in self.model.peft_config:
                self.model.add_adapter(task, share_config_for(state, task, trainable=True))
        load_tasks(self.model, state)
        if state.tasks:
            self.model.set_adapter(next(iter(state.tasks)))
            if PLACEHOLDER in self.model.peft_config:
                self.model.delete_adapter(PLACEHOLDER)
        self._stream.state = state


def _with_adapters(model: nn.Module, state: SubspaceState, share_config: ShareConfig) -> PeftModel:
    """The base model with the tasks of a subspace, or with a placeholder for the first one."""
    if state.tasks:
        return SharedSubspace(state).apply(model)
    config = copy.deepcopy(share_config)
    peft_model = get_peft_model(model, config, adapter_name=PLACEHOLDER)
    # PEFT found out what None and "all-linear" mean; later adapters target the same.
    share_config.target_modules = copy.copy(config.target_modules)
    return peft_model
