"""The mathematics of a merge on the device, compared with float64 on the CPU."""

from __future__ import annotations

import pytest
import torch

from share_hf.subspace import (
    DriftToleranceError,
    LayerSubspace,
    LowRankUpdate,
    SubspaceSettings,
    merge_into_layer,
    residual_outside,
)
from tests.subspace.streams import random_update


SHAPE = (48, 40)
SETTINGS = {
    "joint": SubspaceSettings(num_components=10, pseudo_rank=4),
    "factor": SubspaceSettings(num_components=10, pseudo_rank=4, basis="factor"),
    "grown": SubspaceSettings(num_components=6, pseudo_rank=4, drift_tolerance=0.3, max_components=24),
}


def updates_of_a_stream() -> list[dict[str, LowRankUpdate]]:
    """Merges of one update wider than p, of two at once, and of one that is zero."""
    generator = torch.Generator().manual_seed(0)
    one, two, three = (random_update(generator, SHAPE, rank, scale) for rank, scale in ((6, 1.0), (4, 30.0), (3, 0.1)))
    nothing = LowRankUpdate(torch.zeros(SHAPE[0], 4).double(), two.in_factor)
    return [{"one": one}, {"two": two, "three": three}, {"nothing": nothing}]


def merged(settings: SubspaceSettings, device: torch.device, dtype: torch.dtype) -> tuple[LayerSubspace, list[float]]:
    """Merge a stream into a layer stored in `dtype`, and return it with the drift of every task in every merge."""
    layer = LayerSubspace.empty(*SHAPE, settings.pseudo_rank, dtype=dtype, device=device)
    drift: list[float] = []
    for updates in updates_of_a_stream():
        moved = {
            task: LowRankUpdate(update.out_factor.to(device), update.in_factor.to(device))
            for task, update in updates.items()
        }
        layer, report = merge_into_layer(layer, moved, settings)
        drift += report.drift.values()
    return layer, drift


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_merge_on_the_device_is_that_of_the_cpu_in_double_precision(
    settings: SubspaceSettings, device: torch.device
) -> None:
    found, drift = merged(settings, device, torch.float32)
    expected, expected_drift = merged(settings, torch.device("cpu"), torch.float64)
    assert found.basis_out.device.type == found.records.norms.device.type == device.type
    assert found.tasks == expected.tasks
    assert found.num_components == expected.num_components
    for task in found.tasks:
        update, reference = found.update_of(task).dense().cpu().double(), expected.update_of(task).dense()
        assert (update - reference).norm() <= 1e-6 * reference.norm()
    assert max(expected_drift) > 0.1  # the basis is too small for all of it
    torch.testing.assert_close(drift, expected_drift, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.records.drift_bounds.cpu(), expected.records.drift_bounds, rtol=0, atol=1e-5)
    assert found.explained_variance() == pytest.approx(expected.explained_variance(), abs=1e-6)


def test_a_refused_drift_is_refused_on_the_device(device: torch.device) -> None:
    settings = SubspaceSettings(num_components=6, pseudo_rank=4, drift_tolerance=1e-4, max_components=7)
    with pytest.raises(DriftToleranceError, match=r"drift_tolerance is 0\.0001"):
        merged(settings, device, torch.float32)


def test_a_layer_moved_to_the_device_continues_like_one_that_stayed(device: torch.device) -> None:
    settings = SETTINGS["joint"]
    layer, _ = merged(settings, torch.device("cpu"), torch.float32)
    update = random_update(torch.Generator().manual_seed(1), SHAPE, 4)
    moved = LowRankUpdate(update.out_factor.to(device), update.in_factor.to(device))
    assert residual_outside(layer.to(device), moved) == pytest.approx(residual_outside(layer, update), abs=1e-9)
    found, _ = merge_into_layer(layer.to(device), {"new": moved}, settings)
    expected, _ = merge_into_layer(layer, {"new": update}, settings)
    back = found.to("cpu").without_task("one")
    assert back.tasks == ("two", "three", "nothing", "new")
    for task in back.tasks:
        update, reference = back.update_of(task).dense(), expected.update_of(task).dense()
        assert (update - reference).norm() <= 1e-5 * reference.norm()
    for found_side, side in zip(found.balanced("two"), expected.balanced("two"), strict=True):
        assert found_side.device.type == device.type
        torch.testing.assert_close(found_side.norm().cpu(), side.norm(), rtol=1e-5, atol=0)
