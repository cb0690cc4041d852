"""Custom modules: how layers are nested, shared, called and read."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, MambaConfig, MambaForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from share_hf import ShareConfig
from share_hf.tuner import share_layers
from share_hf.tuner.placement import EMBEDDINGS_READ_BY_THEIR_MODULE, READ_BY_THEIR_MODULE

from ..cases import assert_close, snapshot
from .models import fill, output, with_task_in_weights


SIZE = 16


class Lowered(nn.Linear):
    """A subclass that does more than the layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - 1


class WithShift(nn.Linear):
    """A layer that is called with more than its input."""

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        return super().forward(x) + shift


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = WithShift(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, shift=2.0)


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.relu(self.layer(x)))


class SharedBlock(nn.Module):
    """One block at two places, so that its layer has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(SIZE, SIZE), nn.ReLU())
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            [nn.ModuleDict({"in": nn.Linear(SIZE, 2 * SIZE), "out": nn.Linear(2 * SIZE, SIZE)}) for _ in range(2)]
        )

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = x + stage["out"](F.relu(stage["in"](x)))
        return x


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


class TwoNames(nn.Module):
    """One layer under two names, of which PEFT adapts the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(SIZE, SIZE)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


class Words(nn.Module):
    """An embedding whose indices are made from the input."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.words = embedding

    def forward(self, x: Tensor) -> Tensor:
        return self.words((4 * x).long() % SIZE)


def encoder_layer() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(SIZE, 2, 2 * SIZE, batch_first=True, dropout=0.0))


def encoder() -> nn.Module:
    return nn.TransformerEncoder(encoder_layer()[0], num_layers=2)


# By name: how it is made, what is adapted, and the shape of its input.
MODULES: dict[str, tuple[Callable[[], nn.Module], list[str], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(SIZE, 24), nn.ReLU(), nn.Linear(24, 3)), ["0", "2"], (5, SIZE)),
    "vector": (lambda: nn.Sequential(nn.Linear(SIZE, 24), nn.Linear(24, 3)), ["0", "1"], (SIZE,)),
    "images": (lambda: nn.Sequential(nn.Linear(SIZE, 24), nn.ReLU()), ["0"], (2, 3, 4, SIZE)),
    "no-samples": (lambda: nn.Sequential(nn.Linear(SIZE, 24)), ["0"], (0, 3, SIZE)),
    "without-bias": (lambda: nn.Sequential(nn.Linear(SIZE, 24, bias=False)), ["0"], (5, SIZE)),
    "conv1d": (lambda: nn.Sequential(Conv1D(24, SIZE), nn.ReLU(), nn.Linear(24, 3)), ["0", "2"], (2, 5, SIZE)),
    "subclass": (lambda: nn.Sequential(Lowered(SIZE, 24)), ["0"], (5, SIZE)),
    "more-arguments": (Shifted, ["layer"], (5, SIZE)),
    "called-twice": (CalledTwice, ["layer"], (5, SIZE)),
    "shared-block": (SharedBlock, ["0"], (5, SIZE)),
    "nested": (Nested, ["in", "out"], (2, 5, SIZE)),
    "nested-in-part": (Nested, ["stages.1.in"], (2, 5, SIZE)),
    "tied": (Tied, ["first"], (5, SIZE)),
    "two-names": (TwoNames, ["first"], (5, SIZE)),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 12, (3, 2), stride=2, padding=1), nn.ReLU(), nn.Conv2d(12, 5, 1)),
        ["0", "2"],
        (2, 3, 7, 6),
    ),
    "convolution-of-one-image": (lambda: nn.Sequential(nn.Conv2d(3, 12, 3, padding="same")), ["0"], (3, 7, 6)),
    "convolution-without-bias": (lambda: nn.Sequential(nn.Conv2d(3, 12, 3, bias=False)), ["0"], (2, 3, 7, 6)),
    "convolution-of-a-series": (lambda: nn.Sequential(nn.Conv1d(3, 12, 3, padding=1)), ["0"], (2, 3, 7)),
    "convolution-of-a-volume": (lambda: nn.Sequential(nn.Conv3d(3, 12, (1, 2, 3))), ["0"], (2, 3, 4, 5, 6)),
    "embedding": (lambda: Words(nn.Embedding(SIZE, 12)), ["words"], (2, 5)),
    "embedding-with-padding": (lambda: Words(nn.Embedding(SIZE, 12, padding_idx=0)), ["words"], (2, 5)),
    "embedding-that-scales": (lambda: Words(Gemma3TextScaledWordEmbedding(SIZE, 12, 0, 3.0)), ["words"], (2, 5)),
    "torch-encoder-layer": (encoder_layer, ["linear1", "linear2"], (2, 5, SIZE)),
    "torch-encoder": (encoder, ["linear1", "linear2"], (2, 5, SIZE)),
}
SHARED_WEIGHTS = {"tied", "two-names"}

each_module = pytest.mark.parametrize("name", MODULES)
each_phase = pytest.mark.parametrize("phase", ["coefficients", "adapt", "init"])


def config_for(targets: list[str] | str, **values: Any) -> ShareConfig:
    return ShareConfig(num_components=8, pseudo_rank=3, target_modules=targets, **values)


def adapted(base: nn.Module, targets: list[str] | str, **values: Any) -> PeftModel:
    model = get_peft_model(base, config_for(targets, **values), "one")
    fill(model, "one")
    return model.eval()


def module_and_input(name: str) -> tuple[nn.Module, list[str], Tensor]:
    make, targets, shape = MODULES[name]
    return make().eval(), targets, torch.randn(shape)


def assert_close_if_any(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    if expected.numel():
        assert_close(found, expected)


def untied(module: nn.Module) -> nn.Module:
    """Return the module with a separate layer at every place, so that one can be changed alone."""
    if isinstance(module, (Tied, TwoNames)):
        bias = module.second.bias.detach().clone()
        weight = module.second.weight.detach().clone()
        module.second = nn.Linear(SIZE, SIZE)
        module.second.weight, module.second.bias = nn.Parameter(weight), nn.Parameter(bias)
    return module


@each_phase
@each_module
def test_it_computes_what_weights_with_the_update_do(name: str, phase: str) -> None:
    base, targets, x = module_and_input(name)
    without = base(x).detach()
    model = adapted(copy.deepcopy(base), targets, phase=phase)
    with_update = with_task_in_weights(untied(base), model, "one")
    for mode in (torch.no_grad, torch.enable_grad):  # torch has special kernels for the first
        with mode():
            found = model(x).detach()
        assert_close_if_any(found, with_update(x).detach())
    assert found.numel() == 0 or (found - without).abs().max() > 0.01
    with model.disable_adapter():
        assert_close_if_any(model(x).detach(), without)


@pytest.mark.parametrize("name", [name for name in MODULES if name not in SHARED_WEIGHTS])
@each_phase
def test_it_is_merged(name: str, phase: str) -> None:
    base, targets, x = module_and_input(name)
    model = adapted(base, targets, phase=phase)
    expected = model(x).detach()
    model.merge_adapter()
    assert_close_if_any(model(x).detach(), expected)
    model.unmerge_adapter()
    assert_close_if_any(model(x).detach(), expected)
    assert_close_if_any(model.merge_and_unload()(x).detach(), expected)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("name", sorted(SHARED_WEIGHTS))
def test_a_weight_that_another_layer_has_too_is_not_merged_into(name: str, merge: str) -> None:
    base, targets, x = module_and_input(name)
    model = adapted(base, targets)
    before, expected = snapshot(model), model(x)
    with pytest.raises(ValueError, match=r"'first' cannot be merged into: .* at \[.*second.*\].*export_lora"):
        getattr(model, merge)()
    assert snapshot(model) == before
    assert torch.equal(model(x), expected)


def test_a_head_that_is_tied_to_the_embeddings_is_not_merged_into() -> None:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    base = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(3, 10)[None]
    with pytest.warns(UserWarning, match="tie_word_embeddings=True"):
        model = adapted(base, ["lm_head"])
    expected = output(model, {"input_ids": ids})
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"'lm_head' cannot be merged into.*embed_tokens"):
        model.merge_adapter()
    assert torch.equal(output(model, {"input_ids": ids}), expected)


def test_torchs_encoder_computes_with_the_update_where_samples_are_padded() -> None:
    base, targets, x = module_and_input("torch-encoder")
    base.enable_nested_tensor = base.use_nested_tensor = False  # torch adds no update to these
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    model = adapted(copy.deepcopy(base), targets)
    dense = with_task_in_weights(base, model, "one")
    with torch.no_grad():
        found, expected = model(x, src_key_padding_mask=padding), dense(x, src_key_padding_mask=padding)
    assert_close(found[~padding], expected[~padding])


class TestLayersThatTheirModuleReads:
    @pytest.mark.parametrize("target", [["out_proj"], "all-linear", ["linear1", "self_attn.out_proj"]])
    def test_are_refused_by_name_and_the_model_stays(self, target: list[str] | str) -> None:
        base = encoder_layer()
        before = snapshot(base)
        with pytest.raises(ValueError, match=r"'0.self_attn.out_proj' is in a MultiheadAttention, which reads"):
            get_peft_model(base, config_for(target))
        assert snapshot(base) == before

    def test_are_refused_where_they_are_embeddings(self) -> None:
        config = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        base = CLIPVisionModel(config)
        with pytest.raises(ValueError, match=r"position_embedding' is in a CLIPVisionEmbeddings, which reads"):
            get_peft_model(base, config_for(["position_embedding"]))
        model = get_peft_model(base, config_for(["patch_embedding"]))
        assert [type(layer.get_base_layer()) for layer in share_layers(model).values()] == [nn.Conv2d]

    def test_are_left_out_if_excluded(self) -> None:
        model = adapted(encoder_layer(), "all-linear", exclude_modules=["out_proj"])
        assert share_layers(model).keys() == {"0.linear1", "0.linear2"}

    @pytest.mark.parametrize("target", ["x_proj", "dt_proj"])
    def test_are_refused_in_models_of_transformers(self, target: str) -> None:
        base = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=1))
        before = snapshot(base)
        with pytest.raises(ValueError, match=rf"mixer.{target}' is in a MambaMixer, .*exclude_modules"):
            get_peft_model(base, config_for(["in_proj", target]))
        assert snapshot(base) == before

    @pytest.mark.slow
    def test_are_known_for_all_models_of_transformers(self) -> None:
        # Weights that are read in a mode of few models that must be requested, as if it were not parallel, and with
        # other queries.
        apart = {("BloomAttention", "dense"), ("BloomMLP", "dense_4h_to_h"), ("DisentangledSelfAttention", "in_proj")}
        # A model whose head is only read for a mask, and a layer that is clipped in place.
        apart |= {(name, "lm_head") for name in ("Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM")}
        apart |= {("Gemma3nTextAltUp", "correction_coefs")}
        folder = Path(transformers.__file__).parent / "models"
        found = {read for path in folder.glob("*/modeling_*.py") for read in _weights_read_in(path)}
        known = {(module, layer) for module, layers in READ_BY_THEIR_MODULE.items() for layer in layers}
        known |= {(name, layer) for layer, names in EMBEDDINGS_READ_BY_THEIR_MODULE.items() for name in names.split()}
        assert {("MambaMixer", "dt_proj"), ("SamMaskDecoder", "mask_tokens")} <= found
        assert found - apart <= known


# What is read from a weight without computing with it.
_ABOUT_A_WEIGHT = {"dtype", "device", "shape", "size", "data", "data_ptr", "requires_grad"}


def _weights_read_in(path: Path) -> set[tuple[str, str]]:
    """Return classes, and their layers whose weight they read outside the code that makes the layers.

    Convolutions whose weights are read have groups, for which they are refused.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for module in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        layers = {
            node.targets[0].attr
            for node in ast.walk(module)
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Attribute)
            and isinstance(node.value, ast.Call)
            and ast.unparse(node.value.func) in ("nn.Linear", "Conv1D", "nn.Embedding")
        }
        for method in (node for node in module.body if isinstance(node, ast.FunctionDef)):
            if "init" in method.name or "tie" in method.name:
                continue
            about = {
                id(node.value)
                for node in ast.walk(method)
                if isinstance(node, ast.Attribute) and node.attr in _ABOUT_A_WEIGHT
            }
            about |= {
                id(argument)
                for node in ast.walk(method)
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "hasattr")
                for argument in node.args
            }
            for node in ast.walk(method):
                if isinstance(node, ast.Attribute) and node.attr == "weight" and id(node) not in about:
                    owner, _, layer = ast.unparse(node.value).rpartition(".")
                    if owner == "self" and layer in layers:
                        found.add((module.name, layer))
    return found


@each_module
def test_lora_adapts_the_same_layers(name: str) -> None:
    make, targets, _ = MODULES[name]
    lora = get_peft_model(make(), LoraConfig(target_modules=targets))
    assert get_peft_model(make(), config_for(targets)).targeted_module_names == lora.targeted_module_names
