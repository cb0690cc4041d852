"""Convolutions and embeddings: LoRAs of them that PEFT wrote can be read, applied, and exported again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import ConvNextConfig, ConvNextForImageClassification, LlamaForCausalLM

from share_hf import ShareConfig, SharedSubspace, ShareTrainer
from share_hf.format.lora_tensors import as_matrices, as_tensors, factor_of
from share_hf.state import Layout, reconcile
from share_hf.subspace import LowRankUpdate
from share_hf.tuner import share_layers

from ..continual.cases import arguments
from ..continual.cases import config as stream_config
from ..trees import edit_index, edit_json, edit_tensors, files_of
from .cases import LLAMA, assert_close, gradients, learn, logits, snapshot
from .matrix.models import fill, with_task_in_weights


TARGETS = ["words", "series", "image", "head"]
IDS = torch.randint(1, 20, (4, 7), generator=torch.Generator().manual_seed(3))


class Reader(nn.Module):
    """A layer of each kind, one after another."""

    def __init__(self, kernel: tuple[int, int] = (3, 2)) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 12, padding_idx=0)
        self.series = nn.Conv1d(12, 10, 3, padding=1)
        self.image = nn.Conv2d(1, 6, kernel, stride=2, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        series = self.series(self.words(ids).transpose(1, 2))
        return self.head(self.image(series[:, None]).tanh().mean((2, 3)))


@pytest.fixture
def base() -> Reader:
    torch.manual_seed(0)
    return Reader().eval()


def lora_of(base: nn.Module, folder: Path, seed: int, **config: Any) -> Path:
    """Write a LoRA with PEFT that has its own rank and scale."""
    torch.manual_seed(seed)
    values = dict(r=2 + seed, lora_alpha=5, target_modules=TARGETS, init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**{**values, **config}))
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture
def folders(base: Reader, tmp_path: Path) -> dict[str, Path]:
    options = {"first": {}, "other": {"use_rslora": True}, "partial": {"target_modules": ["image", "words"]}}
    return {
        task: lora_of(base, tmp_path / f"lora-{task}", seed, **config)
        for seed, (task, config) in enumerate(options.items())
    }


@pytest.fixture
def subspace(folders: dict[str, Path]) -> SharedSubspace:
    return SharedSubspace.from_adapters(folders, progress=False)


@torch.no_grad()
def output(model: nn.Module, **kwargs: Any) -> Tensor:
    return model.eval()(IDS, **kwargs)


def of_lora(base: nn.Module, folder: Path) -> Tensor:
    return output(PeftModel.from_pretrained(copy.deepcopy(base), folder))


# ---- Adapters in and out --------------------------------------------------------------------------------------------


def test_adapters_compute_what_peft_computes_with_them(
    base: Reader, folders: dict[str, Path], subspace: SharedSubspace
) -> None:
    model = subspace.apply(copy.deepcopy(base))
    for task, folder in folders.items():
        model.set_adapter(task)
        assert_close(output(model), of_lora(base, folder))
        assert (output(model) - output(base)).abs().max() > 0.01


def test_their_matrices_are_those_of_the_weights(base: Reader, folders: dict[str, Path]) -> None:
    subspace = SharedSubspace.from_adapters(folders, progress=False)
    shapes = {module: layer.shape for module, layer in subspace.state.layers.items()}
    assert shapes == {"words": (12, 20), "series": (10, 36), "image": (6, 6), "head": (3, 6)}
    merged = PeftModel.from_pretrained(copy.deepcopy(base), folders["first"]).merge_and_unload()
    for module, update in subspace.state.updates_of("first").items():
        change = (merged.get_submodule(module).weight - base.get_submodule(module).weight).detach()
        expected = change.T if module == "words" else change.flatten(1)
        assert_close(update.dense(), expected)


def test_an_export_is_what_came_in_and_comes_in_again(
    base: Reader, folders: dict[str, Path], subspace: SharedSubspace, tmp_path: Path
) -> None:
    again = {}
    for task, folder in folders.items():
        subspace.export_lora(task, again.setdefault(task, tmp_path / f"exported-{task}"))
        assert_close(of_lora(base, again[task]), of_lora(base, folder))
    names = {task: set(load_file(folder / "adapter_model.safetensors")) for task, folder in again.items()}
    assert names["first"] == set(load_file(folders["first"] / "adapter_model.safetensors"))
    second = SharedSubspace.from_adapters(again, progress=False)
    assert second.state.layouts == subspace.state.layouts
    for task in folders:
        for module, update in subspace.state.updates_of(task).items():
            assert_close(second.state.updates_of(task)[module].dense(), update.dense())


def test_a_mixed_batch_computes_each_sample_as_its_task_does(base: Reader, subspace: SharedSubspace) -> None:
    model = subspace.apply(copy.deepcopy(base))
    names = ["other", "__base__", "partial", "first"]
    found = output(model, adapter_names=names)
    for i, name in enumerate(names):
        if name == "__base__":
            expected = output(base)
        else:
            model.set_adapter(name)
            expected = output(model)
        assert_close(found[i], expected[i])


def test_a_tree_comes_back_whole_by_every_loader(base: Reader, subspace: SharedSubspace, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    subspace.save_pretrained(tree)
    expected = output(subspace.apply(copy.deepcopy(base), ["other"]))
    loaded = SharedSubspace.from_pretrained(tree)
    assert loaded.state.layouts == subspace.state.layouts
    assert torch.equal(output(loaded.apply(copy.deepcopy(base), ["other"])), expected)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tree, subfolder="tasks/other")
    assert torch.equal(output(model), expected)
    newest = output(subspace.apply(copy.deepcopy(base), ["partial"]))
    assert_close(of_lora(base, tree), newest)  # the plain LoRA at its root
    loaded.save_pretrained(tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tree)


def test_a_models_own_checkpoint_comes_back(base: Reader, subspace: SharedSubspace, tmp_path: Path) -> None:
    model = subspace.apply(copy.deepcopy(base))
    model.save_pretrained(tmp_path / "checkpoint")
    found = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "checkpoint" / "other")
    model.set_adapter("other")
    assert torch.equal(output(found), output(model))


@pytest.mark.parametrize("safe_merge", [True, False])
def test_a_merge_is_taken_back(safe_merge: bool, base: Reader, subspace: SharedSubspace) -> None:
    model = subspace.apply(copy.deepcopy(base), ["first", "other"])
    expected = output(model)
    model.merge_adapter(safe_merge=safe_merge)
    assert_close(output(model), expected)
    model.unmerge_adapter()
    assert_close(output(model), expected)
    plain = model.merge_and_unload()
    assert_close(output(plain), expected)
    assert [type(plain.get_submodule(name)) for name in TARGETS] == [nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Linear]
    assert torch.equal(output(subspace.apply(copy.deepcopy(base)).unload()), output(base))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_copy_restores_the_weights_to_the_bit(dtype: torch.dtype, base: Reader, subspace: SharedSubspace) -> None:
    model = subspace.apply(copy.deepcopy(base).to(dtype), ["first", "other"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = output(model)
    model.merge_adapter(["first"], keep_base=True)
    model.merge_adapter(["other"])
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"base_model.model.{name}.base_layer.weight" for name in TARGETS}
    model.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(output(model), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_smaller_type_rounds_and_no_more(dtype: torch.dtype, base: Reader, subspace: SharedSubspace) -> None:
    expected = output(subspace.apply(copy.deepcopy(base)))
    model = subspace.apply(copy.deepcopy(base).to(dtype))
    assert output(model).dtype == dtype
    assert_close(output(model), expected, tolerance=0.05)
    assert_close(output(model, adapter_names=["first"] * len(IDS)), expected, tolerance=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(output(subspace.apply(copy.deepcopy(base))), expected, tolerance=0.05)


def test_an_embedding_that_peft_saved_beside_its_update_is_kept_with_both(tiny_model: Any, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model("llama"), config)
    with torch.no_grad():
        model.get_input_embeddings().base_layer.weight.add_(0.1)  # trained, like those of new tokens
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    subspace = SharedSubspace.from_adapters([tmp_path / "lora"], progress=False)
    assert "model.embed_tokens" not in subspace.state.layers
    batch = LLAMA.batch()
    assert_close(logits(subspace.apply(tiny_model("llama")), batch), logits(model.eval(), batch))


def test_a_copy_of_an_embedding_that_is_the_models_own_leaves_the_update(tiny_model: Any, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")

    def loaded() -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()

    config = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    model = get_peft_model(loaded(), config)
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    subspace = SharedSubspace.from_adapters([tmp_path / "lora"], progress=False)
    assert subspace.state.layouts == {"model.embed_tokens": Layout("embedding")}
    batch, applied = LLAMA.batch(), subspace.apply(loaded())
    assert_close(logits(applied, batch), logits(model.eval(), batch))
    applied.save_pretrained(tmp_path / "checkpoint", save_embedding_layers=True)
    again = PeftModel.from_pretrained(loaded(), tmp_path / "checkpoint" / "lora")
    assert torch.equal(logits(again, batch), logits(applied, batch))


def test_compiled_it_computes_the_same(base: Reader, subspace: SharedSubspace) -> None:
    model = subspace.apply(base)
    expected = output(model)
    assert_close(output(torch.compile(model, backend="eager")), expected)


# ---- Training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["coefficients", "adapt", "init"])
def test_gradients_are_those_of_the_update_in_the_weights(phase: str, base: Reader) -> None:
    config = ShareConfig(num_components=5, pseudo_rank=3, target_modules=TARGETS, phase=phase)
    model = get_peft_model(copy.deepcopy(base).double(), config, "one")
    fill(model, "one")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(parameters) == {"coefficients": 8, "adapt": 16, "init": 8}[phase]
    model.train()
    model(IDS).square().sum().backward()
    found = {name: p.grad.double().clone() for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    weights = {
        f"{name}.weight": base.get_submodule(name).weight.double().detach()
        + layer.get_delta_weight("one").double().reshape(base.get_submodule(name).weight.shape)
        for name, layer in share_layers(model).items()
    }
    torch.func.functional_call(copy.deepcopy(base).double(), weights, IDS).square().sum().backward()
    for name, parameter in parameters.items():
        assert_close(found[name], parameter.grad, tolerance=1e-3)


@pytest.mark.parametrize("share", [{}, {"coefficient_dtype": "4bit", "tolerance": 0.4}], ids=["plain", "small"])
def test_a_stream_of_images_is_learned_in_convolutions(share: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ConvNextForImageClassification(
        ConvNextConfig(num_stages=2, hidden_sizes=[8, 12], depths=[1, 1], num_labels=3)
    )
    tasks = {name: _images(seed) for seed, name in enumerate(["first", "other", "last"])}
    trainer = ShareTrainer(
        copy.deepcopy(model),
        arguments(tmp_path / "out"),
        stream_config(["patch_embeddings", "downsampling_layer.1"], modules_to_save=["classifier"], **share),
        {name: tasks[name] for name in ("first", "other")},
    )
    trainer.train()
    trainer.args.method = "coefficients"
    trainer.learn_task("last", tasks["last"]["train"])
    assert all(layout.kind == "convolution" for layout in trainer.subspace.state.layouts.values())
    assert trainer.subspace.state.layouts.keys() == trainer.subspace.state.layers.keys()
    pixels = torch.stack(list(tasks["first"]["test"]["pixel_values"]))
    loaded = SharedSubspace.from_pretrained(tmp_path / "out" / "subspace")
    with torch.no_grad():
        found = loaded.apply(copy.deepcopy(model), ["last"])(pixel_values=pixels).logits
        trainer.model.set_adapter("last")
        assert_close(found, trainer.model.eval()(pixel_values=pixels).logits)


def _images(seed: int) -> DatasetDict:
    generator = torch.Generator().manual_seed(seed)
    values = {"pixel_values": torch.randn(16, 3, 16, 16, generator=generator).tolist(), "labels": [0, 1, 2, 0] * 4}
    return DatasetDict({split: Dataset.from_dict(values).with_format("torch") for split in ("train", "test")})


@pytest.mark.parametrize("phase", ["coefficients", "adapt", "init"])
def test_a_language_model_learns_in_its_embeddings(phase: str, tiny_model: Any) -> None:
    base = tiny_model("llama")
    model = get_peft_model(base, LLAMA.config(target_modules=["embed_tokens"], phase=phase), "one")
    batch = LLAMA.batch()
    assert all(gradient.isfinite().all() for gradient in gradients(model, batch).values())
    losses = learn(model, batch, steps=8)
    assert losses[-1] < losses[0] - 0.01
    assert_close(logits(model, batch), logits(with_task_in_weights(tiny_model("llama"), model, "one"), batch))


def test_a_fresh_embedding_starts_as_pefts_does(base: Reader) -> None:
    model = get_peft_model(base, ShareConfig(target_modules=["words"], phase="init"), "one")
    layer = share_layers(model)["words"]
    assert not layer.share_temporary_in["one"].any()
    assert 0.5 < layer.share_temporary_out["one"].std() < 2


def test_an_embedding_that_starts_in_the_span_has_basis_vectors_on_its_random_side(base: Reader) -> None:
    sizes = {"num_components": 4, "num_temporary": 2, "pseudo_rank": 2}
    config = ShareConfig(target_modules=["words"], phase="adapt", temporary_init="span", **sizes)
    layer = share_layers(get_peft_model(base, config, "one"))["words"]
    expected = layer.out_features**0.5 * layer.share_basis_out[:, :2]
    assert torch.allclose(layer.share_temporary_out["one"], expected)
    assert not layer.share_temporary_in["one"].any()


def test_dropout_does_not_reach_the_ids_of_an_embedding(base: Reader) -> None:
    model = get_peft_model(base, ShareConfig(target_modules=["words", "series"], dropout=0.9), "one")
    fill(model, "one")
    words, series = share_layers(model)["words"].train(), share_layers(model)["series"].train()
    assert torch.equal(words(IDS), words(IDS))
    x = torch.randn(2, 12, 7)
    assert not torch.equal(series(x), series(x))


# ---- What is refused ------------------------------------------------------------------------------------------------


class Padded(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class Shifted(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids + 2)


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), "a Conv2d with groups=2, expected 1"),
        (nn.Conv1d(4, 4, 3, groups=4), "a Conv1d with groups=4, expected 1"),
        (nn.Conv2d(4, 6, 3, dilation=2), r"a Conv2d with dilation=\(2, 2\), expected 1"),
        (
            nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
            "a Conv2d with padding_mode='reflect', expected 'zeros'",
        ),
        (Padded(4, 6, 3), "a Padded with a forward of its own, expected that of torch.nn.Conv2d"),
        (Shifted(4, 6), "a Shifted with a forward of its own, expected that of torch.nn.Embedding"),
        (nn.Embedding(4, 6, max_norm=1.0), "a Embedding with max_norm=1.0, expected None"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_layer_that_peft_computes_otherwise_is_refused_by_name(layer: nn.Module, found: str) -> None:
    model = nn.Sequential(nn.Identity(), layer)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"'1' is {found}.*exclude_modules"):
        get_peft_model(model, ShareConfig(target_modules=["1"]))
    assert snapshot(model) == before


def test_a_kernel_of_one_has_no_dilation() -> None:
    model = get_peft_model(nn.Sequential(nn.Conv2d(4, 6, 1, dilation=2)), ShareConfig(target_modules=["0"]))
    assert share_layers(model).keys() == {"0"}


def test_pefts_conversion_says_that_it_makes_no_such_lora(subspace: SharedSubspace, base: Reader) -> None:
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(subspace.apply(base), rank=2)


@pytest.mark.parametrize("of_file", [True, False], ids=["file", "memory"])
def test_another_kernel_of_the_same_size_is_refused(of_file: bool, subspace: SharedSubspace, tmp_path: Path) -> None:
    other = Reader(kernel=(2, 3))
    before = snapshot(other)
    subspace.save_pretrained(tmp_path / "tree")
    with pytest.raises(ValueError, match=r"'image' .*convolution with kernel \((2, 3|3, 2)\)"):
        if of_file:
            PeftModel.from_pretrained(other, tmp_path / "tree", subfolder="tasks/first")
        else:
            subspace.apply(other)
    assert snapshot(other) == before


def test_adapters_of_two_kernels_are_refused(subspace: SharedSubspace, tmp_path: Path) -> None:
    folder, held = lora_of(Reader(kernel=(2, 3)), tmp_path / "turned", 1), subspace.state
    with pytest.raises(
        ValueError,
        match=r"'image' is of kind convolution with kernel \(2, 3\) for task 'turned', expected convolution with "
        r"kernel \(3, 2\) as for the others",
    ):
        subspace.add_adapters([folder], progress=False)
    assert subspace.state is held
    other = SharedSubspace.from_adapters([folder], progress=False)
    with pytest.raises(ValueError, match=r"the other subspace has 'image' of kind convolution with kernel \(2, 3\)"):
        reconcile(subspace.state, other.state)


def test_two_writers_keep_their_kernels(folders: dict[str, Path]) -> None:
    one = SharedSubspace.from_adapters({"first": folders["first"]}, progress=False)
    other = SharedSubspace.from_adapters({"partial": folders["partial"]}, progress=False)
    assert reconcile(one.state, other.state).layouts == one.state.layouts


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda t: t.pop("image.lora_B.weight"), "'image' has no lora_B, expected both lora_A and lora_B"),
        (lambda t: t.pop("words.lora_embedding_A"), "'words' has no lora_embedding_A, expected both"),
        (
            lambda t: t.update({"words.lora_A.weight": torch.ones(2, 20)}),
            r"'words' has .*'lora_A', 'lora_embedding_A'",
        ),
        (lambda t: t.update({"image.lora_B.weight": torch.ones(6, 2, 3, 3)}), r"'image' .*\(6, 2, 3, 3\), expected"),
        (lambda t: t.update({"image.lora_B.weight": torch.ones(6, 1, 1, 1)}), "without groups"),
        (lambda t: t.update({"image.lora_A.weight": torch.ones(2, 1, 3)}), r"\(2, 1, 3\) and \(6, 2, 1, 1\)"),
        (lambda t: t.update({"words.lora_embedding_B": torch.ones(12)}), r"'words' are \(2, 20\) and \(12,\)"),
    ],
)
def test_half_a_lora_is_refused_by_name(change: Any, found: str, folders: dict[str, Path]) -> None:
    def renamed(tensors: dict[str, Tensor]) -> None:
        plain = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
        change(plain)
        tensors.clear()
        tensors.update({f"base_model.model.{name}": tensor for name, tensor in plain.items()})

    edit_tensors(folders["first"] / "adapter_model.safetensors", renamed)
    with pytest.raises(ValueError, match=found):
        SharedSubspace.from_adapters([folders["first"]], progress=False)


# ---- Files ----------------------------------------------------------------------------------------------------------


def test_only_trees_with_such_layers_have_the_newer_format(
    folders: dict[str, Path], base: Reader, tmp_path: Path
) -> None:
    dense = lora_of(base, tmp_path / "dense", 1, target_modules=["head"])
    for folders_of, version in (({"dense": dense}, 2), (folders, 3)):
        place = tmp_path / f"tree-{version}"
        SharedSubspace.from_adapters(folders_of, progress=False).save_pretrained(place)
        index = json.loads((place / "share_config.json").read_text())
        assert index["format_version"] == version
        assert ("layout" in index["modules"].get("words", {})) == (version == 3)
        assert "layout" not in index["modules"]["head"]


@pytest.mark.parametrize(
    ("layout", "found"),
    [
        ("convolution", "'image': layout is 'convolution', expected its kind and kernel"),
        ({"kind": "attention"}, "'image': kind is 'attention', expected one of"),
        ({"kind": "convolution"}, r"'image': kernel of a convolution is \(\)"),
        ({"kind": "convolution", "kernel": [3, 0]}, r"'image': kernel of a convolution is \(3, 0\)"),
        ({"kind": "convolution", "kernel": [3, 2.0]}, r"'image': kernel of a convolution is \(3, 2.0\)"),
        ({"kind": "convolution", "kernel": [5]}, r"'image': shape is \(6, 6\), expected a multiple of the kernel"),
        ({"kind": "embedding", "kernel": [3]}, r"'image': kernel of a embedding is \(3,\)"),
    ],
)
def test_a_layout_that_no_version_wrote_is_refused(
    layout: Any, found: str, subspace: SharedSubspace, tmp_path: Path
) -> None:
    subspace.save_pretrained(tmp_path / "tree")
    edit_index(tmp_path / "tree", lambda index: index["modules"]["image"].update(layout=layout))
    with pytest.raises(ValueError, match=rf"share_config.json: {found}"):
        SharedSubspace.from_pretrained(tmp_path / "tree")


def test_a_configuration_that_names_more_is_no_obstacle(folders: dict[str, Path], base: Reader) -> None:
    edit_json(
        folders["first"] / "adapter_config.json",
        lambda config: config.update(target_modules="words|image|head|series|nothing"),
    )
    subspace = SharedSubspace.from_adapters([folders["first"]], progress=False)
    assert subspace.state.layers.keys() == set(TARGETS)


# ---- Mathematics ----------------------------------------------------------------------------------------------------


kernels = st.lists(st.integers(1, 3), max_size=3).map(tuple)


@given(
    kernel=kernels, n=st.integers(1, 5), channels=st.integers(1, 4), rank=st.integers(1, 4), seed=st.integers(0, 99)
)
def test_tensors_of_a_lora_and_matrices_are_the_same_update(
    kernel: tuple[int, ...], n: int, channels: int, rank: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.tensor(kernel).prod()) if kernel else 1
    factors = [torch.randn(rows, rank, generator=generator, dtype=torch.float64) for rows in (n, channels * size)]
    update, layout = LowRankUpdate(*factors), Layout("convolution", kernel) if kernel else None
    tensors = as_tensors("layer", update, layout, rank + 1)
    a, b, found = as_matrices(Path("file"), "layer", {factor_of(name)[1]: tensor for name, tensor in tensors.items()})
    assert found == layout
    assert_close(b @ a, factors[0] @ factors[1].T, tolerance=1e-12)
    if kernel:
        # By PEFT's own formula: first A with its kernel, then B at each position.
        conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]
        x = torch.randn(2, channels, *(size + 2 for size in kernel), generator=generator, dtype=torch.float64)
        weight = (factors[0] @ factors[1].T).reshape(n, channels, *kernel)
        by_lora = conv(conv(x, tensors["layer.lora_A.weight"]), tensors["layer.lora_B.weight"])
        assert_close(by_lora, conv(x, weight), tolerance=1e-9)
