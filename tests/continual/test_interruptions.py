"""What an interrupted stream finds in its folder: its own work, that of an earlier run, or that of another stream."""

from __future__ import annotations

import copy
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from share_hf import SharedSubspace, ShareTrainer
from share_hf.continual import stream as stream_module
from share_hf.continual import task_trainer as task_trainer_module
from share_hf.continual.checkpoints import newest_whole_checkpoint
from share_hf.continual.stream import Stream
from share_hf.format.tree import read_tree

from .cases import (
    LLAMA_TARGETS,
    At,
    Interruption,
    arguments,
    assert_same_tasks,
    classification_task,
    classification_tasks,
    classifier_trainer,
    config,
    language_tasks,
)


NAMES = ("colors", "shapes", "sizes")
CHECKPOINTS: dict[str, Any] = dict(save_strategy="steps", save_steps=1, max_steps=-1, num_train_epochs=1)

Start = Callable[..., ShareTrainer]


@pytest.fixture
def start(tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path) -> Start:
    """Make a new trainer in a folder, like a new process: three tasks with four steps each and two of finetuning."""

    def make(folder: str = "stream", tasks: Any = None, **changes: Any) -> ShareTrainer:
        values = {**CHECKPOINTS, "finetune_num_train_epochs": 0.5, **changes}
        tasks = tasks if tasks is not None else classification_tasks(*NAMES)
        return classifier_trainer(tiny_model("bert"), tmp_path / folder, tasks, **values)

    return make


