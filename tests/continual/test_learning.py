"""Tasks learned one by one or in a stream, from data in every form, and data and settings that are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from share_hf import ShareConfig, SharedSubspace, ShareTrainer, ShareTrainingArguments
from share_hf.continual import task_trainer as task_trainer_module
from share_hf.subspace import DriftToleranceError
from share_hf.tuner import share_layers

from .cases import (
    BERT_TARGETS,
    LLAMA_TARGETS,
    At,
    Interruption,
    P,
    arguments,
    assert_same_tasks,
    classification_task,
    classification_tasks,
    classifier_trainer,
    config,
    language_task,
    language_tasks,
    logits,
    updates,
)
from .conftest import Make


@pytest.fixture
def saved_lora(tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path) -> Callable[..., Path]:
    """A plain LoRA of the tiny BERT with random weights, as PEFT saves it."""

    def save(name: str, **options: Any) -> Path:
        values = dict(r=P, target_modules=BERT_TARGETS, init_lora_weights=False, task_type="SEQ_CLS")
        model = get_peft_model(tiny_model("bert"), LoraConfig(**{**values, **options}))
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


# ---- Ways to learn --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["share", "coefficients"])
def test_tasks_learned_one_by_one_end_as_a_stream_does(method: str, make: Make) -> None:
    tasks = classification_tasks("colors", "shapes", "sizes")
    stream = make(tasks, "stream", method=method, num_init_tasks=2, finetune_num_train_epochs=0.25)
    stream.train()
    one_by_one = make(None, "one by one", method=method, num_init_tasks=2, finetune_num_train_epochs=0.25)
    for name, data in tasks.items():
        report = one_by_one.learn_task(name, data["train"], data["test"])
        assert (report is None) == (method == "coefficients" and name == "sizes")
        assert report is None or report.new_tasks == (name,)
    assert_same_tasks(one_by_one.subspace, stream.subspace)
    assert one_by_one.metrics == stream.metrics
    assert [info.learned_by for info in stream.subspace.state.tasks.values()] == [
        "init",
        "init",
        "adapt" if method == "share" else "coefficients",
    ]


def test_a_task_can_follow_a_finished_stream(make: Make) -> None:
    trainer = make(classification_tasks("colors"))
    trainer.train()
    data = classification_task(1, 3)
    trainer.learn_task("shapes", data["train"])
    assert trainer.subspace.tasks == ("colors", "shapes")
    assert list(trainer.evaluate_tasks()) == ["colors"]
    assert trainer.metrics["matrix"][1][0] is not None
    assert trainer.metrics["matrix"][1][1] is None


@pytest.mark.parametrize("num_init_tasks", [1, 3])
def test_as_many_tasks_as_asked_for_are_free_factors(num_init_tasks: int, make: Make) -> None:
    trainer = make(classification_tasks("colors", "shapes", "sizes"), num_init_tasks=num_init_tasks)
    trainer.train()
    expected = ["init"] * num_init_tasks + ["adapt"] * (3 - num_init_tasks)
    assert [info.learned_by for info in trainer.subspace.state.tasks.values()] == expected


def test_finetuning_leaves_bases_and_other_tasks_to_the_bit(make: Make) -> None:
    merged = {}
    trainer = make(classification_tasks("colors", "shapes"), finetune_num_train_epochs=1)

    def keep(args: TrainingArguments, state: Any, **kwargs: Any) -> None:
        if args.output_dir.endswith("shapes-finetune"):
            merged["state"] = trainer.subspace.state

    trainer.add_callback(At("on_train_begin", keep))
    trainer.train()
    before, after = merged["state"], trainer.subspace.state
    for module, layer in after.layers.items():
        old = before.layers[module]
        assert torch.equal(layer.basis_out, old.basis_out) and torch.equal(layer.basis_in, old.basis_in)
        i, j = layer.index("colors"), layer.index("shapes")
        assert torch.equal(layer.coefficients_out[i], old.coefficients_out[i])
        assert torch.equal(layer.records.drift_bounds[i], old.records.drift_bounds[i])
        assert not torch.equal(layer.coefficients_out[j], old.coefficients_out[j])
        assert layer.records.drift_bounds[j] == 0
    assert torch.equal(after.tasks["colors"].head["classifier.bias"], before.tasks["colors"].head["classifier.bias"])


def test_a_merge_changes_old_tasks_by_the_drift_it_reports(make: Make) -> None:
    tasks = classification_tasks("colors", "shapes")
    trainer = make(num_init_tasks=2, share={"num_components": 5, "pseudo_rank": 4})
    trainer.learn_task("colors", tasks["colors"]["train"])
    before = updates(trainer.subspace, "colors")
    report = trainer.learn_task("shapes", tasks["shapes"]["train"])
    assert report is not None and report.max_drift > 0.01
    for module, update in updates(trainer.subspace, "colors").items():
        drift = float((update - before[module]).norm() / before[module].norm())
        assert drift == pytest.approx(report.layers[module].drift["colors"], abs=1e-5)
        assert drift <= report.layers[module].drift_bound["colors"]


# ---- Language models ------------------------------------------------------------------------------------------------


def test_language_tasks_are_scored_by_their_loss_and_get_better(
    tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    args = arguments(tmp_path, max_steps=12, learning_rate=2e-2, evaluate_before=True, num_init_tasks=2)
    tasks = language_tasks("ones", "twos", "threes")
    trainer = ShareTrainer(tiny_model("llama"), args, config(LLAMA_TARGETS), tasks)
    trainer.train()
    metrics = trainer.metrics
    assert metrics["score"] == "-loss"
    for j, task in enumerate(tasks):
        assert metrics["matrix"][j][j] > metrics["baseline"][j] + 0.05
        assert metrics["matrix"][-1][j] == pytest.approx(-trainer.evaluate_tasks()[task]["loss"], abs=1e-6)
    assert not next(iter(trainer.subspace.state.tasks.values())).head
    model = SharedSubspace.from_pretrained(tmp_path / "subspace").apply(tiny_model("llama"))
    for task, data in tasks.items():
        model.set_adapter(task)
        trainer.model.set_adapter(task)
        assert torch.equal(logits(model, data["validation"]), logits(trainer.model, data["validation"]))


def test_an_untrained_task_does_what_the_base_model_does(
    tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    trainer = ShareTrainer(tiny_model("llama"), arguments(tmp_path), config(LLAMA_TARGETS), language_tasks("ones"))
    data = language_task(0)["train"]
    assert torch.equal(logits(trainer.model, data), logits(tiny_model("llama"), data))


# ---- Where a stream starts from -------------------------------------------------------------------------------------


def test_adapters_start_the_subspace_and_stay_within_their_drift(
    make: Make, saved_lora: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    adapters = {"one": saved_lora("one"), "two": saved_lora("two")}
    expected = SharedSubspace.from_adapters(adapters, num_components=12, pseudo_rank=4, progress=False)
    capfd.readouterr()
    trainer = make(classification_tasks("colors"), trainer={"adapters": adapters})
    assert "Reading adapters" not in capfd.readouterr().err
    assert_same_tasks(trainer.subspace, expected)
    trainer.train()
    assert trainer.subspace.tasks == ("one", "two", "colors")
    assert trainer.subspace.state.tasks["colors"].learned_by == "adapt"
    for task in adapters:
        drift = trainer.subspace.state.drifts()[task]
        assert trainer.metrics["drift"][task] == drift
        for name, tensor in expected.state.tasks[task].head.items():
            assert torch.equal(trainer.subspace.state.tasks[task].head[name], tensor)


def test_a_subspace_that_is_continued_is_not_changed_itself(make: Make) -> None:
    first = make(classification_tasks("colors"), "first")
    first.train()
    given = first.subspace
    state = given.state
    second = make(classification_tasks("shapes"), "second", trainer={"subspace": given})
    second.train()
    assert given.state is state
    assert given.tasks == ("colors",)
    assert second.subspace.tasks == ("colors", "shapes")


@pytest.mark.parametrize("settings", [{"center": True, "basis": "factor"}, {"explained_variance": 0.8}])
def test_a_subspace_of_any_settings_is_continued_with_them(
    settings: dict[str, Any],
    saved_lora: Callable[..., Path],
    tiny_model: Callable[[str], PreTrainedModel],
    tmp_path: Path,
) -> None:
    adapters = {"one": saved_lora("one"), "two": saved_lora("two")}
    given = SharedSubspace.from_adapters(adapters, num_components=12, pseudo_rank=4, progress=False, **settings)
    tasks = classification_tasks("colors")
    trainer = ShareTrainer(tiny_model("bert"), arguments(tmp_path / "out"), tasks=tasks, subspace=given)
    trainer.train()
    assert trainer.subspace.settings == given.settings
    assert trainer.subspace.tasks == ("one", "two", "colors")


def test_a_configuration_says_whether_merges_are_centered(make: Make) -> None:
    trainer = make(classification_tasks("colors", "shapes"), share={"basis": "factor", "center": True})
    trainer.train()
    assert trainer.subspace.settings.center
    with pytest.raises(ValueError, match=r"share_config has .*center=True.*, the subspace has .*center=False"):
        given = make(classification_tasks("colors"), "plain", share={"basis": "factor"})
        given.train()
        centered = {"basis": "factor", "center": True}
        make(classification_tasks("sizes"), "other", share=centered, trainer={"subspace": given.subspace})


# ---- Data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["torch", "numpy", "renamed", "mapping", "bare"])
def test_data_comes_in_any_usual_form(form: str, make: Make) -> None:
    data: Any = classification_task(0, 2)
    if form in ("torch", "numpy"):
        data = data.with_format(form)
    elif form == "renamed":
        data = data.rename_column("labels", "label")
    elif form == "mapping":
        data = {"train": data["train"], "eval": data["test"]}
    elif form == "bare":
        data = data["train"]
    trainer = make({"colors": data})
    trainer.train()
    reference = make({"colors": classification_task(0, 2)}, "reference")
    reference.train()
    assert_same_tasks(trainer.subspace, reference.subspace)
    assert (trainer.metrics["matrix"] == reference.metrics["matrix"]) == (form != "bare")


def test_names_of_labels_are_kept_with_the_task(make: Make, tmp_path: Path) -> None:
    trainer = make({"colors": classification_task(0, 2, names=("red", "green")), "shapes": classification_task(1, 3)})
    trainer.train()
    loaded = SharedSubspace.from_pretrained(tmp_path / "out" / "subspace")
    assert loaded.state.tasks["colors"].labels == ("red", "green")
    assert loaded.state.tasks["shapes"].labels is None


def test_a_label_that_has_a_name_counts_even_where_it_is_never_seen(make: Make) -> None:
    data = classification_task(0, 2).cast_column("labels", ClassLabel(names=["red", "green", "blue"]))
    trainer = make({"colors": data})
    trainer.train()
    head = trainer.subspace.state.tasks["colors"].head
    assert (head["classifier.bias"] > -100).all()


def test_the_test_split_scores_a_task_before_any_other(make: Make) -> None:
    data = classification_task(0, 2)
    rows = {
        split: data["train"].select(range(count)) for split, count in (("test", 5), ("validation", 3), ("eval", 2))
    }
    for left_out, expected in ((None, 5), ("test", 3), ("validation", 2)):
        rows.pop(left_out, None)
        trainer = make({"colors": DatasetDict(train=data["train"], **rows)})
        assert len(trainer.tasks["colors"][1]) == expected


# ---- What is seen and kept ------------------------------------------------------------------------------------------


def test_a_quiet_stream_shows_no_bars(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    trainer = make(classification_tasks("colors", "shapes"), disable_tqdm=True)
    capfd.readouterr()
    trainer.train()
    shown = capfd.readouterr()
    assert "%|" not in shown.err + shown.out
    assert "colors [init]" not in shown.err + shown.out


def test_each_task_leaves_a_tree_with_figures_and_a_card(make: Make, tmp_path: Path, with_figures: None) -> None:
    trainer = make()
    for i, (name, data) in enumerate(classification_tasks("colors", "shapes").items()):
        trainer.learn_task(name, data["train"], data["test"])
        folder = tmp_path / "out" / "subspace"
        assert sorted(path.name for path in (folder / "figures").iterdir()) == [
            "accuracy_matrix.png",
            "drift.png",
            "spectra.png",
        ]
        card = ModelCard.load(folder / "README.md")
        assert [result.metric_value for result in card.data.eval_results] == trainer.metrics["matrix"][i]
        assert_same_tasks(SharedSubspace.from_pretrained(folder), trainer.subspace)


# ---- Refusals -------------------------------------------------------------------------------------------------------


def relabelled(split: str, label: Any) -> DatasetDict:
    """Two labels, and a third one in one split."""
    data = classification_task(0, 2)
    labels = [label, *data[split]["labels"][1:]]
    data[split] = Dataset.from_dict({"input_ids": data[split]["input_ids"][:], "labels": labels})
    return data


BINARY = classification_task(0, 2)
UNUSABLE: dict[str, tuple[Any, str]] = {
    "empty": (BINARY["train"].select([]), "has no training examples, expected at least one"),
    "no train split": (DatasetDict(test=BINARY["test"]), r"has splits \['test'\], expected 'train'"),
    "no data": (None, "has no training examples, expected at least one"),
    "label out of range": (relabelled("train", 3), "has label 3, expected integers under num_labels = 3"),
    "negative label": (relabelled("train", -1), "has label -1, expected integers under num_labels = 3"),
    "label never seen in training": (relabelled("test", 2), r"has label 2 in its evaluation data, .*\[0, 1\]"),
    "no labels": (BINARY.remove_columns("labels"), r"has columns \['input_ids'\], expected one of"),
    "no labels to score by": (
        DatasetDict(train=BINARY["train"], test=BINARY["test"].remove_columns("labels")),
        r"has columns \['input_ids'\] in its evaluation data, expected 'labels'",
    ),
    "fractions among classes": (
        {"train": [{"input_ids": [3, 4], "labels": label} for label in (1, 0.5)]},
        "has label 0.5, expected integers",
    ),
    "a value that is no number": (
        DatasetDict(train=Dataset.from_dict({"input_ids": [[3, 4]] * 2, "labels": [0.5, float("nan")]})),
        "has label nan, expected finite numbers: its first label, 0.5",
    ),
    "no value to score by": (
        DatasetDict(
            train=Dataset.from_dict({"input_ids": [[3, 4]] * 2, "labels": [0.5, 1.5]}),
            test=Dataset.from_dict({"input_ids": [[3, 4]], "labels": ["high"]}),
        ),
        "has label 'high' in its evaluation data, expected finite numbers",
    ),
    "more labels than the model has": (
        DatasetDict(train=Dataset.from_dict({"input_ids": [[3, 4]] * 2, "labels": [[0, 1, 0, 0]] * 2})),
        "has 4 labels, expected at least one and at most num_labels = 3",
    ),
    "labels that are no flags": (
        DatasetDict(train=Dataset.from_dict({"input_ids": [[3, 4]] * 2, "labels": [[0, 1], [0, 2]]})),
        r"has label \[0, 2\], expected a list of 2 zeros and ones",
    ),
}  # fmt: skip


def untouched(model: nn.Module, pristine: nn.Module) -> bool:
    parameters, expected = dict(model.named_parameters()), dict(pristine.named_parameters())
    return (
        not share_layers(model)
        and not getattr(model, "peft_config", None)
        and parameters.keys() == expected.keys()
        and all(parameters[name].requires_grad and torch.equal(parameters[name], expected[name]) for name in expected)
    )


@pytest.mark.parametrize("what", list(UNUSABLE))
def test_unusable_data_leaves_model_and_trainer_as_they_were(
    what: str, make: Make, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    data, message = UNUSABLE[what]
    model = tiny_model("bert")
    with pytest.raises(ValueError, match=f"task 'bad' {message}"):
        classifier_trainer(model, tmp_path / "refused", {**classification_tasks("colors"), "bad": data})
    assert untouched(model, tiny_model("bert"))
    trainer = make()
    splits = data if isinstance(data, dict) else {"train": data}
    if "train" in splits:
        state = trainer.subspace.state
        with pytest.raises(ValueError, match=f"task 'bad' {message}"):
            trainer.learn_task("bad", splits["train"], splits.get("test"))
        assert trainer.subspace.state == state
        assert (trainer.tasks, trainer.metrics["tasks"]) == ({}, [])
        assert not (tmp_path / "out" / "stream_state.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": {"target_modules": ["nothing"]}}, "[Tt]arget modules|No modules were targeted"),
        ({"method": "magic"}, "method is 'magic', expected one of"),
        ({"trainer": {"adapters": ["/nowhere"]}}, "/nowhere: no such folder"),
    ],
)
def test_settings_that_do_not_fit_leave_the_model_as_it_was(
    options: dict[str, Any], message: str, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    model = tiny_model("bert")
    with pytest.raises(ValueError, match=message):
        classifier_trainer(model, tmp_path, classification_tasks("colors"), **options)
    assert untouched(model, tiny_model("bert"))
    trainer = classifier_trainer(model, tmp_path, classification_tasks("colors"))
    assert list(trainer.tasks) == ["colors"]


def test_a_subspace_of_another_model_is_refused(
    make: Make, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    first = make(classification_tasks("colors"))
    first.train()
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="which LlamaForCausalLM does not have"):
        ShareTrainer(model, arguments(tmp_path / "second"), subspace=first.subspace)
    assert untouched(model, tiny_model("llama"))


def test_plain_training_arguments_are_refused(tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    model = tiny_model("bert")
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="args is a TrainingArguments, expected ShareTrainingArguments"):
        ShareTrainer(model, args, config(BERT_TARGETS), classification_tasks("colors"))  # type: ignore[arg-type]
    assert untouched(model, tiny_model("bert"))


@pytest.mark.parametrize(
    ("values", "message"),
    [({"num_init_tasks": 0}, "num_init_tasks is 0"), ({"finetune_num_train_epochs": -1}, "finetune_num_train_epochs")],
)
def test_arguments_out_of_range_are_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        ShareTrainingArguments(str(tmp_path), **values)


def test_the_configuration_of_the_caller_is_not_changed(
    tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    mine = ShareConfig(num_components=12, pseudo_rank=4)
    before = copy.deepcopy(mine.to_dict())
    ShareTrainer(tiny_model("bert"), arguments(tmp_path), mine, classification_tasks("colors")).train()
    assert mine.to_dict() == before


# ---- Tasks that fail ------------------------------------------------------------------------------------------------


def test_a_task_that_cannot_be_merged_leaves_no_trace_and_others_can_follow(make: Make) -> None:
    tasks = classification_tasks("colors", "shapes", "sizes")
    strict = {"num_components": 4, "pseudo_rank": 4, "drift_tolerance": 1e-4, "max_components": 4}
    trainer = make(share=strict, num_init_tasks=2)
    trainer.learn_task("colors", tasks["colors"]["train"], tasks["colors"]["test"])
    state, metrics = trainer.subspace.state, trainer.metrics
    with pytest.raises(DriftToleranceError, match=r"drift_tolerance is 0\.0001"):
        trainer.learn_task("shapes", tasks["shapes"]["train"], tasks["shapes"]["test"])
    assert_same_tasks(trainer.subspace.state, state)
    assert list(trainer.tasks) == ["colors"]
    assert list(trainer.model.peft_config) == ["colors"]
    assert trainer.metrics["tasks"] == metrics["tasks"]
    assert trainer.metrics["matrix"] == metrics["matrix"]
    assert trainer.evaluate_tasks()["colors"]["accuracy"] == metrics["matrix"][0][0]
    trainer.args.method = "coefficients"
    trainer.args.num_init_tasks = 1
    for _ in range(2):
        name = "sizes" if "sizes" not in trainer.tasks else "shapes"
        trainer.learn_task(name, tasks[name]["train"], tasks[name]["test"])
    assert trainer.subspace.tasks == ("colors", "sizes", "shapes")
    assert trainer.metrics["tasks"] == ["colors", "sizes", "shapes"]
    assert [len([v for v in row if v is not None]) for row in trainer.metrics["matrix"]] == [1, 2, 3]


def test_a_task_that_was_interrupted_can_be_learned_again_at_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = classification_tasks("colors", "shapes")
    expected = make(tasks, "expected")
    expected.train()
    trainer = make()
    trainer.learn_task("colors", tasks["colors"]["train"], tasks["colors"]["test"])
    with monkeypatch.context() as patch:
        patch.setattr(task_trainer_module, "take_merged", raise_interruption)
        with pytest.raises(Interruption):
            trainer.learn_task("shapes", tasks["shapes"]["train"], tasks["shapes"]["test"])
    trainer.learn_task("shapes", tasks["shapes"]["train"], tasks["shapes"]["test"])
    assert_same_tasks(trainer.subspace, expected.subspace)
    assert trainer.metrics == expected.metrics


def test_a_first_task_that_fails_makes_way_for_another(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = classification_tasks("colors", "shapes")
    trainer, expected = make(), make(folder="expected")
    with monkeypatch.context() as patch:
        patch.setattr(task_trainer_module, "take_merged", raise_interruption)
        with pytest.raises(Interruption):
            trainer.learn_task("colors", tasks["colors"]["train"])
    for each in (trainer, expected):
        each.learn_task("shapes", tasks["shapes"]["train"], tasks["shapes"]["test"])
    assert_same_tasks(trainer.subspace, expected.subspace)
    assert trainer.metrics == expected.metrics
    assert list(trainer.model.peft_config) == ["shapes"]


def raise_interruption(*args: Any, **kwargs: Any) -> None:
    raise Interruption
