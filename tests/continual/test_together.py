"""Several tasks of a stream in one run: `ShareTrainer(together=[...])`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import HubStrategy

from share_hf import SharedSubspace, ShareTrainer
from share_hf.continual.group_steps import schedule_of
from share_hf.continual.phases import begin_group
from share_hf.continual.together import check_can_train_together
from share_hf.engines.local import LocalEngine
from share_hf.state import Phase
from share_hf.tuner.model import ShareModel
from share_hf.tuner.together import trained_by_task

from .cases import (
    LENGTH,
    LLAMA_TARGETS,
    At,
    Interruption,
    arguments,
    assert_same_tasks,
    classification_task,
    classifier_trainer,
    config,
    language_tasks,
)
from .conftest import assert_same_to_the_bit


# Tasks with their numbers of labels and rows. The first one makes the basis.
TASKS = {"first": (3, 32), "colors": (2, 20), "shapes": (3, 41), "sizes": (2, 8), "last": (3, 16)}
TOGETHER = ["colors", "shapes", "sizes"]

Model = Callable[[str], PreTrainedModel]


def stream(*names: str) -> dict[str, DatasetDict]:
    return {
        name: classification_task(seed, labels, rows)
        for seed, (name, (labels, rows)) in enumerate(TASKS.items())
        if not names or name in names
    }


def make(tiny_model: Model, folder: Path, *, trainer: dict[str, Any] | None = None, **overrides: Any) -> ShareTrainer:
    values = {"method": "coefficients", "max_steps": -1, "num_train_epochs": 2, "logging_steps": 3, **overrides}
    keywords = {"together": TOGETHER, **(trainer or {})}
    tasks = keywords.pop("tasks", None) or stream()
    return classifier_trainer(tiny_model("bert"), folder, tasks, trainer=keywords, **values)


def test_a_group_is_learned_in_one_run_and_has_one_row(tiny_model: Model, tmp_path: Path) -> None:
    trainer = make(tiny_model, tmp_path, learning_rate=2e-2, num_train_epochs=6)
    trainer.train()
    state = trainer.subspace.state
    assert list(state.tasks) == list(TASKS)
    assert [info.learned_by for info in state.tasks.values()] == ["init", *["coefficients"] * 4]
    metrics = trainer.metrics
    assert metrics["row_sizes"] == [1, 3, 1]
    assert [len(row) for row in metrics["matrix"]] == [5] * 3
    assert all(score is not None for score in metrics["matrix"][1][:4])
    assert metrics["matrix"][1][4] is None
    assert metrics["forgetting"] == 0.0
    assert "colors +2" in trainer.metrics_table
    assert metrics["average"] > 0.8, trainer.metrics_table
    assert [entry["learned"] for entry in state.lineage if "learned" in entry] == list(TASKS)[1:]
    assert all(info.scores["accuracy"] > 0.5 for info in state.tasks.values())
    assert [folder.name for folder in sorted((tmp_path / "phases").glob("*"))] == [
        "0001-first-init",
        "0002-colors+2-coefficients",
        "0005-last-coefficients",
    ]
    read = SharedSubspace.from_pretrained(tmp_path / "subspace")
    assert_same_tasks(read, trainer.subspace)
    assert read.state.scores()["sizes"].learned == metrics["matrix"][1][3]


def test_a_group_is_set_up_in_one_pass_as_its_tasks_are_one_by_one(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tiny_model, tmp_path, trainer={"together": None, "tasks": stream("first")})
    trainer.train()
    model, state, passes = trainer.model, trainer.subspace.state, []
    inject = ShareModel.inject_adapter
    monkeypatch.setattr(
        ShareModel,
        "inject_adapter",
        lambda tuner, *args, **kwargs: (passes.append(args), inject(tuner, *args, **kwargs)),
    )

    def begun(*groups: list[str]) -> dict[str, torch.Tensor]:
        torch.manual_seed(7)
        for group in groups:
            begin_group(model, state, group, Phase.COEFFICIENTS, trainer.share_config)
        model.base_model.set_adapter(TOGETHER)
        found = {
            f"{task}.{i}": value for task in TOGETHER for i, value in enumerate(trained_by_task(model, [task])[task])
        }
        assert all(model.peft_config[task].phase == Phase.COEFFICIENTS for task in TOGETHER)
        return {name: value.detach().clone() for name, value in found.items()}

    one_by_one = begun(*([task] for task in TOGETHER))
    assert len(passes) == len(TOGETHER)
    at_once = begun(TOGETHER)  # in place of the existing ones
    assert len(passes) == len(TOGETHER) + 1
    assert_same_to_the_bit(at_once, one_by_one)
    assert len(at_once) == len(TOGETHER) * (2 * len(state.layers) + 2)
    assert at_once["colors.1"].any() and not torch.equal(at_once["colors.1"], at_once["shapes.1"])


def test_the_heads_of_a_group_have_their_own_labels(tiny_model: Model, tmp_path: Path) -> None:
    trainer = make(tiny_model, tmp_path)
    trainer.train()
    for name, (labels, _) in TASKS.items():
        bias = next(tensor for key, tensor in trainer.subspace.state.tasks[name].head.items() if key.endswith("bias"))
        assert int((bias > -1e4).sum()) == labels
    weights = [next(iter(info.head.values())) for info in trainer.subspace.state.tasks.values()]
    assert len({tuple(weight.flatten().tolist()) for weight in weights}) == 5


def test_old_tasks_and_the_basis_stay_as_they_are(tiny_model: Model, tmp_path: Path) -> None:
    trainer = make(tiny_model, tmp_path, trainer={"tasks": stream(*list(TASKS)[:4])})
    kept: list[Any] = []
    trainer.add_callback(At("on_train_begin", lambda *_, **__: kept.append(trainer.subspace.state)))
    trainer.train()
    before, after = kept[1], trainer.subspace.state
    for module, layer in before.layers.items():
        assert torch.equal(layer.basis_out, after.layers[module].basis_out)
        assert torch.equal(layer.coefficients_out[0], after.layers[module].coefficients_out[0])


def test_language_models_learn_groups_too(tiny_model: Model, tmp_path: Path) -> None:
    tasks = language_tasks("one", "two", "three", "four")
    args = arguments(
        tmp_path, method="coefficients", max_steps=-1, num_train_epochs=12, learning_rate=2e-2, evaluate_before=True
    )
    trainer = ShareTrainer(tiny_model("llama"), args, config(LLAMA_TARGETS), tasks, together=["two", "three", "four"])
    trainer.train()
    baseline, last = trainer.metrics["baseline"], trainer.metrics["matrix"][-1]
    assert all(learned > before + 0.05 for learned, before in zip(last, baseline, strict=True)), (baseline, last)
    assert trainer.metrics["forward_transfer"] is not None


class Logs(TrainerCallback):
    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_losses_are_logged_by_task(tiny_model: Model, tmp_path: Path) -> None:
    seen = Logs()
    make(tiny_model, tmp_path, trainer={"callbacks": [seen]}, logging_steps=1, samples_per_task=8).train()
    of_groups = [logs for logs in seen.logs if any(name.startswith("share/loss/") for name in logs)]
    assert {name for logs in of_groups for name in logs if name.startswith("share/loss/")} == {
        f"share/loss/{task}" for task in TOGETHER
    }
    single = [logs for logs in of_groups if sum(name.startswith("share/loss/") for name in logs) == 1]
    assert single
    for logs in single:
        (loss,) = (value for name, value in logs.items() if name.startswith("share/loss/"))
        assert loss == pytest.approx(logs["loss"], abs=2e-4)


def test_a_group_that_was_killed_continues_where_it_was(tiny_model: Model, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 4, "warmup_steps": 0.3, "lr_scheduler_type": "cosine"}
    whole = make(tiny_model, tmp_path / "whole", **options)
    whole.train()

    def interrupt(args: Any, state: Any, **_: Any) -> None:
        if "colors" in args.output_dir and state.global_step == 10:
            raise Interruption

    killed = make(tiny_model, tmp_path / "killed", trainer={"callbacks": [At("on_step_end", interrupt)]}, **options)
    with pytest.raises(Interruption):
        killed.train()
    position = json.loads((tmp_path / "killed" / "stream_state.json").read_text())
    assert (position["position"], position["task"], position["together"]) == (1, "colors", TOGETHER)
    resumed = make(tiny_model, tmp_path / "killed", **options)
    steps: list[int] = []
    resumed.add_callback(At("on_step_begin", lambda args, state, **_: steps.append(state.global_step)))
    resumed.train(resume_from_checkpoint=True)
    assert steps[0] == 8
    assert_same_tasks(resumed.subspace, whole.subspace)
    assert resumed.metrics["matrix"] == whole.metrics["matrix"]


def test_a_trainer_whose_group_was_interrupted_starts_it_over(tiny_model: Model, tmp_path: Path) -> None:
    whole = make(tiny_model, tmp_path / "whole")
    whole.train()
    broken = []

    def interrupt(args: Any, state: Any, **_: Any) -> None:
        if "colors" in args.output_dir and not broken:
            broken.append(state.global_step)
            raise Interruption

    trainer = make(tiny_model, tmp_path / "broken", trainer={"callbacks": [At("on_step_end", interrupt)]})
    with pytest.raises(Interruption):
        trainer.train()
    scores = trainer.evaluate_tasks()
    assert list(scores) == ["first"]
    trainer.train(resume_from_checkpoint=True)
    assert_same_tasks(trainer.subspace, whole.subspace)


@pytest.mark.parametrize("stage", ["learn", "evaluate"])
def test_a_group_that_was_killed_after_its_training_is_finished(
    stage: str, tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(tiny_model, tmp_path / "whole")
    whole.train()
    killed = make(tiny_model, tmp_path / "killed")

    def interrupt(args: Any, state: Any, metrics: dict[str, float], **_: Any) -> None:
        if "eval_sizes_loss" in metrics:
            raise Interruption

    if stage == "evaluate":
        killed.add_callback(At("on_evaluate", interrupt))
    else:
        save = killed._stream.save_position

        def save_position(done: int, trained: int, tasks: Any = (), stage: str = "learn", **kwargs: Any) -> None:
            if (
                len(tasks) > 1 and stage == "evaluate"
            ):  # the subspace has the tasks, but the position that says so was not saved
                raise Interruption
            save(done, trained, tasks, stage, **kwargs)

        monkeypatch.setattr(killed._stream, "save_position", save_position)
    with pytest.raises(Interruption):
        killed.train()
    position = json.loads((tmp_path / "killed" / "stream_state.json").read_text())
    assert (position["together"], position["stage"]) == (TOGETHER, stage)
    phases: list[str] = []
    resumed = make(tiny_model, tmp_path / "killed")
    resumed.add_callback(At("on_train_begin", lambda args, *_, **__: phases.append(Path(args.output_dir).name)))
    resumed.train(resume_from_checkpoint=True)
    assert phases == ["0005-last-coefficients"]
    assert_same_tasks(resumed.subspace, whole.subspace)
    assert resumed.metrics["matrix"] == whole.metrics["matrix"]


def test_other_groups_than_before_are_refused(tiny_model: Model, tmp_path: Path) -> None:
    def interrupt(args: Any, state: Any, **_: Any) -> None:
        if "colors" in args.output_dir:
            raise Interruption

    killed = make(tiny_model, tmp_path, trainer={"callbacks": [At("on_step_end", interrupt)]})
    with pytest.raises(Interruption):
        killed.train()
    other = make(tiny_model, tmp_path, trainer={"together": ["colors", "shapes"]})
    with pytest.raises(ValueError, match=r"interrupted in \['colors', 'shapes', 'sizes'\], expected these"):
        other.train(resume_from_checkpoint=True)


def test_a_group_whose_training_diverged_is_refused_whole(tiny_model: Model, tmp_path: Path) -> None:
    trainer = make(tiny_model, tmp_path)

    def spoil(args: Any, state: Any, model: Any, **_: Any) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith("share_coefficients_out.shapes"):
                parameter.data.fill_(float("nan"))

    trainer.add_callback(At("on_step_end", spoil))
    with pytest.raises(ValueError, match="shapes"):
        trainer.train()
    assert list(trainer.subspace.tasks) == ["first"]
    assert list(trainer.model.peft_config) == ["first"]
    assert not trainer.model.base_model.active_adapters[1:]
    assert json.loads((tmp_path / "stream_state.json").read_text())["together"] == TOGETHER


def test_groups_are_finetuned_and_pushed_as_one(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tiny_model, tmp_path, finetune_num_train_epochs=1)
    pushed: list[list[str]] = []
    monkeypatch.setattr(trainer, "_push_while_training", lambda upcoming_tasks: pushed.append(list(upcoming_tasks)))
    monkeypatch.setattr(trainer, "push_to_hub", lambda: None)
    trainer.args.push_to_hub, trainer.args.hub_strategy = True, HubStrategy.EVERY_SAVE
    trainer.train()
    assert pushed == [["colors", "shapes", "sizes", "last"], ["last"]]
    names = [folder.name for folder in sorted((tmp_path / "phases").glob("*"))]
    assert names[2:4] == ["0002-colors+2-coefficients", "0002-colors+2-finetune"]
    assert [info.learned_by for info in trainer.subspace.state.tasks.values()] == ["init", *["coefficients"] * 4]


class TestRefusals:
    @pytest.mark.parametrize(
        ("together", "message"),
        [
            ("colors", r"together is 'colors', expected a list of names"),
            (["colors", "shape"], r"together has \['shape'\], expected names among tasks"),
            (["colors", "colors"], r"together has \['colors'\] twice"),
            ([["colors", "shapes"], ["shapes", "sizes"]], r"together has \['shapes'\] twice"),
            (["colors", "sizes"], r"together has \['colors', 'sizes'\], expected tasks that follow one another"),
            (["first", "colors"], r"together has 'first', which is number 1 in the subspace, expected a basis first"),
            (["colors", ["shapes"]], r"expected names alone or lists of names alone"),
        ],
    )
    def test_names(self, together: Any, message: str, tiny_model: Model, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            make(tiny_model, tmp_path, trainer={"together": together})
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("refused", "message"),
        [
            ({"method": "share"}, r"method is 'share', expected 'coefficients'"),
            ({"eval_strategy": "epoch"}, r"eval_strategy is 'epoch'"),
            ({"auto_find_batch_size": True}, r"auto_find_batch_size is True, expected False"),
            ({"train_sampling_strategy": "group_by_length"}, r"'group_by_length', expected 'random'"),
            ({"samples_per_task": 0}, r"samples_per_task is 0, expected at least 1"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_arguments(self, refused: dict[str, Any], message: str, tiny_model: Model, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            make(tiny_model, tmp_path, **refused)

    def test_schedules_that_follow_a_metric(self, tmp_path: Path) -> None:
        args = arguments(tmp_path)
        args.lr_scheduler_type = "reduce_lr_on_plateau"
        with pytest.raises(ValueError, match=r"lr_scheduler_type is 'reduce_lr_on_plateau', expected a schedule by"):
            schedule_of(args, 5)

    def test_streamed_data(self, tiny_model: Model, tmp_path: Path) -> None:
        tasks = stream()
        tasks["sizes"] = {"train": classification_task(1, 2, names=("a", "b"))["train"].to_iterable_dataset()}
        with pytest.raises(ValueError, match=r"together has \['sizes'\], whose training data is streamed"):
            make(tiny_model, tmp_path, max_steps=3, trainer={"tasks": tasks})

    def test_examples_of_different_columns(self, tiny_model: Model, tmp_path: Path) -> None:
        tasks = stream()
        train = tasks["shapes"]["train"]
        tasks["colors"]["train"] = tasks["colors"]["train"].add_column(
            "note", ["unused"] * len(tasks["colors"]["train"])
        )
        tasks["shapes"]["train"] = train.add_column("token_type_ids", [[0] * LENGTH] * len(train))
        message = r"'shapes', whose examples have \['input_ids', 'labels', 'token_type_ids'\], and 'colors' with"
        with pytest.raises(ValueError, match=message):
            make(tiny_model, tmp_path, trainer={"tasks": tasks})

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"n_gpu": 2, "world_size": 1}, "one process has 2 GPUs, expected one"),
            ({"n_gpu": 1, "world_size": 2}, "ddp_find_unused_parameters is False, expected None or True"),
        ],
        ids=["data-parallel", "ddp"],
    )
    def test_ways_to_use_several_devices(self, values: dict[str, int], message: str) -> None:
        args = SimpleNamespace(**values, ddp_find_unused_parameters=False)
        trainer = SimpleNamespace(args=args, model=torch.nn.Linear(2, 2))
        trainer.engine = LocalEngine(trainer)
        with pytest.raises(ValueError, match=message):
            check_can_train_together(trainer, [], {})

    def test_optimizers_that_count_steps_for_all(self, tiny_model: Model, tmp_path: Path) -> None:
        class Free(torch.optim.SGD):
            def train(self) -> None: ...

            def eval(self) -> None: ...

        trainer = make(tiny_model, tmp_path, trainer={"optimizer_cls_and_kwargs": (Free, {"lr": 0.1})})
        with pytest.raises(ValueError, match=r"the optimizer is Free, expected one whose steps are counted for each"):
            trainer.train()
