"""What may change when a stream is continued, and which warnings are given before anything is trained."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel

from share_hf import SharedSubspace, ShareTrainer
from share_hf.continual.fingerprints import data_fingerprint, weights_fingerprint
from share_hf.continual.position import StreamPosition

from .cases import At, Interruption, assert_same_tasks, classification_tasks, classifier_trainer
from .test_interruptions import Start, interrupt, start, stop_at  # noqa: F401


TASKS = classification_tasks("colors", "shapes", "sizes")
FIRST_TWO = {name: TASKS[name] for name in ("colors", "shapes")}


@pytest.fixture
def warnings_of(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Warnings since the last call."""
    caplog.set_level(logging.WARNING)

    def said() -> list[str]:
        lines = [record.getMessage() for record in caplog.records if record.name.startswith("share_hf.continual")]
        caplog.clear()
        return lines

    return said


def script(trainer: ShareTrainer) -> ShareTrainer:
    """What a person runs, and runs again: a stream, and one more task."""
    trainer.train(resume_from_checkpoint=True)
    trainer.learn_task("sizes", TASKS["sizes"]["train"], TASKS["sizes"]["test"])
    return trainer


@pytest.fixture(scope="module")
def whole(pristine_models: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> ShareTrainer:
    values = dict(save_strategy="steps", save_steps=1, max_steps=-1, num_train_epochs=1, finetune_num_train_epochs=0.5)
    model = copy.deepcopy(pristine_models["bert"])
    return script(classifier_trainer(model, tmp_path_factory.mktemp("whole"), FIRST_TWO, **values))


# ---- A script that is run again -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "where",
    [("colors-init", 2), ("shapes-adapt", 3), ("sizes-adapt", 2), ("sizes-adapt", 4), ("sizes-finetune", 1), None],
    ids=str,
)
def test_a_script_that_ends_with_a_task_of_its_own_can_be_run_again(
    where: tuple[str, int] | None,
    start: Start,  # noqa: F811
    whole: ShareTrainer,
) -> None:
    if where is None:
        script(start(tasks=FIRST_TWO))
    else:
        trainer = start(tasks=FIRST_TWO)
        trainer.add_callback(stop_at(*where))
        with pytest.raises(Interruption):
            script(trainer)
    again = script(start(tasks=FIRST_TWO))
    assert_same_tasks(again.subspace, whole.subspace)
    assert again.metrics["matrix"] == whole.metrics["matrix"]
    assert set(again.evaluate_tasks()) == set(TASKS)


def test_a_task_that_was_found_learned_is_refused_the_second_time(start: Start) -> None:  # noqa: F811
    script(start(tasks=FIRST_TWO))
    again = script(start(tasks=FIRST_TWO))
    with pytest.raises(ValueError, match="sizes"):
        again.learn_task("sizes", TASKS["sizes"]["train"])


def test_tasks_that_came_by_themselves_may_be_named_among_the_others_later(
    start: Start,  # noqa: F811
    whole: ShareTrainer,
) -> None:
    script(start(tasks=FIRST_TWO))
    again = start(tasks=TASKS)
    again.train(resume_from_checkpoint=True)
    assert_same_tasks(again.subspace, whole.subspace)


def test_a_stream_of_nothing_but_single_tasks_continues(start: Start) -> None:  # noqa: F811
    first = start(tasks={})
    first.learn_task("colors", TASKS["colors"]["train"], TASKS["colors"]["test"])
    again = start(tasks={})
    again.train(resume_from_checkpoint=True)
    assert again.learn_task("colors", TASKS["colors"]["train"], TASKS["colors"]["test"]) is None
    again.learn_task("shapes", TASKS["shapes"]["train"], TASKS["shapes"]["test"])
    assert again.metrics["tasks"] == ["colors", "shapes"]
    assert len(again.metrics["matrix"][1]) == 2 and None not in again.metrics["matrix"][1]


def test_another_task_takes_the_place_of_one_that_was_not_merged(
    start: Start,  # noqa: F811
    warnings_of: Callable[[], list[str]],
) -> None:
    interrupt(start(), stop_at("shapes-adapt", 2))
    again = start(tasks={"colors": TASKS["colors"]})
    again.train(resume_from_checkpoint=True)
    warnings_of()
    again.learn_task("sizes", TASKS["sizes"]["train"], TASKS["sizes"]["test"])
    assert any("while it learned task 'shapes'; 'sizes' replaces that task" in line for line in warnings_of())
    assert again.metrics["tasks"] == ["colors", "sizes"]
    assert len(again.metrics["matrix"]) == 2


