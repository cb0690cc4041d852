"""A stream of classification tasks with different labels: what it learns, measures, logs and leaves on disk."""

from __future__ import annotations

import copy
import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from share_hf import SharedSubspace, ShareTrainer
from share_hf.format.tree import read_tree

from .cases import (
    LABELS,
    K,
    P,
    assert_same_tasks,
    assert_same_tensors,
    classification_tasks,
    classifier_trainer,
    logits,
)


LAYERS, HIDDEN = 2, 64
HEAD = 3 * HIDDEN + 3
TASKS = list(LABELS)


@dataclass
class Recorder(TrainerCallback):
    """Records what a stream does, step by step."""

    trainer: ShareTrainer | None = None
    phases: list[tuple[str, str, int]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    trained: list[set[str]] = field(default_factory=list)
    logs: list[dict[str, Any]] = field(default_factory=list)
    heads: dict[str, list[dict[str, Tensor]]] = field(default_factory=dict)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PeftModel | None = None,
        **kwargs: Any,
    ) -> None:
        _, task, phase = Path(args.output_dir).name.split("-")
        self.phases.append((task, phase, state.max_steps))
        self.rates.append(args.learning_rate)
        self.trained.append({name for name, parameter in model.named_parameters() if parameter.requires_grad})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.logs.append({**logs, "step": state.global_step})
        if "share/average" in logs:
            for task, info in self.trainer.subspace.state.tasks.items():
                self.heads.setdefault(task, []).append(info.head)


@dataclass
class Finished:
    """A stream that has ended."""

    trainer: ShareTrainer
    recorder: Recorder
    output: Any
    tasks: dict[str, DatasetDict]
    shown: str

    @property
    def folder(self) -> Path:
        return Path(self.trainer.args.output_dir) / "subspace"


