"""The class of a base model where PEFT has no type for its tasks: `auto_mapping` in an adapter's configuration.

PEFT's `AutoPeftModel` uses it to load a base model, and it identifies classifiers of images, videos and sounds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
)


AUTO_MAPPING = "auto_mapping"

# Modules from which PEFT may import a class: loading somebody else's adapter imports what its configuration says.
_MODULE = re.compile(r"transformers\.models\.[a-z]\w*\.modeling_\w+", re.ASCII)
_CLASS = re.compile(r"[A-Z]\w*", re.ASCII)


def _by_class(pipelines: Mapping[str, Mapping[str, str | tuple[str, ...]]]) -> Mapping[str, str]:
    return MappingProxyType(
        {
            name: pipeline
            for pipeline, classes_by_model in pipelines.items()
            for classes in classes_by_model.values()
            for name in ((classes,) if isinstance(classes, str) else classes)
        }
    )


# Pipelines of the Hub, by the class of a model that classifies inputs and for which PEFT has no task type.
CLASSIFIERS = _by_class(
    {
        "image-classification": MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        "video-classification": MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
        "audio-classification": MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    }
)


def mapping_to(model_class: type) -> dict[str, str] | None:
    """Return PEFT's record of a transformers class; None for any other class, which a reader may not have."""
    return read_mapping({"base_model_class": model_class.__name__, "parent_library": model_class.__module__})


def read_mapping(noted: object) -> dict[str, str] | None:
    """Return the `auto_mapping` of a configuration, or None if it does not name a class of transformers."""
    known = noted if isinstance(noted, Mapping) else {}
    name, module = known.get("base_model_class"), known.get("parent_library")
    if not (isinstance(name, str) and isinstance(module, str)):
        return None
    is_usable = _CLASS.fullmatch(name) and _MODULE.fullmatch(module)
    return {"base_model_class": name, "parent_library": module} if is_usable else None


def class_name_of(target: Mapping[str, Any]) -> str | None:
    """Return the class of the base model of a task without a type in PEFT, if the task's `target` names it."""
    return target.get(AUTO_MAPPING, {}).get("base_model_class")


def pipeline_of(target: Mapping[str, Any]) -> str | None:
    """Return the Hub's name for a task that classifies images, videos or sounds; None for any other task."""
    return CLASSIFIERS.get(class_name_of(target) or "")
