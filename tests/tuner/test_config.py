"""ShareConfig: defaults, what it refuses, and saving and loading."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig

from share_hf import ShareConfig


FULL = dict(
    num_components=16,
    pseudo_rank=4,
    num_temporary=5,
    temporary_init="random",
    target_modules=["q_proj", "v_proj"],
    exclude_modules=["lm_head"],
    layers_to_transform=[0],
    layers_pattern="layers",
    modules_to_save=["score"],
    basis="factor",
    explained_variance=0.9,
    drift_tolerance=0.1,
    max_components=32,
    init_std=0.1,
    fan_in_fan_out=True,
    phase="adapt",
    task_type="CAUSAL_LM",
    base_model_name_or_path="some/model",
    inference_mode=True,
)


def test_defaults_are_the_documented_ones() -> None:
    config = ShareConfig()
    assert (config.num_components, config.pseudo_rank, config.num_temporary) == (32, 8, 8)
    assert (config.basis, config.init_std, config.phase) == ("joint", 0.05, "coefficients")
    assert config.temporary_init == "basis"


@pytest.mark.parametrize(("num_components", "expected"), [(32, 8), (8, 2), (3, 1), (1, 1)])
def test_a_quarter_of_the_components_is_temporary_by_default(num_components: int, expected: int) -> None:
    assert ShareConfig(num_components=num_components, pseudo_rank=1).num_temporary == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_components": 4, "pseudo_rank": 5}, "pseudo_rank is 5, expected at most num_components = 4"),
        ({"num_components": 0}, "num_components is 0, expected a positive integer"),
        ({"pseudo_rank": 0}, "pseudo_rank is 0, expected a positive integer"),
        ({"pseudo_rank": -1}, "pseudo_rank is -1, expected a positive integer"),
        ({"num_components": 8.0}, "num_components is 8.0, expected a positive integer"),
        ({"num_components": True, "pseudo_rank": 1}, "num_components is True, expected a positive integer"),
        ({"num_components": 8, "num_temporary": 8}, "num_temporary is 8, expected at least 1 and less than"),
        ({"num_temporary": 0}, "num_temporary is 0, expected at least 1"),
        ({"temporary_init": "zeros"}, "temporary_init is 'zeros', expected 'basis', 'span' or 'random'"),
        ({"basis": "pca"}, "basis is 'pca', expected 'joint' or 'factor'"),
        ({"phase": "merge"}, "phase is 'merge', expected 'coefficients', 'adapt' or 'init'"),
        ({"init_std": 0.0}, "init_std is 0.0, expected a positive number: zero has no gradient"),
        ({"init_std": -1.0}, "init_std is -1.0, expected a positive number"),
        ({"init_std": float("nan")}, "init_std is nan, expected a positive number"),
        ({"explained_variance": 0.0}, r"explained_variance is 0.0, expected a fraction in \(0, 1\]"),
        ({"explained_variance": 1.5}, "explained_variance is 1.5, expected a fraction"),
        ({"drift_tolerance": 0.0}, "drift_tolerance is 0.0, expected a positive number"),
        ({"max_components": 31}, "max_components is 31, expected at least num_components = 32"),
        ({"layers_pattern": "layers"}, "layers_pattern is given without layers_to_transform"),
        ({"task_type": "DREAMING"}, "DREAMING"),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_value_that_cannot_be_meant_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShareConfig(**values)


@pytest.mark.parametrize("loader", [PeftConfig, ShareConfig])
@pytest.mark.parametrize("values", [{}, FULL], ids=["defaults", "every-field"])
def test_a_config_survives_the_way_to_disk_and_back(
    loader: type[PeftConfig], values: dict[str, Any], tmp_path: Path
) -> None:
    config = ShareConfig(**values)
    config.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is ShareConfig
    assert loaded == config
    assert loaded.peft_type == "SHARE"


def test_the_file_is_plain_json_with_the_type_as_a_string(tmp_path: Path) -> None:
    ShareConfig(**FULL).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["peft_type"] == "SHARE"
    assert sorted(content["target_modules"]) == ["q_proj", "v_proj"]
    assert {name: content[name] for name in ("num_components", "pseudo_rank", "num_temporary", "phase")} == {
        "num_components": 16,
        "pseudo_rank": 4,
        "num_temporary": 5,
        "phase": "adapt",
    }
    assert not [name for name in content if name.startswith("_")]


def test_a_field_of_a_later_version_is_ignored_with_a_warning(tmp_path: Path) -> None:
    ShareConfig(**FULL).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "of_tomorrow": 1}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['of_tomorrow'\] for class ShareConfig"):
        loaded = PeftConfig.from_pretrained(tmp_path)
    assert loaded == ShareConfig(**FULL)


def test_a_file_with_impossible_values_is_refused(tmp_path: Path) -> None:
    ShareConfig(**FULL).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pseudo_rank": 17}))
    with pytest.raises(ValueError, match="pseudo_rank is 17, expected at most num_components = 16"):
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_a_loaded_config_can_be_copied_and_pickled_and_still_brings_its_basis(duplicate: Any, tmp_path: Path) -> None:
    ShareConfig(**FULL).save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    copied = duplicate(loaded)
    assert copied == loaded
    assert copied.peft_type.value == "SHARE"
    assert copied.origin == loaded.origin
