"""The phases of learning a task in a model: beginning one, and taking the result back into the subspace.

A phase is one optimizer run. `init` trains free factors, `adapt` trains temporary factors (Sec. 3.2.2), and
`coefficients` and `finetune` train the task's coefficients in the frozen basis (Sec. 3.2.3).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from peft import PeftModel, TaskType, get_peft_model
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import logging

from ..engines import on_first_process
from ..format.basis_file import bases_of
from ..format.saved_modules import saved_module_of
from ..shared_subspace import SharedSubspace
from ..state import Phase, SubspaceState, TaskInfo, initialization_of, merge_tasks, with_learned_coefficients
from ..subspace import MergeReport
from ..tuner import ShareConfig
from ..tuner.config import GivenBases
from ..tuner.head import parts_to_keep
from ..tuner.injection import add_untrained
from ..tuner.model import layouts_of, share_layers
from ..tuner.transfer import coefficients_of, head_of, load_tasks, share_config_for, target_of, updates_of
from .problems import Problem


logger = logging.get_logger(__name__)

# Name that `get_peft_model` gives an adapter without a name: a placeholder until the model has its first task.
PLACEHOLDER = "default"


class RefusedTaskError(ValueError):
    """Raised when the subspace cannot take the result of a phase, such as one with NaN.

    The model and the subspace are as they were before the phase.
    """


def config_for(model: nn.Module, share_config: ShareConfig | None, subspace: SharedSubspace | None) -> ShareConfig:
    """Return the configuration of new tasks: the given one, or that of the subspace's newest task.

    Raises:
        ValueError: If the configuration contradicts the subspace.
    """
    if share_config is not None:
        config = copy.deepcopy(share_config)
    elif subspace is not None and subspace.tasks:
        config = share_config_for(subspace.state, subspace.tasks[-1], trainable=True)
    else:
        config = ShareConfig()
    if subspace is not None:
        # Task files do not record centering, so neither does a configuration read from them.
        settings = config.subspace_settings(center=config.center or subspace.settings.center)
        if settings != subspace.settings:
            raise ValueError(f"share_config has {settings}, the subspace has {subspace.settings}")
    if config.task_type is None:
        config.task_type = _task_type_of(model)
    return keeping_random_parts(model, config)


def keeping_random_parts(model: nn.Module, config: ShareConfig) -> ShareConfig:
    """Return the configuration with every module that a task must keep to work elsewhere in its `modules_to_save`."""
    # This also names a head that PEFT adds for a type of task: PEFT goes by the class of the model, which fits the
    # first task, and adds no head if that class is of another type.
    saved = config.modules_to_save or []
    # With FSDP, only the first process knows which weights it has loaded; the others wait for them.
    parts = on_first_process(lambda: parts_to_keep(model, config.task_type))
    missing = [part for part in parts if saved_module_of(f"{part}.", saved) is None]
    if not missing:
        return config
    logger.info(
        "Each task keeps %s: they are missing from the checkpoint of the base model, or are its head.", missing
    )
    config = copy.deepcopy(config)
    config.modules_to_save = [*saved, *missing]
    return config


def _task_type_of(model: nn.Module) -> TaskType | None:
    name = type(model).__name__
    if name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        return TaskType.SEQ_CLS
    return TaskType.CAUSAL_LM if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() else None


def with_adapters(model: nn.Module, state: SubspaceState, share_config: ShareConfig) -> PeftModel:
    """Return the base model with the tasks of a subspace, or with a placeholder for the first task.

    The target modules that PEFT finds for the placeholder are written into `share_config`.
    """
    if state.tasks:
        return SharedSubspace(state).apply(model)
    config = copy.deepcopy(share_config)
    peft_model = get_peft_model(model, config, adapter_name=PLACEHOLDER)
    # PEFT has resolved None and "all-linear" to modules, which later adapters target too.
    share_config.target_modules = copy.copy(config.target_modules)
    return peft_model


def begin_group(
    model: PeftModel, state: SubspaceState, tasks: Sequence[str], phase: Phase, config: ShareConfig
) -> None:
    """Make `tasks` the trained adapters of the model, all together. Other arguments are as in `begin_phase`."""
    if len(tasks) == 1:
        begin_phase(model, state, tasks[0], phase, config)
        return
    _prepare(model, state, tasks, phase, config)
    model.set_adapter(tasks[0])
    model.base_model.set_adapter(list(tasks))


def begin_phase(model: PeftModel, state: SubspaceState, task: str, phase: Phase, config: ShareConfig) -> None:
    """Make `task` the only trained adapter of the model in this phase.

    Args:
        model: Model with the tasks of `state` as adapters.
        state: Subspace so far.
        task: New task, or for `finetune` a task of the subspace.
        phase: Phase, which determines the trained parameters.
        config: Configuration of new tasks.
    """
    _prepare(model, state, [task], phase, config)
    model.set_adapter(task)
    if PLACEHOLDER in model.peft_config and task != PLACEHOLDER:
        model.delete_adapter(PLACEHOLDER)
        model.set_adapter(task)


def _prepare(model: PeftModel, state: SubspaceState, tasks: Sequence[str], phase: Phase, config: ShareConfig) -> None:
    """Give the model the parameters of tasks that a phase trains. See `begin_phase`."""
    if phase == Phase.FINETUNE:
        for module, layer in share_layers(model).items():
            for task in filter(state.layers[module].has, tasks):
                layer.set_coefficients(task, *state.layers[module].balanced(task))
        return
    for task in tasks:
        if task in model.peft_config:
            _delete_broken_off(model, task, config)
    task_config = copy.deepcopy(config)
    task_config.phase, task_config.inference_mode = phase, False
    if state.layers:
        task_config.origin = GivenBases(bases_of(state.layers))
    add_untrained(model, tasks, task_config)


def _delete_broken_off(model: PeftModel, task: str, config: ShareConfig) -> None:
    """Remove an adapter whose training, alone or in a group, was interrupted."""
    if len(model.peft_config) == 1:  # a first task: PEFT needs at least one adapter
        with torch.random.fork_rng(devices=[]):
            model.add_adapter(PLACEHOLDER, copy.deepcopy(config))
    if len(model.active_adapters) > 1:  # PEFT does not delete one of several active heads
        model.set_adapter(model.active_adapters[0])
    model.delete_adapter(task)


def take_merged(
    model: PeftModel,
    state: SubspaceState,
    task: str,
    info: TaskInfo,
    *,
    held: SubspaceState | None = None,
    progress: bool = False,
) -> tuple[SubspaceState, MergeReport]:
    """Merge the trained updates of `task` into the subspace, and give the model the result (Sec. 3.2.3).

    Args:
        model: Model that was trained on the task.
        state: Subspace so far.
        task: Name of the task.
        info: Facts about the task.
        held: Same as in `load_tasks`.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If a trained value is not finite. The message names the task; state and model stay unchanged.
        DriftToleranceError: If the drift tolerance cannot be met. State and model stay unchanged.
    """
    updates = {task: updates_of(model, task)}
    merged, report = on_first_process(
        lambda: merge_tasks(state, updates, {task: info}, layouts={task: layouts_of(model)}, progress=progress),
        known=state,
    )
    model.peft_config[task].phase = Phase.COEFFICIENTS
    load_tasks(model, merged, held=held)
    return merged, report


def take_coefficients(
    model: PeftModel, state: SubspaceState, infos: Mapping[str, TaskInfo], *, held: SubspaceState | None = None
) -> SubspaceState:
    """Take coefficients that were trained in the basis of the subspace unchanged, and give the model the result.

    Args:
        model: Model that was trained on the tasks.
        state: Subspace so far.
        infos: Facts about each task.
        held: Same as in `load_tasks`.

    Raises:
        ValueError: If a trained value is not finite. The message names the task; state and model stay unchanged.
    """
    learned = with_learned_coefficients(state, {task: coefficients_of(model, task) for task in infos}, infos)
    load_tasks(model, learned, held=held, trained=infos)
    return learned


def put_back(model: PeftModel, state: SubspaceState, task: str, config: ShareConfig) -> None:
    """Restore `task` in the model to what the subspace holds, whatever a phase has changed since.

    Args:
        model: Model with the tasks of `state` as adapters.
        state: Subspace to restore from.
        task: Task of the subspace, or a task that was not learned, whose adapter is removed.
        config: Configuration of a placeholder, which replaces the adapter if there is no other task.
    """
    if task in state.tasks:
        load_tasks(model, state, [task])
    elif task in model.peft_config:
        if not state.tasks:
            model.add_adapter(PLACEHOLDER, copy.deepcopy(config))
        model.set_adapter(next(reversed(state.tasks), PLACEHOLDER))
        model.delete_adapter(task)


def describe_task(model: PeftModel, task: str, learned_by: Phase, problem: Problem | None = None) -> TaskInfo:
    """Return the facts about a task that the model was just trained on."""
    target = target_of(model, task)
    # Only these factors start from a random A, as a LoRA does.
    is_random = learned_by == Phase.INIT or (
        learned_by == Phase.ADAPT and model.peft_config[task].temporary_init == "random"
    )
    sketch = initialization_of(updates_of(model, task)) if is_random else None
    return TaskInfo(
        learned_by=learned_by,
        target=target,
        head=head_of(model, task),
        labels=None if problem is None else problem.label_names,
        problem_type=None if problem is None else problem.problem_type,
        initialization=sketch,
    )


def write_final_values(optimizer: torch.optim.Optimizer | None) -> None:
    """Give a model the final values of its training: a schedule-free optimizer trains different ones."""
    if callable(getattr(optimizer, "eval", None)):
        optimizer.eval()
