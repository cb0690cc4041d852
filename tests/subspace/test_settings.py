from __future__ import annotations

from typing import Any

import pytest

from share_hf.subspace import SubspaceSettings, check_dimensions


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_components": 0}, "num_components is 0, expected a positive integer"),
        ({"num_components": 2.0}, "num_components is 2.0, expected a positive integer"),
        ({"num_components": True}, "num_components is True, expected a positive integer"),
        ({"pseudo_rank": -1}, "pseudo_rank is -1, expected a positive integer"),
        ({"num_components": 4, "pseudo_rank": 5}, "pseudo_rank is 5, expected at most num_components = 4"),
        ({"basis": "paper"}, "basis is 'paper', expected 'joint' or 'factor'"),
        ({"center": True}, "center=True needs basis='factor': the joint basis has no columns to take a mean of"),
        ({"explained_variance": 0.0}, "explained_variance is 0.0, expected a fraction in (0, 1]"),
        ({"explained_variance": 1.5}, "explained_variance is 1.5, expected a fraction in (0, 1]"),
        ({"explained_variance": float("nan")}, "explained_variance is nan, expected a fraction in (0, 1]"),
        ({"drift_tolerance": 0.0}, "drift_tolerance is 0.0, expected a positive number"),
        ({"drift_tolerance": float("nan")}, "drift_tolerance is nan, expected a positive number"),
        ({"max_components": 31}, "max_components is 31, expected at least num_components = 32"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_what_was_found_and_expected(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        SubspaceSettings(**values)

    assert str(error.value) == message


def test_settings_at_the_edge_of_their_range_are_accepted() -> None:
    settings = SubspaceSettings(
        num_components=3,
        pseudo_rank=3,
        basis="factor",
        center=True,
        explained_variance=1.0,
        drift_tolerance=1e-12,
        max_components=3,
    )

    check_dimensions(settings.num_components, settings.pseudo_rank)


def test_settings_come_from_a_dictionary_with_more_keys() -> None:
    settings = SubspaceSettings.from_dict({"num_components": 8, "basis": "factor", "target_modules": ["q_proj"]})

    assert settings == SubspaceSettings(num_components=8, basis="factor")


def test_settings_from_a_dictionary_are_checked() -> None:
    with pytest.raises(ValueError, match="pseudo_rank is 8, expected at most num_components = 6"):
        SubspaceSettings.from_dict({"num_components": 6, "pseudo_rank": 8})
