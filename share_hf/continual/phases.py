"""The phases of learning a task, on a model: begin one, and take what was learned back into the subspace.

A phase is one optimizer run. `init` trains free factors, `adapt` temporary factors (Sec. 3.2.2), `coefficients` and
`finetune` the task's coefficients in the frozen basis (Sec. 3.2.3).
"""

from __future__ import annotations

import copy
from typing import Literal

from peft import PeftModel

from ..hub.state import LearnedBy, SubspaceState, TaskInfo, initialization_of, merge_tasks, with_learned_coefficients
from ..subspace import MergeReport
from ..tuner.config import ShareConfig
from ..tuner.model import share_layers
from ..tuner.origin import attach_bases
from ..tuner.state import coefficients_of, head_of, load_tasks, target_of, updates_of
from .distributed import on_first_process


TrainingPhase = Literal["init", "adapt", "coefficients", "finetune"]

# What `get_peft_model` calls an adapter that is given no name: a stand-in until the first task is there.
PLACEHOLDER = "default"


def begin_phase(model: PeftModel, state: SubspaceState, task: str, phase: TrainingPhase, config: ShareConfig) -> None:
    """Make `task` the one adapter of the model that is trained, in this phase.

    Args:
        model: Has the tasks of `state` as adapters.
        state: The subspace so far.
        task: A new task, or for `finetune` one of the subspace.
        phase: What of the task is trained.
        config: What new tasks are configured by.
    """
    if phase == "finetune":
        for module, layer in share_layers(model).items():
            if task in state.layers[module].tasks:
                layer.set_coefficients(task, *state.layers[module].balanced(task))
    else:
        if task in model.peft_config:
            model.delete_adapter(task)
        task_config = copy.deepcopy(config)
        task_config.phase, task_config.inference_mode = phase, False
        if state.layers:
            attach_bases(task_config, state.bases())
        model.add_adapter(task, task_config)
    model.set_adapter(task)
    if PLACEHOLDER in model.peft_config and task != PLACEHOLDER:
        model.delete_adapter(PLACEHOLDER)
        model.set_adapter(task)


def take_merged(
    model: PeftModel, state: SubspaceState, task: str, info: TaskInfo, *, progress: bool = False
) -> tuple[SubspaceState, MergeReport]:
    """Merge what `task` was trained as into the subspace, and give the model the result (Sec. 3.2.3).

    Raises:
        DriftToleranceError: If the tolerated drift cannot be met. State and model are as before.
    """
    updates = {task: updates_of(model, task)}
    merged, report = on_first_process(lambda: merge_tasks(state, updates, {task: info}, progress=progress))
    model.peft_config[task].phase = "coefficients"
    load_tasks(model, merged, merged.tasks)
    return merged, report


def take_coefficients(model: PeftModel, state: SubspaceState, task: str, info: TaskInfo) -> SubspaceState:
    """Take coefficients that were trained in the basis of the subspace as they are, and give the model the head."""
    learned = with_learned_coefficients(state, task, coefficients_of(model, task), info)
    load_tasks(model, learned, [task])
    return learned


def describe_task(
    model: PeftModel, task: str, learned_by: LearnedBy, labels: tuple[str, ...] | None = None
) -> TaskInfo:
    """What is known of a task that the model was just trained on."""
    target = target_of(model.peft_config[task])
    # Only free factors start from a random A, as those of a LoRA do.
    sketch = initialization_of(updates_of(model, task)) if learned_by == "init" else None
    return TaskInfo(
        learned_by=learned_by, target=target, head=head_of(model, task), labels=labels, initialization=sketch
    )
