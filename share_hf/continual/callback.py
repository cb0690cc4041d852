"""A callback that adapts and merges inside any Trainer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..engines import check_foreign_engine, check_heads, leave_to_gloo, take_trained_values
from ..format.names import check_task_name
from ..shared_subspace import SharedSubspace
from ..state import Phase, SubspaceState
from ..subspace import DriftToleranceError, MergeReport
from ..tuner import ShareConfig
from ..tuner.master_weights import MasterWeights
from ..tuner.model import share_layers
from ..tuner.renaming import named_as_in
from ..tuner.transfer import is_share_model, load_router, load_tasks, state_of
from .arguments import REFUSED_ARGUMENTS
from .phases import (
    RefusedTaskError,
    begin_phase,
    describe_task,
    keeping_random_parts,
    put_back,
    take_merged,
    write_final_values,
)
from .routing import check_loader_routes, with_route_from


# Name that `trl.DPOTrainer` gives its copy of the adapter that it starts from.
REFERENCE = "ref"


class ShareCallback(TrainerCallback):
    """
    Learns one task in any [`~transformers.Trainer`] and merges it into the subspace of the model.

    Pass it in `callbacks=[...]`: the task is set up when the Trainer is created, before the optimizer exists, and
    merged when training ends. With a subspace in the model, the task adapts to it (Sec. 3.2.2); without one, the task
    is trained as a LoRA and starts the subspace.

    The callback works in `trl.SFTTrainer` without changes, also on quantized models: TRL rounds the adapters in the
    model to bfloat16 there, but the new task is added afterwards in float32, and the tasks of `subspace` are restored.
    `trl.DPOTrainer` takes the base model and `peft_config=ShareConfig(...)` for the first task. For a later task, it
    needs an adapter named `default` in the model that has the earlier tasks
    (`model.add_adapter("default", ShareConfig(...))`), which is removed when the task is set up. Its reference is the
    base model either way.

    With `load_best_model_at_end`, the best checkpoint is merged. The Trainer itself only looks for adapters named
    `default`, and warns that it could not locate the best model. The Trainer must take neither `optimizers=`, which
    would be created before the parameters of the task, nor `model_init=`.

    Under DDP, ZeRO-1 and ZeRO-2, every process merges the same values. FSDP and ZeRO-3 partition an adapter as long as
    the Trainer lives, and are refused; [`ShareTrainer`] supports them. DeepSpeed allows one Trainer per process, and
    therefore one task.

    Args:
        task (`str`):
            Name of the new task.
        subspace ([`SharedSubspace`], *optional*):
            Subspace so far. None takes it from the model, without what is known about its drift and about the inputs
            of its tasks.
        routing (`bool`, *optional*, defaults to `False`):
            Whether to learn a route to the task after its merge, in one more pass over the training data with the base
            model, so that inputs find their task, as [`SharedSubspace.learn_route`] does. Streamed, packed and
            padding-free data and the preferences of `trl.DPOTrainer` are not supported.

    Attributes:
        subspace ([`SharedSubspace`]): The subspace, which has the task when training has ended.
        report ([`~share_hf.subspace.MergeReport`]): Report of the merge, None until then.

    Example:
        ```py
        >>> model = get_peft_model(base_model, ShareConfig())
        >>> callback = ShareCallback("mrpc")
        >>> Trainer(model=model, train_dataset=mrpc, callbacks=[callback]).train()
        >>> callback.subspace.save_pretrained("share-subspace")
        ```
    """

    def __init__(self, task: str, subspace: SharedSubspace | None = None, *, routing: bool = False) -> None:
        check_task_name(task, subspace.tasks if subspace is not None else ())
        self.task = task
        self.subspace = subspace
        self.routing = routing
        self.report: MergeReport | None = None
        self._entered = False
        self._masters: MasterWeights | None = None

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PeftModel | None = None,
        **kwargs: Any,
    ) -> None:
        if not is_share_model(model):
            raise ValueError(
                f"ShareCallback needs a PeftModel of a ShareConfig, found {type(model).__name__}: wrap the model with "
                "get_peft_model(model, ShareConfig()) or SharedSubspace.apply(model) first"
            )
        _check_options(args, kwargs)
        check_heads(model)
        check_foreign_engine()
        known: SubspaceState = (
            named_as_in(model, self.subspace.state) if self.subspace is not None else state_of(model)
        )
        check_task_name(self.task, known.tasks)
        rounded = _rounded_tasks(model, known)
        if rounded and self.subspace is None:
            raise ValueError(
                f"the coefficients of {rounded} in the model are not float32, because SFTTrainer and DPOTrainer round "
                "those of the active task on a quantized model: pass the subspace to restore them, "
                f"ShareCallback({self.task!r}, subspace)"
            )
        self.subspace = SharedSubspace(known)
        config = keeping_random_parts(model, copy.copy(cast(ShareConfig, model.peft_config[model.active_adapter])))
        self._config = config
        self._phase = Phase.ADAPT if known.tasks else Phase.INIT
        begin_phase(model, known, self.task, self._phase, config)
        if AcceleratorState().distributed_type != DistributedType.DEEPSPEED:  # which has float32 values of its own
            self._masters = MasterWeights(model, [self.task])
        if rounded:
            load_tasks(model, known, rounded)
        self._entered = True

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PeftModel | None = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if not self._entered:
            raise RuntimeError(
                "ShareCallback was added after the Trainer was made, expected it in "
                "Trainer(..., callbacks=[ShareCallback(...)]): it sets the task up before the optimizer exists"
            )
        if self.report is not None:
            raise RuntimeError(
                f"task {self.task!r} is already merged, make a new Trainer and callback for another task"
            )
        if not is_share_model(model) or self.task not in model.peft_config:
            raise ValueError(
                f"the model has no adapter {self.task!r}, expected the one that the Trainer was made with: model_init "
                "makes another model in train()"
            )
        if self.routing:
            check_loader_routes(self.task, train_dataloader, args)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PeftModel | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        assert is_share_model(model) and self.subspace is not None  # on_train_begin has seen to it
        write_final_values(optimizer)
        take_trained_values(model)
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            _load_best(model, self.task, Path(state.best_model_checkpoint))
        if REFERENCE in model.peft_config:
            # The reference is not a task, and has no coefficients in the basis that the merge creates.
            model.delete_adapter(REFERENCE)
            model.set_adapter(self.task)
        if self._masters is not None:
            self._masters.release()
        info, known = describe_task(model, self.task, self._phase), self.subspace.state
        try:
            merged, self.report = take_merged(model, known, self.task, info)
        except DriftToleranceError:
            raise
        except ValueError as error:
            put_back(model, known, self.task, self._config)
            raise RefusedTaskError(str(error)) from error
        self.subspace = SharedSubspace(merged)
        if self.routing:
            self.subspace = SharedSubspace(with_route_from(train_dataloader, args, model, merged, self.task))
            load_router(model, self.subspace.state)
        leave_to_gloo()


def _check_options(args: TrainingArguments, given: Mapping[str, Any]) -> None:
    """Refuse options of a Trainer with which something other than the trained task would be merged.

    Args:
        args: Arguments of the Trainer.
        given: Objects that the Trainer passes to callbacks, by keyword.
    """
    for name in ("optimizer", "lr_scheduler"):
        if given.get(name) is not None:
            raise ValueError(
                f"optimizers has the {name} {type(given[name]).__name__}, made before the parameters of the task, "
                "which it would not train; expected optim in the arguments, or optimizer_cls_and_kwargs"
            )
    if getattr(args, "enable_jit_checkpoint", False):
        raise ValueError(f"enable_jit_checkpoint is True, expected {REFUSED_ARGUMENTS['enable_jit_checkpoint']}")


def _load_best(model: PeftModel, task: str, checkpoint: Path) -> None:
    """Load a task from the best checkpoint of a run: the Trainer itself only looks for an adapter named `default`."""
    if AcceleratorState().distributed_type == DistributedType.DEEPSPEED:
        return  # its engine has loaded all trained parameters
    folder = checkpoint / task
    if folder.is_dir():
        model.load_adapter(str(folder), task, is_trainable=True)
        model.set_adapter(task)
    elif PartialState().is_main_process:  # others may be on machines without it, and receive the merge from here
        raise ValueError(f"{folder}: no such folder, expected the best checkpoint of task {task!r} to merge")


def _rounded_tasks(model: PeftModel, state: SubspaceState) -> list[str]:
    """Return the tasks whose coefficients in the model are no longer in float32."""
    layers = share_layers(model).values()
    return [
        task
        for task in state.tasks
        if any(
            task in parameters and parameters[task].dtype != torch.float32
            for layer in layers
            for parameters in (layer.share_coefficients_out, layer.share_coefficients_in)
        )
    ]
