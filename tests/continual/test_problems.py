"""Classes, values and several labels side by side in one stream: heads, losses, metrics, and what is kept."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value
from huggingface_hub import ModelCard
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel

from share_hf import ShareConfig, SharedSubspace, ShareTrainer
from share_hf.continual.data import split_data
from share_hf.continual.measures import accuracy, f1, pearson
from share_hf.continual.problems import CLASSES, MULTI_LABEL, REGRESSION, loss_of, task_details
from share_hf.state import without_scores
from share_hf.tuner.head import rule_out_labels

from .cases import BERT_TARGETS, K, P, arguments, classification_task, classifier_trainer


Make = Callable[..., ShareTrainer]

LEARNING = {"max_steps": -1, "num_train_epochs": 25, "learning_rate": 2e-2}


def _tokens(first: Tensor, seed: int) -> list[list[int]]:
    ids = torch.randint(3, 64, (len(first), 6), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = first
    return ids.tolist()


def regression_task(seed: int, rows: int = 32) -> DatasetDict:
    """A task in which the first token determines the value, between 0 and 5."""
    splits = {}
    for i, split in enumerate(("train", "test")):
        value = torch.arange(rows) % 4
        splits[split] = Dataset.from_dict(
            {"input_ids": _tokens(20 + 3 * value, 100 * seed + i), "labels": (value * 1.25 + 0.5).tolist()}
        )
    return DatasetDict(splits)


def multi_label_task(seed: int, rows: int = 32) -> DatasetDict:
    """A task in which the first token determines which of two labels a text has."""
    splits = {}
    for i, split in enumerate(("train", "test")):
        which = torch.arange(rows) % 4
        labels = torch.stack([which % 2, which // 2], dim=1)
        splits[split] = Dataset.from_dict(
            {"input_ids": _tokens(40 + 3 * which, 100 * seed + i), "labels": labels.float().tolist()}
        )
    return DatasetDict(splits)


def mixed_tasks() -> dict[str, DatasetDict]:
    return {"shapes": classification_task(1, 3), "likeness": regression_task(2), "topics": multi_label_task(3)}


@pytest.fixture(scope="module")
def learned(
    pristine_models: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> tuple[ShareTrainer, Path]:
    """A stream of all three kinds that was learned until it predicts well, and its folder."""
    folder = tmp_path_factory.mktemp("mixed")
    trainer = classifier_trainer(
        copy.deepcopy(pristine_models["bert"]),
        folder,
        mixed_tasks(),
        trainer={"labels": {"topics": ("a", "b")}},
        **LEARNING,
    )
    trainer.train()
    return trainer, folder


def test_each_kind_is_learned_and_scored_by_its_own_metric(learned: tuple[ShareTrainer, Path]) -> None:
    trainer, _ = learned
    metrics = trainer.metrics
    assert metrics["score"] == "score"
    assert metrics["score_names"] == {"shapes": "accuracy", "likeness": "pearson", "topics": "f1"}
    assert all(score > 0.8 for score in metrics["matrix"][-1]), metrics["matrix"]
    assert [name for name in trainer.evaluate_tasks()["likeness"] if name in ("accuracy", "f1")] == []
    lines = trainer.metrics_table.splitlines()
    assert lines[1].split() == ["(score)", "accuracy", "pearson", "f1"]
    assert lines[-1].startswith("score: average ")


def test_a_value_is_predicted_in_its_own_units(
    learned: tuple[ShareTrainer, Path], tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    _, folder = learned
    model = SharedSubspace.from_pretrained(folder / "subspace").apply(tiny_model("bert"))
    model.set_adapter("likeness")
    data = regression_task(2)["test"].with_format("torch")
    with torch.no_grad():
        outputs = model(input_ids=data["input_ids"][:]).logits
    assert F.mse_loss(outputs[:, 0], data["labels"][:]) < 0.5
    assert (outputs[:, 1:] < -1000).all()  # the task never predicts a label that it does not have


def test_kind_names_and_metrics_are_kept_with_the_tasks(learned: tuple[ShareTrainer, Path]) -> None:
    trainer, folder = learned
    loaded = SharedSubspace.from_pretrained(folder / "subspace").state
    assert [info.problem_type for info in loaded.tasks.values()] == [CLASSES, REGRESSION, MULTI_LABEL]
    assert loaded.tasks["topics"].labels == ("a", "b")
    assert {task: score.metric for task, score in loaded.scores().items()} == trainer.metrics["score_names"]
    assert loaded.tasks["likeness"].scores["pearson"] == pytest.approx(trainer.metrics["matrix"][1][1])
    card = ModelCard.load(folder / "subspace" / "README.md")
    assert "| `likeness` | adapt | pearson |" in card.text
    assert [result.metric_type for result in card.data.eval_results] == ["accuracy", "pearson", "f1"]
    assert {result.task_type for result in card.data.eval_results} == {"text-classification"}


def test_a_renamed_task_keeps_its_metric_and_a_removed_one_leaves_none(learned: tuple[ShareTrainer, Path]) -> None:
    subspace = SharedSubspace.from_pretrained(learned[1] / "subspace")
    subspace.rename_task("likeness", "similarity")
    assert subspace.state.scores()["similarity"].metric == "pearson"
    left = without_scores(subspace.state.metrics, ["topics", "similarity"])
    assert left["score"] == "accuracy"
    assert "score_names" not in left


def test_a_score_that_a_kind_of_task_lacks_is_refused_before_anything_is_trained(
    tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    model, known = tiny_model("bert"), {"shapes": classification_task(1, 3)}
    lacks = r"score_metric is 'accuracy', expected one of \['pearson', 'loss'\], which task 'likeness' has"
    with pytest.raises(ValueError, match=lacks):
        classifier_trainer(model, tmp_path / "all", mixed_tasks(), score_metric="accuracy")
    assert not hasattr(model, "peft_config")
    trainer = classifier_trainer(model, tmp_path / "later", known, score_metric="accuracy")
    with pytest.raises(ValueError, match=lacks):
        trainer.learn_task("likeness", *regression_task(2).values())
    assert trainer.trained_steps == 0
    classifier_trainer(
        tiny_model("bert"),
        tmp_path / "measured",
        mixed_tasks(),
        trainer={"compute_metrics": dict.fromkeys(("likeness", "topics"), lambda prediction: {"accuracy": 1.0})},
        score_metric="accuracy",
    )


def test_torch_data_is_read_once_for_its_labels() -> None:
    class Counted(torch.utils.data.Dataset):
        def __init__(self, rows: Dataset) -> None:
            self.rows, self.reads = rows, [0] * len(rows)

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, i: int) -> dict[str, Any]:
            self.reads[i] += 1
            return self.rows[i]

    rows = classification_task(1, 3)
    data = {"train": Counted(rows["train"]), "validation": Counted(rows["test"]), "test": Counted(rows["test"])}
    splits = split_data("task", data, max_steps=-1)
    details = task_details("task", data, splits, 3, selects=True)
    assert details.selection is data["validation"] and splits.evaluation is data["test"]
    assert details.problem.num_labels == 3
    # The first example also tells the columns.
    assert all(set(split.reads[1:]) == {1} for split in data.values())


@pytest.mark.parametrize("of_model", [None, "regression", "multi_label_classification"])
def test_the_model_s_own_kind_of_problem_changes_nothing(
    of_model: str | None, tiny_model: Callable[[str], PreTrainedModel], make: Make, tmp_path: Path
) -> None:
    model = tiny_model("bert")
    model.config.problem_type = of_model
    trainer = classifier_trainer(model, tmp_path / "other", mixed_tasks())
    trainer.train()
    reference = make(mixed_tasks(), "reference")
    reference.train()
    assert np.allclose(trainer.metrics["matrix"][-1], reference.metrics["matrix"][-1], atol=1e-4)


def test_label_smoothing_is_for_classes_alone(make: Make) -> None:
    trainer = make(mixed_tasks(), label_smoothing_factor=0.3)
    trainer.train()
    smoothed = {task: metrics["loss"] for task, metrics in trainer.evaluate_tasks().items()}
    trainer.label_smoother = None
    plain = {task: metrics["loss"] for task, metrics in trainer.evaluate_tasks().items()}
    assert {task for task in plain if plain[task] != smoothed[task]} == {"shapes"}


def test_losses_are_those_of_torch_over_the_task_s_own_outputs() -> None:
    logits = torch.randn(6, 4)
    values, flags, classes = torch.randn(6), torch.randint(0, 2, (6, 3)).float(), torch.arange(6) % 3
    assert loss_of(REGRESSION, logits, values, 1) == pytest.approx(F.mse_loss(logits[:, 0], values).item())
    expected = F.binary_cross_entropy_with_logits(logits[:, :3], flags).item()
    assert loss_of(MULTI_LABEL, logits, flags, 3) == pytest.approx(expected)
    assert loss_of(CLASSES, logits, classes, 3) == pytest.approx(F.cross_entropy(logits[:, :3], classes).item())
    halves = [loss_of(MULTI_LABEL, logits[rows], flags[rows], 3, num_items=18) for rows in (slice(2), slice(2, 6))]
    assert sum(halves) == pytest.approx(expected)


def test_metrics_by_kind_are_those_of_their_formulas() -> None:
    values, labels = np.array([[1.0], [2.0], [4.0]], dtype=np.float32), np.array([0.0, 1.0, 5.0])
    assert pearson(EvalPrediction(values, labels))["pearson"] == pytest.approx(np.corrcoef(values[:, 0], labels)[0, 1])
    assert pearson(EvalPrediction(np.ones((3, 1)), labels)) == {"pearson": 0.0}
    flags, logits = np.array([[1, 0], [1, 1], [0, 0]]), np.array([[2.0, 1.0], [3.0, -1.0], [-1.0, -2.0]])
    assert f1(EvalPrediction(logits, flags))["f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert f1(EvalPrediction(-np.ones((1, 2)), np.zeros((1, 2))))["f1"] == 0
    assert accuracy(EvalPrediction(np.eye(3), np.array([0, 1, 0])))["accuracy"] == pytest.approx(2 / 3)
    batches = EvalPrediction([values[:2], values[2:]], [labels[:2], labels[2:]])
    assert pearson(batches) == pearson(EvalPrediction(values, labels))


# ---- Metrics of the user's ------------------------------------------------------------------------------------------


def squared_error(prediction: EvalPrediction) -> dict[str, float]:
    assert prediction.predictions.shape[1] == 1  # a single value, without what is masked
    errors = (prediction.predictions[:, 0] - prediction.label_ids) ** 2
    return {"negative_error": float(-errors.mean()), "exact": float((errors < 1e-3).mean())}


def test_the_first_metric_of_a_task_s_own_function_is_its_score(make: Make) -> None:
    trainer = make(mixed_tasks(), trainer={"compute_metrics": {"likeness": squared_error}})
    trainer.train()
    assert trainer.metrics["score_names"]["likeness"] == "negative_error"
    assert trainer.metrics["score_names"]["shapes"] == "accuracy"
    assert list(trainer.subspace.state.tasks["likeness"].scores) == ["negative_error", "exact"]


def test_all_metrics_are_read_again_the_score_first(make: Make, tmp_path: Path) -> None:
    def both(prediction: EvalPrediction) -> dict[str, float]:
        return {"zeal": 0.25, "confusion": [[1, 2]], **accuracy(prediction)}

    trainer = make({"shapes": classification_task(1, 3)}, trainer={"compute_metrics": {"shapes": both}})
    trainer.train()
    scores = SharedSubspace.from_pretrained(tmp_path / "out" / "subspace").state.tasks["shapes"].scores
    assert list(scores) == ["zeal", "accuracy"]
    assert (
        json.loads((tmp_path / "out" / "subspace" / "tasks" / "shapes" / "metrics.json").read_text())["score"]
        == "zeal"
    )


@pytest.mark.parametrize(
    "count", [np.int64(3), np.float32(3), torch.tensor(3)], ids=lambda count: type(count).__name__
)
def test_numbers_of_any_type_are_stored_and_truth_values_are_not(count: Any, make: Make, tmp_path: Path) -> None:
    def measure(prediction: EvalPrediction) -> dict[str, Any]:
        return {**accuracy(prediction), "count": count, "passed": True, "failed": np.bool_(False)}

    trainer = make({"shapes": classification_task(1, 3)}, trainer={"compute_metrics": {"shapes": measure}})
    trainer.train()
    scores = SharedSubspace.from_pretrained(tmp_path / "out" / "subspace").state.tasks["shapes"].scores
    assert list(scores) == ["accuracy", "count"] and scores["count"] == 3


def test_what_is_not_a_function_of_a_task_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="compute_metrics has 'f1' for task 'shapes', expected a function"):
        make(mixed_tasks(), trainer={"compute_metrics": {"shapes": "f1"}})


def test_a_function_for_a_task_that_is_not_there_is_reported(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    make(mixed_tasks(), trainer={"compute_metrics": {"shape": accuracy}})
    assert "compute_metrics has functions for ['shape'], which are not among tasks" in caplog.text


def test_names_that_are_not_as_many_as_the_labels_are_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"labels has \('a',\) for task 'topics', expected 2 different names"):
        make(mixed_tasks(), trainer={"labels": {"topics": ("a",)}})


def test_names_of_labels_of_no_task_are_reported(
    make: Make, caplog: pytest.LogCaptureFixture, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    make(mixed_tasks(), trainer={"labels": {"topic": ("a", "b")}})
    assert "labels has names for ['topic'], which are not among tasks" in caplog.text
    with pytest.raises(
        ValueError, match=r"labels has names for \['topic'\], expected none: the model is not a classifier"
    ):
        ShareTrainer(tiny_model("llama"), arguments(tmp_path / "out"), labels={"topic": ("a", "b")})


def test_tasks_without_classes_are_not_learned_together(
    learned: tuple[ShareTrainer, Path], tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    tasks = {"more": classification_task(5, 2), "more_values": regression_task(6)}
    with pytest.raises(ValueError, match="together has 'more_values', which is regression, expected single_label"):
        ShareTrainer(
            tiny_model("bert"),
            arguments(tmp_path / "out", method="coefficients"),
            ShareConfig(num_components=K, pseudo_rank=P, target_modules=BERT_TARGETS),
            tasks,
            subspace=SharedSubspace.from_pretrained(learned[1] / "subspace"),
            together=["more", "more_values"],
        )


# ---- Data in other forms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["value", "flags"])
def test_streamed_data_has_its_kind_in_its_features(kind: str, make: Make) -> None:
    data = {"value": regression_task, "flags": multi_label_task}[kind](2)
    labels = Value("float32") if kind == "value" else Sequence(Value("float32"), length=2)
    features = Features({"input_ids": Sequence(Value("int64")), "labels": labels})
    streamed = {split: rows.cast(features).to_iterable_dataset() for split, rows in data.items()}
    trainer, reference = make({"task": streamed}, "streamed"), make({"task": data}, "rows")
    for each in (trainer, reference):
        each.train()
    assert trainer._details["task"].problem.problem_type == (REGRESSION if kind == "value" else MULTI_LABEL)
    assert trainer.metrics["score"] == reference.metrics["score"] == ("pearson" if kind == "value" else "f1")


def test_labels_that_streamed_training_data_has_no_name_for_are_refused(make: Make) -> None:
    data = classification_task(1, 3)
    features = Features({**data["train"].features, "labels": ClassLabel(names=["a", "b"])})
    train = data["train"].filter(lambda row: row["labels"] < 2).cast(features).to_iterable_dataset()
    with pytest.raises(ValueError, match="task 'a' has label 2, expected integers under num_labels = 2 in its eval"):
        make({"a": {"train": train, "test": data["test"]}})


def test_more_names_than_the_model_has_labels_are_refused(make: Make) -> None:
    data = classification_task(1, 3)
    features = Features({**data["train"].features, "labels": ClassLabel(names=list("abcdefgh"))})
    with pytest.raises(ValueError, match="task 'a' has label 7, expected integers under num_labels = 3 of the model"):
        make({"a": DatasetDict({split: rows.cast(features) for split, rows in data.items()})})


def test_a_head_without_a_bias_predicts_no_label_that_a_task_lacks() -> None:
    head = {"score.weight": torch.tensor([[3.0, 1.0], [1.0, 3.0]])}
    inputs = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    one = inputs @ rule_out_labels(head, "score", 2, 4)["score.weight"].T
    several = inputs @ rule_out_labels(head, "score", 2, 4, several=True)["score.weight"].T
    assert (one.argmax(-1) < 2).all()
    assert not (several[:, 2:] > 0).any() and torch.equal(several[:, :2], one[:, :2])


def test_data_of_torch_is_understood_by_its_tensors(make: Make) -> None:
    rows: list[dict[str, Any]] = list(multi_label_task(3)["train"].with_format("torch"))
    trainer = make({"topics": {"train": rows, "test": rows}})
    trainer.train()
    assert trainer.metrics["score"] == "f1"