def test_no_task_is_learned_before_one_that_is_merged_and_not_finished(start: Start) -> None:  # noqa: F811
    interrupt(start(), stop_at("shapes-finetune", 1))
    again = start(tasks={"colors": TASKS["colors"]})
    again.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"after the merge of task 'shapes', expected learn_task\('shapes'"):
        again.learn_task("sizes", TASKS["sizes"]["train"])
    again.learn_task("shapes", TASKS["shapes"]["train"], TASKS["shapes"]["test"])
    assert again.metrics["tasks"] == ["colors", "shapes"]


def test_rows_of_scores_belong_to_their_tasks_when_one_was_given_up(start: Start) -> None:  # noqa: F811
    trainer = start(tasks=FIRST_TWO)
    stop = stop_at("shapes-adapt", 2)
    trainer.add_callback(stop)
    with pytest.raises(Interruption):
        trainer.train()
    trainer.remove_callback(stop)
    trainer.learn_task("sizes", TASKS["sizes"]["train"], TASKS["sizes"]["test"])
    assert trainer.metrics["tasks"] == ["colors", "sizes"]
    assert [len(row) for row in trainer.metrics["matrix"]] == [2, 2]


# ---- Another base model ---------------------------------------------------------------------------------------------


def changed(model: PreTrainedModel, name: str | None, noise: float) -> PreTrainedModel:
    model.name_or_path = name if name is not None else model.name_or_path
    with torch.no_grad():
        for parameter in model.bert.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.mark.parametrize("name", [None, "org/other"])
