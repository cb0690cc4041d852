"""What PEFT supports for LoRA and SHARE refuses, and options that SHARE supports or refuses.

| call | what it says |
|---|---|
| see `OPTIONS` | an option of `LoraConfig` that `ShareConfig` lacks: what to do instead |
| see `CALLS` | a function or argument for LoRA, or a layer that cannot take an update: what to do instead |
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import peft
import peft.functional
import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn
from transformers import PreTrainedModel

from share_hf import ShareConfig

from ..cases import snapshot, with_random_bases
from .architectures import ARCHITECTURES
from .models import adapted, output


LORA = r"export the task as a LoRA with SharedSubspace\.export_lora"
NONE = "expected none: the coefficients have the scale of an update in them"

# By option of LoRA, what ShareConfig says about it: all options that it lacks.
OPTIONS: dict[str, str] = {
    "r": "expected pseudo_rank, the rank of a task's update, and num_components",
    "lora_dropout": "expected dropout",
    "lora_alpha": NONE,
    "use_rslora": NONE,
    "alora_invocation_tokens": LORA,
    "alpha_pattern": LORA,
    "arrow_config": LORA,
    "bias": LORA,
    "corda_config": LORA,
    "ensure_weight_tying": LORA,
    "eva_config": LORA,
    "init_lora_weights": LORA,
    "kasa_config": LORA,
    "layer_replication": LORA,
    "loftq_config": LORA,
    "lora_bias": LORA,
    "lora_ga_config": LORA,
    "megatron_config": LORA,
    "megatron_core": LORA,
    "monteclora_config": LORA,
    "qalora_group_size": LORA,
    "rank_pattern": LORA,
    "runtime_config": LORA,
    "trainable_token_indices": LORA,
    "use_bdlora": LORA,
    "use_dora": LORA,
    "use_qalora": LORA,
    "velora_config": LORA,
}

NOT_MIXED = "`peft_type` 'SHARE' is not compatible with the `PeftMixedModel`"


def _scaled(model: PeftModel, folder: Path) -> None:
    with rescale_adapter_scale(model, 0.5):
        pass


def _native(model: PeftModel) -> PreTrainedModel:
    return model.unload()


def _with(**values: Any) -> ShareConfig:
    return ShareConfig(num_components=8, pseudo_rank=4, **values)


# By name: a call with a model that has the task "one" and the folder in which it is saved, and the message.
CALLS: dict[str, tuple[Callable[[PeftModel, Path], Any], str]] = {
    "rescale_adapter_scale": (_scaled, "scaling is only supported for models with `LoraLayer`s"),
    "hotswap_adapter": (
        lambda model, folder: hotswap_adapter(model, str(folder / "one"), "one"),
        "Hotswapping only supports LORA but SHARE was passed",
    ),
    "prepare_model_for_compiled_hotswap": (
        lambda model, folder: prepare_model_for_compiled_hotswap(model, target_rank=8),
        "No adapter layers found on the model",
    ),
    "initialize_lora_eva_weights": (
        lambda model, folder: peft.initialize_lora_eva_weights(model, adapter_name="one"),
        "'ShareConfig' object has no attribute 'init_lora_weights'",
    ),
    "replace_lora_weights_loftq": (
        lambda model, folder: peft.replace_lora_weights_loftq(model),
        "does not appear to be a transformers model or is a local model",
    ),
    "save_pretrained(path_initial_model_for_weight_conversion=)": (
        lambda model, folder: model.save_pretrained(
            folder / "new", path_initial_model_for_weight_conversion=str(folder / "initial")
        ),
        "path_initial_model_for_weight_conversion works with LoRA only, expected none for tasks: "
        r"export a task as a LoRA with SharedSubspace\.export_lora",
    ),
    "get_peft_model(mixed=True)": (
        lambda model, folder: get_peft_model(_native(copy.deepcopy(model)), _with(), mixed=True),
        NOT_MIXED,
    ),
    "PeftMixedModel.from_pretrained": (
        lambda model, folder: PeftMixedModel.from_pretrained(_native(copy.deepcopy(model)), folder / "one"),
        "Adapter of type SHARE is not supported for mixed models",
    ),
    "a PeftModel of a PeftModel": (
        lambda model, folder: get_peft_model(model, _with(), "two"),
        "model is a PeftModelForCausalLM, expected the base model: add a task to it with add_adapter",
    ),
    "add_adapter of a LoRA": (
        lambda model, folder: model.add_adapter("two", LoraConfig(target_modules=["q_proj"])),
        "Cannot combine adapters with different peft types",
    ),
    "add_weighted_adapter(combination_type='ties')": (
        lambda model, folder: model.add_weighted_adapter(["one"], [1.0], "two", combination_type="ties"),
        "export the tasks as LoRAs with SharedSubspace.export_lora",
    ),
    "a norm as target": (
        lambda model, folder: model.add_adapter("two", _with(target_modules=["model.norm"])),
        r"'model\.norm' is a LlamaRMSNorm, .*train others whole with modules_to_save",
    ),
    "trainable_token_indices that are set afterwards": (
        lambda model, folder: model.add_adapter("two", _set(_with(), trainable_token_indices=[1, 2])),
        rf"'trainable_token_indices', an option of LoRA: {LORA}",
    ),
    "ensure_weight_tying that is set afterwards": (
        lambda model, folder: model.add_adapter("two", _set(_with(), ensure_weight_tying=True)),
        rf"'ensure_weight_tying', an option of LoRA: {LORA}",
    ),
    "adapter_names in training": (
        lambda model, folder: model.train()(torch.ones(1, 3, dtype=torch.long), adapter_names=["__base__"]),
        r"adapter_names has \['__base__'\] in training mode, expected trained tasks, as \['one'\] are",
    ),
}


def _set(config: ShareConfig, **values: Any) -> ShareConfig:
    for name, value in values.items():
        setattr(config, name, value)
    return config


@pytest.fixture
def name() -> str:
    return "llama"


@pytest.fixture
def model(base: Callable[[], PreTrainedModel]) -> PeftModel:
    return adapted(base(), ARCHITECTURES["llama"], "one")


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_of_lora_names_what_there_is_instead(option: str) -> None:
    with pytest.raises(TypeError, match=f"got an unexpected keyword argument '{option}', .*{OPTIONS[option]}"):
        ShareConfig(**{option: None})


def test_all_options_of_lora_are_known() -> None:
    names = {field.name for field in fields(LoraConfig)} - {field.name for field in fields(ShareConfig)}
    assert names == OPTIONS.keys()


def test_an_option_of_lora_in_a_file_is_left_out_with_a_warning(tmp_path: Path) -> None:
    ShareConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace("{", '{"use_dora": true,', 1))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['use_dora'\]"):
        assert PeftConfig.from_pretrained(tmp_path) == ShareConfig()


@pytest.mark.parametrize("call", CALLS)
def test_what_is_loras_alone_is_refused_before_the_model_is_changed(
    call: str, model: PeftModel, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    files, before = sorted(tmp_path.rglob("*")), snapshot(model)
    inputs = ARCHITECTURES["llama"].inputs()
    expected = output(model, inputs)
    function, message = CALLS[call]
    with pytest.raises((ValueError, TypeError, AttributeError), match=message):
        function(model, tmp_path)
    assert snapshot(model) == before
    assert sorted(tmp_path.rglob("*")) == files
    assert torch.equal(output(model.eval(), inputs), expected)


@pytest.mark.parametrize("way", ["add_adapter", "load_adapter", "inject_adapter_in_model", "get_peft_model"])
def test_another_method_beside_tasks_is_refused(way: str, base: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"])
    get_peft_model(base(), config).save_pretrained(tmp_path)
    model = base()
    model.add_adapter(_with(target_modules=["q_proj"]), "one")
    before = snapshot(model)
    add: dict[str, Callable[[], Any]] = {
        "add_adapter": lambda: model.add_adapter(config, "two"),
        "load_adapter": lambda: model.load_adapter(str(tmp_path), "two"),
        "get_peft_model": lambda: get_peft_model(model, config, "two"),
        "inject_adapter_in_model": lambda: peft.functional.inject_adapter_in_model(config, model, "two"),
    }
    with pytest.raises(ValueError, match="adapter 'two' is LORA, expected SHARE beside the tasks that the model has"):
        add[way]()
    assert snapshot(model) == before
    copied = copy.deepcopy(model)
    copied.add_adapter(_with(target_modules=["q_proj"]), "three")
    assert list(copied.peft_config) == ["one", "three"]


def test_hotswapping_by_transformers_is_refused(
    model: PeftModel, base: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    native = base()
    native.load_adapter(str(tmp_path / "one"), "one")
    before = snapshot(native)
    with pytest.raises(ValueError, match="only supported for LoRA, please set `hotswap=False`"):
        native.load_adapter(str(tmp_path / "one"), "one", hotswap=True)
    assert snapshot(native) == before


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(3, 4, 2), nn.EmbeddingBag(4, 4), nn.Bilinear(3, 3, 3)])
def test_a_layer_of_another_kind_is_refused(layer: nn.Module) -> None:
    with pytest.raises(TypeError, match=f"'0' is a {type(layer).__name__}, .*train others whole with modules_to_save"):
        get_peft_model(nn.Sequential(layer), _with(target_modules=["0"]))


class TestIgnoreMismatchedSizes:
    """PEFT would leave out what does not fit, but a task without its head or its coefficients is not a task."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        architecture = ARCHITECTURES["bert-classifier"]
        with_random_bases(adapted(architecture.build(), architecture, "one")).save_pretrained(tmp_path)
        return tmp_path / "one"

    @pytest.fixture
    def other(self) -> PreTrainedModel:
        architecture = ARCHITECTURES["bert-classifier"]
        return replace(architecture, config={**architecture.config, "num_labels": 5}).build()

    @pytest.mark.parametrize("ignore", [False, True])
    @pytest.mark.parametrize("way", ["from_pretrained", "load_adapter", "in-place", "transformers"])
    def test_a_head_of_other_labels_is_refused_all_the_same(
        self, way: str, ignore: bool, folder: Path, other: PreTrainedModel
    ) -> None:
        model: Any = other
        if way in ("load_adapter", "in-place"):
            model = get_peft_model(other, ARCHITECTURES["bert-classifier"].share_config(), "there")
        load = {
            "from_pretrained": lambda **options: PeftModel.from_pretrained(model, folder, **options),
            "load_adapter": lambda **options: model.load_adapter(folder, "new", **options),
            "in-place": lambda **options: model.load_adapter(folder, "there", **options),
            "transformers": lambda **options: model.load_adapter(str(folder), **options),
        }[way]
        before = snapshot(model)
        values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"'classifier\.bias' is stored with shape \(3,\).*num_labels=3"):
            load(ignore_mismatched_sizes=ignore)
        assert snapshot(model) == before
        assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())

    def test_what_fits_is_loaded(self, folder: Path) -> None:
        architecture = ARCHITECTURES["bert-classifier"]
        inputs = architecture.inputs()
        expected = PeftModel.from_pretrained(architecture.build(), folder)
        found = PeftModel.from_pretrained(architecture.build(), folder, ignore_mismatched_sizes=True)
        assert torch.equal(output(found, inputs), output(expected, inputs))

    def test_a_state_dict_is_loaded_in_part_with_pefts_warning(self) -> None:
        architecture = ARCHITECTURES["bert-classifier"]
        state = get_peft_model_state_dict(adapted(architecture.build(), architecture, "one"), adapter_name="one")
        model = get_peft_model(architecture.build(), architecture.share_config(pseudo_rank=2), "one")
        with pytest.raises(RuntimeError, match="size mismatch"):
            set_peft_model_state_dict(model, state, "one")
        with pytest.warns(UserWarning, match="ignored because you passed `ignore_mismatched_sizes=True`"):
            set_peft_model_state_dict(model, state, "one", ignore_mismatched_sizes=True)


def test_a_lora_takes_what_share_refuses(base: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    model = get_peft_model(base(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    inputs = ARCHITECTURES["llama"].inputs()
    before = output(model, inputs)
    with rescale_adapter_scale(model, 0.5):
        assert not torch.equal(output(model, inputs), before)
    other = get_peft_model(base(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    other.save_pretrained(tmp_path)
    hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    assert torch.equal(output(model, inputs), output(other, inputs))
    mixed = get_peft_model(base(), LoraConfig(target_modules=["q_proj"]), mixed=True)
    assert isinstance(mixed, PeftMixedModel)
