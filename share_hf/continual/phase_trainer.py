"""A Trainer that runs again and again: once for each phase of a stream."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..engines import check_heads, engine_for, engine_that_wrote, on_first_process
from ..engines.local import LocalEngine
from ..format.files import naming
from ..tuner import upstream
from .checkpoints import claim_phase, delete_checkpoints_before, empty_phase, newest_whole_checkpoint
from .data import Data
from .phases import write_final_values


logger = logging.get_logger(__name__)

upstream.check(upstream.OF_TRAINER)


class PhaseTrainer(Trainer):
    """
    Trains one adapter of a model after the other, each in an optimizer run with arguments and a folder of its own.

    Between the runs, adapters are whole and in float32 on every process, whichever engine trains them.

    Args:
        model ([`~peft.PeftModel`]): Model with Share adapters.
        args ([`~transformers.TrainingArguments`]): Arguments that all runs have in common.
        **kwargs: Same as in [`~transformers.Trainer`].

    Attributes:
        engine ([`~share_hf.engines.Engine`]): Engine that runs the phases.
        trained_steps (`int`): Number of optimizer steps in the finished runs. Logs count them, so that all runs form
            one curve.
        ignore_keys_for_eval (`list[str]`, *optional*): Outputs of the model that are left out of predictions.

    Raises:
        ValueError: If the engine that `args` or the launcher ask for could not train any phase.
    """

    def __init__(self, model: PeftModel, args: TrainingArguments, **kwargs: Any) -> None:
        check_heads(model)
        super().__init__(model=model, args=args, **kwargs)
        self.engine = engine_for(self)
        self.trained_steps = 0
        self.ignore_keys_for_eval: list[str] | None = None
        self._given_optimizer = kwargs.get("optimizer_cls_and_kwargs")
        self._in_phase = False
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and getattr(callback, "logging_dir", "") is None:
                # The place that the Trainer itself would choose, rather than the folder of a phase.
                callback.logging_dir = str(Path(args.output_dir, "runs", time.strftime("%b%d_%H-%M-%S")))

    def run_phase(self, args: TrainingArguments, train_dataset: Data, resumed: Path | None = None) -> TrainOutput:
        """
        Train the trainable parameters of the model in one optimizer run.

        Args:
            args: Arguments of this run.
            train_dataset: Training data of this run.
            resumed: Folder of an interrupted run. This run resumes from its newest whole checkpoint, if the engine can
                read it.

        Returns:
            `TrainOutput`: Number of steps, and mean loss.
        """
        self.train_dataset = train_dataset
        history = self.state.log_history
        self.optimizer = self.lr_scheduler = None
        if self._given_optimizer is not None:
            kind, keywords = self._given_optimizer
            self.optimizer_cls_and_kwargs = kind, {"lr": args.learning_rate, **keywords}
        # With persistent workers, the Trainer would keep evaluating the data of the first run.
        vars(self).pop("_eval_dataloaders", None)
        self.model_wrapped = self.model
        with self._with_arguments(args), _taking_hooks_off(self.model), self.engine.train_ready():
            checkpoint = on_first_process(lambda: self._first_checkpoint(resumed))
            state = checkpoint and TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            self.engine.is_broken_off = True
            if state and state.global_step >= state.max_steps:
                # The Trainer would take one more step if the last one is not the end of an epoch.
                self._load_trained(checkpoint)
                self.state = state
                output = TrainOutput(state.global_step, 0.0, {})
            else:
                output = super().train(
                    resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None,
                    ignore_keys_for_eval=self.ignore_keys_for_eval,
                )
            write_final_values(self.optimizer)
            self.engine.release()
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                self._load_from_checkpoint(self.state.best_model_checkpoint)
            self.engine.is_broken_off = False
        # The Trainer begins a new history with every run, but all runs belong to one stream.
        self.state.log_history = history + self.state.log_history
        self.trained_steps += output.global_step
        return output

    @contextmanager
    def _with_arguments(self, args: TrainingArguments) -> Iterator[None]:
        kept, self.args, self._in_phase = self.args, args, True
        try:
            yield
        finally:
            self.args, self._in_phase = kept, False
            self.is_in_train = False  # it would stay True after an interrupted run

    def _first_checkpoint(self, resumed: Path | None) -> Path | None:
        """Return the checkpoint that a run resumes from, and claim the folder of the run for this stream."""
        own = Path(self.args.output_dir)
        checkpoint = self._checkpoint_to_resume(resumed) if resumed is not None else None
        if checkpoint is None or checkpoint.parent != own:
            empty_phase(own)
        claim_phase(own)
        return checkpoint

    def _checkpoint_to_resume(self, folder: Path) -> Path | None:
        checkpoint = newest_whole_checkpoint(folder)
        if checkpoint is None:
            return None
        written = engine_that_wrote(checkpoint), len(list(checkpoint.glob("rng_state*.pth")))
        resumed = self.engine.writes, self.args.world_size
        if written == resumed:
            return checkpoint
        found = "{}: written with {} by {} process(es), resumed with {} by {}".format(checkpoint, *written, *resumed)
        if written[0] == resumed[0] == LocalEngine.writes:
            logger.warning("%s; random numbers, such as those of dropout, continue from another state.", found)
            return checkpoint
        logger.warning("%s, which cannot read its optimizer state; the phase starts over.", found)
        return None

    def _load_trained(self, checkpoint: Path) -> None:
        """Load the values of a phase that was trained to its end, and an optimizer if it changes them at the end."""
        self._load_from_checkpoint(str(checkpoint))
        if not isinstance(self.engine, LocalEngine):
            return
        self.create_optimizer()
        if callable(getattr(self.optimizer, "eval", None)):
            state = torch.load(checkpoint / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(state)

    def log(self, logs: Mapping[str, float], start_time: float | None = None) -> None:
        """
        Log at the step of the stream rather than the step of its phase.

        Args:
            logs (`Mapping[str, float]`): Values to log.
            start_time (`float`, *optional*): Same as in [`~transformers.Trainer`].
        """
        step = self.state.global_step
        self.state.global_step = self.trained_steps + (step if self._in_phase else 0)
        try:
            super().log(dict(logs), start_time)
        finally:
            self.state.global_step = step

    def _remove_unused_columns(self, dataset: Dataset, description: str | None = None) -> Dataset:
        # The columns that a transform reads, such as an image, are not inputs of the model: what it returns is.
        return dataset if dataset.format["type"] == "custom" else super()._remove_unused_columns(dataset, description)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters that `weight_decay` applies to, whatever the name of the trained task."""
        task = f".{self.model.active_adapter}"
        decayed = super().get_decay_parameter_names(model)
        # The Trainer leaves out names that contain "bias" or "norm", but that may be the name of the task.
        of_task = {name for name, parameter in model.named_parameters() if task in name and parameter.ndim > 1}
        return decayed + sorted(of_task - set(decayed))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self.engine.after_backward()
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the adapters of the model; in the checkpoint of a phase, only the active ones, which it trains.

        Args:
            output_dir (`str`, *optional*): Folder to save to. None means the trainer's own folder.
        """
        folder = output_dir if output_dir is not None else self.args.output_dir
        trained = self.engine.gather()
        if self.args.should_save:
            adapters = self.model.active_adapters if _internal_call else None
            state_dict = trained if _internal_call else None
            self.model.save_pretrained(folder, selected_adapters=adapters, state_dict=state_dict)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def _load_best_model(self) -> None:
        """Do nothing yet, as an engine may hold other values. The best model loads when the adapter is whole again."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        place = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        with naming(place):
            try:
                super()._save_checkpoint(model, trial)
            except RuntimeError as error:
                if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
                    raise
                raise OSError(f"{place}: could not be written, is the disk full? ({error})") from error
        if self.args.should_save and self.args.save_total_limit:
            delete_checkpoints_before(Path(self.args.output_dir), self.args.save_total_limit)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The first process marks the checkpoint as whole next, and deletes older ones.
        self.accelerator.wait_for_everyone()


@contextmanager
def _taking_hooks_off(model: nn.Module) -> Iterator[None]:
    """Remove the forward hooks that a run within the block leaves on modules, as an interrupted run does.

    Otherwise the next run would add NEFTune's noise twice, and `debug="underflow_overflow"` would inspect each module
    once for each run.
    """
    before = {module: set(module._forward_hooks) for module in model.modules()}
    try:
        yield
    finally:
        for module in model.modules():
            for added in set(module._forward_hooks) - before.get(module, set(module._forward_hooks)):
                del module._forward_hooks[added]
