"""Every option of a Trainer and its arguments is honoured in a stream, with a test for it, or refused by name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel, Trainer, TrainingArguments, default_data_collator

from share_hf import ShareTrainer, ShareTrainingArguments
from share_hf.continual.arguments import REFUSED_ARGUMENTS, REFUSED_PARAMETERS

from .cases import (
    LLAMA_TARGETS,
    At,
    Interruption,
    arguments,
    assert_same_tasks,
    classification_tasks,
    classifier_trainer,
    config,
    language_tasks,
    updates,
)


TESTS = Path(__file__).parents[1]
PHASES = ["0001-colors-init", "0001-colors-finetune", "0002-shapes-adapt", "0002-shapes-finetune"]

# Every phase reads these from its arguments, which `test_every_phase_reads_its_options` observes.
READ_IN_EVERY_PHASE = {
    *("activation_checkpointing", "activation_checkpointing_kwargs", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("auto_find_batch_size", "average_tokens_across_devices", "batch_eval_metrics", "dataloader_drop_last"),
    *("dataloader_in_order", "dataloader_multiprocessing_context", "dataloader_num_workers", "dataloader_pin_memory"),
    *("dataloader_prefetch_factor", "eval_accumulation_steps", "eval_delay", "eval_do_concat_batches", "eval_steps"),
    *("eval_strategy", "gradient_accumulation_steps", "greater_is_better", "include_for_metrics", "max_grad_norm"),
    *("include_num_input_tokens_seen", "length_column_name", "logging_first_step", "logging_nan_inf_filter"),
    *("logging_steps", "logging_strategy", "lr_scheduler_kwargs", "lr_scheduler_type", "max_steps", "optim"),
    *("metric_for_best_model", "optim_args", "output_dir", "per_device_eval_batch_size", "prediction_loss_only"),
    *("per_device_train_batch_size", "remove_unused_columns", "save_on_each_node", "save_steps", "save_strategy"),
    *("torch_empty_cache_steps", "train_sampling_strategy", "use_liger_kernel", "warmup_steps"),
}
# Options that some versions of transformers lack, or read elsewhere.
NOT_IN_ALL_VERSIONS = {"activation_checkpointing", "activation_checkpointing_kwargs"}

# These are read once, by the process or the Trainer, and hold for all phases.
READ_WHEN_MADE = {
    *("accelerator_config", "data_seed", "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_static_graph"),
    *("disable_tqdm", "full_determinism", "label_names", "log_level", "log_level_replica", "log_on_each_node"),
    *("report_to", "skip_memory_metrics", "use_cache"),
}
# These are settled before a Trainer is made: the device, the processes and their numbers, and who reads them.
OF_THE_PROCESS = {
    *("ddp_backend", "ddp_timeout", "local_rank", "tf32", "use_cpu"),
    *("project", "run_name", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id"),  # `report_to`
}
# "Not directly used by Trainer", as its documentation says.
OF_SCRIPTS = {"do_train", "do_eval", "do_predict", "resume_from_checkpoint"}

SHOWN_BY = {
    "bf16": "engines/test_engines.py::test_mixed_precision_is_the_same_in_all_phases_and_evaluations",
    "fp16": "cuda/test_streams.py::test_",
    "dataloader_persistent_workers": "continual/test_options.py::test_workers_that_persist_do_not_keep_the_data",
    "ddp_broadcast_buffers": "distributed/test_streams.py::test_two_processes_learn_what_one_does",
    "debug": "continual/test_options.py::test_what_a_phase_hooks_into_modules_comes_off_with_it",
    "deepspeed": "distributed/test_streams.py::test_two_processes_learn_what_one_does",
    "eval_on_start": "continual/test_options.py::test_a_phase_begins_with_an_evaluation_of_its_own_task",
    "fsdp": "engines/test_engines.py::test_settings_of_fsdp_that_do_not_go_with_adapters_are_refused",
    "fsdp_config": "engines/test_engines.py::test_settings_of_fsdp_that_do_not_go_with_adapters_are_refused",
    "gradient_checkpointing": "continual/test_options.py::test_a_way_to_compute_the_same_learns_the_same",
    "gradient_checkpointing_kwargs": "continual/test_options.py::test_a_way_to_compute_the_same_learns_the_same",
    "hub_always_push": "continual/test_push.py::test_every_save_is_a_push_after_every_task",  # a push is waited for
    "hub_model_id": "continual/test_push.py::test_every_save_is_a_push_after_every_task",
    "hub_private_repo": "continual/test_push.py::test_a_trainer_pushes_when_it_is_told_to",
    "hub_revision": "continual/test_push.py::test_what_a_subspace_has_no_use_for_is_refused",
    "hub_strategy": "continual/test_push.py::test_end_is_one_push_when_all_tasks_are_learned",
    "hub_token": "continual/test_push.py::test_a_trainer_pushes_when_it_is_told_to",
    "ignore_data_skip": "continual/test_options.py::test_a_phase_resumes_as_its_arguments_say",
    "label_smoothing_factor": "continual/test_options.py::test_labels_are_smoothed_over_those_of_the_task",
    "learning_rate": "continual/test_options.py::test_each_phase_has_its_own_rate_even_if_it_is_zero",
    "liger_kernel_config": "continual/test_options.py::test_every_phase_reads_its_options",  # with use_liger_kernel
    "load_best_model_at_end": "continual/test_checkpoint_options.py::test_the_best_checkpoint_of_a_phase_is_what",
    "neftune_noise_alpha": "continual/test_options.py::test_what_a_phase_hooks_into_modules_comes_off_with_it",
    "num_train_epochs": "continual/test_stream.py::test_first_tasks_are_free_factors_and_later_ones_are_adapted",
    "push_to_hub": "continual/test_push.py::test_every_save_is_a_push_after_every_task",
    "restore_callback_states_from_checkpoint": "continual/test_options.py::test_a_phase_resumes_as_its_arguments_say",
    "save_only_model": "continual/test_checkpoint_options.py::test_a_checkpoint_of_the_model_alone_is_not_continued",
    "save_total_limit": "continual/test_checkpoint_options.py::test_save_total_limit_is_how_many_checkpoints",
    "seed": "continual/test_resume.py::test_a_phase_that_is_cut_off_continues_to_the_bit",
    "torch_compile": "continual/test_options.py::test_a_compiled_model_learns_the_same",
    "torch_compile_backend": "continual/test_options.py::test_a_compiled_model_learns_the_same",
    "torch_compile_mode": "continual/test_options.py::test_a_compiled_model_learns_the_same",
    "weight_decay": "continual/test_options.py::test_weights_decay_whatever_the_task_is_called",
}

PARAMETERS_SHOWN_BY = {
    "model": "continual/test_trainer.py::test_contradicting_arguments_are_refused",
    "args": "continual/test_learning.py::test_plain_training_arguments_are_refused",
    "data_collator": "continual/test_options.py::test_a_batch_that_does_not_fit_makes_all_phases_take_smaller_ones",
    "eval_dataset": "continual/test_options.py::test_eval_dataset_is_evaluated_in_every_phase",
    "processing_class": "continual/test_options.py::test_a_tokenizer_is_saved_with_checkpoints",
    "compute_loss_func": "continual/test_options.py::test_a_custom_loss_is_trained",
    "compute_metrics": "continual/test_options.py::test_predictions_come_as_the_options_have_them",
    "callbacks": "continual/test_checkpoint_options.py::test_the_best_checkpoint_is_chosen_by_the_own_task",
    "optimizer_cls_and_kwargs": "continual/test_options.py::test_each_phase_makes_an_optimizer_of_the_class",
    "preprocess_logits_for_metrics": "continual/test_options.py::test_predictions_come_as_the_options_have_them",
}

TinyModel = Callable[[str], PreTrainedModel]
Make = Callable[..., ShareTrainer]


@pytest.fixture
def make(tiny_model: TinyModel, tmp_path: Path) -> Make:
    """Make a trainer of `colors`, which has 2 of the classifier's 3 labels, and `shapes`, which has all of them."""

    def build(name: str = "stream", tasks: Any = None, **changes: Any) -> ShareTrainer:
        tasks = classification_tasks("colors", "shapes") if tasks is None else tasks
        return classifier_trainer(tiny_model("bert"), tmp_path / name, tasks, **changes)

    return build


