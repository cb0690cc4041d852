"""Which modules are kept whole with a task, and which of an adapter's embeddings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from share_hf import SharedSubspace
from share_hf.format.lora import read_lora
from share_hf.format.saved_modules import num_labels_of, saved_module_of, saved_names
from tests.trees import BERT_LORA, edit_json, lora_config, named, save_adapter


IDS = torch.arange(3, 19).reshape(2, 8)


@pytest.mark.parametrize("saved", [["classifier"], ["norm"], ["b.norm", "score"], ["ifier"], ["c", "pre_classifier"]])
def test_names_are_resolved_as_peft_wraps_modules(saved: list[str]) -> None:
    def block() -> nn.Module:
        return nn.ModuleDict({"q": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "final_norm": nn.LayerNorm(4)})

    heads = {"pre_classifier": nn.Linear(4, 4), "classifier": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))}
    model = nn.ModuleDict({"a": block(), "b": block(), **heads, "score": nn.Linear(4, 2)})
    names = [name for name, _ in model.named_parameters()]
    peft_model = get_peft_model(model, LoraConfig(target_modules=["q"], modules_to_save=saved))
    wrapped = {
        name.removeprefix("base_model.model.")
        for name, module in peft_model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    assert wrapped
    assert {saved_module_of(name, saved) for name in names} - {None} == wrapped


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM", None])
def test_a_task_type_brings_the_names_that_peft_gives_it(
    task_type: str | None, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    config = LoraConfig(target_modules=["query"], modules_to_save=["pooler"], task_type=task_type)
    if task_type != "CAUSAL_LM":
        get_peft_model(tiny_model("bert"), config)
    assert set(saved_names(["pooler"], task_type)) == set(config.modules_to_save)


@pytest.mark.parametrize("names", [("classifier.dense", "classifier.out_proj"), ("pooler.dense", "classifier")])
@pytest.mark.parametrize("labels", [2, 8, 150])
def test_the_labels_of_a_head_of_two_layers_are_those_of_the_last(names: tuple[str, str], labels: int) -> None:
    first, last = torch.zeros(8, 8), torch.zeros(labels, 8)
    for order in (1, -1):
        pairs = [(f"{names[0]}.weight", first), (f"{names[1]}.weight", last), ("model.norm.weight", torch.zeros(8))]
        assert num_labels_of(dict(pairs[::order])) == labels
    assert num_labels_of({"lm_head.weight": last}) is None


def test_a_head_of_an_old_configuration_is_read(tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    folder = save_adapter(named(tiny_model("bert")), tmp_path / "old", lora_config(**BERT_LORA), seed=0)
    expected = read_lora(folder)
    edit_json(folder / "adapter_config.json", lambda config: config.update(modules_to_save=None))
    found = read_lora(folder)
    assert found.head.keys() == expected.head.keys() == {"classifier.weight", "classifier.bias"}
    assert set(found.target["modules_to_save"]) == {"classifier", "score"}


def test_a_tree_that_could_not_be_read_again_is_not_written(subspace: SharedSubspace, tmp_path: Path) -> None:
    subspace.save_pretrained(tmp_path / "tree")
    (name, info), *_ = subspace.state.tasks.items()
    for head, message in (
        ({"elsewhere.weight": torch.ones(2, 2)}, "'elsewhere.weight' is unexpected"),
        ({"lm_head.weight": torch.full((2, 2), torch.nan)}, "lm_head.weight' has NaN"),
    ):
        broken = replace(info, head=head, target={**info.target, "modules_to_save": ["lm_head"]})
        state = replace(subspace.state, tasks={**subspace.state.tasks, name: broken})
        with pytest.raises(ValueError, match=message):
            SharedSubspace(state).save_pretrained(tmp_path / "tree")
    assert SharedSubspace.from_pretrained(tmp_path / "tree").tasks == subspace.tasks


# ---- Embeddings -----------------------------------------------------------------------------------------------------


def llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def save_lora(base: PreTrainedModel, folder: Path, *, embeddings: bool | str = "auto", **config: object) -> Path:
    torch.manual_seed(1)
    values = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **config}
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**values))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, save_embedding_layers=embeddings)
    return folder


def resized() -> LlamaForCausalLM:
    model = llama()
    model.resize_token_embeddings(67, mean_resizing=False)
    return model


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (llama, {"target_modules": ["q_proj", "lm_head"]}),
        (resized, {"embeddings": True}),
        (resized, {"target_modules": ["q_proj", "lm_head"]}),
        (lambda: llama(tie_word_embeddings=True), {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        (llama, {"modules_to_save": ["embed_tokens", "norm"]}),
    ],
    ids=["head-is-adapted", "resized", "resized-and-adapted", "tied", "saved-by-name"],
)
def test_embeddings_that_are_not_the_base_models_are_kept_with_the_task(
    build: Callable[[], PreTrainedModel], options: dict[str, object], tmp_path: Path
) -> None:
    base = build()
    folder = save_lora(base, tmp_path / "lora", **options)
    subspace = SharedSubspace.from_adapters({"one": folder}, num_components=8, pseudo_rank=8, progress=False)
    subspace.save_pretrained(tmp_path / "tree")
    subspace.export_lora("one", tmp_path / "exported")
    with torch.no_grad():
        expected = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(IDS).logits
        for found in (
            SharedSubspace.from_pretrained(tmp_path / "tree").apply(build()),
            PeftModel.from_pretrained(build(), tmp_path / "tree" / "tasks" / "one"),
            PeftModel.from_pretrained(build(), tmp_path / "tree"),
            PeftModel.from_pretrained(build(), tmp_path / "exported"),
        ):
            torch.testing.assert_close(found.eval()(IDS).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_embeddings_that_the_base_model_has_too_are_left_out(dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    found = read_lora(save_lora(base, tmp_path / "same", embeddings=True))
    assert (found.head, found.target.get("modules_to_save")) == ({}, None)
    adapted = read_lora(save_lora(base, tmp_path / "adapted", target_modules=["q_proj", "lm_head"]))
    assert not adapted.head
    assert "lm_head" in adapted.updates
    with torch.no_grad():
        base.lm_head.weight[5, 0] += 1.0
    changed = read_lora(save_lora(base, tmp_path / "changed", embeddings=True))
    kept = {"lm_head.weight", "model.embed_tokens.weight"} if tied else {"lm_head.weight"}
    assert changed.head.keys() == kept


def test_an_adapter_of_the_head_alone_that_brings_another_head_is_refused(tmp_path: Path) -> None:
    folder = save_lora(llama(), tmp_path / "lora", target_modules=["lm_head"])
    assert "base_model.model.lm_head.base_layer.weight" in load_file(folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"it adapts only \['lm_head'\] and stores them whole"):
        read_lora(folder)


def test_a_vocabulary_of_another_size_is_refused_with_what_helps(tmp_path: Path) -> None:
    folder = save_lora(resized(), tmp_path / "lora", embeddings=True)
    subspace = SharedSubspace.from_adapters({"one": folder}, num_components=8, pseudo_rank=8, progress=False)
    with pytest.raises(ValueError, match=r"task 'one': .*resize_token_embeddings\(67\)"):
        subspace.apply(llama())
