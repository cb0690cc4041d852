"""A subspace put into a model."""

from __future__ import annotations

from collections.abc import Sequence

from peft import PeftModel
from torch import nn

from ..state import component_of
from ..tuner.injection import add_tasks, inject_tasks
from ..tuner.transfer import is_share_model
from .held import HeldSubspace


class Applying(HeldSubspace):
    """Tasks as adapters of their base model."""

    def apply(
        self,
        model: nn.Module,
        tasks: Sequence[str] | None = None,
        *,
        trainable: bool = False,
        prefix: str | None = None,
    ) -> PeftModel:
        """
        Inject tasks into their base model.

        Args:
            model (`torch.nn.Module`): The base model, without adapters.
            tasks (`Sequence[str]`, *optional*): The tasks to load; all of them if not given. The first is active.
            trainable (`bool`, *optional*, defaults to `False`): Whether the active task's coefficients are trained.
            prefix (`str`, *optional*):
                The component of a pipeline that `model` is, such as "unet" where modules are called `unet.…`. Tasks
                that adapt nothing in it are left out, unless they are asked for.

        Returns:
            `PeftModel`: With one adapter a task and one basis a layer.

        Raises:
            ValueError: If a task is unknown, or a layer of the model has another shape or is of another kind; the
                model is as it was.
        """
        names = list(self.tasks if tasks is None else tasks)
        if not names:
            raise ValueError("no tasks to apply, expected at least one")
        for name in names:
            self._check_known(name)
        state = self._holding(names)
        if prefix is not None:
            state = component_of(state, prefix, tasks or ())
            names = [name for name in names if name in state.tasks]
        peft_model = inject_tasks(model, state, names, trainable=trainable)
        return peft_model if trainable else peft_model.eval()

    def add_task(self, model: PeftModel, task: str | Sequence[str], *, prefix: str | None = None) -> None:
        """
        Put a task, or several, into a model that has others of this subspace already.

        `model.delete_adapter(task)` takes one out. What is active stays so.

        Args:
            model (`PeftModel`): From [`~SharedSubspace.apply`], with this subspace as it is now.
            task (`str` or `Sequence[str]`): What to add.
            prefix (`str`, *optional*): As for [`~SharedSubspace.apply`].

        Raises:
            ValueError: If a task is unknown or in the model already, the model has another basis, or a task does not
                fit it; the model is as it was.
        """
        names = [task] if isinstance(task, str) else list(dict.fromkeys(task))
        if not is_share_model(model):
            raise ValueError(f"model is a {type(model).__name__}, expected one that apply made")
        for name in names:
            self._check_known(name)
            if name in model.peft_config:
                raise ValueError(
                    f"task {name!r} is in the model already, expected others: delete_adapter takes it out"
                )
        state = self._holding(names)
        if prefix is not None:
            state = component_of(state, prefix, names)
        add_tasks(model, state, names)