@pytest.fixture(scope="module")
def finished(pristine_models: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Four tasks with 2, 3, 2, 3 labels: two as free factors, two adapted and merged, and each of them finetuned."""
    recorder = Recorder()
    tasks = classification_tasks()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out, redirect_stderr(out):
        patch.setitem(sys.modules, "matplotlib.figure", None)
        trainer = classifier_trainer(
            copy.deepcopy(pristine_models["bert"]),
            tmp_path_factory.mktemp("stream"),
            tasks,
            trainer={"callbacks": [recorder]},
            num_init_tasks=2,
            max_steps=-1,
            num_train_epochs=2,
            init_num_train_epochs=4,
            finetune_num_train_epochs=1,
            init_learning_rate=1e-2,
            finetune_learning_rate=2e-3,
            evaluate_before=True,
            disable_tqdm=False,
        )
        recorder.trainer = trainer
        output = trainer.train()
    return Finished(trainer, recorder, output, tasks, out.getvalue())


def test_first_tasks_are_free_factors_and_later_ones_are_adapted_each_in_a_run_of_its_own(finished: Finished) -> None:
    # 32 rows in batches of 8 make 4 steps per epoch.
    assert finished.recorder.phases == [
        ("colors", "init", 16),
        ("colors", "finetune", 4),
        ("shapes", "init", 16),
        ("shapes", "finetune", 4),
        ("sizes", "adapt", 8),
        ("sizes", "finetune", 4),
        ("sounds", "adapt", 8),
        ("sounds", "finetune", 4),
    ]
    assert finished.recorder.rates == [1e-2, 2e-3, 1e-2, 2e-3, 5e-3, 2e-3, 5e-3, 2e-3]
    assert finished.output.global_step == 2 * 16 + 2 * 8 + 4 * 4
    assert [info.learned_by for info in finished.trainer.subspace.state.tasks.values()] == [
        "init",
        "init",
        "adapt",
        "adapt",
    ]


def test_only_the_task_in_work_is_trained(finished: Finished) -> None:
    for (task, phase, _), trained in zip(finished.recorder.phases, finished.recorder.trained, strict=True):
        assert all(f".{task}" in name for name in trained)
        kinds = {name.split(".share_")[1].split(".")[0] for name in trained if ".share_" in name}
        assert (
            kinds
            == {
                "init": {"temporary_out", "temporary_in"},
                "adapt": {"temporary_out", "temporary_in", "coefficients_out", "coefficients_in"},
                "finetune": {"coefficients_out", "coefficients_in"},
            }[phase]
        )
        assert sum(".modules_to_save." in name for name in trained) == 2


def test_parameters_are_counted_by_phase(finished: Finished) -> None:
    modules = 2 * LAYERS
    phi = K // 4
    parameters = finished.trainer.metrics["parameters"]
    assert parameters["init"] == modules * P * 2 * HIDDEN + HEAD
    assert parameters["adapt"] == modules * phi * (2 * HIDDEN + 2 * P) + HEAD
    assert parameters["finetune"] == modules * 2 * K * P + HEAD


def test_tasks_are_learned_and_stay_learned(finished: Finished) -> None:
    matrix = finished.trainer.metrics["matrix"]
    for j, task in enumerate(TASKS):
        assert matrix[j][j] >= 0.95 > finished.trainer.metrics["baseline"][j], task
        assert matrix[-1][j] >= 0.8, task


def test_the_matrix_holds_what_was_measured_and_nothing_else(finished: Finished) -> None:
    metrics = finished.trainer.metrics
    assert metrics["tasks"] == TASKS
    assert metrics["score"] == "accuracy"
    for i, row in enumerate(metrics["matrix"]):
        # Tasks learned so far, and the next one before its turn.
        assert [value is not None for value in row] == [j <= i + 1 for j in range(len(TASKS))]
        assert all(0 <= value <= 1 for value in row if value is not None)
    last = metrics["matrix"][-1]
    assert metrics["average"] == pytest.approx(sum(last) / 4)
    learned = [metrics["matrix"][j][j] for j in range(3)]
    assert metrics["backward_transfer"] == pytest.approx(sum(last[j] - learned[j] for j in range(3)) / 3)
    seen = [metrics["matrix"][j - 1][j] - metrics["baseline"][j] for j in (1, 2, 3)]
    assert metrics["forward_transfer"] == pytest.approx(sum(seen) / 3)


def test_the_output_of_training_is_that_of_the_whole_stream(finished: Finished) -> None:
    assert finished.output.metrics == finished.trainer.metrics
    losses = [(log["train_loss"]) for log in finished.recorder.logs if "train_loss" in log]
    steps = [steps for _, _, steps in finished.recorder.phases]
    expected = sum(loss * count for loss, count in zip(losses, steps, strict=True)) / sum(steps)
    assert finished.output.training_loss == pytest.approx(expected)


def test_evaluating_again_gives_the_last_row(finished: Finished) -> None:
    active = finished.trainer.model.active_adapter
    scores = finished.trainer.evaluate_tasks()
    assert list(scores) == TASKS
    assert [scores[task]["accuracy"] for task in TASKS] == finished.trainer.metrics["matrix"][-1]
    assert finished.trainer.model.active_adapter == active


def test_a_score_is_what_the_saved_subspace_gives_a_fresh_model(
    finished: Finished, pristine_models: dict[str, PreTrainedModel]
) -> None:
    model = SharedSubspace.from_pretrained(finished.folder).apply(copy.deepcopy(pristine_models["bert"]))
    for j, task in enumerate(TASKS):
        model.set_adapter(task)
        data = finished.tasks[task]["test"]
        accuracy = (logits(model, data).argmax(-1) == torch.tensor(data["labels"][:])).float().mean()
        assert float(accuracy) == pytest.approx(finished.trainer.metrics["matrix"][-1][j])


def test_heads_come_back_bit_identical_after_later_tasks(finished: Finished) -> None:
    for i, task in enumerate(TASKS):
        heads = finished.recorder.heads[task]
        assert len(heads) == len(TASKS) - i
        for later in heads[1:]:
            assert_same_tensors(later, heads[0])
    first, second = (finished.recorder.heads[task][0]["classifier.weight"] for task in TASKS[:2])
    assert not torch.equal(first, second)


def test_the_model_carries_the_tasks_of_the_subspace(finished: Finished) -> None:
    model, state = finished.trainer.model, finished.trainer.subspace.state
    assert isinstance(model, PeftModel)
    assert list(model.peft_config) == TASKS
    parameters = model.get_base_model().state_dict()
    for module, layer in state.layers.items():
        for i, task in enumerate(layer.tasks):
            assert torch.equal(parameters[f"{module}.share_coefficients_out.{task}"], layer.coefficients_out[i])
            assert torch.equal(parameters[f"{module}.share_coefficients_in.{task}"], layer.coefficients_in[i])
    for task in TASKS:
        head = state.tasks[task].head
        for name in ("weight", "bias"):
            assert torch.equal(parameters[f"classifier.modules_to_save.{task}.{name}"], head[f"classifier.{name}"])


# ---- Labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_labels_a_task_does_not_have_are_never_predicted_and_have_no_part_in_the_loss(
    task: str, finished: Finished
) -> None:
    trainer, data = finished.trainer, finished.tasks[task]["test"]
    own = LABELS[task]
    trainer.evaluate_tasks()
    trainer.model.set_adapter(task)
    found = logits(trainer.model, data)
    assert int(found.argmax(-1).max()) < own
    assert (found[:, own:] < found[:, :own].min() - 1000).all()
    loss = torch.nn.functional.cross_entropy(found[:, :own], torch.tensor(data["labels"][:]))
    metrics = trainer.evaluate_tasks()[task]
    assert metrics["loss"] == pytest.approx(float(loss), abs=1e-5)


def test_a_mask_of_one_task_does_not_hide_labels_of_another(finished: Finished) -> None:
    trainer = finished.trainer
    for evaluated, used in (("sizes", "shapes"), ("shapes", "sizes")):
        trainer._evaluate_task(evaluated)
        trainer.model.set_adapter(used)
        data = finished.tasks[used]["test"]
        assert logits(trainer.model, data).argmax(-1).unique().tolist() == list(range(LABELS[used]))


# ---- Logs and what a person sees ------------------------------------------------------------------------------------


def test_merges_and_scores_are_logged_at_the_step_of_the_stream(finished: Finished) -> None:
    logs = finished.recorder.logs
    merges = [log for log in logs if "share/merge_max_drift" in log]
    assert [log["step"] for log in merges] == [16, 36, 48, 60]
    assert [log["share/tasks"] for log in merges] == [1, 2, 3, 4]
    assert [log["share/merge_changed_layers"] for log in merges] == [4] * 4
    assert merges[0]["share/merge_max_drift"] == 0
    assert all(log["share/merge_max_drift"] <= log["share/merge_max_drift_bound"] for log in merges)
    scores = [log for log in logs if "share/average" in log]
    assert [log["step"] for log in scores] == [20, 40, 52, 64]
    last, metrics = scores[-1], finished.trainer.metrics
    for name in ("average", "forgetting", "backward_transfer"):
        assert last[f"share/{name}"] == metrics[name]
    for j, task in enumerate(TASKS):
        assert last[f"share/accuracy/{task}"] == metrics["matrix"][-1][j]
        assert last[f"share/drift/{task}"] == metrics["drift"][task]
    for phase in ("init", "adapt", "finetune"):
        assert last[f"share/trainable_parameters/{phase}"] == metrics["parameters"][phase]


def test_the_log_history_of_the_trainer_has_the_whole_stream(finished: Finished) -> None:
    history = finished.trainer.state.log_history
    assert sum("share/merge_max_drift" in entry for entry in history) == 4
    assert [entry["share/average"] for entry in history if "share/average" in entry][-1] == (
        finished.trainer.metrics["average"]
    )


def test_a_person_sees_one_line_for_each_task(finished: Finished) -> None:
    lines = [line for line in finished.shown.splitlines() if line.strip().startswith(("1 ", "2 ", "3 ", "4 "))]
    assert [line.split()[1] for line in lines] == TASKS
    assert [line.split()[2] for line in lines] == ["init", "init", "adapt", "adapt"]
    matrix, baseline = finished.trainer.metrics["matrix"], finished.trainer.metrics["baseline"]
    for j, line in enumerate(lines):
        assert f"accuracy {baseline[j]:.3f} -> {matrix[j][j]:.3f}" in line
        assert "drift" in line
    assert "colors [init]" in finished.shown
    assert "sounds [finetune]" in finished.shown


def test_a_table_of_the_stream_has_a_row_for_each_task(finished: Finished) -> None:
    table = finished.trainer.metrics_table
    assert [line.split()[0] for line in table.splitlines()] == ["after", "(before)", *TASKS, "accuracy:"]


# ---- Drift and the tree ---------------------------------------------------------------------------------------------


def test_drift_is_that_of_the_certificate(finished: Finished) -> None:
    state = finished.trainer.subspace.state
    assert finished.trainer.metrics["drift"] == state.drifts()
    assert finished.trainer.metrics["drift"]["colors"] > 0


def test_the_saved_subspace_is_the_trainers(finished: Finished) -> None:
    saved = read_tree(finished.folder)
    assert_same_tasks(saved, finished.trainer.subspace)
    assert saved.metrics == json.loads(json.dumps(finished.trainer.metrics))
    assert saved.lineage == tuple(json.loads(json.dumps(finished.trainer.subspace.state.lineage)))
    card = (finished.folder / "README.md").read_text()
    assert f"| `sounds` | adapt | {saved.metrics['matrix'][3][3]:.3f} |" in card


def test_the_lineage_records_merges_and_finetuning(finished: Finished) -> None:
    steps = [(next(iter(set(step) & {"merged", "learned"})), step) for step in finished.trainer.subspace.state.lineage]
    assert [(kind, step[kind]) for kind, step in steps] == [
        (kind, task) for name in TASKS for kind, task in (("merged", [name]), ("learned", name))
    ]


def test_a_second_run_of_a_finished_stream_does_nothing(finished: Finished) -> None:
    before, phases = finished.trainer.subspace.state, len(finished.recorder.phases)
    output = finished.trainer.train()
    assert output.global_step == 0
    assert len(finished.recorder.phases) == phases
    assert_same_tasks(finished.trainer.subspace.state, before)
