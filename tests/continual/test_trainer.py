"""A stream of tasks in the Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from share_hf import ShareConfig, SharedSubspace, ShareTrainer, ShareTrainingArguments

from .conftest import MakeTrainer, assert_same_to_the_bit, classification_data, coefficients, language_data


def heads(trainer: ShareTrainer, task: str) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach().clone()
        for name, parameter in trainer.model.named_parameters()
        if f".modules_to_save.{task}." in name
    }


def test_a_stream_learns_all_its_tasks_in_their_phases(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    output = trainer.train()
    learned_by = {name: info.learned_by for name, info in trainer.subspace.state.tasks.items()}
    assert learned_by == {"a": "init", "b": "adapt", "c": "adapt"}
    assert output.global_step == 18
    assert list(trainer.model.peft_config) == ["a", "b", "c"]


def test_training_lowers_the_loss_of_every_phase(make_trainer: MakeTrainer, language_tasks: dict[str, Any]) -> None:
    trainer = make_trainer(model="llama", tasks=language_tasks, num_train_epochs=8, evaluate_before=True)
    trainer.train()
    matrix, baseline = trainer.metrics["matrix"], trainer.metrics["baseline"]
    assert trainer.metrics["score"] == "-loss"
    assert all(matrix[-1][j] > baseline[j] for j in range(3)), (matrix, baseline)


def test_heads_of_earlier_tasks_come_back_untouched(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(finetune_num_train_epochs=1)
    data = dict(trainer.tasks)
    trainer.tasks.clear()
    trainer.learn_task("a", *data["a"])
    of_a = heads(trainer, "a")
    trainer.learn_task("b", *data["b"])
    trainer.learn_task("c", *data["c"])
    assert of_a
    assert_same_to_the_bit(heads(trainer, "a"), of_a)
    assert not torch.equal(*(next(iter(heads(trainer, task).values())) for task in ("b", "c")))


def test_labels_beyond_a_task_own_are_neither_predicted_nor_trained(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.train()
    trainer.model.set_adapter("b")
    predictions = trainer.predict(trainer.tasks["a"][1].remove_columns("label")).predictions
    assert set(predictions.argmax(-1)) <= {0, 1}
    untouched = trainer.model.get_base_model().classifier.original_module.weight[2]
    assert torch.equal(heads(trainer, "b")["base_model.model.classifier.modules_to_save.b.weight"][2], untouched)


def test_old_tasks_change_by_no_more_than_the_certified_drift(make_trainer: MakeTrainer) -> None:
    config = ShareConfig(num_components=2, pseudo_rank=2, num_temporary=1, target_modules=["query", "value"])
    trainer = make_trainer(config=config, learning_rate=5e-2)
    data = dict(trainer.tasks)
    trainer.tasks.clear()
    trainer.learn_task("a", *data["a"])
    before = {m: layer.update_of("a").dense().double() for m, layer in trainer.subspace.state.layers.items()}
    report = trainer.learn_task("b", *data["b"])
    assert report is not None
    assert report.max_drift > 1e-3
    for module, layer in trainer.subspace.state.layers.items():
        change = (layer.update_of("a").dense().double() - before[module]).norm() / before[module].norm()
        assert float(change) == pytest.approx(report.layers[module].drift["a"], abs=1e-5)


def test_the_model_holds_what_the_subspace_says(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.train()
    fresh = SharedSubspace.from_pretrained(Path(trainer.args.output_dir) / "subspace")
    assert_same_to_the_bit(coefficients(trainer), coefficients(SimpleNamespace(subspace=fresh)))
    for module, layer in trainer.subspace.state.layers.items():
        held = trainer.model.get_base_model().get_submodule(module)
        assert torch.equal(held.share_coefficients_out["b"], layer.coefficients_out[layer.index("b")])


def test_coefficients_alone_leave_the_basis_and_the_old_tasks_as_they_are(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(method="coefficients")
    data = dict(trainer.tasks)
    trainer.tasks.clear()
    trainer.learn_task("a", *data["a"])
    before = coefficients(trainer)
    assert trainer.learn_task("b", *data["b"]) is None
    after = coefficients(trainer)
    assert_same_to_the_bit({name: after[name] for name in before}, before)
    assert trainer.subspace.state.tasks["b"].learned_by == "coefficients"
    trained = trainer.metrics["parameters"]["coefficients"]
    layers = len(trainer.subspace.state.layers)
    assert trained == layers * 2 * 2 * 2 + 3 * 64 + 3  # k = p = 2 after one task of rank 2, and the head


def test_adapting_trains_the_parameters_the_paper_counts(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.train()
    phi = 2  # the basis has two directions after one task of rank 2, fewer than num_temporary
    expected = sum(phi * (sum(layer.shape) + 2 * 2) for layer in trainer.subspace.state.layers.values())
    assert trainer.metrics["parameters"]["adapt"] >= expected + 3 * 64 + 3


def test_random_temporary_factors_learn_what_a_lora_does(make_trainer: MakeTrainer) -> None:
    sizes = {"num_components": 8, "pseudo_rank": 2, "target_modules": ["query", "value"]}
    adapted = make_trainer(folder="adapted", config=ShareConfig(**sizes, temporary_init="random"))
    free = make_trainer(folder="free", config=ShareConfig(**sizes), num_init_tasks=3)
    for trainer in (adapted, free):
        trainer.train()
    assert_same_to_the_bit(coefficients(adapted), coefficients(free))
    found, expected = adapted.subspace.state.tasks, free.subspace.state.tasks
    assert (found["c"].learned_by, expected["c"].learned_by) == ("adapt", "init")
    assert found["c"].initialization == expected["c"].initialization is not None


def test_temporary_factors_in_the_span_are_merged_like_others_and_have_no_random_start(
    make_trainer: MakeTrainer,
) -> None:
    config = ShareConfig(num_components=8, pseudo_rank=2, target_modules=["query", "value"], temporary_init="span")
    trainer = make_trainer(config=config)
    trainer.train()
    state = trainer.subspace.state
    factors = sum(2 * sum(layer.shape) for layer in state.layers.values())
    assert trainer.metrics["parameters"]["adapt"] == factors + 3 * 64 + 3  # two directions on each side, and the head
    assert all(layer.coefficients_of("c")[0].any() for layer in state.layers.values())
    assert state.tasks["a"].initialization is not None  # trained as a LoRA, in the init phase
    assert state.tasks["c"].initialization is None


def test_finetuning_changes_only_the_newest_task(make_trainer: MakeTrainer) -> None:
    plain, tuned = make_trainer(folder="plain"), make_trainer(folder="tuned", finetune_num_train_epochs=2)
    for trainer in (plain, tuned):
        trainer.train()
    assert [step.get("learned") or step.get("merged") for step in tuned.subspace.state.lineage] == [
        *(["a"], "a", ["b"], "b", ["c"], "c"),
    ]
    assert tuned.subspace.state.tasks["c"].learned_by == "adapt"


def test_scores_drift_and_parameter_counts_are_logged_and_kept(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(evaluate_before=True)
    logged: dict[str, float] = {}
    original = trainer.log
    trainer.log = lambda logs, *args: (logged.update(logs), original(logs, *args))[1]  # type: ignore[method-assign]
    trainer.train()
    for name in ("share/average", "share/forgetting", "share/accuracy/a", "share/drift/a", "share/merge_max_drift"):
        assert name in logged
    assert logged["share/trainable_parameters/adapt"] == trainer.metrics["parameters"]["adapt"]
    kept = SharedSubspace.from_pretrained(Path(trainer.args.output_dir) / "subspace").state.metrics
    assert kept == trainer.metrics
    assert trainer.metrics["forward_transfer"] is not None


def test_all_seen_tasks_can_be_evaluated_and_the_active_adapter_stays(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(evaluate_seen_tasks=False)
    trainer.train()
    trainer.model.set_adapter("b")
    metrics = trainer.evaluate_tasks()
    assert set(metrics) == {"a", "b", "c"}
    assert all(0 <= values["accuracy"] <= 1 for values in metrics.values())
    assert trainer.model.active_adapter == "b"
    assert trainer.metrics["matrix"][-1][:2] == [None, None]


def test_a_custom_scorer_replaces_the_evaluation(make_trainer: MakeTrainer) -> None:
    calls = []

    def scorer(model: Any, task: str, data: Dataset) -> dict[str, float]:
        calls.append((task, model.active_adapter, len(data)))
        return {"exact": 0.5}

    trainer = make_trainer(task_scorer=scorer, score_metric="exact")
    trainer.train()
    assert ("a", "a", 12) in calls
    assert trainer.metrics["score"] == "exact"
    assert trainer.metrics["average"] == 0.5


def test_an_unknown_score_metric_names_the_ones_there_are(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match=r"score_metric is 'f1', expected one of \['accuracy', 'loss'\]"):
        make_trainer(score_metric="f1")
    scored = make_trainer(score_metric="f1", task_scorer=lambda model, task, data: {"exact": 1.0})
    with pytest.raises(ValueError, match=r"score_metric is 'f1', expected one of \['exact'\]"):
        scored.train()


def test_a_stream_starts_from_given_adapters(
    make_trainer: MakeTrainer, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    lora = get_peft_model(
        tiny_model("bert"),
        LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False, task_type="SEQ_CLS"),
    )
    lora.save_pretrained(tmp_path / "given")
    trainer = make_trainer(adapters={"given": tmp_path / "given"})
    trainer.train()
    assert trainer.subspace.tasks == ("given", "a", "b", "c")
    assert trainer.subspace.state.tasks["a"].learned_by == "adapt"


def test_a_stream_continues_a_saved_subspace(make_trainer: MakeTrainer) -> None:
    first = make_trainer(folder="first")
    first.train()
    saved = SharedSubspace.from_pretrained(Path(first.args.output_dir) / "subspace")
    second = make_trainer(folder="second", subspace=saved, tasks={"d": classification_data(3, 7)})
    second.train()
    assert second.subspace.tasks == ("a", "b", "c", "d")
    assert second.subspace.state.tasks["d"].learned_by == "adapt"


def empty() -> Dataset:
    return classification_data(2, 0).select([])


def with_label(label: int) -> Dataset:
    return classification_data(2, 0).map(lambda row: {"label": label})


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"a": DatasetDict(test=classification_data(2, 0))}, "task 'a' has splits \\['test'\\], expected 'train'"),
        ({"a": empty()}, "task 'a' has no training examples"),
        ({"a": with_label(3)}, "task 'a' has label 3, expected integers under num_labels = 3"),
        (
            {"a": DatasetDict(train=classification_data(2, 0), test=with_label(2))},
            "task 'a' has label 2 in its evaluation data, expected one of those it is trained on: \\[0, 1\\]",
        ),
        ({"a": language_data(1).rename_column("labels", "tags")}, "expected one of \\('label', 'labels'\\)"),
        ({"main": classification_data(2, 0)}, "task name 'main' is reserved"),
        ({"a": classification_data(2, 0), "A": classification_data(2, 0)}, "differs from 'a' only in case"),
    ],
)
def test_unusable_tasks_are_refused_by_name(make_trainer: MakeTrainer, tasks: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tasks=tasks)


def test_a_refused_task_leaves_the_trainer_as_it_was(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.train()
    before = coefficients(trainer)
    with pytest.raises(ValueError, match="task 'a' already exists"):
        trainer.learn_task("a", classification_data(2, 0))
    with pytest.raises(ValueError, match="has no training examples"):
        trainer.learn_task("d", empty())
    assert list(trainer.tasks) == ["a", "b", "c"]
    assert list(trainer.model.peft_config) == ["a", "b", "c"]
    assert_same_to_the_bit(coefficients(trainer), before)


def test_drift_that_cannot_be_tolerated_leaves_the_old_tasks_as_they_were(make_trainer: MakeTrainer) -> None:
    config = ShareConfig(
        num_components=2, pseudo_rank=2, target_modules=["query"], drift_tolerance=1e-4, max_components=2
    )
    trainer = make_trainer(config=config)
    data = dict(trainer.tasks)
    trainer.tasks.clear()
    trainer.learn_task("a", *data["a"])
    before = coefficients(trainer)
    with pytest.raises(ValueError, match=r"drift_tolerance is 0\.0001, but with 2 components"):
        trainer.learn_task("b", *data["b"])
    assert_same_to_the_bit(coefficients(trainer), before)


def test_contradicting_arguments_are_refused(
    make_trainer: MakeTrainer, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="method is 'magic', expected one of"):
        make_trainer(method="magic")
    with pytest.raises(ValueError, match="num_init_tasks is 0"):
        make_trainer(num_init_tasks=0)
    with pytest.raises(ValueError, match="no tasks to train on"):
        make_trainer(tasks=None).train()
    peft_model = get_peft_model(tiny_model("bert"), LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="model has adapters already"):
        ShareTrainer(peft_model, ShareTrainingArguments(str(tmp_path), report_to="none"))
    trained = make_trainer()
    trained.train()
    with pytest.raises(ValueError, match="subspace and adapters are both given"):
        make_trainer(folder="both", subspace=trained.subspace, adapters=["x"])
    other = ShareConfig(num_components=16, pseudo_rank=2, target_modules=["query", "value"])
    with pytest.raises(
        ValueError, match=r"share_config has .*num_components=16.* the subspace has .*num_components=8"
    ):
        make_trainer(folder="other", subspace=trained.subspace, config=other, tasks={"d": classification_data(2, 1)})
