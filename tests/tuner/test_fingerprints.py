"""Coefficients know their basis: on every route to another model they compute the same there, or are refused."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from share_hf.tuner import share_layers
from tests.format.test_old_trees import VERSION_1
from tests.trees import bert_with_labels, named

from .cases import LLAMA, an_adapted_layer, assert_differ, logits, snapshot, with_random_bases, with_tasks


Base = Callable[[str], PreTrainedModel]
OTHER_BASIS = "share_fingerprint.*the coefficients belong to another basis"


@pytest.fixture
def source(tiny_model: Base) -> PeftModel:
    """A model of two tasks in bases that no new model has."""
    torch.manual_seed(0)
    return with_random_bases(with_tasks(tiny_model("llama"), LLAMA, "one", "two"))


@pytest.fixture
def folder(source: PeftModel, tmp_path: Path) -> Path:
    source.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_refused(model: nn.Module, load: Callable[[], object], message: str = OTHER_BASIS) -> None:
    """Assert that a refusal leaves the model unchanged."""
    before, structure = parameters_of(model), snapshot(model)
    with pytest.raises(ValueError, match=message):
        load()
    assert snapshot(model) == structure
    after = parameters_of(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


class TestStateDicts:
    def test_of_an_adapter_for_a_model_with_another_basis_are_refused(
        self, source: PeftModel, tiny_model: Base
    ) -> None:
        model = get_peft_model(tiny_model("llama"), LLAMA.config())
        weights = get_peft_model_state_dict(source, adapter_name="one")
        assert_refused(model, lambda: set_peft_model_state_dict(model, weights))

    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("strict", [False, True])
    def test_of_a_whole_model_for_one_with_another_basis_are_refused(
        self, strict: bool, assign: bool, source: PeftModel, tiny_model: Base
    ) -> None:
        model = with_tasks(tiny_model("llama"), LLAMA, "one", "two")
        state = source.state_dict()
        assert_refused(model, lambda: model.load_state_dict(state, strict=strict, assign=assign))

    def test_load_into_a_model_with_the_same_basis(self, source: PeftModel, tiny_model: Base, folder: Path) -> None:
        model = PeftModel.from_pretrained(tiny_model("llama"), folder / "two", adapter_name="two")
        model.add_adapter("one", LLAMA.config())
        model.load_state_dict(source.state_dict())
        for task in ("one", "two"):
            model.set_adapter(task)
            source.set_adapter(task)
            assert torch.equal(logits(model, LLAMA.batch()), logits(source, LLAMA.batch()))

    def test_without_fingerprints_are_refused(self, source: PeftModel) -> None:
        weights = get_peft_model_state_dict(source, adapter_name="one")
        weights = {name: tensor for name, tensor in weights.items() if "fingerprint" not in name}
        assert_refused(source, lambda: set_peft_model_state_dict(source, weights, "one"), "is missing, expected")

    def test_of_a_model_before_its_basis_changed_are_refused(self, source: PeftModel) -> None:
        state = parameters_of(source)
        with_random_bases(source)
        assert_refused(source, lambda: source.load_state_dict(state))

    @pytest.mark.parametrize(
        "change",
        [
            lambda tensor: tensor.bfloat16(),
            lambda tensor: tensor.half(),
            lambda tensor: 0.999 * tensor.float() + 0.001 * tensor.float(),
        ],
        ids=["bfloat16", "float16", "moving-average"],
    )
    def test_that_were_cast_or_averaged_still_know_their_basis(
        self, change: Callable[[Tensor], Tensor], source: PeftModel
    ) -> None:
        weights = {
            name: change(tensor) for name, tensor in get_peft_model_state_dict(source, adapter_name="one").items()
        }
        set_peft_model_state_dict(source, weights, "one")

    def test_of_parameters_alone_are_saved_with_the_fingerprints_of_the_model(
        self, source: PeftModel, tiny_model: Base, tmp_path: Path
    ) -> None:
        source.save_pretrained(tmp_path, state_dict=dict(source.named_parameters()))
        loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "one")
        assert torch.equal(logits(loaded, LLAMA.batch()), logits(source, LLAMA.batch()))

    def test_of_accelerate_are_refused_by_a_model_with_another_basis(
        self, source: PeftModel, tiny_model: Base, tmp_path: Path
    ) -> None:
        accelerator = Accelerator(cpu=True)
        accelerator.prepare_model(source)
        accelerator.save_state(tmp_path / "state")
        source.set_adapter("two")
        expected = logits(source, LLAMA.batch())
        for parameter in source.parameters():
            parameter.data.zero_()
        accelerator.load_state(tmp_path / "state")
        source.eval()
        assert torch.equal(logits(source, LLAMA.batch()), expected)
        other = Accelerator(cpu=True)
        model = other.prepare_model(with_tasks(tiny_model("llama"), LLAMA, "one", "two"))
        with pytest.raises(ValueError, match=OTHER_BASIS):
            other.load_state(tmp_path / "state")
        assert model is not source


class TestTransformers:
    def test_refuses_weights_in_memory_of_another_basis(self, source: PeftModel, tiny_model: Base) -> None:
        model = tiny_model("llama")
        weights = get_peft_model_state_dict(source, adapter_name="one")
        before = parameters_of(model)
        with pytest.raises(ValueError, match=OTHER_BASIS):
            model.load_adapter(peft_config=LLAMA.config(), adapter_state_dict=weights)
        assert not share_layers(model)
        assert before.keys() == model.state_dict().keys()

    def test_refuses_weights_in_memory_that_do_not_know_their_basis(self, source: PeftModel, tiny_model: Base) -> None:
        weights = get_peft_model_state_dict(source, adapter_name="one")
        weights = {name: tensor for name, tensor in weights.items() if "fingerprint" not in name}
        with pytest.raises(ValueError, match=r"comes without .*share_fingerprint.*upgrade"):
            tiny_model("llama").load_adapter(peft_config=LLAMA.config(), adapter_state_dict=weights)

    def test_takes_weights_in_memory_into_the_basis_that_their_configuration_is_from(
        self, source: PeftModel, tiny_model: Base, folder: Path
    ) -> None:
        model = tiny_model("llama")
        weights = load_file(folder / "one" / "adapter_model.safetensors")
        result = model.load_adapter(
            peft_config=PeftConfig.from_pretrained(folder / "one"), adapter_state_dict=weights, adapter_name="one"
        )
        assert not result.unexpected_keys and not result.missing_keys
        assert torch.equal(logits(model.eval(), LLAMA.batch()), logits(source, LLAMA.batch()))

    def test_reads_the_basis_beside_the_weights_for_a_custom_configuration(
        self, source: PeftModel, tiny_model: Base, folder: Path
    ) -> None:
        model = tiny_model("llama")
        model.load_adapter(str(folder / "one"), "one", peft_config=LLAMA.config())
        assert torch.equal(logits(model.eval(), LLAMA.batch()), logits(source, LLAMA.batch()))


class TestFolders:
    def test_bring_their_basis_for_a_custom_configuration(
        self, source: PeftModel, tiny_model: Base, folder: Path
    ) -> None:
        config = LLAMA.config()
        model = PeftModel.from_pretrained(tiny_model("llama"), folder, config=config, subfolder="one")
        assert torch.equal(logits(model, LLAMA.batch()), logits(source, LLAMA.batch()))
        assert config.origin is None  # as its owner made it

    def test_bring_their_basis_in_place_of_a_fresh_adapter(
        self, source: PeftModel, tiny_model: Base, folder: Path
    ) -> None:
        model = get_peft_model(tiny_model("llama"), LLAMA.config())
        model.load_adapter(folder, "default", subfolder="one")
        assert torch.equal(logits(model, LLAMA.batch()), logits(source, LLAMA.batch()))

    def test_of_another_basis_are_refused_where_other_tasks_need_the_one_there_is(
        self, tiny_model: Base, folder: Path
    ) -> None:
        model = with_tasks(tiny_model("llama"), LLAMA, "one", "two")
        assert_refused(
            model, lambda: model.load_adapter(folder, "one", subfolder="one"), "is not the one the model has"
        )

    def test_of_other_dimensions_are_refused_in_place_of_an_adapter(self, tiny_model: Base, folder: Path) -> None:
        model = get_peft_model(tiny_model("llama"), LLAMA.config(num_components=6))
        assert_refused(
            model,
            lambda: model.load_adapter(folder, "default", subfolder="one"),
            "num_components of .*saved/one is 8, expected 6 as adapter 'default' has",
        )

    def test_that_a_model_was_loaded_from_and_another_was_saved_to_are_refused(
        self, tiny_model: Base, folder: Path
    ) -> None:
        model = PeftModel.from_pretrained(tiny_model("llama"), folder / "one", adapter_name="one")
        other = with_random_bases(with_tasks(tiny_model("llama"), LLAMA, "one"))
        shutil.rmtree(folder)
        other.save_pretrained(folder)
        assert_refused(model, lambda: model.load_adapter(folder / "one", "two"), "is not the one the model has")
        before = logits(model, LLAMA.batch())
        model.load_adapter(folder / "one", "one")
        assert_differ(logits(model, LLAMA.batch()), before)
        assert torch.equal(logits(model, LLAMA.batch()), logits(other, LLAMA.batch()))

    @pytest.mark.parametrize("index", [True, False])
    def test_whose_basis_is_not_that_of_the_coefficients_are_refused(
        self, index: bool, source: PeftModel, tiny_model: Base, folder: Path, tmp_path: Path
    ) -> None:
        other = with_random_bases(copy.deepcopy(source))
        other.save_pretrained(tmp_path / "other")
        for name in ("subspace.safetensors", *(["share_config.json"] if index else [])):
            shutil.copy(tmp_path / "other" / name, folder / name)
        if not index:
            (folder / "share_config.json").unlink()
        model = tiny_model("llama")
        with pytest.raises(ValueError, match=r"one/adapter_model\.safetensors: .*do not belong to the basis"):
            PeftModel.from_pretrained(model, folder / "one")
        assert not share_layers(model)

    def test_of_this_version_without_fingerprints_are_refused(self, tiny_model: Base, folder: Path) -> None:
        path = folder / "one" / "adapter_model.safetensors"
        save_file({name: tensor for name, tensor in load_file(path).items() if "fingerprint" not in name}, path)
        with pytest.raises(ValueError, match="has coefficients but no share_fingerprint, expected both"):
            PeftModel.from_pretrained(tiny_model("llama"), folder / "one")

    def test_of_version_1_load_under_a_name_that_is_there(self, tiny_model: Base) -> None:
        def bert() -> PreTrainedModel:
            return named(bert_with_labels(tiny_model("bert"), 2))

        place = VERSION_1 / "tasks" / "mrpc"
        expected = PeftModel.from_pretrained(bert(), place)
        model = get_peft_model(bert(), PeftConfig.from_pretrained(VERSION_1 / "tasks" / "rte"))
        model.load_adapter(VERSION_1, "default", subfolder="tasks/mrpc")
        assert torch.equal(logits(model, LLAMA.batch()), logits(expected, LLAMA.batch()))
        for layer in share_layers(model).values():
            layer.set_basis(-layer.share_basis_out, layer.share_basis_in)
        assert_refused(model, lambda: set_peft_model_state_dict(model, get_peft_model_state_dict(expected)))


@pytest.mark.parametrize("phase", ["adapt", "init"])
def test_what_is_not_coefficients_in_the_basis_needs_no_fingerprint(phase: str, tiny_model: Base) -> None:
    source = with_random_bases(with_tasks(tiny_model("llama"), LLAMA, "one", phase=phase))
    weights = get_peft_model_state_dict(source, adapter_name="one")
    assert not [name for name in weights if "fingerprint" in name]
    model = get_peft_model(tiny_model("llama"), LLAMA.config(phase=phase), "one").eval()
    set_peft_model_state_dict(model, weights, "one")
    assert torch.equal(logits(model, LLAMA.batch()), logits(source, LLAMA.batch()))


def test_a_task_of_any_name_has_a_fingerprint(tiny_model: Base) -> None:
    model = with_tasks(tiny_model("llama"), LLAMA, "persistent", "training_data")
    assert sorted(an_adapted_layer(model).share_fingerprint) == ["persistent", "training_data"]
    model.load_state_dict(model.state_dict())


def test_a_deleted_task_leaves_no_fingerprint(source: PeftModel) -> None:
    source.delete_adapter("one")
    assert not [name for name in source.state_dict() if ".share_" in name and name.endswith(".one")]


def test_a_module_into_which_an_adapter_was_injected_checks_too(source: PeftModel, tiny_model: Base) -> None:
    model = inject_adapter_in_model(LLAMA.config(), tiny_model("llama"))
    weights = get_peft_model_state_dict(source, adapter_name="one")
    assert_refused(model, lambda: set_peft_model_state_dict(model, weights))


def test_the_index_of_a_checkpoint_has_the_fingerprint_of_all_bases(folder: Path, source: PeftModel) -> None:
    first = json.loads((folder / "share_config.json").read_text())
    assert first["format_version"] == 2
    with_random_bases(source).save_pretrained(folder)
    assert json.loads((folder / "share_config.json").read_text())["fingerprint"] != first["fingerprint"]
