"""A Trainer for a stream of tasks in one shared subspace."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from huggingface_hub import CommitInfo
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import HubStrategy, TrainOutput
from transformers.utils import logging

from ..engines import check_placement, naming_lost_ranks, on_first_process
from ..format.names import check_task_name
from ..format.places import Adapters
from ..shared_subspace import SharedSubspace
from ..state import ContinualMetrics, SubspaceState
from ..subspace import MergeReport
from ..tuner import ShareConfig
from ..tuner.head import classifies_inputs
from ..tuner.renaming import named_as_in
from ..tuner.transfer import load_tasks
from .arguments import ShareTrainingArguments, check_parameters, training_facts
from .data import EVALUATION_SPLITS, TRAIN_SPLIT, Data, TaskData, TaskSplits, split_data
from .measures import check_functions, check_score_metric
from .phases import RefusedTaskError, config_for, put_back, with_adapters
from .problems import TaskDetails, check_label_names, task_details
from .publishing import publish
from .record import arguments_record, doubt_of_base_model, record_of
from .routing import check_data_routes
from .scoring import TaskScorer
from .stream import Stream
from .task_trainer import TaskTrainer
from .together import Together, Unit, check_can_train_together, check_classes, groups_of


logger = logging.get_logger(__name__)


class ShareTrainer(TaskTrainer):
    """
    Learns a stream of tasks with Share, and keeps the old tasks without their data.

    Each task is learned in phases, each an optimizer run of its own. The first tasks train free factors of rank p
    (`init`); later ones train temporary factors beside the basis (`adapt`) or only coefficients (`coefficients`).
    After `init` and `adapt`, a merge updates the basis and the coefficients of all tasks. The coefficients of the new
    task may then be trained further (`finetune`). After each task, the subspace is saved to `<output_dir>/subspace`,
    and `train(resume_from_checkpoint=True)` resumes a stream that was interrupted anywhere.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Base model without adapters.
        args ([`ShareTrainingArguments`], *optional*):
            Arguments of the phases.
        share_config ([`ShareConfig`], *optional*):
            Configuration with k, p, φ and the target modules.
        tasks (`Mapping[str, Dataset | DatasetDict]`, *optional*):
            Data of each task of the stream, in order, from `datasets` or `torch`, streamed or not. A task learns the
            `train` split and is scored on `test`, or else `validation` or `eval`. With `eval_strategy`, it is also
            evaluated while it trains, on `eval`, or else `validation` or `test`, unless `eval_dataset` is given.
            Streamed data needs `max_steps` and, for a classifier, features that declare its labels. Integer labels
            are classes, floating-point ones values (a regression), and lists of zeros and ones several labels.
        together (`Sequence[str]` or `Sequence[Sequence[str]]`, *optional*):
            Names of consecutive `tasks`, or several such lists. Each list is learned in one run, from batches that mix
            its tasks, with the result that each task alone would have on the samples that it saw. Requires
            `method="coefficients"` and a basis. See `samples_per_task`.
        subspace ([`SharedSubspace`], *optional*):
            Subspace to continue from. Its tasks stay.
        adapters (`Mapping[str, str]` or `Sequence[str]`, *optional*):
            LoRA adapters to initialize the subspace from instead (Sec. 3.2.1).
        dataset_ids (`Mapping[str, str]`, *optional*):
            Hub id of the data set of each task, for the model card.
        labels (`Mapping[str, Sequence[str]]`, *optional*):
            Names of the labels of each task whose data does not have them.
        task_scorer (`Callable`, *optional*):
            Function that replaces the Trainer's own evaluation. It takes the model, the task name and the evaluation
            data, and returns metrics.
        **kwargs:
            Same as in [`~transformers.Trainer`], except for `train_dataset`, `model_init` and `optimizers`, which are
            refused. `compute_metrics` may be a dict of functions by task, where the first metric is the task's score.
            Other tasks of a classifier are scored by accuracy, Pearson correlation (regression) or F1 (several
            labels). `optimizer_cls_and_kwargs` without an `lr` uses the learning rate of the phase.

    Raises:
        ValueError: If a task's name or data is unusable, the model already has adapters, or no stream can honour an
            option.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: ShareTrainingArguments | None = None,
        share_config: ShareConfig | None = None,
        tasks: Mapping[str, TaskData] | None = None,
        *,
        together: Together | None = None,
        subspace: SharedSubspace | None = None,
        adapters: Adapters | None = None,
        dataset_ids: Mapping[str, str] | None = None,
        labels: Mapping[str, Sequence[str]] | None = None,
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
        # Within a phase, the trained task is evaluated, unless there is data for all tasks.
        evaluates = args.eval_strategy != "no" or args.eval_on_start
        self._selects = evaluates and kwargs.get("eval_dataset") is None
        self._max_steps, self._routes, self._labels = args.max_steps, args.routing, labels or {}
        if self._selects:
            kwargs["eval_dataset"] = {}
        share_config = config_for(model, share_config, subspace)
        state = subspace.state if subspace is not None else SubspaceState(share_config.subspace_settings())
        is_classifier = classifies_inputs(model, share_config.task_type)
        self._num_labels = cast(PreTrainedModel, model).config.num_labels if is_classifier else None
        splits: dict[str, TaskSplits] = {}
        details: dict[str, TaskDetails] = {}
        for name, data in (tasks or {}).items():
            check_task_name(name, [*state.tasks, *splits])
            splits[name], details[name] = self._read_task(name, data)
        check_label_names(self._labels, splits, is_classifier=is_classifier)
        groups = groups_of(splits, together, args, known=len(state.tasks))
        check_classes(groups, {name: known.problem for name, known in details.items()})
        if is_classifier:
            kwargs.setdefault("compute_metrics", {})
        check_functions(kwargs.get("compute_metrics"), splits, args)
        for name in (name for name, data in splits.items() if data.evaluation is not None):
            check_score_metric(args.score_metric, name, details[name], kwargs.get("compute_metrics"), task_scorer)
        optimizer = kwargs.get("optimizer_cls_and_kwargs")
        record = record_of(model, share_config)
        if (doubt := doubt_of_base_model(state, record)) is not None and PartialState().is_main_process:
            logger.warning(doubt)
        adapted = with_adapters(model, state, share_config)
        stream = Stream(
            Path(str(args.output_dir)),
            state,
            ContinualMetrics(training=training_facts(args, share_config, optimizer)),
            replace(record, arguments=arguments_record(args, share_config, optimizer)),
            saves=lambda: self.args.should_save,
        )
        super().__init__(
            adapted,
            args,
            stream=stream,
            share_config=share_config,
            tasks=splits,
            groups=groups,
            details=details,
            dataset_ids=dataset_ids or {},
            task_scorer=task_scorer,
            **kwargs,
        )
        if groups:
            check_can_train_together(self, groups, splits)
        if self._selects:
            self.eval_dataset = None  # until there is a task
        if is_classifier:
            # Classifiers take the keyword for the number of items in a whole step, but return the mean over their own
            # batch. Mistaken for a share of the whole, it would count once for each process and accumulated batch.
            self.model_accepts_loss_kwargs = False

    @property
    def subspace(self) -> SharedSubspace:
        """The subspace learned so far."""
        return self._stream.subspace

    @property
    def metrics(self) -> dict[str, Any]:
        """The matrix ``R[i][j]``, average, forgetting, backward and forward transfer, drift and parameter counts."""
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
                Whether to resume where an earlier run in `output_dir` was interrupted, or begin if there was none, or
                the `output_dir` of an earlier run to resume. An interrupted phase repeats the steps since its last
                checkpoint; `save_strategy` decides when checkpoints are written.
            trial (`dict`, *optional*): Trial of a search, which is not supported. Create a trainer for each trial.
            ignore_keys_for_eval (`list[str]`, *optional*):
                Outputs of the model that are left out of the predictions of evaluations.

        Returns:
            `TrainOutput`: Steps and mean loss over the phases that were run, and the metrics of the stream.

        Raises:
            ValueError: If there are no tasks, or the stream to resume is damaged, or has another base model, other
                settings, or tasks in another order. Changed arguments, which apply from the interrupted phase on, and
                changed data only cause a warning.
            FolderInUseError: If another trainer is at work in `output_dir`.
        """
        if not self.tasks and not resume_from_checkpoint:
            raise ValueError("no tasks to train on, expected tasks={name: dataset, ...}")
        if trial is not None:
            raise ValueError("trial is given, expected none: make a trainer for each trial of a search")
        self.ignore_keys_for_eval = ignore_keys_for_eval
        with self._stream.at_work():
            if resume_from_checkpoint:
                self._restore(resume_from_checkpoint)
            outputs = [output for unit in self._units for output in self._learn_unless_done(unit)]
            if self.args.push_to_hub:
                self.push_to_hub()
        steps = sum(output.global_step for output in outputs)
        loss = sum(output.global_step * output.training_loss for output in outputs)
        return TrainOutput(steps, loss / max(steps, 1), self.metrics)

    @naming_lost_ranks()
    def learn_task(self, name: str, train_dataset: Data, eval_dataset: Data | None = None) -> MergeReport | None:
        """
        Learn one more task and merge it.

        If `train(resume_from_checkpoint=True)` has resumed a stream that had begun the task, learning continues from
        there. If the stream had already learned the task, nothing happens.

        Args:
            name (`str`): Name of the new task.
            train_dataset (`Dataset`): Data that the task is learned from.
            eval_dataset (`Dataset`, *optional*): Data that the task is scored on, now and after later tasks.

        Returns:
            [`~share_hf.subspace.MergeReport`], *optional*: The drift of every task. None if the basis did not change
            (`coefficients`), or the resumed stream has already merged the task.

        Raises:
            ValueError: If name or data is unusable, or another task is merged but not finished. Nothing has changed
                then.
            FolderInUseError: If another trainer is at work in `output_dir`. Nothing has changed then.
            RefusedTaskError: If trained values are not finite. Trainer and files stay unchanged.
            DriftToleranceError: If the drift tolerance cannot be met. Whatever ends the learning before the merge, the
                trainer stays unchanged and may learn the task again.
            RuntimeError: If an earlier phase was interrupted under ZeRO-3, which requires a new process.
        """
        data = {TRAIN_SPLIT: train_dataset}
        if eval_dataset is not None:
            data[EVALUATION_SPLITS[0]] = eval_dataset
        known = {*self._stream.state.tasks, *self.tasks}
        is_awaited = name in self._stream.awaited
        check_task_name(name, known - {name} if is_awaited else known)
        splits, details = self._read_task(name, data)
        self._stream.check_next(name)
        with self._stream.at_work(name):
            self.tasks[name], self._details[name] = splits, details
            if is_awaited:
                self._stream.compare_data(name, splits)
            self._merge_report = None
            if self._stream.is_done(name):
                self._stream.awaited.discard(name)
                logger.info("%s: the stream has already learned task %r.", self._stream.folder, name)
            else:
                self._learn_or_withdraw(name)
        return self._merge_report

    def _learn_unless_done(self, unit: Unit) -> list[TrainOutput]:
        """Learn one or several of `tasks`, without the phases that the stream has already completed."""
        if all(self._stream.is_done(name) for name in unit):
            return []
        outputs = list(self._learn(unit))
        upcoming = list(self.tasks)[list(self.tasks).index(unit[-1]) + 1 :]
        if self.args.push_to_hub and self.args.hub_strategy == HubStrategy.EVERY_SAVE and upcoming:
            self._push_while_training(upcoming_tasks=upcoming)
        return outputs

    def _learn_or_withdraw(self, name: str) -> None:
        """Learn a single task. Whatever ends this before the merge leaves the trainer without the task."""
        state, metrics = self._stream.state, copy.deepcopy(self._stream.metrics)
        try:
            for _ in self._learn((name,)):
                pass
        except RefusedTaskError:
            # The task may have been merged before its finetuning was refused.
            self._stream.state, self._stream.metrics = state, metrics
            load_tasks(cast(PeftModel, self.model), state)
            self._withdraw_task(name)
            self._stream.save_subspace(draft=False)
            self._stream.save_position(metrics.learned, self.trained_steps)
            raise
        except BaseException:
            if name not in self._stream.state.tasks:
                self._stream.metrics = metrics
                self._withdraw_task(name)
            raise

    def evaluate_tasks(self) -> dict[str, dict[str, float]]:
        """Return the metrics of every learned task that has evaluation data. The active adapter does not change."""
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

        Tasks that somebody else has pushed meanwhile are merged, and are adapters of the model from then on.

        Args:
            commit_message (`str`, *optional*): Message of the commit. The default names the new tasks.
            blocking (`bool`, *optional*, defaults to `True`): Must be `True`, as a push may change the subspace.
            token (`str`, *optional*): User access token of the Hub. None means `hub_token`.
            revision (`str`, *optional*): Must be None or `"main"`, as branches are tasks.
            private (`bool`, *optional*): Whether to make a new repository private. None means `hub_private_repo`.
            **kwargs: Same as in [`SharedSubspace.push_to_hub`].

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
            if options.get("private") is not None:  # transformers before 5.23 knows that of the arguments alone
                self.args.hub_private_repo = options["private"]
            self.init_hf_repo(token=options.get("token"))
        return publish(self.subspace, str(self.hub_model_id), self.args, **options)

    def _take_published(self, state: SubspaceState) -> None:
        if state.lineage != self._stream.state.lineage:
            self._load_subspace(state)
            self._stream.save_subspace()

    def _push_while_training(self, upcoming_tasks: Collection[str]) -> None:
        try:
            state, _ = self._publish(upcoming_tasks=upcoming_tasks)
        except Exception as error:  # the stream goes on despite any trouble of the network or the repository
            logger.warning("The subspace was not pushed (%s); the push after the next task includes it.", error)
        else:
            self._take_published(state)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the adapters of the model, and publish the subspace if `args.push_to_hub` is set.

        Args:
            output_dir (`str`, *optional*): Folder to save to. None means the trainer's own folder.
        """
        super().save_model(output_dir, _internal_call)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub()

    def _read_task(self, name: str, data: TaskData) -> tuple[TaskSplits, TaskDetails]:
        splits = split_data(name, data, max_steps=self._max_steps)
        if self._routes:
            check_data_routes(name, splits.train)
        names = self._labels.get(name)
        return splits, task_details(name, data, splits, self._num_labels, selects=self._selects, label_names=names)

    def _withdraw_task(self, name: str) -> None:
        """Remove a task that was not learned from the stream and the model."""
        self.tasks.pop(name, None)
        self._details.pop(name, None)
        put_back(cast(PeftModel, self.model), self._stream.state, name, self.share_config)
