"""A tiny LLaVA, whose modules transformers 4.52 renamed."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration


TARGETS = r".*language_model.*\.(q_proj|v_proj)"


def tiny_llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    text = LlamaConfig(vocab_size=64, pad_token_id=0, **sizes)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **sizes)
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_id=1, pad_token_id=0)
    ).eval()


def as_before_4_52(key: str) -> str:
    """Return the name that transformers had before 4.52 for a module of the language model."""
    return key.replace("model.language_model.layers", "language_model.model.layers")
