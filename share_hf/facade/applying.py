"""Applying a subspace to a model."""

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
            model (`torch.nn.Module`): Base model without adapters.
            tasks (`Sequence[str]`, *optional*): Tasks to load. None loads all of them. The first one becomes active.
            trainable (`bool`, *optional*, defaults to `False`):
                Whether the coefficients of the active task are trainable.
            prefix (`str`, *optional*):
                Name of the pipeline component that `model` is, such as "unet" where the subspace calls its modules
                `unet.…`. Tasks that adapt nothing in it are left out, unless `tasks` names them.

        Returns:
            `PeftModel`: The model with one adapter per task and one basis per layer.

        Raises:
            ValueError: If a task is unknown, or a layer of the model has another shape or is of another kind. The
                model stays unchanged.
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
        Add one or several tasks to a model that already has others of this subspace.

        The active adapter does not change. `model.delete_adapter(task)` removes a task again.

        Args:
            model (`PeftModel`): Model that [`~SharedSubspace.apply`] returned for the current bases of this subspace.
            task (`str` or `Sequence[str]`): Task or tasks to add.
            prefix (`str`, *optional*): Same as in [`~SharedSubspace.apply`].

        Raises:
            ValueError: If a task is unknown or already in the model, the model has another basis, or a task does not
                fit the model. The model stays unchanged.
        """
        names = [task] if isinstance(task, str) else list(dict.fromkeys(task))
        if not is_share_model(model):
            raise ValueError(f"model is a {type(model).__name__}, expected one made by SharedSubspace.apply")
        for name in names:
            self._check_known(name)
            if name in model.peft_config:
                raise ValueError(f"task {name!r} is already in the model, expected others: delete_adapter removes it")
        state = self._holding(names)
        if prefix is not None:
            state = component_of(state, prefix, names)
        add_tasks(model, state, names)