def test_every_option_of_the_arguments_is_honoured_or_refused() -> None:
    """A new version of transformers may add an option: find out what a stream does with it, and list it."""
    known = [READ_IN_EVERY_PHASE, READ_WHEN_MADE, OF_THE_PROCESS, OF_SCRIPTS, set(SHOWN_BY), set(REFUSED_ARGUMENTS)]
    options = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert not options - set.union(*known)
    assert sum(map(len, known)) == len(set.union(*known)), "an option is in two lists"


def test_every_parameter_of_the_trainer_is_honoured_or_refused() -> None:
    parameters = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert parameters == PARAMETERS_SHOWN_BY.keys() | REFUSED_PARAMETERS.keys()


@pytest.mark.parametrize("shown_by", sorted({*SHOWN_BY.values(), *PARAMETERS_SHOWN_BY.values()}))
def test_what_an_option_is_shown_by_is_there(shown_by: str) -> None:
    file, _, test = shown_by.partition("::")
    assert f"def {test}" in (TESTS / file).read_text(encoding="utf-8")


@dataclasses.dataclass
class WatchedArguments(ShareTrainingArguments):
    """Arguments that record which of their options are read, by the folder of the stream or the phase."""

    def __getattribute__(self, name: str) -> Any:
        reads: dict[str, set[str]] | None = object.__getattribute__(self, "__dict__").get("reads")
        if reads is not None:
            reads.setdefault(Path(object.__getattribute__(self, "output_dir")).name, set()).add(name)
        return super().__getattribute__(name)


