"""The baselines of the continual learning benchmark, on toy tasks that a tiny BERT learns in a second."""

from __future__ import annotations

import copy
import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from peft import PeftModel
from transformers import (
    BertForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    TrainingArguments,
)

from share_hf import ShareConfig, ShareTrainer, ShareTrainingArguments


FOLDER = Path(__file__).parents[2] / "recipes" / "benchmarks"
METHODS = ("lora", "sequential", "replay-2", "replay-5", "olora", "osf", "joint")
TRAINED, SCORED, EPOCHS = 96, 64, 6
LAYERS, HIDDEN, RANK = 2, 64, 8  # of the tiny BERT, and of a LoRA
ADAPTED = 2 * LAYERS  # query and value
LORA = ADAPTED * RANK * 2 * HIDDEN
HEAD = 2 * HIDDEN + 2


@dataclass(frozen=True)
class ToyTask:
    """Texts of six tokens. The one at `signal` determines the label; those of other tasks are noise here."""

    signal: int
    seed: int
    problem_type: str = "single_label_classification"
    metrics: tuple[str, ...] = ("accuracy", "error")
    num_labels: int = 2
    data: DatasetDict = field(init=False, compare=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        object.__setattr__(self, "data", DatasetDict(train=self._draw(rng, TRAINED), test=self._draw(rng, SCORED)))

    def _draw(self, rng: np.random.Generator, examples: int) -> Dataset:
        ids = rng.integers(12, 16, (examples, 6))
        for place in {1, 2, self.signal}:
            ids[:, place] = 2 * place + 2 + rng.integers(0, 2, examples)
        label = ids[:, self.signal] % 2
        if self.problem_type == "regression":
            label = label * 2.0 - 1.0
        if self.problem_type == "multi_label_classification":
            label = np.stack([label, 1 - label, label], 1).astype(float)
        return Dataset.from_dict({"input_ids": ids.tolist(), "label": label.tolist()})

    @property
    def scored(self) -> Dataset:
        return self.data["test"]

    def scores(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        assert predictions.shape == (SCORED, self.num_labels)
        if self.problem_type == "regression":
            right = (predictions[:, 0] > 0) == (references > 0)
        elif self.problem_type == "multi_label_classification":
            right = ((predictions > 0) == (references > 0.5)).all(1)
        else:
            right = predictions.argmax(1) == references
        return {"accuracy": float(right.mean()), "error": float(1 - right.mean())}


@dataclass
class Run:
    """An outcome, and what was recorded meanwhile: by step, the Trainer and the batches that it trained on."""

    outcome: Any
    trainers: list[Any]

    def seen(self, step: int) -> Counter[int]:
        """Return how often samples of each task were trained on in a step."""
        return Counter(place for batch in self.trainers[step].batches for place in batch["task"].tolist())


MADE: list[Any] = []  # Trainers of the current run
TASKS = {"first": ToyTask(1, 0), "second": ToyTask(2, 1), "third": ToyTask(3, 2)}


@pytest.fixture(scope="module")
def baselines() -> Iterator[ModuleType]:
    """The module, which belongs to no package, with a Trainer that records what it trains on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        module = importlib.import_module("_baselines")

        class NotingTrainer(module.BaselineTrainer):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.batches: list[dict[str, torch.Tensor]] = []
                self.losses: list[float] = []
                self.in_heads: Counter[int] = Counter()
                self.before = copy.deepcopy(self.model)
                self.hooks = [
                    head.register_forward_hook(lambda _, inputs, __, place=place: self._note(place, inputs[0]))
                    for place, head in enumerate(self.model.heads)
                ]
                MADE.append(self)

            def _note(self, place: int, features: torch.Tensor) -> None:
                self.in_heads[place] += len(features)

            def train(self, *args: Any, **kwargs: Any) -> Any:
                done = super().train(*args, **kwargs)
                for hook in self.hooks:
                    hook.remove()
                return done

            def training_step(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any) -> torch.Tensor:
                self.batches.append(inputs)
                loss = super().training_step(model, dict(inputs), *args)
                self.losses.append(float(loss))
                return loss

        patch.setattr(module, "BaselineTrainer", NotingTrainer)
        yield module


@pytest.fixture(scope="module")
def run(
    baselines: ModuleType, pristine_models: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Run]:
    """Run a method on some of the toy tasks, once for all tests that ask for the same run."""
    folder = str(tmp_path_factory.mktemp("baselines"))

    @cache
    def run_once(method: str, *names: str, orthogonality: float = 0.02, **args: Any) -> Run:
        settings = baselines.BaselineSettings(
            arguments(folder, **args), ["query", "value"], rank=RANK, orthogonality=orthogonality
        )
        MADE.clear()
        outcome = baselines.train(method, pristine_models["bert"], {name: TASKS[name] for name in names}, settings)
        return Run(outcome, list(MADE))

    return run_once


def arguments(folder: str, **changed: Any) -> TrainingArguments:
    return TrainingArguments(
        folder,
        **{"num_train_epochs": EPOCHS, "learning_rate": 5e-3, "warmup_steps": 0.1, "seed": 1, **changed},
        per_device_train_batch_size=8,
        per_device_eval_batch_size=SCORED,
        report_to="none",
        logging_strategy="no",
        use_cpu=True,
    )


def lora_of(trainer: Any, place: int) -> dict[str, torch.Tensor]:
    state = trainer.model.backbone.state_dict()
    return {name: value for name, value in state.items() if f"lora-{place:05d}" in name}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns_every_task(run: Callable[..., Run], method: str) -> None:
    done = run(method, "first", "second")
    matrix = done.outcome.metrics.matrix
    newest = matrix[0] if method == "joint" else [matrix[0][0], matrix[1][1]]
    assert min(newest) > 0.7, matrix  # 0.5 is chance, and 0.06 a standard error
    for trainer in done.trainers:
        assert np.mean(trainer.losses[-6:]) < np.mean(trainer.losses[:6])


@pytest.mark.parametrize("method", [method for method in METHODS if method != "joint"])
def test_the_matrix_has_a_row_a_step_and_what_was_learned_in_it(run: Callable[..., Run], method: str) -> None:
    outcome = run(method, "first", "second").outcome
    metrics = outcome.metrics
    assert (metrics.score, metrics.tasks, metrics.learned) == ("accuracy", ["first", "second"], 2)
    assert metrics.matrix[0][1] is None and None not in metrics.matrix[1]
    assert [step.tasks for step in outcome.steps] == [("first",), ("second",)]
    assert all(step.seconds > 0 for step in outcome.steps)
    for name, last in zip(metrics.tasks, metrics.matrix[1], strict=True):
        found = TASKS[name].scores(outcome.predictions[name], np.asarray(TASKS[name].scored["label"]))
        assert outcome.scores[name] == found
        assert found["accuracy"] == last


def test_loras_of_their_own_forget_nothing(run: Callable[..., Run]) -> None:
    alone, both = run("lora", "first"), run("lora", "first", "second")
    assert both.outcome.metrics.forgetting == 0
    np.testing.assert_array_equal(both.outcome.predictions["first"], alone.outcome.predictions["first"])
    # They are not predicted again after the second task; if they were, they would be the same.
    last = both.trainers[-1]
    first, _ = last.model.backbone.peft_config
    last.model.backbone.set_adapter(first)
    ids = torch.tensor(TASKS["first"].scored["input_ids"][:])
    with torch.no_grad():
        outputs = last.model.eval()(input_ids=ids, task=torch.zeros(len(ids), dtype=torch.long))["logits"]
    found = outputs[:, : TASKS["first"].num_labels].numpy()
    np.testing.assert_allclose(found, both.outcome.predictions["first"], atol=1e-5)


def test_loras_are_kept_with_their_heads(
    baselines: ModuleType, tiny_model: Callable[[str], Any], tmp_path: Path
) -> None:
    heads = importlib.import_module("_baselines_heads")
    settings = baselines.BaselineSettings(
        arguments(str(tmp_path / "out"), num_train_epochs=1), ["query", "value"], rank=RANK
    )
    tasks = {name: TASKS[name] for name in ("first", "second")}
    base = tiny_model("bert")
    outcome = baselines.train("lora", base, tasks, settings, keep_in=tmp_path / "loras")
    for name, task in tasks.items():
        kept = tmp_path / "loras" / name
        model = PeftModel.from_pretrained(heads.without_classifier(base), kept).eval()
        head = heads.kept_head(base, 2, kept / baselines.HEAD_FILE)
        with torch.no_grad():
            outputs = head(model(input_ids=torch.tensor(list(task.scored["input_ids"]))).logits)
        np.testing.assert_allclose(outputs.numpy(), outcome.predictions[name], atol=1e-5)


def test_one_lora_forgets(run: Callable[..., Run]) -> None:
    fast = {"learning_rate": 2e-2, "num_train_epochs": 4}
    of_one, of_each = (run(method, "first", "second", **fast).outcome.metrics for method in ("sequential", "lora"))
    assert of_one.matrix[0] == of_each.matrix[0]
    assert of_one.forgetting > 0.15
    assert of_each.forgetting == 0


@pytest.mark.parametrize("method", ["sequential", "replay-2", "replay-5", "olora", "joint"])
def test_the_first_task_is_learned_alike_by_all_that_train_a_lora(run: Callable[..., Run], method: str) -> None:
    expected, found = (run(name, "first").outcome.predictions["first"] for name in ("lora", method))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("method", ["sequential", "olora", "osf"])
@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
def test_examples_come_in_the_same_order(run: Callable[..., Run], method: str, sampling: str) -> None:
    expected, found = (
        run(name, "first", "second", train_sampling_strategy=sampling).trainers for name in ("lora", method)
    )
    for theirs, ours in zip(expected, found, strict=True):
        pairs = zip(theirs.batches, ours.batches, strict=True)
        assert all(torch.equal(one["input_ids"], other["input_ids"]) for one, other in pairs)
    heads = [trainers[1].before.heads[1][0].weight for trainers in (expected, found)]
    assert torch.equal(*heads)


def test_predictions_come_in_the_order_of_the_data_however_batches_are_made(run: Callable[..., Run]) -> None:
    outcome = run("lora", "first", train_sampling_strategy="group_by_length").outcome
    assert outcome.metrics.matrix[0][0] > 0.7  # predictions in another order give 0.5


def test_a_seed_fixes_the_outcome_and_changes_it(
    baselines: ModuleType, run: Callable[..., Run], pristine_models: dict[str, PreTrainedModel], tmp_path: Path
) -> None:
    settings = baselines.BaselineSettings(arguments(str(tmp_path)), ["query", "value"])
    again = baselines.train("lora", pristine_models["bert"], {"first": TASKS["first"]}, settings)
    one, other = run("lora", "first"), run("lora", "first", seed=2)
    np.testing.assert_array_equal(again.predictions["first"], one.outcome.predictions["first"])
    assert not np.allclose(other.outcome.predictions["first"], one.outcome.predictions["first"])
    orders = [each.trainers[0].batches[0]["input_ids"] for each in (one, other)]
    assert not torch.equal(*orders)


def test_a_lora_learns_as_in_the_init_phase_of_share_from_the_same_random_numbers(
    run: Callable[..., Run], tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    """The order of examples of similar length is drawn after the factors."""
    sampling = {"train_sampling_strategy": "group_by_length"}

    class NotingTrainer(ShareTrainer):
        losses: ClassVar[list[float]] = []

        def training_step(self, *args: Any) -> torch.Tensor:
            loss = super().training_step(*args)
            self.losses.append(float(loss))
            return loss

    args = arguments(str(tmp_path)).to_dict()
    args = {name: args[name] for name in ("num_train_epochs", "learning_rate", "warmup_steps", "seed", "use_cpu")}
    data = {name: TASKS[name].data for name in ("first", "second")}
    config = ShareConfig(num_components=8, pseudo_rank=RANK, target_modules=["query", "value"])
    sizes = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": SCORED, "report_to": "none", **sampling}
    trainer = NotingTrainer(
        tiny_model("bert"), ShareTrainingArguments(str(tmp_path), num_init_tasks=2, **args, **sizes), config, data
    )
    trainer.train()
    lora = run("lora", "first", "second", **sampling)
    expected = [loss for trainer in lora.trainers for loss in trainer.losses]
    assert trainer.losses == pytest.approx(expected, abs=1e-4)


def test_the_model_given_stays_as_it_was(run: Callable[..., Run], tiny_model: Callable[[str], Any]) -> None:
    before = {name: value.clone() for name, value in tiny_model("bert").state_dict().items()}
    for method in METHODS:
        run(method, "first", "second")
    after = tiny_model("bert").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(("method", "kept"), [("replay-2", 2), ("replay-5", 5)])
def test_replay_trains_on_the_promised_examples_through_their_own_heads(
    run: Callable[..., Run], method: str, kept: int
) -> None:
    done = run(method, "first", "second", "third", num_train_epochs=2)
    assert [step.examples for step in done.outcome.steps] == [
        {"first": TRAINED},
        {"second": TRAINED, "first": kept},
        {"third": TRAINED, "first": kept, "second": kept},
    ]
    for step, trainer in enumerate(done.trainers):
        expected = {place: 2 * (TRAINED if place == step else kept) for place in range(step + 1)}
        assert done.seen(step) == trainer.in_heads == expected

    def replayed(step: int, place: int) -> set[tuple[int, ...]]:
        batches = done.trainers[step].batches
        return {tuple(ids) for batch in batches for ids in batch["input_ids"][batch["task"] == place].tolist()}

    memory = replayed(1, 0)
    assert len(memory) == kept
    assert memory <= set(map(tuple, TASKS["first"].data["train"]["input_ids"]))
    assert replayed(2, 0) == memory


def test_replayed_examples_depend_on_the_seed_and_are_never_none(baselines: ModuleType) -> None:
    data = Dataset.from_dict({"place": list(range(200))})
    picked = [baselines.replayed(data, 0.05, seed)["place"][:] for seed in (1, 1, 2)]
    assert [len(set(places)) for places in picked] == [10, 10, 10]
    assert picked[0] == picked[1] != picked[2]
    assert len(baselines.replayed(data.select(range(3)), 0.02, 0)) == 1


def test_joint_training_sees_all_tasks_at_once(run: Callable[..., Run]) -> None:
    done = run("joint", "first", "second")
    assert done.outcome.metrics.row_sizes == [2]
    assert done.outcome.metrics.learned == 2
    (step,) = done.outcome.steps
    assert (step.tasks, step.examples) == (("first", "second"), {"first": TRAINED, "second": TRAINED})
    assert done.seen(0) == done.trainers[0].in_heads == {0: EPOCHS * TRAINED, 1: EPOCHS * TRAINED}
    assert any(len(batch["task"].unique()) == 2 for batch in done.trainers[0].batches)


def test_the_penalty_of_o_lora_is_that_of_the_paper(run: Callable[..., Run]) -> None:
    trainer = run("olora", "first", "second", "third", orthogonality=0.5, num_train_epochs=1).trainers[2]
    by_hand = 0.0
    for module in trainer.model.backbone.modules():
        if hasattr(module, "lora_A"):
            first, second, third = (module.lora_A[f"lora-{place:05d}"].weight.detach() for place in range(3))
            for row in third:
                by_hand += sum(float(old @ row) ** 2 for earlier in (first, second) for old in earlier)
    batch = trainer.batches[0]
    with torch.no_grad():
        without = trainer.compute_loss(trainer.model.eval(), dict(batch))
        penalized = trainer.compute_loss(trainer.model.train(), dict(batch))  # there is no dropout in the model
    assert float(penalized - without) == pytest.approx(0.5 * by_hand, rel=1e-4)
    assert by_hand > 1e-3


def test_the_penalty_of_o_lora_makes_tasks_orthogonal(run: Callable[..., Run]) -> None:
    def overlap(weight: float) -> float:
        trainer = run("olora", "first", "second", orthogonality=weight, num_train_epochs=1).trainers[1]
        state = trainer.model.backbone.state_dict()
        pairs = [(state[name], state[name.replace("00000", "00001")]) for name in state if "A.lora-00000" in name]
        return sum(float((old @ new.T).square().sum()) for old, new in pairs)

    assert overlap(10.0) < 0.2 * overlap(0.0)


def test_earlier_adapters_of_o_lora_stay_and_are_summed(run: Callable[..., Run]) -> None:
    alone, both = (run("olora", *names).trainers[-1] for names in (["first"], ["first", "second"]))
    before, after = lora_of(alone, 0), lora_of(both, 0)
    assert len(after) == 2 * ADAPTED
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    layer = both.model.backbone.base_model.model.bert.encoder.layer[1].attention.self.query
    inputs = torch.randn(3, HIDDEN)
    weight = layer.weight + sum(
        layer.lora_B[name].weight @ layer.lora_A[name].weight for name in ("lora-00000", "lora-00001")
    )
    torch.testing.assert_close(layer(inputs), F.linear(inputs, weight, layer.bias))


def test_osf_leaves_the_directions_it_protects(run: Callable[..., Run]) -> None:
    # Adam divides each entry of a projected gradient by a different number, which rotates it; plain steps do not.
    done = run("osf", "first", "second", optim="sgd", learning_rate=1.0, num_train_epochs=1)
    start, end = (done.trainers[1].before.backbone, done.trainers[1].model.backbone)
    for name in ("query", "value"):
        layer = f"bert.encoder.layer.1.attention.self.{name}"
        before = start.base_model.model.get_submodule(layer).base_layer.weight.detach().double()
        change = end.get_submodule(layer).weight.detach().double() - before
        left, _, right = torch.linalg.svd(before)
        assert change.norm() > 1e-3
        assert (left[:, : HIDDEN // 2].T @ change).norm() < 1e-4 * change.norm()
        assert (change @ right[: HIDDEN // 2].T).norm() < 1e-4 * change.norm()


def test_osf_protects_more_with_each_task(run: Callable[..., Run]) -> None:
    steps = run("osf", "first", "second", "third", num_train_epochs=1).outcome.steps
    free = [HIDDEN - 1, HIDDEN - HIDDEN // 3, HIDDEN - 2 * HIDDEN // 3]  # none would be kept at first; PEFT needs one
    assert [step.adapter_parameters for step in steps] == [ADAPTED * rank * (2 * HIDDEN + 1) for rank in free]


def test_osf_scores_what_it_stores(run: Callable[..., Run], tiny_model: Callable[[str], Any]) -> None:
    done = run("osf", "first", "second")
    kept = done.trainers[1].model
    model = tiny_model("bert")
    model.classifier = kept.heads[0]
    for name, parameter in model.named_parameters():
        if name.endswith(("query.weight", "value.weight")):
            parameter.data = kept.backbone.get_parameter(name).data
    with torch.no_grad():
        outputs = model.eval()(torch.tensor(TASKS["first"].scored["input_ids"][:])).logits
    np.testing.assert_allclose(outputs.numpy(), done.outcome.predictions["first"], atol=1e-5)


@pytest.mark.parametrize(
    ("method", "adapters", "heads", "of_task", "shared"),
    [
        ("lora", [LORA, LORA], [HEAD, HEAD], LORA + HEAD, 0),
        ("sequential", [LORA, LORA], [HEAD, HEAD], HEAD, LORA),
        ("replay-5", [LORA, LORA], [HEAD, 2 * HEAD], HEAD, LORA),
        ("olora", [LORA, LORA], [HEAD, HEAD], LORA + HEAD, 0),
        (
            "osf",
            [ADAPTED * rank * (2 * HIDDEN + 1) for rank in (HIDDEN - 1, HIDDEN // 2)],
            [HEAD, HEAD],
            HEAD,
            ADAPTED * HIDDEN * HIDDEN,
        ),
        ("joint", [LORA], [2 * HEAD], HEAD, LORA),
    ],
)
def test_parameters_and_bytes_are_those_counted_by_hand(
    run: Callable[..., Run], method: str, adapters: list[int], heads: list[int], of_task: int, shared: int
) -> None:
    outcome = run(method, "first", "second").outcome
    assert [step.adapter_parameters for step in outcome.steps] == adapters
    assert [step.head_parameters for step in outcome.steps] == heads
    header = 200 * (2 * ADAPTED + 3)  # a name, a dtype, a shape and offsets for each tensor
    for size in outcome.bytes_of_tasks.values():
        assert 4 * of_task < size < 4 * of_task + header
    assert outcome.bytes_shared == 0 if not shared else 4 * shared < outcome.bytes_shared < 4 * shared + header
    assert outcome.bytes_in_all == outcome.bytes_shared + sum(outcome.bytes_of_tasks.values())


def test_samples_of_all_kinds_go_once_through_the_backbone_and_to_their_own_head(
    baselines: ModuleType, tiny_model: Callable[[str], Any]
) -> None:
    tasks = {
        "classes": ToyTask(1, 0),
        "number": ToyTask(2, 1, "regression", num_labels=1),
        "several": ToyTask(3, 2, "multi_label_classification", num_labels=3),
    }
    model = tiny_model("bert")
    headed = baselines.HeadedModel(model, tasks).eval()
    data = baselines.prepare(tasks, baselines.inputs_of(model))
    rows = [data[name]["train"][place] for place in (0, 1) for name in ("several", "classes", "number")]
    batch = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels", "task")}
    passes = []
    headed.backbone.bert.register_forward_hook(lambda *_: passes.append(1))
    mixed = headed(**batch)
    assert len(passes) == 1
    mixed.loss.backward()

    losses = []
    for place, (task, head) in enumerate(zip(tasks.values(), headed.heads, strict=True)):
        model.config.problem_type, model.num_labels, model.classifier = task.problem_type, task.num_labels, head[0]
        own = [row for row in range(len(rows)) if rows[row]["task"] == place]
        labels = torch.tensor([task.data["train"][place]["label"] for place in (0, 1)])
        expected = model.eval()(batch["input_ids"][own], labels=labels)
        torch.testing.assert_close(mixed.logits[own, : task.num_labels], expected.logits)
        assert not mixed.logits[own, task.num_labels :].any()
        losses.append(expected.loss)
        assert head[0].weight.grad.abs().sum() > 0
    torch.testing.assert_close(mixed.loss, torch.stack(losses).mean())
    headed.zero_grad()
    headed(**{key: value[1:2] for key, value in batch.items()}).loss.backward()
    assert [head[0].weight.grad is None for head in headed.heads] == [False, True, True]


@pytest.mark.parametrize("method", ["replay-5", "joint"])
def test_tasks_of_different_kinds_are_learned_in_one_stream(
    baselines: ModuleType, pristine_models: dict[str, PreTrainedModel], tmp_path: Path, method: str
) -> None:
    tasks = {
        "number": ToyTask(1, 0, "regression", num_labels=1),
        "several": ToyTask(2, 1, "multi_label_classification", ("error", "accuracy"), 3),
    }
    settings = baselines.BaselineSettings(arguments(str(tmp_path)), ["query", "value"])
    outcome = baselines.train(method, pristine_models["bert"], tasks, settings)
    assert outcome.metrics.score == "main metric"
    assert min(scores["accuracy"] for scores in outcome.scores.values()) > 0.75
    assert outcome.metrics.matrix[-1][1] == outcome.scores["several"]["error"]


def test_a_task_with_more_outputs_than_the_model_is_refused(
    baselines: ModuleType, tiny_model: Callable[[str], Any]
) -> None:
    outputs = tiny_model("bert").config.num_labels
    task = ToyTask(1, 0, "multi_label_classification", num_labels=outputs + 1)
    with pytest.raises(ValueError, match=f"classifier has {outputs} outputs, expected {outputs + 1}"):
        baselines.HeadedModel(tiny_model("bert"), {"wide": task})


def test_a_head_keeps_the_form_of_the_classifier_it_stands_for(baselines: ModuleType) -> None:
    config = RobertaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
    )
    headed = baselines.HeadedModel(RobertaForSequenceClassification(config), {"several": ToyTask(1, 0)})
    outputs = headed(task=torch.zeros(3, dtype=torch.long), input_ids=torch.full((3, 8), 5))
    assert outputs.loss is None and outputs.logits.shape == (3, 2)
    assert sum(parameter.numel() for parameter in headed.heads.parameters()) == 32 * 32 + 32 + 2 * 32 + 2


def with_labels(task: ToyTask, labels: list[Any]) -> ToyTask:
    changed = copy.copy(task)
    train = task.data["train"].select(range(len(labels))).remove_columns("label").add_column("label", labels)
    object.__setattr__(changed, "data", DatasetDict(train=train, test=task.data["test"]))
    return changed


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2], r"task 'bad' has the label 2, expected whole numbers from 0 to 1"),
        ([0.0, 0.5, 1.0], r"task 'bad' has the label 0.5, expected whole numbers"),
        (["Good", "Bad"], r"task 'bad' has labels such as 'Good', expected numbers, 1 per label"),
        ([[0, 1], [1, 0]], r"task 'bad' has labels of 2 numbers, expected 1"),
    ],
)
def test_labels_that_are_not_of_the_kind_of_their_task_are_refused_before_training(
    baselines: ModuleType,
    pristine_models: dict[str, PreTrainedModel],
    tmp_path: Path,
    labels: list[Any],
    message: str,
) -> None:
    tasks = {"good": TASKS["first"], "bad": with_labels(TASKS["second"], labels)}
    MADE.clear()
    settings = baselines.BaselineSettings(arguments(str(tmp_path)), ["query", "value"])
    with pytest.raises(ValueError, match=message):
        baselines.train("lora", pristine_models["bert"], tasks, settings)
    assert not MADE


def test_what_cannot_be_compared_is_refused_by_name(
    baselines: ModuleType, pristine_models: dict[str, PreTrainedModel], tmp_path: Path
) -> None:
    settings = baselines.BaselineSettings(arguments(str(tmp_path)), ["query", "value"])
    bert = pristine_models["bert"]
    with pytest.raises(ValueError, match="method is 'replay-9', expected one of lora, sequential, replay-2"):
        baselines.train("replay-9", bert, TASKS, settings)
    with pytest.raises(ValueError, match="tasks is empty"):
        baselines.train("lora", bert, {}, settings)
    with pytest.raises(ValueError, match="task 'odd' has problem type 'ranking', expected one of"):
        baselines.train("lora", bert, {"odd": ToyTask(1, 0, "ranking")}, settings)
    with pytest.raises(ValueError, match="BertModel has no dense classifier, expected one as classifier or score"):
        baselines.train("lora", bert.bert, TASKS, settings)
    beside = BertForSequenceClassification(bert.config)
    beside.pre_classifier = torch.nn.Linear(HIDDEN, HIDDEN)
    with pytest.raises(ValueError, match=r"has 'pre_classifier\.weight' outside its body and its classifier"):
        baselines.train("lora", beside, TASKS, settings)
    smoothing = baselines.BaselineSettings(arguments(str(tmp_path), label_smoothing_factor=0.1), ["query", "value"])
    with pytest.raises(ValueError, match=r"label_smoothing_factor is 0\.1, expected 0"):
        baselines.train("lora", bert, TASKS, smoothing)
