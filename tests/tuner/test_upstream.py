"""What share_hf changes in other libraries: the table is complete, and each entry is needed and guarded."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import multiprocessing
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper, register_peft_method
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import share_hf
from share_hf import ShareConfig, SharedSubspace
from share_hf.tuner import ShareModel, share_layers, upstream
from share_hf.tuner.upstream import Upstream
from tests.hub_server.fixtures import Hub
from tests.trees import files_of

from .cases import BERT, LLAMA, logits, with_random_bases, with_tasks


Base = Callable[[str], PreTrainedModel]

ROOT = Path(__file__).parents[2]
LIBRARIES = ("peft", "transformers", "accelerate")

# Private names of torch and of Python, which change with neither PEFT nor transformers nor accelerate.
OTHERS = {
    *("_C", "_current_graph_task_id", "_apply", "_buffers", "_conv_forward", "_forward_hooks", "_parameters"),
    *("_foreach_mul_", "_foreach_norm", "_load_from_state_dict", "_save_to_state_dict"),
    *("_actions", "_asdict", "_abc_impl"),
}


# ---- Every entry is needed ------------------------------------------------------------------------------------------


SHOWN: set[str] = set()


def shows_the_need_of(*entries: Upstream) -> Callable[[Any], Any]:
    SHOWN.update(entry.label for entry in entries)
    return lambda test: test


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[Upstream], None]:
    """Puts the function of the library back for the length of a test."""

    def put_back(entry: Upstream) -> None:
        holder = pkgutil.resolve_name(entry.owner)
        found = inspect.getattr_static(holder, entry.name)
        is_of_class = isinstance(found, classmethod)
        original = upstream.original_of(found.__func__ if is_of_class else found)
        assert original is not None
        monkeypatch.setattr(holder, entry.name, classmethod(original) if is_of_class else original)

    return put_back


@pytest.fixture
def source(tiny_model: Base) -> PeftModel:
    """A model of two tasks in bases that no fresh model has."""
    return with_random_bases(with_tasks(tiny_model("llama"), LLAMA, "one", "two"))


@pytest.fixture
def folder(source: PeftModel, tmp_path: Path) -> Path:
    source.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@shows_the_need_of(upstream.CONFIG_CLASSES, upstream.TUNER_CLASSES, upstream.PREFIXES)
def test_peft_registers_no_method_that_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="Unknown PEFT type SHARE"):
        register_peft_method(name="share", config_cls=ShareConfig, model_cls=ShareModel)


@shows_the_need_of(upstream.LOADED_CONFIGS)
def test_peft_does_not_say_where_it_read_a_configuration(without: Callable[..., None], folder: Path) -> None:
    assert PeftConfig.from_pretrained(folder / "one").origin is not None
    without(upstream.LOADED_CONFIGS)
    assert PeftConfig.from_pretrained(folder / "one").origin is None
    assert ShareConfig.from_pretrained(folder / "one").origin is not None


@shows_the_need_of(upstream.SAVED_PEFT_MODELS, upstream.SAVED_MODELS)
@pytest.mark.parametrize("entry", [upstream.SAVED_PEFT_MODELS, upstream.SAVED_MODELS], ids=lambda entry: entry.label)
def test_a_save_alone_writes_no_bases_and_over_a_subspace(
    entry: Upstream, without: Callable[..., None], tree: Path, tiny_model: Base, tmp_path: Path
) -> None:
    model: Any = tiny_model("llama")
    if entry is upstream.SAVED_MODELS:
        model.add_adapter(LLAMA.config(), "default")
    else:
        model = get_peft_model(model, LLAMA.config())
    without(entry)
    before = files_of(tree)
    model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new" / "subspace.safetensors").exists()
    model.save_pretrained(tree)
    assert files_of(tree) != before


@shows_the_need_of(upstream.PUSHED_PEFT_MODELS, upstream.PUSHED_MODELS)
@pytest.mark.parametrize("entry", [upstream.PUSHED_PEFT_MODELS, upstream.PUSHED_MODELS], ids=lambda entry: entry.label)
def test_a_push_alone_writes_over_a_subspace(
    entry: Upstream, without: Callable[..., None], hub: Hub, subspace: SharedSubspace, tiny_model: Base
) -> None:
    subspace.push_to_hub("org/subspace")
    model: Any = tiny_model("llama")
    if entry is upstream.PUSHED_MODELS:
        model.add_adapter(LLAMA.config(), "default")
    else:
        model = get_peft_model(model, LLAMA.config())
    before = hub.api.repo_info("org/subspace").sha
    without(entry)
    model.push_to_hub("org/subspace")
    assert hub.api.repo_info("org/subspace").sha != before


@shows_the_need_of(upstream.LOADED_PEFT_MODELS)
def test_peft_finds_no_basis_for_a_given_configuration(
    without: Callable[..., None], folder: Path, source: PeftModel, tiny_model: Base
) -> None:
    config = LLAMA.config(target_modules=["q_proj", "v_proj", "down_proj", "o_proj"])
    found = PeftModel.from_pretrained(tiny_model("llama"), folder / "one", config=config)
    assert share_layers(found).keys() == share_layers(source).keys()
    without(upstream.LOADED_PEFT_MODELS)
    found = PeftModel.from_pretrained(tiny_model("llama"), folder / "one", config=config)
    assert share_layers(found).keys() > share_layers(source).keys()


@shows_the_need_of(upstream.LOADED_ADAPTERS)
def test_peft_brings_no_basis_to_an_adapter_that_is_there(
    without: Callable[..., None], folder: Path, tiny_model: Base
) -> None:
    without(upstream.LOADED_ADAPTERS)
    model = get_peft_model(tiny_model("llama"), LLAMA.config(), "one")
    with pytest.raises(ValueError, match="the coefficients belong to another basis"):
        model.load_adapter(folder / "one", "one")


@shows_the_need_of(upstream.LOADED_NATIVE_ADAPTERS)
def test_transformers_reads_no_coefficients_of_4_bits(
    without: Callable[..., None], loras: dict[str, Path], tiny_model: Base, tmp_path: Path
) -> None:
    made = SharedSubspace.from_adapters(loras, num_components=8, coefficient_dtype="4bit", progress=False)
    made.save_pretrained(tmp_path / "tree")
    expected = logits(made.apply(tiny_model("llama"), ["mrpc"]), LLAMA.batch())
    found = []
    for step in range(2):
        model = tiny_model("llama")
        model.load_adapter(str(tmp_path / "tree" / "tasks" / "mrpc"))
        found.append(torch.equal(logits(model.eval(), LLAMA.batch()), expected))
        if not step:
            without(upstream.LOADED_NATIVE_ADAPTERS)
    assert found == [True, False]


@shows_the_need_of(upstream.READ_WEIGHTS)
def test_peft_finds_no_subfolder_of_a_repository_in_the_cache(
    without: Callable[..., None], hub: Hub, subspace: SharedSubspace, tiny_model: Base
) -> None:
    subspace.push_to_hub("org/subspace")
    load = functools.partial(PeftModel.from_pretrained, model_id="org/subspace", subfolder="tasks/mrpc")
    load(tiny_model("llama"))
    with hub.offline():
        load(tiny_model("llama"))
        without(upstream.READ_WEIGHTS)
        with pytest.raises(LocalEntryNotFoundError):
            load(tiny_model("llama"))


@shows_the_need_of(upstream.MIXED_HEADS)
def test_peft_mixes_no_tasks_of_which_one_has_no_head(monkeypatch: pytest.MonkeyPatch, tiny_model: Base) -> None:
    def model() -> PeftModel:
        made = get_peft_model(tiny_model("bert"), BERT.config(modules_to_save=["classifier"]), "one")
        made.add_adapter("two", BERT.config())
        return made.eval()

    extended = model()
    names = ["one", "two", "one", "two"]
    assert torch.allclose(
        logits(extended, BERT.batch(), adapter_names=names)[::2], logits(extended, BERT.batch())[::2], atol=1e-6
    )
    monkeypatch.setattr("share_hf.tuner.mixed_heads.MIXED_HEADS", Upstream("peft", "nothing", (), "…", "…"))
    alone = model()
    assert torch.equal(logits(alone, BERT.batch()), logits(extended, BERT.batch()))
    (head,) = (module for module in alone.modules() if isinstance(module, ModulesToSaveWrapper))
    assert type(head) is ModulesToSaveWrapper
    with pytest.raises(KeyError, match="two"):
        head(torch.zeros(4, 64), adapter_names=names)


def test_the_need_of_every_entry_is_shown() -> None:
    assert {entry.label for entry in (*upstream.REPLACED, upstream.MIXED_HEADS)} == SHOWN


# ---- The table is complete ------------------------------------------------------------------------------------------


def came_out(part: str, folder: Path) -> dict[str, Any]:
    """What a part of the program `changed_libraries` found."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("runs forked copies of a process")
    program = [sys.executable, "-m", "tests.tuner.changed_libraries", part, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(program, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.partition("FOUND")[2])


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return came_out("imports", tmp_path_factory.mktemp("imports"))


def test_importing_share_hf_changes_what_the_table_lists_and_nothing_else(imported: dict[str, Any]) -> None:
    expected = set()
    for entry in upstream.REPLACED:
        holder = pkgutil.resolve_name(entry.owner)
        name = holder.__name__ if inspect.ismodule(holder) else f"{holder.__module__}.{holder.__qualname__}"
        expected.add(f"{name}.{entry.name}")
    mappings = {entry.name for entry in upstream.REPLACED if entry.owner == "peft.mapping"}
    changed = {name.removesuffix("['PeftType.SHARE']") for name in imported["changes"]}
    # Other modules have the mappings of `peft.mapping` under the same names.
    others = {name for name in changed if name.rpartition(".")[2] in mappings and not name.startswith("peft.mapping.")}
    assert changed - others == expected


def test_the_page_for_users_names_what_is_changed() -> None:
    page = (ROOT / "recipes" / "guides" / "reliability.md").read_text(encoding="utf-8")
    section = page.partition("## What `share_hf` changes in other libraries")[2].partition("\n## ")[0]
    functions = [entry for entry in upstream.REPLACED if entry.parameters]
    names = {
        f"{entry.label.split('.')[-2]}.{entry.name}".replace("PeftConfigMixin", "PeftConfig") for entry in functions
    }
    assert [name for name in sorted(names) if f"{name}`" not in section] == []


def test_a_repeated_import_replaces_each_function_once(imported: dict[str, Any]) -> None:
    first, reloaded, anew = imported["reimported"]["depths"]
    assert first == reloaded == anew
    assert imported["reimported"]["known"]


def _classes() -> Iterator[type]:
    for module in pkgutil.walk_packages(share_hf.__path__, "share_hf."):
        if module.name in ("share_hf.cli.__main__", "share_hf.serving.vllm_resolver"):
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(value) and value.__module__ == module.name:
                yield value


def test_every_private_method_that_is_overridden_is_listed() -> None:
    listed = {entry.name for entry in (*upstream.OF_TUNER, *upstream.OF_TRAINER)}
    overridden = {
        name
        for our_class in _classes()
        for name in vars(our_class)
        if name.startswith("_") and not name.startswith("__") and name not in OTHERS
        for other in our_class.__mro__[1:]
        if other.__module__.partition(".")[0] in LIBRARIES and name in vars(other)
    }
    assert len(overridden) > 15
    assert overridden - listed == set()


def test_every_private_name_that_is_used_is_listed() -> None:
    listed = {entry.name for entry in (*upstream.OF_TUNER, *upstream.OF_TRAINER, *upstream.OF_INSTANCES)}
    used, ours = set(), set()
    for path in (ROOT / "share_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                used.add(node.attr)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                ours.add(node.name)
            elif isinstance(node, ast.Attribute | ast.Name):
                ours.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    private = {name for name in used if name.startswith("_") and not name.startswith("__")}
    assert private - ours - OTHERS - listed == set()


def test_every_entry_fits_the_libraries_that_are_installed(caplog: pytest.LogCaptureFixture) -> None:
    entries = (*upstream.REPLACED, upstream.MIXED_HEADS, *upstream.OF_TUNER, *upstream.OF_TRAINER)
    assert [entry.label for entry in entries if not entry.fits()] == []
    assert not caplog.records


def test_attributes_of_instances_are_there(tiny_model: Base, tmp_path: Path, tiny_model_folder: Any) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path), dataloader_num_workers=1, dataloader_persistent_workers=True, use_cpu=True
    )
    trainer = Trainer(tiny_model("llama"), arguments, eval_dataset=[{"input_ids": [1]}])
    trainer.get_eval_dataloader()
    hooked = nn.Linear(1, 1)
    add_hook_to_module(hooked, AlignDevicesHook())
    instances = {
        "_loss_shifts_labels": trainer,
        "_eval_dataloaders": trainer,
        "_models": Accelerator(cpu=True),
        "_is_accelerate_prepared": Accelerator(cpu=True).prepare(tiny_model("llama")),
        "_hf_hook": hooked,
        "_is_hf_initialized": next(AutoModelForCausalLM.from_pretrained(tiny_model_folder("llama")).parameters()),
    }
    assert instances.keys() == {entry.name for entry in upstream.OF_INSTANCES}
    assert [name for name, instance in instances.items() if not hasattr(instance, name)] == []