def test_every_phase_reads_its_options(tiny_model: TinyModel, tmp_path: Path) -> None:
    values = arguments(
        tmp_path / "stream",
        finetune_num_train_epochs=1,
        train_sampling_strategy="group_by_length",
        **dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True),
        **({"activation_checkpointing": True} if "activation_checkpointing" in fields() else {}),
    )
    args = WatchedArguments(**{name: getattr(values, name) for name in fields(ShareTrainingArguments)})
    args.reads = {}
    tasks = classification_tasks("colors", "shapes")
    trainer = ShareTrainer(tiny_model("bert"), args, config(["query", "value"]), tasks)
    assert args.reads["stream"] >= READ_WHEN_MADE & fields()
    args.reads.clear()
    trainer.train()
    assert [phase for phase in args.reads if phase != "stream"] == PHASES
    for phase in PHASES:
        assert not (READ_IN_EVERY_PHASE & fields()) - args.reads[phase]


def fields(kind: type = TrainingArguments) -> set[str]:
    return {field.name for field in dataclasses.fields(kind) if field.init}


# ---- Refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"bf16_full_eval": True},
            r"bf16_full_eval is True, expected False: .*load the base model in torch\.bfloat16",
        ),
        ({"enable_jit_checkpoint": True}, r"enable_jit_checkpoint is True, .*half trained; save_steps"),
        ({"eval_use_gather_object": True}, "eval_use_gather_object is True, expected False"),
        ({"optim_target_modules": ["q_proj"]}, r"optim_target_modules is \['q_proj'\], expected None: GaLore"),
        ({"parallelism_config": object()}, "parallelism_config is .*expected None: .*DDP, DeepSpeed or FSDP"),
        ({"init_num_train_epochs": 2, "max_steps": 3}, "init_num_train_epochs is 2 and max_steps 3, expected one"),
    ],
)
def test_arguments_that_no_stream_can_honour_are_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    if not set(values) <= fields(ShareTrainingArguments):
        pytest.skip("this version of transformers does not have it")
    with pytest.raises(ValueError, match=message):
        ShareTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **values)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_dataset": Dataset.from_dict({"labels": [1]})}, "train_dataset is given, expected tasks="),
        ({"model_init": lambda: None}, "model_init is given, expected model"),
        (
            {"optimizers": (torch.optim.SGD([torch.zeros(1)]), None)},
            "optimizers is given, expected optim and .*_kwargs",
        ),
        (
            {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"params": []})},
            r"optimizer_cls_and_kwargs has \['params'\] for SGD, expected none",
        ),
    ],
)
def test_parameters_that_no_stream_can_honour_are_refused(given: dict[str, Any], message: str, make: Make) -> None:
    with pytest.raises(ValueError, match=message):
        make(trainer=given)