@pytest.fixture(scope="module")
def whole(pristine_models: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> ShareTrainer:
    """The stream that nothing interrupts."""
    trainer = classifier_trainer(
        copy.deepcopy(pristine_models["bert"]),
        tmp_path_factory.mktemp("whole"),
        classification_tasks(*NAMES),
        finetune_num_train_epochs=0.5,
        **CHECKPOINTS,
    )
    trainer.train()
    return trainer


def stop_at(phase: str, step: int) -> At:
    """Stop the stream after this step of a phase."""

    def stop(args: Any, state: Any, **kwargs: Any) -> None:
        if args.output_dir.endswith(phase) and state.global_step == step:
            raise Interruption

    return At("on_step_end", stop)


def interrupt(trainer: ShareTrainer, at: At | None = None) -> None:
    if at is not None:
        trainer.add_callback(at)
    with pytest.raises(Interruption):
        trainer.train(resume_from_checkpoint=True)


def assert_ends_as(trainer: ShareTrainer, whole: ShareTrainer) -> None:
    trainer.train(resume_from_checkpoint=True)
    assert_same_tasks(trainer.subspace, whole.subspace)
    assert trainer.metrics["matrix"] == whole.metrics["matrix"]
    assert trainer.metrics["drift"] == whole.metrics["drift"]
    assert_same_tasks(read_tree(Path(trainer.args.output_dir) / "subspace"), whole.subspace)


def test_a_stream_that_is_interrupted_again_and_again_ends_as_one_that_is_not(
    start: Start, whole: ShareTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for phase, step in (("colors-init", 1), ("colors-init", 3), ("shapes-adapt", 2), ("shapes-finetune", 1)):
        interrupt(start(), stop_at(phase, step))
    for name in ("_evaluate_after", "_log_merge"):
        with monkeypatch.context() as patch:
            patch.setattr(ShareTrainer, name, raising(getattr(ShareTrainer, name)))
            interrupt(start())
    for name in ("take_merged", "write_tree", "take_coefficients"):
        with monkeypatch.context() as patch:
            module = stream_module if name == "write_tree" else task_trainer_module
            patch.setattr(module, name, raising(getattr(module, name)))
            interrupt(start())
    assert_ends_as(start(), whole)


def raising(original: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        raise Interruption

    return wrapper


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 2, 4, 7], ids=lambda call: f"save-{call}")
def test_a_stream_that_is_interrupted_between_two_saves_ends_as_one_that_is_not(
    call: int, start: Start, whole: ShareTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The subspace is saved, but its record of the stream's position is not."""
    calls = [0]
    original = Stream.save_position

    def save(self: Stream, *args: Any, **kwargs: Any) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise Interruption
        original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "save_position", save)
        interrupt(start())
    assert_ends_as(start(), whole)


def test_the_folder_of_the_stream_can_be_named(start: Start, whole: ShareTrainer, tmp_path: Path) -> None:
    interrupt(start(), stop_at("shapes-adapt", 2))
    (tmp_path / "stream").rename(tmp_path / "moved")
    trainer = start("elsewhere")
    trainer.train(resume_from_checkpoint=str(tmp_path / "moved"))
    assert trainer.subspace.tasks == NAMES
    assert_same_tasks(trainer.subspace, whole.subspace)


@pytest.mark.parametrize("place", ["nowhere", "stream/phases/0001-colors-init/checkpoint-2"])
def test_a_folder_that_has_no_stream_is_refused_and_nothing_is_deleted(
    place: str, start: Start, tmp_path: Path
) -> None:
    interrupt(start(), stop_at("shapes-adapt", 2))
    before = {path: path.read_bytes() for path in (tmp_path / "stream").rglob("*") if path.is_file()}
    with pytest.raises(
        ValueError, match=rf"{place}: no stream_state.json there, expected the output_dir of an earlier"
    ):
        start().train(resume_from_checkpoint=str(tmp_path / place))
    assert {path: path.read_bytes() for path in (tmp_path / "stream").rglob("*") if path.is_file()} == before


def test_true_as_a_command_line_has_it_resumes_too(start: Start, whole: ShareTrainer) -> None:
    interrupt(start(), stop_at("shapes-adapt", 2))
    trainer = start()
    trainer.train(resume_from_checkpoint="true")
    assert_same_tasks(trainer.subspace, whole.subspace)
    assert trainer.state.global_step > 0


def test_steps_are_counted_on_where_the_stream_was_interrupted(start: Start, whole: ShareTrainer) -> None:
    interrupt(start(), stop_at("shapes-adapt", 2))
    trainer = start()
    trainer.train(resume_from_checkpoint=True)
    resumed, expected = (
        [log["step"] for log in each.state.log_history if "share/average" in log] for each in (trainer, whole)
    )
    assert expected == [6, 12, 18]
    assert resumed == expected[1:]


def test_all_phases_are_logged_as_one_curve_in_one_place(start: Start, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    trainer = start(report_to="tensorboard", logging_steps=1)
    trainer.train()
    steps = [log["step"] for log in trainer.state.log_history if "loss" in log]
    assert steps == list(range(1, 19))
    assert not list((tmp_path / "stream" / "phases").rglob("events.*"))
    (folder,) = (tmp_path / "stream" / "runs").iterdir()
    assert list(folder.glob("events.*"))


# ---- What an earlier run left ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["colors-init", "shapes-adapt"])
def test_nothing_of_an_earlier_run_in_the_same_folder_is_used(phase: str, start: Start, whole: ShareTrainer) -> None:
    start(learning_rate=1e-1, seed=1).train()
    trainer = start()
    trainer.add_callback(stop_at(phase, 2))
    with pytest.raises(Interruption):
        trainer.train()
    assert_ends_as(start(), whole)


def test_a_second_try_at_a_task_takes_nothing_from_the_first(start: Start, tmp_path: Path) -> None:
    tasks = classification_tasks("colors", "shapes")
    expected = start("expected", tasks)
    expected.train()
    trainer = start(tasks={})
    trainer.learn_task("colors", tasks["colors"]["train"], tasks["colors"]["test"])
    # Other data, trained further: its checkpoints have the higher numbers.
    for data, step in ((classification_task(5, 3), 4), (tasks["shapes"], 2)):
        stop = stop_at("shapes-adapt", step)
        trainer.add_callback(stop)
        with pytest.raises(Interruption):
            trainer.learn_task("shapes", data["train"], data["test"])
        trainer.remove_callback(stop)
    assert_ends_as(start(tasks=tasks), expected)


def test_a_run_that_is_not_resumed_begins_again(start: Start, whole: ShareTrainer) -> None:
    interrupt(start(), stop_at("shapes-adapt", 2))
    trainer = start()
    trainer.train()
    assert_same_tasks(trainer.subspace, whole.subspace)


# ---- Torn checkpoints -----------------------------------------------------------------------------------------------


class Stranger:
    """An object that runs code when it is unpickled."""

    ran: list[str] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return Stranger.ran.append, ("code",)


def hostile() -> bytes:
    content = io.BytesIO()
    torch.save({"state": Stranger()}, content)
    return content.getvalue()


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "garbage": lambda content: random.Random(0).randbytes(len(content)),
    "zeros": lambda content: bytes(len(content)),
}
DAMAGED = [
    *((name, damage) for name in ("trainer_state.json", "adapter_model.safetensors") for damage in DAMAGES),
    *((name, damage) for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt") for damage in ("cut", "garbage")),
]


@pytest.fixture(scope="module")
def stopped(pristine_models: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a stream that was stopped after three checkpoints of a phase. It must not be changed."""
    folder = tmp_path_factory.mktemp("stopped")
    values = {**CHECKPOINTS, "finetune_num_train_epochs": 0.5}
    model = copy.deepcopy(pristine_models["bert"])
    interrupt(classifier_trainer(model, folder, classification_tasks(*NAMES), **values), stop_at("shapes-adapt", 4))
    return folder


@pytest.mark.parametrize(("name", "damage"), [*DAMAGED, ("optimizer.pt", "hostile")])
def test_a_damaged_checkpoint_is_passed_over_and_named(
    name: str, damage: str, stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (original,) = (stopped / "phases").glob("*-shapes-adapt")
    folder = shutil.copytree(original, tmp_path / original.name)
    assert newest_whole_checkpoint(folder) == folder / "checkpoint-3"
    assert not caplog.messages
    (path,) = (folder / "checkpoint-3").rglob(name)
    content = hostile() if damage == "hostile" else DAMAGES[damage](path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert newest_whole_checkpoint(folder) == folder / "checkpoint-2"
    (line,) = caplog.messages
    assert str(folder / "checkpoint-3") in line and (name in line)
    assert not Stranger.ran


def test_a_byte_of_a_checkpoint_that_has_changed_is_seen(stopped: Path, tmp_path: Path) -> None:
    (original,) = (stopped / "phases").glob("*-shapes-adapt")
    folder = shutil.copytree(original, tmp_path / original.name)
    path = folder / "checkpoint-3" / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert newest_whole_checkpoint(folder) == folder / "checkpoint-2"


def test_the_newest_checkpoint_that_was_written_to_its_end_is_taken(
    start: Start, whole: ShareTrainer, stopped: Path, tmp_path: Path
) -> None:
    shutil.copytree(stopped, tmp_path / "stream")
    (folder,) = (tmp_path / "stream" / "phases").glob("*-shapes-adapt")
    (adapter,) = (folder / "checkpoint-3").rglob("adapter_model.safetensors")
    adapter.write_bytes(adapter.read_bytes()[:-1])
    (folder / "checkpoint-9").mkdir()
    (folder / "checkpoint-x").mkdir()
    assert newest_whole_checkpoint(folder) == folder / "checkpoint-2"
    assert_ends_as(start(), whole)


def test_a_folder_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert newest_whole_checkpoint(tmp_path) is None
    assert newest_whole_checkpoint(tmp_path / "nowhere") is None


# ---- Other streams --------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(start: Start, tmp_path: Path) -> Path:
    """The folder of a stream that was stopped while it learned its second task."""
    interrupt(start(), stop_at("shapes-adapt", 2))
    return tmp_path / "stream"


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (("shapes", "colors", "sizes"), r"was at task 'shapes', number 2, but tasks is \['shapes', 'colors'"),
        (("sizes", "shapes", "sounds"), r"has learned \['colors'\], but tasks is \['sizes', 'shapes', 'sounds'\]"),
    ],
)
def test_a_stream_of_other_tasks_is_refused(
    tasks: tuple[str, ...], message: str, start: Start, interrupted: Path
) -> None:
    before = (interrupted / "stream_state.json").read_text()
    trainer = start(tasks=classification_tasks(*tasks))
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.subspace.tasks == ()
    assert (interrupted / "stream_state.json").read_text() == before


def test_further_tasks_may_follow_those_of_the_interrupted_stream(start: Start, interrupted: Path) -> None:
    trainer = start(tasks=classification_tasks(*NAMES, "sounds"))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.subspace.tasks == (*NAMES, "sounds")


@pytest.mark.parametrize(
    "settings", [{"num_components": 16}, {"pseudo_rank": 2}, {"basis": "factor"}, {"drift_tolerance": 0.5}]
)
def test_a_stream_with_other_settings_is_refused(settings: dict[str, Any], start: Start, interrupted: Path) -> None:
    trainer = start(share=settings)
    (name,) = settings
    with pytest.raises(ValueError, match=rf"the stream has .*{name}=.*, expected .*{name}={settings[name]!r}"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.subspace.tasks == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "holds a list, expected a JSON object"),
        ('{"position": 1, "unknown": 2}', "not a stream state"),
    ],
)
def test_a_damaged_stream_state_is_refused(content: str, message: str, start: Start, interrupted: Path) -> None:
    (interrupted / "stream_state.json").write_text(content)
    with pytest.raises(ValueError, match=rf"stream_state\.json: {message}"):
        start().train(resume_from_checkpoint=True)


def test_a_damaged_subspace_is_refused_and_not_started_over(start: Start, interrupted: Path) -> None:
    path = interrupted / "subspace" / "subspace.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"subspace\.safetensors: "):
        start().train(resume_from_checkpoint=True)
    assert path.read_bytes() == content[:-1]


def test_a_subspace_without_what_the_stream_has_learned_is_refused(start: Start, interrupted: Path) -> None:
    shutil.rmtree(interrupted / "subspace")
    trainer = start()
    with pytest.raises(ValueError, match=r"subspace: has tasks \[\], expected \['colors'\] as in stream_state.json"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.subspace.tasks == ()


def test_a_stream_that_began_from_a_subspace_continues_from_it(
    start: Start, whole: ShareTrainer, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    given = SharedSubspace(whole.subspace.state)
    tasks = {"sounds": classification_task(3, 3), "smells": classification_task(4, 2)}
    expected = start("uninterrupted", tasks, trainer={"subspace": given})
    expected.train()
    interrupt(start(tasks=tasks, trainer={"subspace": given}), stop_at("sounds-adapt", 2))
    assert_ends_as(start(tasks=tasks, trainer={"subspace": given}), expected)
    assert expected.subspace.tasks == (*NAMES, "sounds", "smells")


def test_the_state_of_a_stream_is_json_that_a_person_can_read(start: Start, interrupted: Path) -> None:
    state = json.loads((interrupted / "stream_state.json").read_text())
    assert (state["position"], state["task"], state["stage"]) == (1, "shapes", "learn")
    assert state["metrics"]["tasks"] == ["colors", "shapes"]


def test_a_language_model_resumes_to_the_bit_too(tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    def make(folder: str) -> ShareTrainer:
        args = arguments(tmp_path / folder, **CHECKPOINTS)
        return ShareTrainer(tiny_model("llama"), args, config(LLAMA_TARGETS), language_tasks("ones", "twos"))

    expected = make("whole")
    expected.train()
    interrupt(make("stream"), stop_at("twos-adapt", 2))
    assert_ends_as(make("stream"), expected)