# ---- Every entry is guarded -----------------------------------------------------------------------------------------


REPLACED = pytest.mark.parametrize("entry", upstream.REPLACED, ids=lambda entry: entry.label)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return came_out("cases", tmp_path_factory.mktemp("cases"))


def _assert_told(result: Any, entry: Upstream, problem: str) -> None:
    assert isinstance(result, dict), result
    assert result["came_out"] == "works"
    # Both classes have the same `push_to_hub`.
    (warning,) = (warning for warning in result["warned"] if warning.startswith(f"{entry.label} "))
    assert all(f".{entry.name} {problem} in " in other for other in result["warned"])
    assert f" {problem} in {entry.label.partition('.')[0]} " in warning
    assert f"so {entry.without}." in warning


@pytest.mark.slow
@REPLACED
def test_where_a_function_is_missing_all_else_works(entry: Upstream, found: dict[str, Any]) -> None:
    _assert_told(found["missing"][entry.label], entry, "is missing")


@pytest.mark.slow
@REPLACED
def test_where_a_function_differs_all_else_works(entry: Upstream, found: dict[str, Any]) -> None:
    if not entry.parameters:
        assert entry.owner == "peft.mapping"
        return
    _assert_told(found["differs"][entry.label], entry, f"has no parameter {entry.parameters[0]!r}")


