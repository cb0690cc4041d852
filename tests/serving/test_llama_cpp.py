"""llama.cpp computes the same with a LoRA in GGUF as PEFT, token for token, on a small model and on a real one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from share_hf import SharedSubspace
from share_hf.serving import export_gguf
from tests.trees import assert_close, lora_config, save_adapter


pytestmark = pytest.mark.slow

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NEW_TOKENS = 24

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed (pip install share-hf[gguf])")
llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed, which has to be compiled")


def _write_base(model: LlamaForCausalLM, path: Path) -> None:
    """Write a Llama as GGUF, in float32 and without a vocabulary: prompts are token ids here."""
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        rows = weight.float()
        if (count := heads.get(name.split(".")[-2])) is not None:
            order = torch.arange(len(rows)).reshape(count, 2, -1).mT.flatten()
            rows = rows[order]
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), rows.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _logits_of_llama_cpp(base: Path, lora: Path | None, prompt: list[int]) -> tuple[list[int], Tensor]:
    """Return the tokens that llama.cpp finds most likely one after another, and the logits at all positions."""
    model = llama_cpp.Llama(
        str(base),
        lora_path=None if lora is None else str(lora),
        n_ctx=64,
        n_threads=1,
        logits_all=True,
        verbose=False,
    )
    tokens, new = list(prompt), list(prompt)
    for _ in range(NEW_TOKENS):
        model.eval(new)
        new = [int(np.argmax(model.scores[len(tokens) - 1]))]
        tokens += new
    return tokens, torch.from_numpy(np.array(model.scores[: len(tokens) - 1]))


@torch.no_grad()
def _logits_of_peft(model: torch.nn.Module, prompt: list[int]) -> tuple[list[int], Tensor]:
    tokens = list(prompt)
    for _ in range(NEW_TOKENS):
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens, model(input_ids=torch.tensor([tokens[:-1]])).logits[0]


@pytest.mark.parametrize(
    ("place", "targets"),
    [("tiny", [*LINEAR, "embed_tokens", "lm_head"]), ("models/llama-text-6m", LINEAR)],
    ids=["tiny", "real"],
)
def test_llama_cpp_generates_what_peft_does(
    place: str,
    targets: list[str],
    tiny_model: Callable[[str], PreTrainedModel],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    base = tmp_path / "base"
    if place == "tiny":
        tiny_model("llama").save_pretrained(base)
    else:
        base = request.getfixturevalue("shared_data") / place

    def loaded() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    folders = {
        task: save_adapter(loaded(), tmp_path / task, lora_config(target_modules=targets), seed)
        for seed, task in enumerate(("mrpc", "sst2"))
    }
    subspace = SharedSubspace.from_adapters(folders, num_components=12, pseudo_rank=4, progress=False)
    _write_base(loaded(), tmp_path / "base.gguf")
    prompt = torch.randint(3, 64, (6,)).tolist()
    seen = [tokens_and_logits := _logits_of_peft(loaded().eval(), prompt)]
    found = _logits_of_llama_cpp(tmp_path / "base.gguf", None, prompt)
    assert found[0] == tokens_and_logits[0]
    for task in subspace.tasks:
        subspace.export_lora(task, tmp_path / f"{task}-lora")
        expected = _logits_of_peft(PeftModel.from_pretrained(loaded(), tmp_path / f"{task}-lora").eval(), prompt)
        export_gguf(subspace, task, tmp_path / f"{task}.gguf", base_model=base)
        found = _logits_of_llama_cpp(tmp_path / "base.gguf", tmp_path / f"{task}.gguf", prompt)
        assert_close(found[1], expected[1], 1e-3)
        assert found[0] == expected[0]
        seen.append(expected)
    assert len({tuple(tokens) for tokens, _ in seen}) == 3  # the base model and both tasks give different answers
