"""Restrictions from a layer's place in its model: some modules read the weights of their layers themselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..format.module_names import without_wrappers


# Layers by the class of their parent module, which reads their weight directly, bypassing their forward, at least in
# training or with fused kernels. An update would have no effect there.
READ_BY_THEIR_MODULE: dict[str, frozenset[str]] = {
    "MultiheadAttention": frozenset({"out_proj"}),
    "MambaMixer": frozenset({"x_proj", "dt_proj", "out_proj"}),
    "FalconMambaMixer": frozenset({"x_proj", "dt_proj", "out_proj"}),
    "JambaMambaMixer": frozenset({"dt_proj"}),
    "Mamba2Mixer": frozenset({"out_proj"}),
    "BambaMixer": frozenset({"out_proj"}),
    "FalconH1Mixer": frozenset({"out_proj"}),
    "GraniteMoeHybridMambaLayer": frozenset({"out_proj"}),
    "NemotronHMamba2Mixer": frozenset({"out_proj"}),
    "Zamba2MambaMixer": frozenset({"out_proj"}),
    "DetrMHAttentionMap": frozenset({"k_proj"}),
    "ConditionalDetrMHAttentionMap": frozenset({"k_proj"}),
    "MaskFormerDetrMHAttentionMap": frozenset({"k_proj"}),
    "DabDetrMHAttentionMap": frozenset({"k_linear"}),
    "LayoutLMv2Encoder": frozenset({"rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"}),
    "LayoutLMv3Encoder": frozenset({"rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"}),
    "PPDocLayoutV2ReadingOrderEncoder": frozenset({"rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"}),
    "TDNNLayer": frozenset({"kernel"}),
    "WavLMAttention": frozenset({"q_proj", "k_proj", "v_proj", "out_proj"}),
    "MobileBertLMPredictionHead": frozenset({"dense", "decoder"}),
    "LSHSelfAttention": frozenset({"query_key", "value"}),
    "LongcatFlashTopkRouter": frozenset({"classifier"}),
    "NeoMMEForMaskedLM": frozenset({"unembedding_projection"}),
}


# Classes of the modules that read an embedding's weight, by name of the embedding: queries of detectors, tokens of
# prompts, codes, and positions that are interpolated for images of another size.
EMBEDDINGS_READ_BY_THEIR_MODULE: dict[str, str] = {
    "cls_embed": "Sam3GeometryEncoder Sam3LiteTextGeometryEncoder",
    "codebook": "DacVectorQuantize",
    "embed_positions": "AudioFlamingo3Encoder MossTranscribeDiarizeAudioModel Qwen2AudioEncoder VoxtralEncoder",
    "embed_tokens": "Qwen4ExpTextModel",
    "embedding": (
        "ChameleonVQVAEVectorQuantizer Emu3VQVAEVectorQuantizer GlmImageVQVAEVectorQuantizer JanusVQVAEVectorQuantizer"
    ),
    "hq_token": "SamHQMaskDecoder",
    "iou_token": (
        "EdgeTamMaskDecoder EdgeTamVideoMaskDecoder Sam2MaskDecoder Sam2VideoMaskDecoder "
        "Sam3TrackerMaskDecoder Sam3TrackerVideoMaskDecoder SamHQMaskDecoder SamMaskDecoder"
    ),
    "level_embed": "Mask2FormerTransformerModule OneFormerTransformerModule",
    "mask_tokens": (
        "EdgeTamMaskDecoder EdgeTamVideoMaskDecoder Sam2MaskDecoder Sam2VideoMaskDecoder "
        "Sam3TrackerMaskDecoder Sam3TrackerVideoMaskDecoder SamHQMaskDecoder SamMaskDecoder"
    ),
    "ngram_embeddings": "ProphetNetDecoder",
    "no_mask_embed": (
        "EdgeTamPromptEncoder EdgeTamVideoPromptEncoder Sam2PromptEncoder Sam2VideoPromptEncoder "
        "Sam3TrackerPromptEncoder Sam3TrackerVideoPromptEncoder SamHQPromptEncoder SamPromptEncoder"
    ),
    "not_a_point_embed": (
        "EdgeTamPromptEncoder EdgeTamVideoPromptEncoder Sam2PromptEncoder Sam2VideoPromptEncoder "
        "Sam3TrackerPromptEncoder Sam3TrackerVideoPromptEncoder SamHQPromptEncoder SamPromptEncoder"
    ),
    "obj_score_token": (
        "EdgeTamMaskDecoder EdgeTamVideoMaskDecoder Sam2MaskDecoder Sam2VideoMaskDecoder "
        "Sam3TrackerMaskDecoder Sam3TrackerVideoMaskDecoder"
    ),
    "patterns": "DabDetrModel",
    "point_embed": (
        "EdgeTamPromptEncoder EdgeTamVideoPromptEncoder Sam2PromptEncoder Sam2VideoPromptEncoder "
        "Sam3TrackerPromptEncoder Sam3TrackerVideoPromptEncoder"
    ),
    "position_embedding": (
        "AltCLIPVisionEmbeddings BridgeTowerVisionEmbeddings CLIPSegVisionEmbeddings "
        "CLIPVisionEmbeddings ChineseCLIPVisionEmbeddings Cosmos3EdgeVisionEmbeddings "
        "GitVisionEmbeddings Glm4vMoeVisionEmbeddings Glm4vVisionEmbeddings GlmImageVisionEmbeddings "
        "GraniteDoclingVisionEmbeddings HunYuanVLVisionPatchEmbed JanusVisionEmbeddings "
        "Kosmos2VisionEmbeddings MetaClip2VisionEmbeddings OwlViTVisionEmbeddings Owlv2VisionEmbeddings "
        "Phi4MultimodalVisionEmbeddings Siglip2VisionEmbeddings SiglipVisionEmbeddings "
        "Step3p7VisionEmbeddings UnlimitedOcrVisionEmbeddings XCLIPVisionEmbeddings"
    ),
    "position_embeddings": "DistilBertModel",
    "presence_token": "Sam3DetrDecoder Sam3LiteTextDetrDecoder",
    "prompt_ctx": "OneFormerTextMapper",
    "queries_embedder": "Mask2FormerTransformerModule MaskFormerTransformerModule OneFormerTransformerModule",
    "queries_features": "Mask2FormerTransformerModule",
    "query": "EomtDinov3ForUniversalSegmentation EomtForUniversalSegmentation VideomtForUniversalSegmentation",
    "query_1024_resolution": "DeepseekOcr2VisionModel",
    "query_768_resolution": "DeepseekOcr2VisionModel",
    "query_embed": "Sam3DetrDecoder Sam3LiteTextDetrDecoder",
    "query_feat": "LwDetrModel RfDetrModel",
    "query_position_embeddings": (
        "ConditionalDetrModel DeformableDetrModel DetrModel GroundingDinoModel MMGroundingDinoModel "
        "TableTransformerModel"
    ),
    "query_refpoint_embeddings": "DabDetrModel",
    "reference_point_embed": "LwDetrModel RfDetrModel",
    "reference_points": "GroundingDinoModel Sam3DetrDecoder Sam3LiteTextDetrDecoder",
    "rel_embeddings": "DebertaEncoder DebertaV2Encoder SEWDTransformerEncoder",
    "tgt_embed": "OmDetTurboDecoder",
}


def check_reached(parent: nn.Module, child_name: str, module_name: str) -> None:
    """Refuse a layer whose forward its parent module does not always call.

    Raises:
        ValueError: If the layer is one of these. Names the layer and the class of its parent module.
    """
    for base in type(parent).__mro__:
        embeddings_in = EMBEDDINGS_READ_BY_THEIR_MODULE.get(child_name, "").split()
        if child_name in READ_BY_THEIR_MODULE.get(base.__name__, ()) or base.__name__ in embeddings_in:
            raise ValueError(
                f"{module_name!r} is in a {base.__name__}, which reads its weight directly, so an update would have "
                "no effect; expected layers that are called: leave it out with exclude_modules, or train it whole "
                "with modules_to_save"
            )


def call_layers_of(parent: nn.Module, layer: nn.Module) -> None:
    """Keep torch's encoder layers from using their fused kernel, which reads the weights: if hooks are registered,
    they call their layers. When the layer is unloaded, its hook goes with it."""
    if isinstance(parent, nn.TransformerEncoderLayer):
        layer.register_forward_pre_hook(_no_change)


def _no_change(layer: nn.Module, args: tuple[Any, ...]) -> None:
    """Do nothing: the hook only has to be registered."""


def check_held_once(model: nn.Module, layers: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse to merge into a weight that is used elsewhere in the model too and would change there as well.

    Args:
        model: Model that contains the layers.
        layers: Names and layers that adapters are wrapped around.

    Raises:
        ValueError: If a weight is used twice. Names the layer and the other places of its weight.
    """
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for child_name, child in [*module.named_children(), *module.named_parameters(recurse=False)]:
            holders.setdefault(id(child), []).append(without_wrappers(f"{name}.{child_name}".strip(".")))
    for name, layer in layers:
        base = layer.get_base_layer()
        for shared in (base, getattr(base, "weight", None)):
            if len(places := holders.get(id(shared), [])) > 1:
                raise ValueError(
                    f"{name!r} cannot be merged into: the model has its weight more than once, at {places}, and all "
                    "would change. Untie them first, or use the task unmerged or, with SharedSubspace.export_lora, as "
                    "a LoRA"
                )