@pytest.mark.slow
def test_what_a_changed_trainer_cannot_do_is_told_when_ours_is_imported(found: dict[str, Any]) -> None:
    assert len(found["trainer"]) == len(upstream.OF_TRAINER)
    for entry, warning in zip(upstream.OF_TRAINER, found["trainer"], strict=True):
        assert warning.startswith(f"{entry.label} is missing in transformers ")
        assert f"so {entry.without}." in warning


# ---- The mechanism --------------------------------------------------------------------------------------------------


class Library:
    """Stands for a class of another library."""

    attribute = 3

    def method(self, number: int, *, scale: int = 1) -> int:
        """Multiply."""
        return number * scale

    @classmethod
    def of_class(cls, number: int) -> str:
        return f"{cls.__name__} {number}"


class Heir(Library):
    pass


def entry_of(name: str, *parameters: str) -> Upstream:
    return Upstream("tests.tuner.test_upstream:Library", name, parameters, "…", "…")


@pytest.fixture
def _library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves `Library` as it was."""
    for name in ("method", "of_class"):
        monkeypatch.setattr(Library, name, vars(Library)[name])


def more(amount: int) -> Callable[[Any], Any]:
    return lambda original: lambda *args, **kwargs: original(*args, **kwargs) + amount


@pytest.mark.usefixtures("_library")
class TestReplacing:
    def test_keeps_name_signature_and_text(self) -> None:
        before = inspect.signature(Library.method)
        entry_of("method", "number", "scale").replace(more(1))
        assert Library().method(2, scale=3) == 7
        assert (Library.method.__name__, Library.method.__doc__) == ("method", "Multiply.")
        assert inspect.signature(Library.method) == before

    def test_again_takes_the_new_function_in_place_of_the_first(self) -> None:
        for amount in (1, 2):
            entry_of("method", "number").replace(more(amount))
        assert Library().method(2) == 4
        assert upstream.original_of(Library.method)(Library(), 2) == 2

    def test_again_does_so_below_the_wrapper_of_another_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        entry_of("method", "number").replace(more(1))
        ours = Library.method

        @functools.wraps(ours)
        def theirs(*args: Any, **kwargs: Any) -> int:
            return ours(*args, **kwargs) + 100

        monkeypatch.setattr(Library, "method", theirs)
        entry_of("method", "number").replace(more(2))
        assert Library().method(2) == 104

    def test_a_method_of_a_class_gives_it_the_class(self) -> None:
        entry_of("of_class", "number").replace(lambda original: lambda cls, number: original(cls, number).upper())
        assert Heir.of_class(number=3) == "HEIR 3"

    @pytest.mark.parametrize(
        ("name", "parameters", "problem"),
        [
            ("method", ("number", "other"), "has no parameter 'other'"),
            ("nothing", ("number",), "is missing"),
            ("attribute", ("number",), "is no function with a signature"),
        ],
    )
    def test_what_does_not_fit_is_left_alone_with_one_warning(
        self, name: str, parameters: tuple[str, ...], problem: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told: list[str] = []
        monkeypatch.setattr(upstream.logger, "warning_once", told.append)
        before = dict(vars(Library))
        entry_of(name, *parameters).replace(more(1))
        assert before == dict(vars(Library))
        (warning,) = told
        assert warning.startswith(f"tests.tuner.test_upstream.Library.{name} {problem} in tests ")