def test_options_that_contradict_each_other_are_refused(make: Make) -> None:
    optimizer = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}
    with pytest.raises(ValueError, match=r"init_learning_rate is 0\.2 and optimizer_cls_and_kwargs has an 'lr'"):
        make(trainer=optimizer, init_learning_rate=0.2)
    with pytest.raises(ValueError, match="batch_eval_metrics is True, expected compute_metrics with it"):
        make(batch_eval_metrics=True)
    with pytest.raises(ValueError, match="trial is given, expected none"):
        make().train(trial={"learning_rate": 0.1})


# ---- Optimizers ----------------------------------------------------------------------------------------------------


def rates(trainer: ShareTrainer) -> list[float]:
    """Return the learning rate with which each phase begins."""
    logged = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    return logged[::3]


def test_each_phase_has_its_own_rate_even_if_it_is_zero(make: Make) -> None:
    trainer = make(
        init_learning_rate=0.0, learning_rate=0.01, finetune_learning_rate=0.02, finetune_num_train_epochs=1
    )
    trainer.train()
    assert rates(trainer) == pytest.approx([0.0, 0.02, 0.01, 0.02])


def test_each_phase_makes_an_optimizer_of_the_class_it_is_given(make: Make) -> None:
    keywords = {"momentum": 0.5}
    trainer = make(
        trainer={"optimizer_cls_and_kwargs": (torch.optim.SGD, keywords)},
        learning_rate=0.01,
        init_learning_rate=0.03,
    )
    used = []

    def note(args: Any, state: Any, optimizer: Any, **kwargs: Any) -> None:
        used.append((type(optimizer.optimizer), optimizer.param_groups[0]["momentum"]))

    trainer.add_callback(AtBegin(note))
    trainer.train()
    assert used == [(torch.optim.SGD, 0.5)] * 2
    assert rates(trainer) == pytest.approx([0.03, 0.01])
    assert keywords == {"momentum": 0.5}
    assert trainer.metrics["training"]["optimizer"] == "SGD"


