"""A Trainer that learns one task after the other in a shared subspace, and scores them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..engines import together
from ..format.base_model import base_name
from ..state import Phase, SubspaceState, TaskInfo, measured
from ..subspace import DriftToleranceError, MergeReport
from ..tuner import ShareConfig
from ..tuner.head import layer_of_labels, rule_out_labels
from ..tuner.injection import add_adapters
from ..tuner.transfer import load_bases, load_router, load_tasks
from .arguments import ShareTrainingArguments, arguments_of_phase
from .checkpoints import empty_phase
from .data import TaskSplits, is_streamed, naming_used_up_streams, used_up
from .group_trainer import MOST_LOGGED_TASKS, GroupTrainer
from .labels import LabelMask, LabelSmootherOfTask
from .measures import MetricsByTask, check_score_metric
from .phases import (
    PLACEHOLDER,
    RefusedTaskError,
    begin_group,
    describe_task,
    put_back,
    take_coefficients,
    take_merged,
)
from .position import STREAM_STATE_FILE, Stage
from .problems import CLASSES, MULTI_LABEL, Problem, TaskDetails, loss_of
from .progress import StreamProgressCallback
from .routing import check_engine_routes, with_route_of
from .scoring import Scorer, TaskScorer
from .stream import Stream
from .together import Unit, units_of


logger = logging.get_logger(__name__)


class TaskTrainer(GroupTrainer):
    """
    Learns tasks one by one, or several together. It learns each in one or two phases, takes their results into the
    subspace, saves it, and scores the tasks.

    Args:
        model ([`~peft.PeftModel`]): Model with the tasks of the stream's subspace as adapters, or a placeholder.
        args ([`ShareTrainingArguments`]): Arguments that all phases have in common.
        stream ([`Stream`]): Stream with its progress so far.
        share_config ([`ShareConfig`]): Configuration of new tasks.
        tasks (`dict[str, TaskSplits]`): Data of each task.
        groups (`list[tuple[str, ...]]`): Groups of tasks that are learned together.
        details (`dict[str, TaskDetails]`): Further facts about each task.
        dataset_ids (`Mapping[str, str]`): Hub id of the data set of each task.
        task_scorer (`Callable`, *optional*): Same as in [`ShareTrainer`].
        **kwargs: Same as in [`~transformers.Trainer`]. `compute_metrics` may also be a dict of functions by task.
    """

    args: ShareTrainingArguments

    def __init__(
        self,
        model: PeftModel,
        args: ShareTrainingArguments,
        *,
        stream: Stream,
        share_config: ShareConfig,
        tasks: dict[str, TaskSplits],
        groups: list[Unit],
        details: dict[str, TaskDetails],
        dataset_ids: Mapping[str, str],
        task_scorer: TaskScorer | None,
        **kwargs: Any,
    ) -> None:
        functions = kwargs.get("compute_metrics")
        self._check_score_metric = partial(check_score_metric, functions=functions, task_scorer=task_scorer)
        if isinstance(functions, Mapping):
            kwargs["compute_metrics"] = MetricsByTask(functions, self._task_at_work, self._problem_of)
        super().__init__(model, args, **kwargs)
        if args.routing:
            check_engine_routes(self.engine)
        self.share_config = share_config
        self.tasks = tasks
        self._groups = groups
        self._stream = stream
        self._details = details
        self._dataset_ids = dict(dataset_ids)
        self._merge_report: MergeReport | None = None
        self._label_mask = LabelMask(model, self._num_labels_of)
        if self.label_smoother is not None:
            self.label_smoother = LabelSmootherOfTask(self.label_smoother, self._labels_at_work)
        self._scorer = Scorer(self, self._label_mask, task_scorer, args.score_metric)
        self._progress = StreamProgressCallback()
        if not args.disable_tqdm:
            self.remove_callback(DEFAULT_PROGRESS_CALLBACK)  # another one in notebooks
            self.add_callback(self._progress)

    @property
    def _units(self) -> list[Unit]:
        """The tasks in order, where tasks that are learned together form one unit."""
        return units_of(self.tasks, self._groups)

    def _learn(self, tasks: Unit) -> Iterator[TrainOutput]:
        """Run the stages of one task, or of several together: learn and merge, finetune, evaluate.

        Yields:
            The output of each phase.
        """
        started = time.monotonic()
        for name in filter(self._is_scored, tasks):
            self._check_score_metric(self.args.score_metric, name, self._details[name])
        self._recover()
        self._stream.begin()
        resumed_stage = self._stream.take_up({name: self.tasks[name] for name in tasks})
        if resumed_stage is None:
            for name in tasks:
                self._evaluate_before(name)
        if resumed_stage in (None, "learn"):
            yield self._learn_in(Phase.COEFFICIENTS if len(tasks) > 1 else self._next_phase(), tasks, "learn")
        if resumed_stage != "evaluate" and self.args.finetune_num_train_epochs > 0:
            yield self._learn_in(Phase.FINETUNE, tasks, "finetune")
        position = self._position_of(tasks)
        self._stream.save_position(position, self.trained_steps, tasks, "evaluate")
        self._evaluate_after(tasks)
        if self.args.routing:
            for name in tasks:
                self._stream.state = with_route_of(self, self._stream.state, name, self.tasks[name].train)
            load_router(self.model, self._stream.state)
        self._stream.save_subspace(draft=False)
        self._stream.save_position(position + len(tasks), self.trained_steps)
        if self.is_world_process_zero() and not self.args.disable_tqdm:
            learned_by = self._stream.state.tasks[tasks[0]].learned_by
            self._progress.task_line(self._stream.metrics, learned_by, time.monotonic() - started)

    def _learn_in(self, phase: Phase, tasks: Unit, stage: Stage) -> TrainOutput:
        """Run one phase of a task, or of several together, and take its result into the subspace."""
        position = self._position_of(tasks)
        self._stream.save_position(position, self.trained_steps, tasks, stage)
        output = self._train_phase(tasks, phase)
        self._stream.save_position(position, self.trained_steps, tasks, stage, phase_steps=output.global_step)
        try:
            self._take(tasks, phase)
        except DriftToleranceError:
            raise
        except ValueError as error:
            self._forget_phase(tasks, phase, stage, output.global_step)
            raise RefusedTaskError(str(error)) from error
        return output

    def _forget_phase(self, tasks: Unit, phase: Phase, stage: Stage, steps: int) -> None:
        """Make a phase begin anew when it is resumed: its result was refused, so its checkpoints are useless."""
        position, stream = self._position_of(tasks), self._stream
        for name in tasks:
            put_back(self.model, stream.state, name, self.share_config)
        folder = stream.phase_folder(position, _title(tasks), phase)
        together(lambda: self.args.should_save and empty_phase(folder))
        self.trained_steps -= steps
        stream.save_position(position, self.trained_steps, tasks, stage)

    def _recover(self) -> None:
        """Restore the tasks of the model from the subspace if a phase was interrupted."""
        if self.engine.is_broken_off:
            self.engine.recover()
            load_tasks(self.model, self._stream.state)
            self.engine.is_broken_off = False

    def _restore(self, resumed: str | bool) -> None:
        """Resume an interrupted stream, or begin if there is none.

        Raises:
            ValueError: If the stream in the folder is damaged, or has another base model, other settings or other
                tasks, or if a named folder has no stream.
        """
        is_named = isinstance(resumed, str) and resumed.lower() != "true"  # a command line passes "true" as text
        folder = Path(resumed) if is_named else self._stream.folder
        begun = self._stream.restore(folder, self.tasks)
        if begun is None:
            if is_named:
                raise ValueError(
                    f"{folder}: no {STREAM_STATE_FILE} there, expected the output_dir of an earlier stream"
                )
            if self.is_world_process_zero():
                logger.warning("%s: no stream to resume there; a new one starts.", folder)
            return
        self._load_subspace(self._stream.state)
        self.trained_steps = begun.trained_steps
        logger.info("Resuming at task %d (%s, %s)", begun.position + 1, begun.task, begun.stage)
        if begun.in_work not in ([], *map(list, self._units)) and begun.in_work[0] in self.tasks:
            raise ValueError(
                f"{folder}: the stream was interrupted in {begun.in_work}, expected these learned together as before, "
                f"but they are learned as {self._units}"
            )
        if begun.task in self._stream.awaited and self.is_world_process_zero():
            logger.warning(
                "%s: the stream was interrupted in task %r, which is not among tasks; learn_task(%r, ...) continues "
                "it.",
                *(folder, begun.task, begun.task),
            )

    def _load_subspace(self, state: SubspaceState) -> None:
        """Load a subspace into the stream, and its tasks into the model as adapters."""
        load_bases(self.model, state)
        add_adapters(self.model, state, list(state.tasks), trainable=True)
        load_tasks(self.model, state)
        load_router(self.model, state)
        if state.tasks:
            self.model.set_adapter(next(iter(state.tasks)))
            if PLACEHOLDER in self.model.peft_config:
                self.model.delete_adapter(PLACEHOLDER)
        self._stream.state = state

    def _next_phase(self) -> Phase:
        if len(self._stream.state.tasks) < self.args.num_init_tasks:
            return Phase.INIT
        return Phase.ADAPT if self.args.method == "share" else Phase.COEFFICIENTS

    def _train_phase(self, tasks: Unit, phase: Phase) -> TrainOutput:
        position = self._position_of(tasks)
        # A phase depends only on the seed and its place, so that a repeated phase runs the same.
        set_seed(self.args.seed + 2 * position + (phase == Phase.FINETUNE))
        begin_group(self.model, self._stream.state, tasks, phase, self.share_config)
        self._label_mask.attach(self.model)
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self._stream.metrics.parameters[phase] = trained // len(tasks)
        title = _title(tasks)
        self._progress.title = f"{title} [{phase}]"
        if self._details[tasks[0]].selection is not None:
            self.eval_dataset = self._details[tasks[0]].selection
        folder = self._stream.phase_folder(position, title, phase)
        args, resumed = arguments_of_phase(self.args, phase, folder), self._stream.resumed_phase(folder)
        data = {name: self.tasks[name].train for name in tasks}
        with naming_used_up_streams(title):
            if len(tasks) > 1:
                output = self.run_group(args, data, resumed)
            else:
                output = self.run_phase(args, data[tasks[0]], resumed)
        # With `auto_find_batch_size`, the batch may be smaller than the arguments ask for.
        self._stream.metrics.training["train_batch_size"] = self.get_total_train_batch_size(self.args)
        if output.global_step == 0 and is_streamed(data[tasks[0]]):
            raise ValueError(used_up(title))
        return output

    def _take(self, tasks: Unit, phase: Phase) -> None:
        """Take the result of a phase into the subspace, and save it."""
        stream = self._stream
        held = stream.state if self.engine.keeps_idle_adapters else None
        infos = {name: self._info_of(name, phase) for name in tasks}
        if phase in (Phase.COEFFICIENTS, Phase.FINETUNE):
            stream.state = take_coefficients(self.model, stream.state, infos, held=held)
        else:
            progress = not self.args.disable_tqdm and self.is_world_process_zero()
            ((name, info),) = infos.items()
            stream.state, report = take_merged(self.model, stream.state, name, info, held=held, progress=progress)
            self._merge_report = report
            self._log_merge(report)
        if stream.state.base_model_name_or_path is None:
            base = base_name(getattr(self.model.get_base_model(), "name_or_path", None))
            stream.state = replace(stream.state, base_model_name_or_path=base)
        stream.save_subspace()

    def _info_of(self, name: str, phase: Phase) -> TaskInfo:
        """Return the facts about a task that a phase has trained."""
        stream, details = self._stream, self._details[name]
        learned_by = stream.state.tasks[name].learned_by if phase == Phase.FINETUNE else phase
        info = describe_task(self.model, name, learned_by, details.problem)
        info = replace(info, dataset=self._dataset_ids.get(name))
        if phase == Phase.FINETUNE:
            info = replace(info, initialization=stream.state.tasks[name].initialization)
        if details.problem is not None:
            info = replace(info, head=self._with_own_labels(info.head, details.problem))
        return info

    def _with_own_labels(self, head: Mapping[str, Tensor], problem: Problem) -> dict[str, Tensor]:
        """Return a head that never predicts labels beyond the task's own, whatever loads it."""
        of_model = self.model.get_base_model().config.num_labels
        layer = layer_of_labels({name: tuple(tensor.shape) for name, tensor in head.items()}, of_model)
        if layer is None or problem.num_labels >= of_model:
            return dict(head)
        several = problem.problem_type == MULTI_LABEL
        return {**head, **rule_out_labels(head, layer, problem.num_labels, of_model, several=several)}

    def _log_merge(self, report: MergeReport) -> None:
        self._log_stream(
            {
                "merge_max_drift": report.max_drift,
                "merge_max_drift_bound": report.max_drift_bound,
                "merge_changed_layers": report.changed_layers,
                "tasks": len(self._stream.state.tasks),
            }
        )

    def _log_stream(self, logs: Mapping[str, float]) -> None:
        self.log({f"share/{name}": value for name, value in logs.items()})

    # ---- Loss and predictions --------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        problem = None if self._group is not None else self._problem_of(self._task_at_work())
        if problem is None or "labels" not in inputs or self._is_loss_of_model(problem):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        loss = loss_of(problem.problem_type, logits, labels, problem.num_labels)
        if return_outputs and not isinstance(outputs, Mapping):
            outputs = (loss, *outputs)
        return (loss, outputs) if return_outputs else loss

    def _is_loss_of_model(self, problem: Problem) -> bool:
        """Return whether the model or the user's function computes the loss, with one kind of loss for all tasks."""
        if self.compute_loss_func is not None:
            return True
        of_model = getattr(self.model.config, "problem_type", None)
        is_smoothed = self.label_smoother is not None
        return problem.problem_type == CLASSES and (is_smoothed or of_model in (None, CLASSES))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        problem = self._problem_of(self._task_at_work())
        if problem is None or logits is None or problem.problem_type == CLASSES:
            return loss, logits, labels
        # Masked outputs carry no value and must not be predicted.
        if isinstance(logits, tuple):
            return loss, (logits[0][..., : problem.num_labels], *logits[1:]), labels
        return loss, logits[..., : problem.num_labels], labels

    # ---- Evaluation ------------------------------------------------------------------------------------------------

    def _evaluate_task(self, task: str, adapter: str | None = None) -> dict[str, float]:
        self._recover()
        return self._scorer.metrics_of(task, self.tasks[task].evaluation, adapter)

    def _scores(self, task: str, adapter: str | None = None) -> dict[str, float | None]:
        """Return the task's score and its other metrics.

        None stands for a value that is NaN or infinite, which says nothing and is not valid JSON.
        """
        found = self._scorer.scores_in(task, self._evaluate_task(task, adapter))
        scores = {metric: measured(value) for metric, value in found.items()}
        self._stream.metrics.score_names[task] = name = next(iter(scores))
        if scores[name] is None:
            logger.warning("%s of task %r is %s, which does not count as a measurement.", name, task, found[name])
        return scores

    def _score(self, task: str, adapter: str | None = None) -> float | None:
        return next(iter(self._scores(task, adapter).values()))

    def _evaluate_before(self, name: str) -> None:
        """Score a task that is not learned yet, with the model alone and with the newest adapter."""
        metrics = self._stream.metrics
        if not self.args.evaluate_before or self.tasks[name].evaluation is None:
            return
        newest = next(reversed(self._stream.state.tasks), PLACEHOLDER)
        column = metrics.tasks.index(name)
        with self.model.disable_adapter():
            metrics.baseline[column] = self._score(name, newest)
        if metrics.matrix:
            metrics.matrix[-1][column] = self._score(name, newest)

    def _evaluate_after(self, tasks: Unit) -> None:
        """Add a row to the matrix, and update the other metrics of the stream."""
        stream, metrics = self._stream, self._stream.metrics
        evaluated = set(metrics.tasks if self.args.evaluate_seen_tasks else tasks)
        found = {task: self._scores(task) for task in metrics.tasks if task in evaluated and self._is_scored(task)}
        scores = {task: next(iter(found[task].values())) if task in found else None for task in metrics.tasks}
        metrics.add_row(list(scores.values()), len(tasks))
        infos = dict(stream.state.tasks)
        for name in tasks:
            if scores[name] is not None:
                finite = {metric: score for metric, score in found[name].items() if score is not None}
                infos[name] = replace(infos[name], scores=finite)
        stream.state = replace(stream.state, tasks=infos)
        metrics.drift = stream.state.drifts()
        logs = {mean: getattr(metrics, mean) for mean in ("average", "forgetting", "backward_transfer")}
        logs["max_drift"] = max(metrics.drift.values())
        if len(metrics.tasks) <= MOST_LOGGED_TASKS:
            logs |= {f"{metrics.score_of(task)}/{task}": score for task, score in scores.items()}
            logs |= {f"drift/{task}": drift for task, drift in metrics.drift.items()}
        logs |= {f"trainable_parameters/{phase}": count for phase, count in metrics.parameters.items()}
        self._log_stream({log: value for log, value in logs.items() if value is not None})

    def _is_scored(self, task: str) -> bool:
        """Return whether a task has data to score it on. A task of a resumed stream may have none yet."""
        return task in self.tasks and self.tasks[task].evaluation is not None

    def _task_at_work(self) -> str:
        return self._label_mask.task_of(self.model.active_adapter)

    def _problem_of(self, task: str) -> Problem | None:
        return self._details[task].problem if task in self._details else None

    def _num_labels_of(self, task: str) -> int | None:
        problem = self._problem_of(task)
        return None if problem is None else problem.num_labels

    def _labels_at_work(self) -> int | list[int | None] | None:
        """Return the number of labels of the active task, or of the task of each sample in a mixed batch."""
        if self._group is not None:
            return [self._label_mask.num_labels_of(name) for name in self._group.names]
        return self._label_mask.num_labels_of(self.model.active_adapter)

    def _position_of(self, tasks: Unit) -> int:
        """Return the number of tasks of the stream before these."""
        return self._stream.metrics.tasks.index(tasks[0])


def _title(tasks: Unit) -> str:
    """Return the title of a phase, which names its task or the first of several."""
    return tasks[0] if len(tasks) == 1 else f"{tasks[0]}+{len(tasks) - 1}"
