"""From a model to disk and back, with every loader of PEFT and transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from share_hf.format.basis_file import read_bases
from share_hf.tuner import share_layers

from .cases import (
    BERT,
    LLAMA,
    Case,
    K,
    P,
    an_adapted_layer,
    assert_close,
    assert_differ,
    each_architecture,
    gradients,
    learn,
    logits,
    task_parameters,
    trainable,
    with_random_bases,
    with_tasks,
)


Save = Callable[..., tuple[Path, dict[str, torch.Tensor]]]


@pytest.fixture
def saved(tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path) -> Save:
    """Save a model with tasks and a separate subspace, and return the folder and the logits of each task."""

    def save(case: Case, *tasks: str, **config: Any) -> tuple[Path, dict[str, torch.Tensor]]:
        model = with_random_bases(with_tasks(tiny_model(case.architecture), case, *tasks, **config))
        outputs = {}
        for task in tasks:
            model.set_adapter(task)
            outputs[task] = logits(model, case.batch())
        folder = tmp_path / "saved"
        model.save_pretrained(folder)
        return folder, outputs

    return save


@each_architecture
@pytest.mark.parametrize("phase", ["coefficients", "adapt", "init"])
def test_a_loaded_task_computes_what_the_saved_one_did(
    case: Case, phase: str, saved: Save, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    folder, expected = saved(case, "default", phase=phase)
    base = tiny_model(case.architecture)
    assert_differ(logits(base, case.batch()), expected["default"])
    model = PeftModel.from_pretrained(base, folder)
    assert torch.equal(logits(model, case.batch()), expected["default"])


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_loading_options_do_what_they_do_for_lora(
    low_cpu_mem_usage: bool, is_trainable: bool, saved: Save, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    folder, expected = saved(LLAMA, "one", "two")
    options = dict(low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=is_trainable)
    model = PeftModel.from_pretrained(tiny_model("llama"), folder / "one", adapter_name="one", **options)
    model.load_adapter(folder / "two", "two", **options)
    for task in ("one", "two"):
        model.set_adapter(task, inference_mode=not is_trainable)
        # Tensors of a file may be at any address, for which some kernels add in another order.
        assert_close(logits(model, LLAMA.batch()), expected[task], 1e-6)
        assert set(trainable(model)) == (set(task_parameters(model, task)) if is_trainable else set())
    assert not [name for name, tensor in model.named_parameters() if tensor.is_meta]
    assert not [name for name, tensor in model.named_buffers() if tensor.is_meta]
    if is_trainable:
        assert all(gradient.abs().max() > 0 for gradient in gradients(model, LLAMA.batch()).values())


def test_training_continues_where_it_was_saved(tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    model = with_random_bases(with_tasks(tiny_model("llama"), LLAMA, "default"))
    model.save_pretrained(tmp_path)
    expected = learn(model, LLAMA.batch(), steps=3)
    resumed = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True)
    assert learn(resumed, LLAMA.batch(), steps=3) == pytest.approx(expected, abs=1e-6)


def test_a_folder_has_the_basis_once_and_each_task_its_coefficients_only(saved: Save) -> None:
    folder, _ = saved(LLAMA, "one", "two")
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "README.md",
        "one/adapter_config.json",
        "one/adapter_model.safetensors",
        "share_config.json",
        "subspace.safetensors",
        "two/adapter_config.json",
        "two/adapter_model.safetensors",
    ]
    modules = read_bases(folder / "subspace.safetensors")
    tensors = load_file(folder / "one" / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        f"base_model.model.{module}.share_{part}": shape
        for module in modules
        for part, shape in (("coefficients_out", (K, P)), ("coefficients_in", (K, P)), ("fingerprint", (8,)))
    }


@pytest.mark.parametrize("safe_serialization", [True, False])
def test_the_default_task_is_saved_at_the_top(
    safe_serialization: bool, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    model = with_random_bases(with_tasks(tiny_model("llama"), LLAMA, "default", "two"))
    model.save_pretrained(tmp_path, safe_serialization=safe_serialization)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert torch.equal(logits(loaded, LLAMA.batch()), logits(model, LLAMA.batch()))


def test_only_the_selected_tasks_are_saved(tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "one", "two")
    model.save_pretrained(tmp_path, selected_adapters=["two"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "share_config.json",
        "subspace.safetensors",
        "two",
    ]


def test_a_process_that_is_not_the_main_one_writes_nothing(
    tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    with_tasks(tiny_model("llama"), LLAMA, "one").save_pretrained(tmp_path, is_main_process=False)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_lora_is_saved_as_ever(tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    get_peft_model(tiny_model("llama"), LoraConfig()).save_pretrained(tmp_path / "lora")
    tiny_model("llama").save_pretrained(tmp_path / "base")
    assert not list(tmp_path.rglob("subspace.safetensors"))


@pytest.mark.parametrize(
    ("place", "place_of_basis"),
    [("", ""), ("two", ""), ("two", "two"), ("tasks/two", ""), ("tasks/two", "tasks"), ("tasks/two", "tasks/two")],
)
@pytest.mark.parametrize("through_subfolder", [False, True])
def test_the_basis_is_found_beside_the_adapter_or_up_to_two_folders_above(
    place: str,
    place_of_basis: str,
    through_subfolder: bool,
    saved: Save,
    tiny_model: Callable[[str], PreTrainedModel],
    tmp_path: Path,
) -> None:
    folder, expected = saved(LLAMA, "two")
    root = tmp_path / "moved"
    (root / place).mkdir(parents=True)
    for name in ("subspace.safetensors", "share_config.json"):
        (folder / name).rename(root / place_of_basis / name)
    for path in (folder / "two").iterdir():
        path.rename(root / place / path.name)
    if through_subfolder and place:
        model = PeftModel.from_pretrained(tiny_model("llama"), root, subfolder=place)
    else:
        model = PeftModel.from_pretrained(tiny_model("llama"), str(root / place))
    assert torch.equal(logits(model, LLAMA.batch()), expected["two"])


def test_a_relative_folder_will_do(
    saved: Save, tiny_model: Callable[[str], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = saved(LLAMA, "two")
    monkeypatch.chdir(folder / "two")
    model = PeftModel.from_pretrained(tiny_model("llama"), ".")
    assert torch.equal(logits(model, LLAMA.batch()), expected["two"])


def test_tasks_of_one_folder_share_its_basis_in_memory(
    saved: Save, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    folder, expected = saved(LLAMA, "one", "two")
    model = PeftModel.from_pretrained(tiny_model("llama"), folder / "two", adapter_name="two")
    basis = an_adapted_layer(model).share_basis_out
    model.load_adapter(folder, "one", subfolder="one")
    assert an_adapted_layer(model).share_basis_out is basis
    assert model.active_adapter == "two"
    assert torch.equal(logits(model, LLAMA.batch()), expected["two"])
    model.set_adapter("one")
    assert torch.equal(logits(model, LLAMA.batch()), expected["one"])


def test_a_fresh_task_can_be_added_to_a_loaded_subspace(
    saved: Save, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    folder, expected = saved(LLAMA, "one")
    model = PeftModel.from_pretrained(tiny_model("llama"), folder / "one", adapter_name="one")
    model.add_adapter("fresh", LLAMA.config())
    model.set_adapter("fresh")
    assert torch.equal(logits(model, LLAMA.batch()), logits(tiny_model("llama"), LLAMA.batch()))
    learn(model, LLAMA.batch(), steps=2)
    model.set_adapter("one")
    assert torch.equal(logits(model, LLAMA.batch()), expected["one"])


def test_a_config_from_disk_starts_an_untrained_task_in_its_subspace(
    saved: Save, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    folder, _ = saved(LLAMA, "one")
    config = PeftConfig.from_pretrained(folder / "one")
    config.inference_mode = False
    model = get_peft_model(tiny_model("llama"), config, adapter_name="new")
    stored = read_bases(folder / "subspace.safetensors")
    for name, layer in share_layers(model).items():
        assert stored[name].equals(layer.share_basis_out, layer.share_basis_in)
    assert torch.equal(logits(model, LLAMA.batch()), logits(tiny_model("llama"), LLAMA.batch()))


def test_saving_a_loaded_model_again_gives_the_same_tensors(
    saved: Save, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    folder, _ = saved(LLAMA, "one")
    PeftModel.from_pretrained(tiny_model("llama"), folder / "one", adapter_name="one").save_pretrained(
        tmp_path / "again"
    )
    for file in ("subspace.safetensors", "one/adapter_model.safetensors"):
        first, second = load_file(folder / file), load_file(tmp_path / "again" / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


@each_architecture
def test_a_state_dict_moves_a_task_to_another_model(case: Case, tiny_model: Callable[[str], PreTrainedModel]) -> None:
    source = with_tasks(tiny_model(case.architecture), case, "one", "two")
    target = get_peft_model(tiny_model(case.architecture), case.config(), adapter_name="other").eval()
    logits(target, case.batch())
    result = set_peft_model_state_dict(target, get_peft_model_state_dict(source, adapter_name="one"), "other")
    assert not result.unexpected_keys
    assert torch.equal(logits(target, case.batch()), logits(source, case.batch()))


class TestAutoPeftModel:
    def test_finds_the_base_model_by_its_path(self, tiny_model_folder: Callable[[str], Path], tmp_path: Path) -> None:
        base = AutoModelForCausalLM.from_pretrained(tiny_model_folder("llama"))
        model = with_random_bases(with_tasks(base, LLAMA, "default"))
        model.save_pretrained(tmp_path)
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(logits(loaded, LLAMA.batch()), logits(model, LLAMA.batch()))

    def test_loads_a_classifier_with_its_head(self, tiny_model_folder: Callable[[str], Path], tmp_path: Path) -> None:
        base = AutoModelForSequenceClassification.from_pretrained(tiny_model_folder("bert"))
        model = with_random_bases(with_tasks(base, BERT, "default", task_type="SEQ_CLS"))
        learn(model, BERT.batch(), steps=2)
        model.save_pretrained(tmp_path)
        loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path)
        assert torch.equal(logits(loaded, BERT.batch()), logits(model, BERT.batch()))


class TestTransformersOwnMethods:
    def test_load_adapter_injects_the_task_with_its_basis(
        self, saved: Save, tiny_model: Callable[[str], PreTrainedModel]
    ) -> None:
        folder, expected = saved(LLAMA, "one", "two")
        base = tiny_model("llama")
        base.load_adapter(str(folder / "one"), adapter_name="one")
        assert torch.equal(logits(base, LLAMA.batch()), expected["one"])
        base.load_adapter(str(folder), adapter_name="two", adapter_kwargs={"subfolder": "two"})
        assert torch.equal(logits(base, LLAMA.batch()), expected["two"])
        base.set_adapter("one")
        assert torch.equal(logits(base, LLAMA.batch()), expected["one"])
        base.disable_adapters()
        assert torch.equal(logits(base, LLAMA.batch()), logits(tiny_model("llama"), LLAMA.batch()))

    def test_load_adapter_is_trainable_if_asked_for(
        self, saved: Save, tiny_model: Callable[[str], PreTrainedModel]
    ) -> None:
        folder, _ = saved(LLAMA, "one")
        frozen, base = tiny_model("llama"), tiny_model("llama")
        frozen.load_adapter(str(folder / "one"), adapter_name="one")
        assert not trainable(frozen)
        base.load_adapter(str(folder / "one"), adapter_name="one", is_trainable=True)
        assert set(trainable(base)) == set(task_parameters(base, "one"))

    def test_add_adapter_starts_a_task_and_save_pretrained_keeps_it(
        self, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
    ) -> None:
        base = tiny_model("llama")
        base.add_adapter(LLAMA.config(), "one")
        assert torch.equal(logits(base, LLAMA.batch()), logits(tiny_model("llama"), LLAMA.batch()))
        assert set(trainable(base)) == set(task_parameters(base, "one"))
        learn(base, LLAMA.batch(), steps=3)
        base.save_pretrained(tmp_path)
        assert (tmp_path / "subspace.safetensors").is_file()
        loaded = tiny_model("llama")
        loaded.load_adapter(str(tmp_path), adapter_name="other")
        assert torch.equal(logits(loaded, LLAMA.batch()), logits(base, LLAMA.batch()))
        in_peft = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
        assert torch.equal(logits(in_peft, LLAMA.batch()), logits(base, LLAMA.batch()))

    def test_auto_model_loads_base_and_task_from_the_folder_of_the_task(
        self, tiny_model_folder: Callable[[str], Path], tmp_path: Path
    ) -> None:
        base = AutoModelForCausalLM.from_pretrained(tiny_model_folder("llama"))
        model = with_random_bases(with_tasks(base, LLAMA, "default"))
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(logits(loaded, LLAMA.batch()), logits(model, LLAMA.batch()))

    def test_delete_adapter_leaves_the_others_and_then_the_base_model(
        self, saved: Save, tiny_model: Callable[[str], PreTrainedModel]
    ) -> None:
        folder, expected = saved(LLAMA, "one", "two")
        base = tiny_model("llama")
        for task in ("one", "two"):
            base.load_adapter(str(folder / task), adapter_name=task)
        base.set_adapter("one")
        base.delete_adapter("two")
        assert torch.equal(logits(base, LLAMA.batch()), expected["one"])
        base.delete_adapter("one")
        assert torch.equal(logits(base, LLAMA.batch()), logits(tiny_model("llama"), LLAMA.batch()))

    def test_a_refused_task_leaves_no_trace(self, tiny_model: Callable[[str], PreTrainedModel]) -> None:
        base = tiny_model("llama")
        base.add_adapter(LLAMA.config(target_modules=["q_proj"]), "one")
        with pytest.raises(TypeError, match=r"'model.norm' is a LlamaRMSNorm"):
            base.add_adapter(LLAMA.config(target_modules=["q_proj", "model.norm"]), "two")
        assert list(base.peft_config) == ["one"]
        assert all(layer.tasks == ["one"] for layer in share_layers(base).values())
        base.add_adapter(LLAMA.config(), "two")


# ---- Resized vocabularies -------------------------------------------------------------------------------------------


KEPT = [None, ["embed_tokens", "lm_head"]]


def resized(folder: Path, size: int = 80) -> PreTrainedModel:
    """Load the model of the folder with additional tokens, whose embeddings differ between processes."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model.eval()


