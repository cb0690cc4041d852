"""The class of a base model that an adapter names: a class of transformers, whoever wrote the adapter."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import ViTForImageClassification

from share_hf.format.model_classes import CLASSIFIERS, mapping_to, pipeline_of, read_mapping


NOTED = {"base_model_class": "ViTForImageClassification", "parent_library": "transformers.models.vit.modeling_vit"}


def test_a_class_of_transformers_is_noted_as_peft_does() -> None:
    assert mapping_to(ViTForImageClassification) == NOTED
    assert read_mapping({**NOTED, "unsloth_fixed": True}) == NOTED


@pytest.mark.parametrize(
    "noted",
    [
        None,
        "ViTForImageClassification",
        ["ViTForImageClassification"],
        {},
        {"base_model_class": "ViTForImageClassification"},
        {**NOTED, "base_model_class": 3},
        {**NOTED, "base_model_class": "__import__"},
        {**NOTED, "parent_library": None},
        {**NOTED, "parent_library": "os"},
        {**NOTED, "parent_library": "transformers_modules.org.model"},
        {**NOTED, "parent_library": "transformers.models.vit.modeling_vit\n"},
        {**NOTED, "parent_library": "transformers.models..modeling_vit"},
        {**NOTED, "parent_library": "transformers.utils.hub"},
    ],
    ids=str,
)
def test_anything_else_is_left_out(noted: Any) -> None:
    assert read_mapping(noted) is None


def test_a_custom_class_is_not_recorded() -> None:
    assert mapping_to(type("ViTForImageClassification", (), {})) is None


def test_classifiers_are_known_by_their_class() -> None:
    assert pipeline_of({"auto_mapping": NOTED}) == "image-classification"
    assert pipeline_of({"task_type": "SEQ_CLS"}) is None
    assert CLASSIFIERS["DeiTForImageClassificationWithTeacher"] == "image-classification"
    assert CLASSIFIERS["Wav2Vec2ForSequenceClassification"] == "audio-classification"
    assert "BertForSequenceClassification" not in CLASSIFIERS