def test_other_weights_are_refused_whatever_they_are_called(
    name: str | None, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    values = dict(save_strategy="steps", save_steps=1)
    interrupt(classifier_trainer(changed(tiny_model("bert"), "org/base", 0), tmp_path, FIRST_TWO, **values), AT_SHAPES)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = changed(tiny_model("bert"), name or "org/base", 1e-3)
    trainer = classifier_trainer(other, tmp_path, FIRST_TWO, **values)
    message = f"one of base model 'org/base', and this is {name or 'org/base'!r} with other weights"
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


AT_SHAPES = stop_at("shapes-adapt", 2)


def test_the_same_weights_may_have_another_name(
    tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path, warnings_of: Callable[[], list[str]]
) -> None:
    interrupt(classifier_trainer(changed(tiny_model("bert"), "org/base", 0), tmp_path, FIRST_TWO), AT_SHAPES)
    warnings_of()
    trainer = classifier_trainer(changed(tiny_model("bert"), str(tmp_path / "copy"), 0), tmp_path, FIRST_TWO)
    trainer.train(resume_from_checkpoint=True)
    assert warnings_of() == []


def test_weights_of_another_precision_are_reported(
    tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path, warnings_of: Callable[[], list[str]]
) -> None:
    interrupt(classifier_trainer(changed(tiny_model("bert"), "org/base", 0), tmp_path, FIRST_TWO), AT_SHAPES)
    warnings_of()
    half = changed(tiny_model("bert"), "org/base", 0).to(torch.bfloat16)
    trainer = classifier_trainer(half, tmp_path, FIRST_TWO)
    trainer.train(resume_from_checkpoint=True)
    (line,) = warnings_of()
    assert "of other shapes, dtypes or places" in line


def test_a_subspace_of_another_base_model_is_reported(
    tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path, warnings_of: Callable[[], list[str]]
) -> None:
    first = classifier_trainer(changed(tiny_model("bert"), "org/base", 0), tmp_path / "first", FIRST_TWO)
    first.train()
    warnings_of()
    for name, lines in (("org/base", 0), ("org/other", 1)):
        model = changed(tiny_model("bert"), name, 0)
        classifier_trainer(model, tmp_path / "second", {}, trainer={"subspace": first.subspace})
        said = warnings_of()
        assert len(said) == lines
    assert "belongs to base model 'org/base', and the model is 'org/other'" in said[0]


def test_heads_that_begin_at_random_do_not_make_another_model(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model, other = tiny_model("bert"), tiny_model("bert")
    torch.nn.init.normal_(other.classifier.weight)
    assert weights_fingerprint(model, ["classifier"]) == weights_fingerprint(other, ["classifier"])
    assert weights_fingerprint(model) != weights_fingerprint(other)


def test_weights_that_are_not_here_are_not_compared(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = tiny_model("llama")
    whole = weights_fingerprint(model)
    absent = weights_fingerprint(model.to("meta"))
    assert absent.values is None
    assert absent.layout != whole.layout


# ---- Other arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"learning_rate": 1e-3}, "learning_rate=0.001 (was 0.005)"),
        ({"optim": "sgd"}, "optim='sgd' (was 'adamw_torch"),
        ({"per_device_train_batch_size": 4}, "train_batch_size=4 (was 8)"),
        ({"num_train_epochs": 2}, "num_train_epochs=2 (was 1)"),
        ({"share": {"num_temporary": 5}}, "num_temporary=5 (was 3)"),
        ({"share": {"temporary_init": "random"}}, "temporary_init='random' (was 'basis')"),
        ({"share": {"target_modules": ["query"]}}, "target_modules=['query'] (was ['query', 'value'])"),
        ({"seed": 3}, "seed=3 (was 42)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_that_have_changed_are_reported_and_hold_for_the_whole_phase(
    changes: dict[str, Any],
    text: str,
    start: Start,  # noqa: F811
    warnings_of: Callable[[], list[str]],
) -> None:
    interrupt(start(tasks=FIRST_TWO), stop_at("shapes-adapt", 2))
    warnings_of()
    again, begun = start(tasks=FIRST_TWO, **changes), []
    again.add_callback(At("on_train_begin", lambda args, state, **kwargs: begun.append(state.global_step)))
    again.train(resume_from_checkpoint=True)
    (line,) = warnings_of()
    assert text in line
    assert "the interrupted phase of task 'shapes' starts over" in line
    assert begun[0] == 0
    assert again.subspace.tasks == tuple(FIRST_TWO)


def test_what_does_not_change_a_result_is_not_reported(
    start: Start,  # noqa: F811
    warnings_of: Callable[[], list[str]],
) -> None:
    interrupt(start(tasks=FIRST_TWO), stop_at("shapes-adapt", 2))
    warnings_of()
    changes = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, logging_steps=5, save_steps=2)
    again, begun = start(tasks=FIRST_TWO, per_device_eval_batch_size=3, run_name="again", **changes), []
    again.add_callback(At("on_train_begin", lambda args, state, **kwargs: begun.append(state.global_step)))
    again.train(resume_from_checkpoint=True)
    assert warnings_of() == []
    assert begun[0] == 1


def test_what_an_earlier_version_did_not_write_down_is_not_asked_for(
    start: Start,  # noqa: F811
    tmp_path: Path,
    warnings_of: Callable[[], list[str]],
) -> None:
    interrupt(start(tasks=FIRST_TWO), stop_at("shapes-adapt", 2))
    path = tmp_path / "stream" / "stream_state.json"
    state = json.loads(path.read_text())
    del state["record"]
    path.write_text(json.dumps(state))
    warnings_of()
    again = start(tasks=FIRST_TWO, learning_rate=1e-3)
    again.train(resume_from_checkpoint=True)
    assert warnings_of() == []


# ---- Edited data ----------------------------------------------------------------------------------------------------


def edited(data: Dataset) -> Dataset:
    rows = data.to_dict()
    rows["labels"][7] = 1 - min(rows["labels"][7], 1)
    return Dataset.from_dict(rows)


@pytest.mark.parametrize(("task", "split", "begun_at"), [("colors", "train", 1), ("shapes", "train", 0)])
def test_edited_data_is_reported_by_its_task(
    task: str,
    split: str,
    begun_at: int,
    start: Start,  # noqa: F811
    warnings_of: Callable[[], list[str]],
) -> None:
    interrupt(start(tasks=FIRST_TWO), stop_at("shapes-adapt", 2))
    warnings_of()
    tasks = {**FIRST_TWO, task: DatasetDict({**FIRST_TWO[task], split: edited(FIRST_TWO[task][split])})}
    again, begun = start(tasks=tasks), []
    again.add_callback(At("on_train_begin", lambda args, state, **kwargs: begun.append(state.global_step)))
    again.train(resume_from_checkpoint=True)
    (line,) = warnings_of()
    assert f"task {task!r} has different {split} data than when it was started: 32 rows of input_ids, labels (" in line
    assert begun[0] == begun_at


def test_edited_data_of_a_task_that_comes_by_itself_is_reported(
    start: Start,  # noqa: F811
    warnings_of: Callable[[], list[str]],
) -> None:
    script(start(tasks=FIRST_TWO))
    again = start(tasks=FIRST_TWO)
    again.train(resume_from_checkpoint=True)
    warnings_of()
    again.learn_task("sizes", edited(TASKS["sizes"]["train"]), TASKS["sizes"]["test"])
    (line,) = warnings_of()
    assert "task 'sizes' has different train data" in line


class Rows(torch.utils.data.Dataset):
    """Examples of torch, the same each time or not."""

    def __init__(self, shift: int = 0, noise: float = 0.0) -> None:
        self.shift, self.noise = shift, noise

    def __len__(self) -> int:
        return 200

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"x": torch.full((3,), number + self.shift) + self.noise * torch.rand(3), "text": f"{number}", "y": 1}


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([{"x": 1}])


def test_data_of_any_kind_is_recognized_by_its_content() -> None:
    data = TASKS["colors"]["train"]
    rows = data.to_dict()
    assert data_fingerprint(data) == data_fingerprint(Dataset.from_dict(rows))
    assert data_fingerprint(data) == data_fingerprint(data.with_format("torch"))
    assert data_fingerprint(data) != data_fingerprint(edited(data))
    assert data_fingerprint(data) != data_fingerprint(data.select(range(31)))
    assert data_fingerprint(data) != data_fingerprint(data.rename_column("labels", "label"))
    assert data_fingerprint(Rows()) == data_fingerprint(Rows()) != data_fingerprint(Rows(shift=1))
    assert data_fingerprint(Rows(noise=1.0)) == "200 rows"
    assert data_fingerprint([{"x": object()}]) == "1 rows"
    assert data_fingerprint(Stream()) is None
    assert data_fingerprint(data.to_iterable_dataset()) is None


# ---- A new stream in a folder that has one --------------------------------------------------------------------------


def test_a_stream_that_starts_over_keeps_what_an_earlier_one_learned(
    start: Start,  # noqa: F811
    tmp_path: Path,
    warnings_of: Callable[[], list[str]],
) -> None:
    first = start(tasks=FIRST_TWO)
    first.train()
    learned = SharedSubspace.from_pretrained(tmp_path / "stream" / "subspace")
    warnings_of()
    second = start(tasks={"sizes": TASKS["sizes"]})
    second.train()
    (line,) = warnings_of()
    kept = tmp_path / "stream" / "earlier" / "0001"
    assert str(kept / "subspace") in line
    assert_same_tasks(SharedSubspace.from_pretrained(kept / "subspace"), learned)
    assert SharedSubspace.from_pretrained(tmp_path / "stream" / "subspace").tasks == ("sizes",)
    # The stream that was kept continues, and the one that was there in between is kept instead.
    third = start(tasks=TASKS)
    third.train(resume_from_checkpoint=str(kept))
    assert third.subspace.tasks == tuple(TASKS)
    assert SharedSubspace.from_pretrained(kept.with_name("0002") / "subspace").tasks == ("sizes",)


def test_what_a_stream_begins_from_is_not_kept_twice(start: Start, tmp_path: Path) -> None:  # noqa: F811
    start(tasks=FIRST_TWO).train()
    given = SharedSubspace.from_pretrained(tmp_path / "stream" / "subspace")
    trainer = start(tasks={"sizes": TASKS["sizes"]}, trainer={"subspace": given})
    trainer.train()
    assert trainer.subspace.tasks == tuple(TASKS)
    assert not (tmp_path / "stream" / "earlier").exists()


# ---- Tampered states ------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_tampered_state_is_read_or_refused_by_name(data: st.DataObject, tmp_path: Path) -> None:
    state = {
        **dict(position=1, task="b", stage="learn", steps=1, trained_steps=3, phase_steps=0, marks_phases=True),
        "metrics": {"score": "accuracy", "tasks": ["a", "b"], "matrix": [[0.5, None]], "baseline": [None, None]},
        "record": {
            "base_model": "org/base",
            "weights": ["abc", "def"],
            "arguments": {"seed": 1},
            "data": {"a": {"train": "3 rows", "evaluation": None}},
        },
    }
    for _ in range(data.draw(st.integers(1, 3))):
        place = state
        while True:
            name = data.draw(st.sampled_from(sorted(place)))
            if not isinstance(place[name], dict) or not place[name] or data.draw(st.booleans()):
                break
            place = place[name]
        place[name] = data.draw(json_values)
    (tmp_path / "stream_state.json").write_text(json.dumps(state))
    try:
        found = StreamPosition.load(tmp_path)
    except ValueError as error:
        assert "stream_state.json: " in str(error)
        return
    found.save(tmp_path)
    assert StreamPosition.load(tmp_path) == found