@pytest.mark.parametrize("modules_to_save", KEPT, ids=["trained-as-they-are", "kept-with-the-task"])
def test_a_checkpoint_of_a_model_with_added_tokens_loads_as_it_was(
    modules_to_save: list[str] | None, tiny_model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tiny_model_folder("llama")
    model = with_tasks(resized(base), LLAMA, "one", modules_to_save=modules_to_save)
    with torch.no_grad():
        for parameter in (*model.get_input_embeddings().parameters(), *model.get_output_embeddings().parameters()):
            parameter.add_(0.1)
    ids = {"input_ids": torch.arange(60, 80).view(2, 10)}
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(resized(base), tmp_path / "one").eval()
    assert_close(logits(loaded, ids), expected)


@pytest.mark.parametrize("modules_to_save", KEPT, ids=["trained-as-they-are", "kept-with-the-task"])
def test_it_is_refused_by_a_model_without_these_tokens(
    modules_to_save: list[str] | None, tiny_model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tiny_model_folder("llama")
    with_tasks(resized(base), LLAMA, "one", modules_to_save=modules_to_save).save_pretrained(tmp_path)
    other = resized(base, 70)
    before = {name: parameter.clone() for name, parameter in other.named_parameters()}
    with pytest.raises(ValueError, match=r"resize_token_embeddings\(80\)"):
        PeftModel.from_pretrained(other, tmp_path / "one")
    assert all(torch.equal(parameter, before[name]) for name, parameter in other.named_parameters())


def test_a_model_whose_lm_head_is_adapted_comes_back_with_the_copy_that_peft_saves_of_it(
    tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "default", "two", target_modules=["q_proj", "lm_head"])
    model.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    loaded.load_adapter(tmp_path / "two", "two")
    for name in ("default", "two"):
        for one in (model, loaded):
            one.set_adapter(name)
        assert_close(logits(loaded.eval(), LLAMA.batch()), logits(model, LLAMA.batch()))
    by_transformers = tiny_model("llama")
    by_transformers.load_adapter(str(tmp_path / "two"), "two")
    assert_close(logits(by_transformers, LLAMA.batch()), logits(model, LLAMA.batch()))
