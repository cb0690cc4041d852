"""The architectures of the matrix: a tiny model of each, what is adapted in it, and its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from share_hf import ShareConfig

from ..cases import PHI, K, P


VOCABULARY, HIDDEN = 64, 32

_DECODER = dict(
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    initializer_range=0.1,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,  # otherwise, random weights repeat the last token, whatever is adapted
)
_ENCODER = dict(
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    initializer_range=0.2,
    num_labels=3,
    pad_token_id=0,
)
_GPT2 = dict(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1)
_ENDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
_BART = dict(
    vocab_size=VOCABULARY,
    d_model=HIDDEN,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=64,
    init_std=0.2,
    decoder_start_token_id=2,
    forced_eos_token_id=None,
    num_labels=3,
    **_ENDS,
)


def _tokens(size: int = 4, length: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(3, VOCABULARY, (size, length), generator=generator)}


def _pairs_of_tokens(size: int = 4) -> dict[str, Tensor]:
    ids = _tokens(size)["input_ids"]
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}


def _images(size: int = 4) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(size, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def _sounds(size: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (size, 5), generator=generator)
    return {"input_features": torch.randn(size, 8, 16, generator=generator), "decoder_input_ids": ids}


@dataclass(frozen=True)
class Architecture:
    """A miniature model of transformers.

    Args:
        model: Name of the class of the model, from which the name of its configuration follows.
        config: Values of the configuration.
        target_modules: Modules that are adapted.
        task_type: Task type of PEFT.
        inputs: Function that makes a batch of a given size.
        is_slow: Whether only the slow tests use it.
        generates: Whether it generates text.
        has_nested_head: Whether its classifier consists of several modules.
    """

    model: str
    config: dict[str, Any]
    target_modules: tuple[str, ...]
    task_type: str | None = None
    inputs: Callable[..., dict[str, Tensor]] = _tokens
    is_slow: bool = True
    generates: bool = False
    has_nested_head: bool = False

    def build(self) -> PreTrainedModel:
        torch.manual_seed(0)
        model_class = getattr(transformers, self.model)
        model = model_class(model_class.config_class(**self.config)).eval()
        with torch.no_grad():  # some start from zeros, so that nothing would reach the output
            for parameter in model.parameters():
                if parameter.ndim > 1 and not parameter.any():
                    nn.init.normal_(parameter, std=0.1)
        return model

    def share_config(self, **overrides: Any) -> ShareConfig:
        values = dict(
            num_components=K,
            pseudo_rank=P,
            num_temporary=PHI,
            target_modules=list(self.target_modules),
            task_type=self.task_type,
        )
        return ShareConfig(**{**values, **overrides})


_LLAMA_LIKE = ("q_proj", "v_proj", "down_proj")

ARCHITECTURES: dict[str, Architecture] = {
    # Decoders.
    "llama": Architecture("LlamaForCausalLM", _DECODER, _LLAMA_LIKE, "CAUSAL_LM", is_slow=False, generates=True),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        {**_GPT2, **_ENDS, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        ("c_attn", "c_proj"),
        "CAUSAL_LM",
        is_slow=False,
        generates=True,
    ),
    "qwen2": Architecture("Qwen2ForCausalLM", _DECODER, _LLAMA_LIKE, "CAUSAL_LM", generates=True),
    "qwen3": Architecture("Qwen3ForCausalLM", _DECODER, _LLAMA_LIKE, "CAUSAL_LM", generates=True),
    "mistral": Architecture("MistralForCausalLM", _DECODER, _LLAMA_LIKE, "CAUSAL_LM", generates=True),
    "gemma": Architecture("GemmaForCausalLM", _DECODER, _LLAMA_LIKE, "CAUSAL_LM", generates=True),
    "gemma2": Architecture("Gemma2ForCausalLM", _DECODER, _LLAMA_LIKE, "CAUSAL_LM", generates=True),
    "phi": Architecture("PhiForCausalLM", _DECODER, ("q_proj", "dense", "fc1"), "CAUSAL_LM", generates=True),
    "phi3": Architecture("Phi3ForCausalLM", _DECODER, ("qkv_proj", "down_proj"), "CAUSAL_LM", generates=True),
    "gpt-neox": Architecture(
        "GPTNeoXForCausalLM", _DECODER, ("query_key_value", "dense_4h_to_h"), "CAUSAL_LM", generates=True
    ),
    "opt": Architecture(
        "OPTForCausalLM",
        {**_DECODER, "ffn_dim": 48, "word_embed_proj_dim": 24, "dropout": 0.0},
        ("q_proj", "project_in", "fc2"),
        "CAUSAL_LM",
        generates=True,
    ),
    "falcon": Architecture(
        "FalconForCausalLM",
        {name: value for name, value in _DECODER.items() if name != "head_dim"},
        ("query_key_value", "dense_h_to_4h"),
        "CAUSAL_LM",
        generates=True,
    ),
    "bloom": Architecture(
        "BloomForCausalLM",
        {**_DECODER, "n_layer": 2, "n_head": 4},
        ("query_key_value", "dense"),
        "CAUSAL_LM",
        generates=True,
    ),
    "mixtral": Architecture(
        "MixtralForCausalLM",
        {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
        ("q_proj", "o_proj"),
        "CAUSAL_LM",
        generates=True,
    ),
    "qwen2-moe": Architecture(
        "Qwen2MoeForCausalLM",
        {
            **_DECODER,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
        },
        ("v_proj", "shared_expert.down_proj", "shared_expert_gate"),
        "CAUSAL_LM",
        generates=True,
    ),
    "qwen3-moe": Architecture(
        "Qwen3MoeForCausalLM",
        {**_DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        ("q_proj", "o_proj"),
        "CAUSAL_LM",
        generates=True,
    ),
    "mamba": Architecture(
        "MambaForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "state_size": 4,
            "num_hidden_layers": 2,
            "initializer_range": 0.5,
            "tie_word_embeddings": False,
            **_ENDS,
        },
        ("in_proj",),
        "CAUSAL_LM",
        is_slow=False,
        generates=True,
    ),
    "llama-classifier": Architecture(
        "LlamaForSequenceClassification", {**_DECODER, "num_labels": 3}, _LLAMA_LIKE, "SEQ_CLS"
    ),
    "llama-features": Architecture("LlamaModel", _DECODER, _LLAMA_LIKE, "FEATURE_EXTRACTION"),
    # Encoders.
    "bert-classifier": Architecture(
        "BertForSequenceClassification", _ENCODER, ("query", "value"), "SEQ_CLS", is_slow=False
    ),
    "bert-tokens": Architecture("BertForTokenClassification", _ENCODER, ("query", "value"), "TOKEN_CLS"),
    "bert-answers": Architecture(
        "BertForQuestionAnswering", {**_ENCODER, "num_labels": 2}, ("query", "output.dense"), "QUESTION_ANS"
    ),
    "bert-features": Architecture("BertModel", _ENCODER, ("key", "intermediate.dense"), "FEATURE_EXTRACTION"),
    "bert-choices": Architecture(
        "BertForMultipleChoice",
        _ENCODER,
        ("query", "value"),
        inputs=lambda size=4: {"input_ids": _tokens(2 * size)["input_ids"].view(size, 2, -1)},
    ),
    "roberta": Architecture(
        "RobertaForSequenceClassification", _ENCODER, ("query", "value"), "SEQ_CLS", has_nested_head=True
    ),
    "deberta": Architecture(
        "DebertaForSequenceClassification", _ENCODER, ("in_proj", "intermediate.dense"), "SEQ_CLS"
    ),
    "deberta-v2": Architecture(
        "DebertaV2ForSequenceClassification",
        {
            **_ENCODER,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "share_att_key": True,
        },
        ("query_proj", "key_proj"),
        "SEQ_CLS",
    ),
    "electra": Architecture(
        "ElectraForSequenceClassification",
        {**_ENCODER, "embedding_size": 16},
        ("query", "embeddings_project"),
        "SEQ_CLS",
        has_nested_head=True,
    ),
    "albert": Architecture(  # one block that is called once for each layer
        "AlbertForSequenceClassification", {**_ENCODER, "embedding_size": 16}, ("query", "ffn"), "SEQ_CLS"
    ),
    "distilbert": Architecture(
        "DistilBertForSequenceClassification",
        {**_ENCODER, "dim": HIDDEN, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
        ("q_lin", "lin2"),
        "SEQ_CLS",
    ),
    "modernbert": Architecture(
        "ModernBertForSequenceClassification",
        {**_ENCODER, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
        ("Wqkv", "Wi"),
        "SEQ_CLS",
    ),
    # Encoder-decoders.
    "t5": Architecture(
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": HIDDEN,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 1,
            "num_heads": 4,
            "initializer_factor": 3.0,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": 2,
        },
        ("q", "v", "wo"),
        "SEQ_2_SEQ_LM",
        inputs=_pairs_of_tokens,
        is_slow=False,
        generates=True,
    ),
    "bart": Architecture(
        "BartForConditionalGeneration",
        {**_BART, "dropout": 0.0},
        ("k_proj", "fc1"),
        "SEQ_2_SEQ_LM",
        inputs=_pairs_of_tokens,
        generates=True,
    ),
    "bart-classifier": Architecture(
        "BartForSequenceClassification",
        {**_BART, "dropout": 0.0},
        ("k_proj", "fc1"),
        "SEQ_CLS",
        inputs=lambda size=4: {"input_ids": torch.cat([_tokens(size)["input_ids"], torch.full((size, 1), 2)], dim=1)},
    ),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        {**_BART, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 32, "dropout": 0.0},
        ("q_proj", "fc2"),
        inputs=_sounds,
    ),
    # Images.
    "vit": Architecture(
        "ViTForImageClassification",
        {**_ENCODER, "image_size": 16, "patch_size": 8},
        ("q_proj", "v_proj"),
        inputs=_images,
        is_slow=False,
    ),
    "dinov2": Architecture(
        "Dinov2ForImageClassification",
        {**_ENCODER, "image_size": 16, "patch_size": 8},
        ("q_proj", "fc1"),
        inputs=_images,
    ),
}


def names(condition: Callable[[Architecture], bool] = lambda _: True) -> list[Any]:
    """Return the architectures for which a condition holds, as parameters of a test."""
    return [
        pytest.param(name, marks=pytest.mark.slow if architecture.is_slow else ())
        for name, architecture in ARCHITECTURES.items()
        if condition(architecture)
    ]
