"""The device on which the tests in this folder run: a CUDA card, or the CPU if there is none.

SHARE_HF_TEST_DEVICE=cuda skips them instead of running them on the CPU; recipes/benchmarks/gpu.py sets it.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from tests.continual.conftest import short_garbage_collection, without_figures  # noqa: F401


@pytest.fixture(autouse=True)
def _own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some versions of transformers leave the precision of one Trainer in the environment of the next."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device of the models."""
    wanted = os.environ.get("SHARE_HF_TEST_DEVICE")
    if wanted == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"no CUDA device: torch {torch.__version__} finds none")
    return torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The same, for tests of features that the CPU does not have."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    return device


@pytest.fixture
def model_on_device(
    tiny_model: Callable[[str], PreTrainedModel], device: torch.device
) -> Callable[[str], PreTrainedModel]:
    """Make a separate copy of a tiny model on the device."""
    return lambda name: tiny_model(name).to(device)