def test_a_rate_of_the_optimizer_is_that_of_all_phases_and_of_the_card(make: Make) -> None:
    trainer = make(trainer={"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.25})})
    trainer.train()
    assert rates(trainer) == pytest.approx([0.25, 0.25])
    assert trainer.metrics["training"]["learning_rate"] == trainer.metrics["training"]["init_learning_rate"] == 0.25


class AtBegin(At):
    def __init__(self, action: Callable[..., None]) -> None:
        super().__init__("on_train_begin", action)


class EndsWithZero(torch.optim.SGD):
    """Trains other values than it ends with, as schedule-free optimizers do. Here, it ends with zeros."""

    def eval(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.zero_()

    def train(self) -> None:
        pass


def test_what_a_schedule_free_optimizer_ends_with_is_what_is_learned(make: Make) -> None:
    trainer = make(tasks=classification_tasks("shapes"), trainer={"optimizer_cls_and_kwargs": (EndsWithZero, {})})
    trainer.train()
    assert all(not update.any() for update in updates(trainer.subspace, "shapes").values())


class Averaging(torch.optim.SGD):
    """Ends with the mean of all values that it trained, which it keeps in its state."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["steps"] = state.get("steps", 0) + 1
                state["sum"] = state.get("sum", torch.zeros_like(parameter)) + parameter.detach()

    def eval(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self.state:
                    parameter.data.copy_(self.state[parameter]["sum"] / self.state[parameter]["steps"])


def test_a_phase_that_is_trained_to_its_end_ends_with_the_values_of_its_optimizer(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This also holds if it is resumed there and no step is left for the optimizer."""

    def trainer(folder: str) -> ShareTrainer:
        options = {"optimizer_cls_and_kwargs": (Averaging, {"lr": 0.1})}
        return make(folder, classification_tasks("shapes"), trainer=options, save_strategy="steps", save_steps=3)

    whole = trainer("whole")
    whole.train()
    cut = trainer("cut")
    cut.add_callback(At("on_train_end", interrupting))
    with pytest.raises(Interruption):
        cut.train()
    resumed = trainer("cut")
    resumed.train(resume_from_checkpoint=True)
    assert_same_tasks(resumed.subspace, whole.subspace)


def interrupting(*args: Any, **kwargs: Any) -> None:
    raise Interruption


def test_weights_decay_whatever_the_task_is_called(make: Make) -> None:
    tasks = {"debias": classification_tasks("shapes")["shapes"]}
    trainer = make(tasks=tasks, weight_decay=0.1)
    decayed: list[float] = []

    def note(args: Any, state: Any, optimizer: Any, **kwargs: Any) -> None:
        decayed.extend(
            group["weight_decay"] for group in optimizer.param_groups for p in group["params"] if p.ndim == 2
        )

    trainer.add_callback(AtBegin(note))
    trainer.train()
    assert decayed == [0.1] * (2 * len(trainer.subspace.state.layers) + 1)  # and the head's weight


# ---- Ways to compute -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"full_determinism": True},
        {"skip_memory_metrics": False, "include_num_input_tokens_seen": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
def test_a_way_to_compute_the_same_learns_the_same(changes: dict[str, Any], make: Make) -> None:
    plain, other = make("plain"), make("other", **changes)
    checkpointed: list[bool] = []
    other.add_callback(
        At("on_step_end", lambda args, state, model, **kwargs: checkpointed.append(model.is_gradient_checkpointing))
    )
    try:
        for trainer in (plain, other):
            trainer.train()
    finally:
        torch.use_deterministic_algorithms(False)
    for task in ("colors", "shapes"):
        expected = updates(plain.subspace, task)
        assert all(
            torch.allclose(update, expected[module], atol=1e-6)
            for module, update in updates(other.subspace, task).items()
        )
    assert set(checkpointed) == {"gradient_checkpointing" in changes}


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(make: Make) -> None:
    plain = make("plain", max_steps=1)
    plain.train()
    torch._dynamo.reset()
    compiled = make("compiled", max_steps=1, torch_compile=True, torch_compile_backend="eager")
    graphs: list[int] = []
    compiled.add_callback(
        At(
            "on_train_end",
            lambda *args, **kwargs: graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"]),
        )
    )
    torch._dynamo.utils.counters.clear()
    compiled.train()
    assert 0 < graphs[0] < graphs[1]
    for task in ("colors", "shapes"):
        expected = updates(plain.subspace, task)
        assert all(torch.allclose(u, expected[m], atol=1e-6) for m, u in updates(compiled.subspace, task).items())


def test_a_batch_that_does_not_fit_makes_all_phases_take_smaller_ones(make: Make) -> None:
    seen: list[int] = []

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        seen.append(len(rows))
        if len(rows) > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return default_data_collator(rows)

    trainer = make(trainer={"data_collator": collate}, auto_find_batch_size=True, per_device_eval_batch_size=4)
    trainer.train()
    assert trainer.subspace.tasks == ("colors", "shapes")
    assert seen[0] == 8
    assert set(seen[seen.index(4) :]) == {4}
    assert trainer.metrics["training"]["train_batch_size"] == 4


def test_what_a_phase_hooks_into_modules_comes_off_with_it(make: Make) -> None:
    trainer = make(neftune_noise_alpha=5.0, debug="underflow_overflow")
    head = trainer.model.get_base_model().classifier
    before = {module: len(module._forward_hooks) for module in trainer.model.modules()}
    hooked: list[int] = []

    def stop(args: Any, state: Any, **kwargs: Any) -> None:
        hooked.append(sum(map(len, (module._forward_hooks for module in before))))
        if len(hooked) == 1:
            raise Interruption

    trainer.add_callback(AtBegin(stop))
    with pytest.raises(Interruption):
        trainer.train()
    trainer.train()
    assert hooked[0] > sum(before.values())
    assert max(hooked) - min(hooked) < 20  # which modules a task brings, and no second set of all of them
    assert len(head._forward_hooks) == before[head]
    embeddings = trainer.model.get_base_model().get_input_embeddings()
    assert len(embeddings._forward_hooks) == before[embeddings]


def test_a_custom_loss_is_trained(make: Make) -> None:
    labels_seen: list[torch.Tensor] = []

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        labels_seen.append(labels)
        return 0.0 * outputs.logits.sum()

    trainer = make(tasks=classification_tasks("shapes"), trainer={"compute_loss_func": loss})
    trainer.train()
    assert len(labels_seen) > 3
    assert all(not update.any() for update in updates(trainer.subspace, "shapes").values())


def test_labels_are_smoothed_over_those_of_the_task(make: Make) -> None:
    """If they were spread over a masked label too, the loss would be about 1e37, with gradients of other labels."""
    trainer = make(label_smoothing_factor=0.3, learning_rate=0.0)
    trainer.train()
    for task, num_labels in (("colors", 2), ("shapes", 3)):
        data = trainer.tasks[task].evaluation
        trainer.model.set_adapter(task)
        with torch.no_grad():
            logits = trainer.model.eval()(input_ids=torch.tensor(data["input_ids"][:])).logits[:, :num_labels]
        expected = -log_softmax(logits, -1)
        own = expected.gather(1, torch.tensor(data["labels"][:])[:, None]).mean()
        assert trainer.evaluate_tasks()[task]["loss"] == pytest.approx(
            float(0.7 * own + 0.3 * expected.mean()), abs=1e-5
        )
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert max(losses) < 3


# ---- Evaluation ----------------------------------------------------------------------------------------------------


def test_workers_that_persist_do_not_keep_the_data_of_the_first_task(make: Make) -> None:
    """A Trainer reuses the loader that it made for the first evaluation, whatever data comes later."""
    tasks = classification_tasks("colors", "shapes")
    tasks["shapes"]["test"] = tasks["shapes"]["test"].select(range(7))
    tasks["shapes"]["validation"] = tasks["shapes"]["test"].select(range(5))
    workers = dict(dataloader_num_workers=1, dataloader_persistent_workers=True)
    trainer = make(tasks=tasks, **workers, eval_strategy="steps", eval_steps=3)
    seen: list[int] = []

    def count(prediction: Any) -> dict[str, float]:
        seen.append(len(prediction.label_ids))
        return {"accuracy": 0.0}

    trainer.compute_metrics = count
    trainer.train()
    assert seen == [32, 32, 5, 32, 7]  # selection and score of colors, selection of shapes, scores of both


def test_a_phase_begins_with_an_evaluation_of_its_own_task(make: Make) -> None:
    tasks = classification_tasks("colors", "shapes")
    tasks["shapes"]["test"] = tasks["shapes"]["test"].select(range(5))
    trainer = make(tasks=tasks, eval_on_start=True)
    evaluated: list[tuple[int, int]] = []
    trainer.add_callback(
        At(
            "on_evaluate",
            lambda args, state, eval_dataloader, **kwargs: (
                evaluated.append((state.global_step, len(eval_dataloader.dataset)))
                if "phases" in args.output_dir
                else None
            ),
        )
    )
    trainer.train()
    assert evaluated == [(0, 32), (0, 5)]


def test_eval_dataset_is_evaluated_in_every_phase(make: Make) -> None:
    data = classification_tasks("shapes")["shapes"]["test"].select(range(6))
    trainer = make(trainer={"eval_dataset": data}, eval_strategy="steps", eval_steps=3)
    trainer.train()
    assert trainer.eval_dataset is data
    assert sum("eval_loss" in log for log in trainer.state.log_history) == 2


def test_without_a_task_there_is_nothing_to_evaluate(make: Make) -> None:
    with pytest.raises(ValueError, match="evaluation requires an eval_dataset"):
        make(eval_strategy="epoch").evaluate()


def choose(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


@pytest.mark.parametrize(
    ("trainer", "changes"),
    [
        ({}, {"eval_do_concat_batches": False, "per_device_eval_batch_size": 5}),
        ({"preprocess_logits_for_metrics": choose}, {}),
        (
            {"preprocess_logits_for_metrics": choose},
            {"eval_do_concat_batches": False, "per_device_eval_batch_size": 5},
        ),
        ({}, {"include_for_metrics": ["inputs", "loss"], "eval_accumulation_steps": 1}),
    ],
)
def test_predictions_come_as_the_options_have_them_and_accuracy_is_the_same(
    trainer: dict[str, Any], changes: dict[str, Any], make: Make
) -> None:
    plain, other = make("plain", learning_rate=0.05), make("other", learning_rate=0.05, trainer=trainer, **changes)
    for each in (plain, other):
        each.train()
    assert_same_tasks(other.subspace, plain.subspace)
    assert other.metrics["matrix"] == plain.metrics["matrix"]
    assert plain.metrics["average"] > 0.3


def test_batches_can_be_counted_as_they_come(make: Make) -> None:
    class Counted:
        right: list[np.ndarray] = []

        def __call__(self, prediction: Any, compute_result: bool) -> dict[str, float]:
            self.right.append((prediction.predictions.argmax(-1) == prediction.label_ids).float().numpy())
            if not compute_result:
                return {}
            accuracy, self.right = float(np.concatenate(self.right).mean()), []
            return {"accuracy": accuracy}

    plain = make("plain")
    counted = make("counted", trainer={"compute_metrics": Counted()}, batch_eval_metrics=True)
    for trainer in (plain, counted):
        trainer.train()
    assert counted.metrics["matrix"] == plain.metrics["matrix"]


def test_outputs_can_be_left_out_of_the_predictions(make: Make) -> None:
    seen: list[type] = []

    def note(prediction: Any) -> dict[str, float]:
        seen.append(type(prediction.predictions))
        return {"accuracy": 0.0}

    trainer = make(trainer={"compute_metrics": note})
    trainer.model.config.output_hidden_states = True
    trainer.train(ignore_keys_for_eval=["hidden_states"])
    assert set(seen) == {np.ndarray}


# ---- Checkpoints ---------------------------------------------------------------------------------------------------


def test_a_phase_resumes_as_its_arguments_say(make: Make) -> None:
    changes = dict(
        save_strategy="steps", save_steps=1, ignore_data_skip=True, restore_callback_states_from_checkpoint=True
    )
    trainer = make(**changes)

    def stop(args: Any, state: Any, **kwargs: Any) -> None:
        if args.output_dir.endswith("shapes-adapt") and state.global_step == 2:
            raise Interruption

    trainer.add_callback(At("on_step_end", stop))
    with pytest.raises(Interruption):
        trainer.train()
    resumed = make(**changes)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.subspace.tasks == ("colors", "shapes")
    assert [log["step"] for log in resumed.state.log_history if "loss" in log][-1] == 6


def test_a_tokenizer_is_saved_with_checkpoints(tiny_model: TinyModel, tmp_path: Path) -> None:
    class Tokenizer:
        model_input_names = ["input_ids"]

        def save_pretrained(self, folder: Any) -> None:
            Path(folder, "tokenizer.txt").write_text("a b c")

    args = arguments(tmp_path / "stream", save_strategy="steps", save_steps=3)
    trainer = ShareTrainer(
        tiny_model("llama"), args, config(LLAMA_TARGETS), language_tasks("a"), processing_class=Tokenizer()
    )
    trainer.train()
    assert (tmp_path / "stream" / "phases" / "0001-a-init" / "checkpoint-3" / "tokenizer.txt").is_file()
