"""Every architecture of the matrix is built once."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from .architectures import ARCHITECTURES, Architecture


@pytest.fixture(scope="session")
def pristine_architectures() -> dict[str, PreTrainedModel]:
    """Models by name, built on request. They must not be changed."""
    return {}


@pytest.fixture
def architecture(name: str) -> Architecture:
    return ARCHITECTURES[name]


@pytest.fixture
def base(name: str, pristine_architectures: dict[str, PreTrainedModel]) -> Callable[[], PreTrainedModel]:
    """Make a separate copy of the model in eval mode. All copies have the same weights."""
    if name not in pristine_architectures:
        pristine_architectures[name] = ARCHITECTURES[name].build()
    return lambda: copy.deepcopy(pristine_architectures[name])
