"""A Trainer for a stream of tasks in one shared subspace."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from datasets import Dataset
from huggingface_hub import CommitInfo
from peft import PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import HubStrategy, TrainOutput
from transformers.utils import logging

from ..hub.metrics import ContinualMetrics
from ..hub.names import check_task_name
from ..hub.reconcile import combined_metrics
from ..hub.state import LearnedBy, SubspaceState
from ..hub.tree import write_tree
from ..shared_subspace import Adapters, SharedSubspace
from ..subspace import MergeReport
from ..tuner import ShareConfig
from ..tuner.state import load_bases, load_tasks, share_config_for
from .arguments import Method, ShareTrainingArguments, training_facts
from .distributed import on_first_process, together
from .engines import ready_for_inference, recover_engine
from .inputs import (
    EVALUATION_SPLITS,
    TRAIN_SPLIT,
    TaskData,
    TaskSplits,
    accuracy,
    config_for,
    selection_data,
    split_data,
)
from .labels import LabelMask, count_labels, rule_out_labels
from .lost_ranks import naming_lost_ranks
from .phase_trainer import PhaseTrainer
from .phases import PLACEHOLDER, TrainingPhase, begin_phase, describe_task, take_coefficients, take_merged
from .progress import StreamProgressCallback
from .stream_state import STREAM_STATE_FILE, SUBSPACE_FOLDER, Stage, StreamState, read_stream


logger = logging.get_logger(__name__)

TaskScorer = Callable[[PreTrainedModel | PeftModel, str, Dataset], dict[str, float]]

PHASES_FOLDER = "phases"


class ShareTrainer(PhaseTrainer):
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
            The stream, in its order: task name to its data. The `train` split is learned; the `test` split, or else
            `validation` or `eval`, scores the task. With `eval_strategy`, `validation` or `eval`, or else `test`, is
            evaluated while it trains, unless `eval_dataset` is given.
        subspace ([`SharedSubspace`], *optional*):
            A subspace to continue. Its tasks stay.
        adapters (`Mapping[str, str]` or `Sequence[str]`, *optional*):
            LoRA adapters to initialize the subspace from instead (Sec. 3.2.1).
        dataset_ids (`Mapping[str, str]`, *optional*):
            By task, the hub id of its data set, for the model card.
        task_scorer (`Callable`, *optional*):
            Called with model, task name and evaluation data instead of the Trainer's own evaluation; returns metrics.
        **kwargs:
            As for [`~transformers.Trainer`].

    Raises:
        ValueError: If a task's name or data is unusable, or the model has adapters already.
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
        args = args if args is not None else ShareTrainingArguments(output_dir="tmp_trainer")
        if not isinstance(args, ShareTrainingArguments):
            raise ValueError(f"args is a {type(args).__name__}, expected ShareTrainingArguments")
        if args.method not in get_args(Method):
            raise ValueError(f"method is {args.method!r}, expected one of {get_args(Method)}")
        if adapters is not None:
            settings = (share_config or ShareConfig()).subspace_settings()
            state = on_first_process(
                lambda: SharedSubspace.from_adapters(adapters, **vars(settings), progress=not args.disable_tqdm).state
            )
            subspace = SharedSubspace(state)
        # Within a phase, the task that is trained is evaluated, unless there is data for all of them.
        self._evaluates_own_task = args.eval_strategy != "no" and kwargs.get("eval_dataset") is None
        if self._evaluates_own_task:
            kwargs["eval_dataset"] = {}
        self.share_config = config_for(model, share_config, subspace)
        settings = self.share_config.subspace_settings()
        self._subspace_state = subspace.state if subspace is not None else SubspaceState(settings=settings)
        self.tasks: dict[str, TaskSplits] = {}
        self._selection: dict[str, Dataset | None] = {}
        self._num_labels: dict[str, int] = {}
        self._label_names: dict[str, list[str] | None] = {}
        for name, data in (tasks or {}).items():
            self._note_task(model, name, data)
        peft_model = self._with_adapters(model)
        self._label_mask = LabelMask(peft_model, self._num_labels)
        self._task_scorer = task_scorer
        self._dataset_ids = dict(dataset_ids or {})
        self._continual = ContinualMetrics(training=training_facts(args, self.share_config))
        self._merge_report: MergeReport | None = None
        self._begun = False
        self._resumed_folder: Path | None = None
        self._stream_steps = 0
        self._in_phase = False
        if self.share_config.task_type == TaskType.SEQ_CLS:
            kwargs.setdefault("compute_metrics", accuracy)
        super().__init__(model=peft_model, args=args, **kwargs)
        if self.share_config.task_type == TaskType.SEQ_CLS:
            # Classifiers take the keyword that tells the items of a whole step, but return the mean over their own
            # batch: taken for a sum over all, it would count once for each process and accumulated batch.
            self.model_accepts_loss_kwargs = False
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and getattr(callback, "logging_dir", "") is None:
                # Where the Trainer would put them, if they were not of phases.
                callback.logging_dir = str(Path(args.output_dir, "runs", time.strftime("%b%d_%H-%M-%S")))
        self._progress = StreamProgressCallback()
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(self._progress)

    @property
    def subspace(self) -> SharedSubspace:
        """The subspace as learned so far."""
        state = self._subspace_state
        return SharedSubspace(replace(state, metrics=combined_metrics(state.metrics, self.metrics, state.tasks)))

    @property
    def metrics(self) -> dict[str, Any]:
        """The matrix R[i][j], average, forgetting, backward and forward transfer, drift and parameter counts."""
        return self._continual.as_dict()

    @property
    def metrics_table(self) -> str:
        """The matrix and the summary as text."""
        return self._continual.table()

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

        Returns:
            `TrainOutput`: Steps and mean loss over the phases that were run, and the metrics of the stream.
        """
        if not self.tasks:
            raise ValueError("no tasks to train on, expected tasks={name: dataset, ...}")
        begun = self._restore(resume_from_checkpoint) if resume_from_checkpoint else StreamState()
        outputs = []
        for position, name in enumerate(self.tasks):
            learned = name in self._subspace_state.tasks and name != begun.task
            if position < begun.position or learned:
                continue
            stage = begun.stage if begun.task == name else None
            outputs += self._learn(name, resumed_stage=stage)
            is_last = position + 1 == len(self.tasks)
            if self.args.push_to_hub and self.args.hub_strategy == HubStrategy.EVERY_SAVE and not is_last:
                self._push_while_training()
        if self.args.push_to_hub:
            self.push_to_hub()
        steps = sum(output.global_step for output in outputs)
        loss = sum(output.global_step * output.training_loss for output in outputs)
        return TrainOutput(steps, loss / max(steps, 1), self.metrics)

    @naming_lost_ranks()
    def learn_task(self, name: str, train_dataset: Dataset, eval_dataset: Dataset | None = None) -> MergeReport | None:
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
            DriftToleranceError: If the tolerated drift cannot be met. Whatever ends the learning before its merge, the
                trainer is as before, and may learn the task again.
            RuntimeError: If an earlier phase was broken off under ZeRO-3: that needs a new process.
        """
        data = {TRAIN_SPLIT: train_dataset}
        if eval_dataset is not None:
            data[EVALUATION_SPLITS[0]] = eval_dataset
        self._note_task(self.model.get_base_model(), name, data)
        self._merge_report = None
        continual = copy.deepcopy(self._continual)
        try:
            for _ in self._learn(name):
                pass
        except BaseException:
            if name not in self._subspace_state.tasks:
                self._continual = continual
                self._withdraw_task(name)
            raise
        return self._merge_report

    def evaluate_tasks(self) -> dict[str, dict[str, float]]:
        """Metrics of every task learned so far that has evaluation data, by task. The active adapter stays."""
        learned = [task for task in self.tasks if task in self._subspace_state.tasks]
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
            commit_message (`str`, *optional*): Of the commit; tells the new tasks if not given.
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
        token = token if token is not None else self.args.hub_token
        private = private if private is not None else self.args.hub_private_repo
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        subspace = self.subspace

        def push() -> tuple[SubspaceState, CommitInfo]:
            commit = subspace.push_to_hub(
                self.hub_model_id, commit_message=commit_message, token=token, private=private, **kwargs
            )
            return subspace.state, commit

        state, commit = on_first_process(push)
        if state.lineage != self._subspace_state.lineage:
            self._load_subspace(state)
            self._save_subspace()
        return commit

    def _push_while_training(self) -> None:
        try:
            self.push_to_hub()
        except ValueError:
            raise
        except Exception as error:  # whatever ails the network, the stream goes on
            logger.warning("The subspace was not pushed (%s); the push after the next task catches up.", error)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the adapters of the model, and publish the subspace with `push_to_hub`.

        Args:
            output_dir (`str`, *optional*): Where; the trainer's own folder if not given.
        """
        super().save_model(output_dir, _internal_call)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub()

    # ---- One task --------------------------------------------------------------------------------------------------

    def _learn(self, name: str, resumed_stage: Stage | None = None) -> Iterator[TrainOutput]:
        """The stages of one task: learn and merge, finetune, evaluate. Yields the outcome of each phase."""
        started = time.monotonic()
        self._recover()
        self._begin()
        if resumed_stage is None:
            self._evaluate_before(name)
        if resumed_stage in (None, "learn"):
            phase = self._next_phase()
            self._note_stage(name, "learn")
            output = self._train_phase(name, phase)
            yield output
            self._note_stage(name, "learn", output.global_step)
            self._take(name, phase)
        if resumed_stage != "evaluate" and self.args.finetune_num_train_epochs > 0:
            self._note_stage(name, "finetune")
            output = self._train_phase(name, "finetune")
            yield output
            self._note_stage(name, "finetune", output.global_step)
            self._take(name, "finetune")
        self._note_stage(name, "evaluate")
        self._evaluate_after(name)
        self._save_subspace(draft=False)
        self._save_stream(self._stream_state(self._position_of(name) + 1))
        if self.is_world_process_zero() and not self.args.disable_tqdm:
            learned_by = self._subspace_state.tasks[name].learned_by
            self._progress.task_line(self._continual, learned_by, time.monotonic() - started)

    def _recover(self) -> None:
        """Put the tasks of the model back as they are in the subspace, if a phase was broken off."""
        if self.is_broken_off:
            recover_engine(self)
            load_tasks(self.model, self._subspace_state, self._subspace_state.tasks)
            self.is_broken_off = False

    def _next_phase(self) -> TrainingPhase:
        if len(self._subspace_state.tasks) < self.args.num_init_tasks:
            return "init"
        return "adapt" if self.args.method == "share" else "coefficients"

    def _train_phase(self, name: str, phase: TrainingPhase) -> TrainOutput:
        position = self._position_of(name)
        # A phase depends on the seed and its place alone, so that one that is run again runs the same.
        set_seed(self.args.seed + 2 * position + (phase == "finetune"))
        begin_phase(self.model, self._subspace_state, name, phase, self.share_config)
        self._continual.parameters[phase] = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self._progress.title = f"{name} [{phase}]"
        if self._evaluates_own_task:
            self.eval_dataset = self._selection[name]
        folder = f"{PHASES_FOLDER}/{position + 1:04d}-{name}-{phase}"
        resumed, self._resumed_folder = self._resumed_folder, None
        self._in_phase = True
        try:
            output = self.run_phase(
                self._arguments_of(phase, self._output_dir / folder),
                self.tasks[name].train,
                resumed / folder if resumed is not None else None,
            )
        finally:
            self._in_phase = False
        self._stream_steps += output.global_step
        return output

    def _arguments_of(self, phase: TrainingPhase, folder: Path) -> ShareTrainingArguments:
        args = copy.copy(self.args)
        args.output_dir = str(folder)
        args.push_to_hub = False  # what goes to the hub is the subspace, not the checkpoints of a phase
        if phase == "init":
            args.learning_rate = self.args.init_learning_rate or args.learning_rate
            args.num_train_epochs = self.args.init_num_train_epochs or args.num_train_epochs
        if phase == "finetune":
            args.learning_rate = self.args.finetune_learning_rate or args.learning_rate
            args.num_train_epochs = self.args.finetune_num_train_epochs
        return args

    def _take(self, name: str, phase: TrainingPhase) -> None:
        """Take what a phase trained into the subspace, and save it."""
        state = self._subspace_state
        names = self._label_names.get(name)
        learned_by: LearnedBy = state.tasks[name].learned_by if phase == "finetune" else phase
        info = describe_task(self.model, name, learned_by, tuple(names) if names else None)
        info = replace(info, dataset=self._dataset_ids.get(name))
        if phase == "finetune":
            info = replace(info, initialization=state.tasks[name].initialization)
        if name in self._num_labels:
            of_model = self.model.get_base_model().config.num_labels
            info = replace(info, head=rule_out_labels(info.head, self._num_labels[name], of_model))
        if phase in ("coefficients", "finetune"):
            self._subspace_state = take_coefficients(self.model, state, name, info)
        else:
            progress = not self.args.disable_tqdm and self.is_world_process_zero()
            self._subspace_state, self._merge_report = take_merged(self.model, state, name, info, progress=progress)
            self._log_merge(self._merge_report)
        if self._subspace_state.base_model_name_or_path is None:
            base = getattr(self.model.get_base_model(), "name_or_path", None) or None
            self._subspace_state = replace(self._subspace_state, base_model_name_or_path=base)
        self._save_subspace()

    def _log_merge(self, report: MergeReport) -> None:
        self._log_stream(
            {
                "merge_max_drift": report.max_drift,
                "merge_max_drift_bound": report.max_drift_bound,
                "merge_changed_layers": report.changed_layers,
                "tasks": len(self._subspace_state.tasks),
            }
        )

    def _log_stream(self, logs: Mapping[str, float]) -> None:
        self.log({f"share/{name}": value for name, value in logs.items()})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """
        Log at the step of the stream rather than of its phase, so that all phases make one curve.

        Args:
            logs (`dict[str, float]`): The values.
            start_time (`float`, *optional*): As for [`~transformers.Trainer`].
        """
        step = self.state.global_step
        self.state.global_step = self._stream_steps + (step if self._in_phase else 0)
        try:
            super().log(logs, start_time)
        finally:
            self.state.global_step = step

    # ---- Evaluation ------------------------------------------------------------------------------------------------

    def _evaluate_task(self, task: str, adapter: str | None = None) -> dict[str, float]:
        """Metrics of a task with its own adapter, or another's; without their prefix."""
        self._recover()
        data = self.tasks[task].evaluation
        active = self.model.active_adapter
        self.model.set_adapter(adapter or task)
        try:
            with self._label_mask.of_task(task), ready_for_inference(self):
                if self._task_scorer is not None:
                    return self._task_scorer(self.model, task, data)
                prefix = f"eval_{task}"
                metrics = self.evaluate(data, metric_key_prefix=prefix)
                return {name.removeprefix(f"{prefix}_"): value for name, value in metrics.items()}
        finally:
            if not self.is_broken_off:
                self.model.set_adapter(active)

    def _score(self, metrics: Mapping[str, float]) -> float:
        if self.args.score_metric is not None:
            if self.args.score_metric not in metrics:
                raise ValueError(f"score_metric is {self.args.score_metric!r}, expected one of {sorted(metrics)}")
            self._continual.score = self.args.score_metric
        elif "accuracy" in metrics:
            self._continual.score = "accuracy"
        else:
            self._continual.score = "-loss"
            return -metrics["loss"]
        return metrics[self._continual.score]

    def _evaluate_before(self, name: str) -> None:
        """Score a task that is not learned yet, with the model alone and with the newest adapter."""
        continual = self._continual
        if name not in continual.tasks:
            continual.tasks.append(name)
            continual.baseline.append(None)
            for row in continual.matrix:
                row.append(None)
        if not self.args.evaluate_before or self.tasks[name].evaluation is None:
            return
        newest = next(reversed(self._subspace_state.tasks), PLACEHOLDER)
        with self.model.disable_adapter():
            continual.baseline[-1] = self._score(self._evaluate_task(name, newest))
        if continual.matrix:
            continual.matrix[-1][-1] = self._score(self._evaluate_task(name, newest))

    def _evaluate_after(self, name: str) -> None:
        """One more row of the matrix, and what else is kept of the stream."""
        continual = self._continual
        evaluated = continual.tasks if self.args.evaluate_seen_tasks else [name]
        row: list[float | None] = [None] * len(continual.tasks)
        for j, task in enumerate(continual.tasks):
            if task in evaluated and self.tasks[task].evaluation is not None:
                row[j] = self._score(self._evaluate_task(task))
        continual.matrix.append(row)
        own = row[continual.tasks.index(name)]
        if own is not None:
            tasks = self._subspace_state.tasks
            scored = replace(tasks[name], scores={continual.score: own})
            self._subspace_state = replace(self._subspace_state, tasks={**tasks, name: scored})
        continual.drift = {task: self._subspace_state.drift_of(task) for task in self._subspace_state.tasks}
        logs = {name: getattr(continual, name) for name in ("average", "forgetting", "backward_transfer")}
        logs |= {f"{continual.score}/{task}": value for task, value in zip(continual.tasks, row, strict=True)}
        logs |= {f"drift/{task}": drift for task, drift in continual.drift.items()}
        logs |= {f"trainable_parameters/{phase}": count for phase, count in continual.parameters.items()}
        self._log_stream({name: value for name, value in logs.items() if value is not None})

    # ---- Setting up, saving, restoring -----------------------------------------------------------------------------

    @property
    def _output_dir(self) -> Path:
        folder = Path(self.args.output_dir)
        return folder.parents[1] if folder.parent.name == PHASES_FOLDER else folder

    @property
    def _steps(self) -> int:
        return len(self._subspace_state.lineage)

    def _position_of(self, name: str) -> int:
        return list(self.tasks).index(name)

    def _with_adapters(self, model: nn.Module) -> PeftModel:
        if self._subspace_state.tasks:
            return SharedSubspace(self._subspace_state).apply(model)
        config = copy.deepcopy(self.share_config)
        peft_model = get_peft_model(model, config, adapter_name=PLACEHOLDER)
        # PEFT found out what None and "all-linear" mean; later adapters target the same.
        self.share_config.target_modules = copy.copy(config.target_modules)
        return peft_model

    def _note_task(self, model: nn.Module, name: str, data: TaskData) -> None:
        """Check a task's name and data, and only then take it into the stream."""
        check_task_name(name, [*self._subspace_state.tasks, *self.tasks])
        splits = split_data(name, data)
        selection = selection_data(data)
        if self._evaluates_own_task and selection is None:
            raise ValueError(
                f"task {name!r} has no evaluation data, expected {EVALUATION_SPLITS} in its data, or eval_dataset: "
                "eval_strategy asks for evaluations while it trains"
            )
        if self.share_config.task_type == TaskType.SEQ_CLS:
            for split in (selection, splits.evaluation):
                self._num_labels[name], self._label_names[name] = count_labels(
                    name, splits.train, split, model.config.num_labels
                )
        self.tasks[name], self._selection[name] = splits, selection

    def _withdraw_task(self, name: str) -> None:
        """Take a task that was not learned out of the stream and the model."""
        for noted in (self.tasks, self._selection, self._num_labels, self._label_names):
            noted.pop(name, None)
        if name in self.model.peft_config:
            if not self._subspace_state.tasks:
                self.model.add_adapter(PLACEHOLDER, copy.deepcopy(self.share_config))
            self.model.set_adapter(next(reversed(self._subspace_state.tasks), PLACEHOLDER))
            self.model.delete_adapter(name)

    def _note_stage(self, name: str, stage: Stage, phase_steps: int = 0) -> None:
        """`phase_steps`: of the phase of this stage, when it is trained and only has to be taken."""
        stream = self._stream_state(self._position_of(name), name, stage)
        self._save_stream(replace(stream, trained_steps=stream.trained_steps - phase_steps, phase_steps=phase_steps))

    def _stream_state(self, position: int, task: str | None = None, stage: Stage = "learn") -> StreamState:
        return StreamState(position, task, stage, self._steps, self._stream_steps, metrics=self.metrics)

    def _save_stream(self, stream: StreamState) -> None:
        together(lambda: self.args.should_save and stream.save(self._output_dir))

    def _save_subspace(self, *, draft: bool = True) -> None:
        state, folder = self.subspace.state, self._output_dir / SUBSPACE_FOLDER
        together(lambda: self.args.should_save and write_tree(state, folder, draft=draft))

    def _begin(self) -> None:
        """Make the folder this stream's, once: what an earlier run left there must not be taken for it on a resume."""
        if self._begun:
            return
        self._begun = True
        together(lambda: self.args.should_save and self._clear_folder())
        self._save_subspace()

    def _clear_folder(self) -> None:
        (self._output_dir / STREAM_STATE_FILE).unlink(missing_ok=True)
        shutil.rmtree(self._output_dir / PHASES_FOLDER, ignore_errors=True)

    def _restore(self, resumed: str | bool) -> StreamState:
        """Take up subspace, metrics and position of an interrupted stream, as the first process finds them.

        Raises:
            ValueError: If what is there is damaged, or belongs to a stream with other settings or tasks.
        """
        is_named = isinstance(resumed, str) and resumed.lower() != "true"  # as a command line has it
        folder = Path(resumed) if is_named else self._output_dir
        begun, state = on_first_process(lambda: read_stream(folder, list(self.tasks), self._subspace_state))
        if begun is None:
            if is_named:
                raise ValueError(
                    f"{folder}: no {STREAM_STATE_FILE} there, expected the output_dir of an earlier stream"
                )
            if self.is_world_process_zero():
                logger.warning("%s: no stream to resume there, it begins.", folder)
            return StreamState()
        if state is not None:
            self._load_subspace(state)
        if begun.metrics is not None:
            self._continual = ContinualMetrics.from_dict(begun.metrics)
        if begun.task is not None and self._steps > begun.steps:
            trained_steps = begun.trained_steps + begun.phase_steps
            stage = "finetune" if begun.stage == "learn" else "evaluate"
            begun = replace(begun, stage=stage, trained_steps=trained_steps)
        self._begun = True
        self._stream_steps = begun.trained_steps
        self._resumed_folder = folder if begun.task is not None else None
        logger.info("Resuming at task %d (%s, %s)", begun.position + 1, begun.task, begun.stage)
        return begun

    def _load_subspace(self, state: SubspaceState) -> None:
        load_bases(self.model, state)
        for task in state.tasks:
            if task not in self.model.peft_config:
                self.model.add_adapter(task, share_config_for(state, task, trainable=True))
        load_tasks(self.model, state, state.tasks)
        if state.tasks:
            self.model.set_adapter(next(iter(state.tasks)))
            if PLACEHOLDER in self.model.peft_config:
                self.model.delete_adapter(PLACEHOLDER)
        self._subspace_state = state
