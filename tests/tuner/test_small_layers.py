"""Layers with fewer outputs or inputs than k or p: gates, routers, heads with one output."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification
from transformers.utils import logging as hf_logging

from share_hf import ShareConfig, SharedSubspace
from share_hf.state import Phase
from share_hf.tuner import share_layers
from share_hf.tuner.transfer import state_of

from .cases import logits, randomize


IDS = torch.arange(3, 19).reshape(2, 8)
TARGETS = ["q_proj", "k_proj", "score"]


@pytest.fixture
def base() -> LlamaForSequenceClassification:
    """A model whose `q_proj` is 32 x 32, `k_proj` 8 x 32 and `score` 1 x 32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=32,
        pad_token_id=0,
        num_labels=1,
        initializer_range=0.1,
    )
    model = LlamaForSequenceClassification(config).eval()
    model.name_or_path = "org/base"
    return model


@pytest.fixture
def warnings_of_share(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the library logs, with each line once per test."""
    type(hf_logging.get_logger()).warning_once.cache_clear()
    hf_logging.enable_propagation()
    with caplog.at_level(logging.WARNING, logger="share_hf"):
        yield caplog
    hf_logging.disable_propagation()


def outputs(model: nn.Module) -> Tensor:
    return logits(model, {"input_ids": IDS})


def lora(base: nn.Module, folder: Path, seed: int, r: int = 4) -> Path:
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=r, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    return folder


def test_a_fresh_layer_takes_as_many_directions_and_columns_as_it_has_room_for(
    base: LlamaForSequenceClassification,
) -> None:
    model = get_peft_model(base, ShareConfig(num_components=16, pseudo_rank=12, target_modules=TARGETS))

    found = {name.rpartition(".")[2]: layer for name, layer in share_layers(model).items()}
    for module, (k_out, k_in, p) in {"q_proj": (16, 16, 12), "k_proj": (8, 16, 8), "score": (1, 16, 1)}.items():
        layer = found[module]
        assert (layer.share_basis_out.shape[1], layer.share_basis_in.shape[1]) == (k_out, k_in)
        assert layer.share_coefficients_out["default"].shape == (k_out, p)
        assert layer.share_coefficients_in["default"].shape == (k_in, p)


@pytest.mark.parametrize("phase", [Phase.INIT, Phase.ADAPT, Phase.COEFFICIENTS])
def test_small_layers_are_trained_in_every_phase(phase: Phase, base: LlamaForSequenceClassification) -> None:
    config = ShareConfig(num_components=16, pseudo_rank=12, target_modules=TARGETS, phase=phase)
    model = get_peft_model(base, config).train()

    model(input_ids=IDS, labels=torch.tensor([0.0, 1.0])).loss.backward()

    layers = share_layers(model)
    assert len(layers) == 5
    for name, layer in layers.items():
        trained = [parameter for key, parameter in layer.named_parameters() if ".default" in key]
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in trained), name


def test_one_line_says_which_new_layers_are_smaller(
    base: LlamaForSequenceClassification, warnings_of_share: pytest.LogCaptureFixture
) -> None:
    model = get_peft_model(base, ShareConfig(num_components=16, pseudo_rank=4, target_modules=TARGETS))
    model.add_adapter("other", ShareConfig(num_components=16, pseudo_rank=4, target_modules=TARGETS))

    (record,) = [record for record in warnings_of_share.records if record.name.startswith("share_hf")]
    assert record.getMessage().startswith("3 of 5 layers have fewer outputs or inputs than num_components = 16")
    assert "'score' (1, 32)" in record.getMessage()


def test_one_line_says_which_layers_of_adapters_are_smaller_and_none_when_they_are_loaded(
    base: LlamaForSequenceClassification, warnings_of_share: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    subspace = SharedSubspace.from_adapters({"a": lora(base, tmp_path / "a", 0)}, progress=False)
    subspace.add_adapters({"b": lora(base, tmp_path / "b", 1)}, progress=False)
    subspace.save_pretrained(tmp_path / "tree")
    SharedSubspace.from_pretrained(tmp_path / "tree").apply(base)

    (record,) = [record for record in warnings_of_share.records if record.name.startswith("share_hf")]
    assert record.getMessage().startswith("3 of 5 layers have fewer outputs or inputs than num_components = 32")


def test_adapters_of_small_layers_are_kept_through_a_tree_and_as_plain_loras(
    base: LlamaForSequenceClassification, tmp_path: Path
) -> None:
    adapters = {name: lora(base, tmp_path / name, seed, r=8) for seed, name in enumerate("abc")}
    expected = {
        name: outputs(PeftModel.from_pretrained(copy.deepcopy(base), place)) for name, place in adapters.items()
    }

    subspace = SharedSubspace.from_adapters(adapters, num_components=32, pseudo_rank=8, progress=False)

    # One output each, and an input direction for each of the three tasks.
    assert subspace.state.layers["score"].num_components == (1, 3)
    subspace.save_pretrained(tmp_path / "tree")
    loaded = SharedSubspace.from_pretrained(tmp_path / "tree")
    assert loaded.state.layers["score"].coefficients_in.shape == (3, 3, 1)
    model = loaded.apply(copy.deepcopy(base))
    for name, logits_of_lora in expected.items():
        model.set_adapter(name)
        torch.testing.assert_close(outputs(model), logits_of_lora, atol=1e-4, rtol=0)
        loaded.export_lora(name, tmp_path / f"exported-{name}")
        exported = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / f"exported-{name}")
        torch.testing.assert_close(outputs(exported), logits_of_lora, atol=1e-4, rtol=0)
        of_peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "tree" / "tasks" / name)
        torch.testing.assert_close(outputs(of_peft), logits_of_lora, atol=1e-4, rtol=0)
    again = SharedSubspace.from_adapters(
        {"a": tmp_path / "exported-a"}, num_components=32, pseudo_rank=8, progress=False
    )
    torch.testing.assert_close(outputs(again.apply(copy.deepcopy(base))), expected["a"], atol=1e-4, rtol=0)


def test_a_checkpoint_of_a_model_with_small_layers_loads(base: LlamaForSequenceClassification, tmp_path: Path) -> None:
    config = ShareConfig(num_components=16, pseudo_rank=12, target_modules=TARGETS)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    randomize(model, "default")
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)

    torch.testing.assert_close(outputs(loaded), outputs(model))
    state = state_of(model)
    assert state.layers["score"].pseudo_rank == 1
    mixed = model(input_ids=IDS, adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(mixed[0], outputs(model)[0])
