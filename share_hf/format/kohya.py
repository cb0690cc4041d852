"""Restore names of modules in which kohya's trainer and similar ones write underscores for dots.

A flattened name has a single reading only if the parts of names are known. They are known for the models of Stable
Diffusion 1, 2 and XL, for Flux, and for the text encoders CLIP and T5. Any other name is refused rather than guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Vocabulary:
    """Parts of which the module names of one kind of model consist.

    Args:
        lists: Parts that are always followed by a number.
        parts: All other parts, never followed by a number.
    """

    lists: frozenset[str]
    parts: frozenset[str]


def _vocabulary(lists: str, parts: str) -> Vocabulary:
    return Vocabulary(frozenset(lists.split()), frozenset(parts.split()))


UNET = _vocabulary(
    "down_blocks up_blocks attentions resnets downsamplers upsamplers transformer_blocks net to_out",
    "mid_block attn1 attn2 to_q to_k to_v ff proj proj_in proj_out conv conv1 conv2 conv_in conv_out conv_shortcut "
    "time_emb_proj time_embedding add_embedding linear_1 linear_2",
)
TRANSFORMER = _vocabulary(
    "transformer_blocks single_transformer_blocks net to_out",
    "attn attn2 to_q to_k to_v add_q_proj add_k_proj add_v_proj to_add_out ff ff_context proj proj_mlp proj_out norm "
    "norm1 norm1_context norm_out linear x_embedder context_embedder time_text_embed timestep_embedder "
    "guidance_embedder text_embedder pos_embed linear_1 linear_2",
)
TEXT_ENCODER = _vocabulary(
    "layers block layer",
    "text_model encoder self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection SelfAttention "
    "DenseReluDense q k v o wi_0 wi_1 wo",
)

# Names in the U-Net of Stability AI, on which kohya trains SDXL: modules outside the blocks, and those in a ResNet.
_BESIDE_BLOCKS = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
}
_IN_RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_BLOCK = re.compile(r"(?P<side>input|output)_blocks_(?P<block>\d+)_(?P<inner>[012])_(?P<rest>.+)")
_MIDDLE = re.compile(r"middle_block_(?P<inner>[012])_(?P<rest>.+)")
_MIDDLE_PARTS = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
_LAYERS_AND_SAMPLER = 3  # two ResNets per block, then a module that changes the resolution

# Names in a block of Flux by Black Forest Labs: the name in diffusers, or the names of the layers that it joins.
_IN_DOUBLE_BLOCK: Mapping[str, tuple[str, ...]] = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn_proj": ("attn.to_out.0",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn_proj": ("attn.to_add_out",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "txt_mod_lin": ("norm1_context.linear",),
}
_IN_SINGLE_BLOCK: Mapping[str, tuple[str, ...]] = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}

_MOST_WORDS = 64  # in a name, far more than any real one has
_WORDS_OF_A_PART = 3
_FLUX = re.compile(r"(?P<kind>double|single)_blocks_(?P<block>\d+)_(?P<rest>.+)")


def is_of_flux(flat: str) -> bool:
    """Return whether a flattened name belongs to a block of Flux as Black Forest Labs names it."""
    return _FLUX.fullmatch(flat) is not None


@lru_cache(maxsize=2**16)
def dotted_names(flat: str, component: str) -> tuple[str, ...]:
    """Return the names of the modules that a flattened name stands for: one, or those that Flux joins in one matrix.

    Args:
        flat: Name with underscores for dots, without the prefix of its component.
        component: Component `unet`, `transformer` or `text_encoder`, or a numbered one of these.

    Returns:
        Names in diffusers or transformers, in the order of the rows of the joined matrix. Empty if the name has no
        reading, or several.
    """
    if (match := _FLUX.fullmatch(flat)) is not None:
        inside = _IN_DOUBLE_BLOCK if match["kind"] == "double" else _IN_SINGLE_BLOCK
        blocks = "transformer_blocks" if match["kind"] == "double" else "single_transformer_blocks"
        return tuple(f"{blocks}.{match['block']}.{name}" for name in inside.get(match["rest"], ()))
    if component.startswith("unet") and (name := _named_by_diffusers(flat)) is not None:
        return (name,)
    vocabulary = UNET if component.startswith("unet") else TRANSFORMER
    readings = list(_readings(flat, TEXT_ENCODER if component.startswith("text_encoder") else vocabulary))
    return tuple(readings) if len(readings) == 1 else ()


def _named_by_diffusers(flat: str) -> str | None:
    """Return the name in diffusers of a U-Net's module that Stability AI names; None for any other name."""
    if flat in _BESIDE_BLOCKS:
        return _BESIDE_BLOCKS[flat]
    if (match := _MIDDLE.fullmatch(flat)) is not None:
        return _inside(_MIDDLE_PARTS[int(match["inner"])], match["rest"])
    if (match := _BLOCK.fullmatch(flat)) is None:
        return None
    number, inner, rest = int(match["block"]), int(match["inner"]), match["rest"]
    kind = "attentions" if inner else "resnets"
    if match["side"] == "output":
        block, layer = divmod(number, _LAYERS_AND_SAMPLER)
        if inner and rest == "conv":
            return f"up_blocks.{block}.upsamplers.0.conv"
        return _inside(f"up_blocks.{block}.{kind}.{layer}", rest)
    block, layer = divmod(number - 1, _LAYERS_AND_SAMPLER)
    if rest == "op":
        return f"down_blocks.{block}.downsamplers.0.conv"
    return _inside(f"down_blocks.{block}.{kind}.{layer}", rest)


def _inside(parent: str, rest: str) -> str | None:
    if ".resnets." in parent:
        return f"{parent}.{_IN_RESNET[rest]}" if rest in _IN_RESNET else None
    readings = list(_readings(rest, UNET))
    return f"{parent}.{readings[0]}" if len(readings) == 1 else None


def _readings(flat: str, vocabulary: Vocabulary) -> Iterator[str]:
    """Yield all names that consist of parts of a vocabulary and flatten to this one."""
    words = flat.split("_")
    if len(words) > _MOST_WORDS:
        return
    for end in range(1, min(len(words), _WORDS_OF_A_PART) + 1):
        part, rest = "_".join(words[:end]), words[end:]
        if part in vocabulary.parts:
            beginning = part
        elif part in vocabulary.lists and rest and rest[0].isdecimal():
            beginning, rest = f"{part}.{rest[0]}", rest[1:]
        else:
            continue
        if not rest:
            yield beginning
        else:
            yield from (f"{beginning}.{ending}" for ending in _readings("_".join(rest), vocabulary))
