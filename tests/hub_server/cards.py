"""The Hub's check of the metadata at the top of a model card."""

from __future__ import annotations

import re
from typing import Any

import yaml


EMPTY_METADATA = "empty or missing yaml metadata in repo card"
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)(?:\r?\n)?---[ \t]*(?:\r?\n|$)", re.DOTALL)
_MODEL_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
_TEXT_FIELDS = ("license", "license_name", "license_link", "library_name", "pipeline_tag", "base_model_relation")
_LISTS = ("tags",)
_TEXTS_OR_LISTS = ("language", "datasets", "metrics", "base_model")
_LICENSES = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0
    lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1
    openmdw-1.0 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
    """


def card_metadata(text: str) -> Any:
    """Return the content of the YAML at the top of a card, or None if there is none.

    Raises:
        yaml.YAMLError: If it is not YAML.
    """
    found = _FRONT_MATTER.match(text)
    return yaml.safe_load(found[1]) if found else None


def card_problems(text: str) -> tuple[list[str], list[str]]:
    """Return errors in the metadata of a card, for which it is refused, and warnings, for which it is not."""
    try:
        metadata = card_metadata(text)
    except yaml.YAMLError as error:
        return [f"YAML metadata is invalid: {error}"], []
    if not metadata:
        return [], [EMPTY_METADATA]
    if not isinstance(metadata, dict):
        return ["YAML metadata must be a mapping"], []
    errors = [f'"{key}" must be a string' for key in _TEXT_FIELDS if not _is_text(metadata.get(key, ""))]
    errors += [f'"{key}" must be an array' for key in _LISTS if not _is_texts(metadata.get(key, []))]
    for key in _TEXTS_OR_LISTS:
        if not (_is_text(metadata.get(key, "")) or _is_texts(metadata.get(key))):
            errors.append(f'"{key}" must be one of [string, array]')
    errors += _value_errors(metadata) if not errors else []
    return errors + _model_index_errors(metadata.get("model-index", [])), []


def _value_errors(metadata: dict[str, Any]) -> list[str]:
    """Return errors in values of fields that have the right type."""
    errors = []
    if metadata.get("license", "other") not in _LICENSES.split():
        errors.append(f'"license" must be one of [{", ".join(_LICENSES.split())}]')
    base_models = metadata.get("base_model", [])
    for name in [base_models] if _is_text(base_models) else base_models:
        if not _MODEL_ID.fullmatch(name):
            errors.append(f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.')
    return errors


def _model_index_errors(models: Any) -> list[str]:
    """Results must have a task, a dataset and a metric."""
    if not isinstance(models, list):
        return ['"model-index" must be an array']
    errors = []
    for i, model in enumerate(models):
        where = f"model-index[{i}]"
        errors += _missing(model, where, "name", "results")
        if errors:
            continue
        for j, result in enumerate(model["results"]):
            at = f"{where}.results[{j}]"
            if missing := _missing(result, at, "task", "dataset", "metrics"):
                errors += missing
                continue
            errors += _missing(result["task"], f"{at}.task", "type")
            errors += _missing(result["dataset"], f"{at}.dataset", "name", "type")
            for k, metric in enumerate(result["metrics"]):
                errors += _missing(metric, f"{at}.metrics[{k}]", "type", "value")
    return errors


def _missing(mapping: Any, where: str, *keys: str) -> list[str]:
    if not isinstance(mapping, dict):
        return [f'"{where}" must be of type object']
    return [f'"{where}.{key}" is required' for key in keys if mapping.get(key) is None]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
