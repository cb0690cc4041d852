from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from share_hf.subspace import LayerSubspace, SubspaceSettings, TaskRecords, merge_into_layer
from share_hf.subspace.layer import update_norms
from share_hf.subspace.stack import TASKS_PER_CHUNK

from .streams import dense_learned, dense_of, random_update


SETTINGS = SubspaceSettings(num_components=4, pseudo_rank=2)
SHAPE = (12, 9)


@pytest.fixture
def layer() -> LayerSubspace:
    """Three tasks in four components: none is stored exactly."""
    generator = torch.Generator().manual_seed(0)
    updates = {task: random_update(generator, SHAPE, 2) for task in ("first", "second", "third")}
    return merge_into_layer(LayerSubspace.empty(*SHAPE, 2), updates, SETTINGS)[0]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def assert_same_task(layer: LayerSubspace, task: str, other: LayerSubspace) -> None:
    """Assert that coefficients and records of `task` are equal bit by bit in both layers."""
    i, j = layer.index(task), other.index(task)
    assert torch.equal(layer.coefficients_out[i], other.coefficients_out[j])
    assert torch.equal(layer.coefficients_in[i], other.coefficients_in[j])
    for field in fields(TaskRecords):
        assert getattr(layer.records, field.name)[i] == getattr(other.records, field.name)[j]


def test_an_empty_layer_has_neither_directions_nor_tasks() -> None:
    layer = LayerSubspace.empty(7, 5, 2)

    assert layer.shape == (7, 5)
    assert layer.num_components == (0, 0)
    assert layer.pseudo_rank == 2
    assert layer.tasks == ()
    assert layer.explained_variance() == 1.0


def test_the_update_of_a_task_is_a_lora_of_the_pseudo_rank(layer: LayerSubspace) -> None:
    update = layer.update_of("second")

    assert update.out_factor.shape == (12, 2)
    assert update.in_factor.shape == (9, 2)
    torch.testing.assert_close(update.dense().double(), dense_of(layer, "second"), rtol=0, atol=1e-5)


def test_an_unknown_task_is_named_beside_those_there_are(layer: LayerSubspace) -> None:
    with pytest.raises(ValueError) as error:
        layer.update_of("fourth")

    assert str(error.value) == "no task 'fourth' in this layer, it has ['first', 'second', 'third']"


def test_a_task_learned_inside_the_basis_is_appended_and_counts_as_learned(layer: LayerSubspace) -> None:
    out, in_ = normal(4, 2), normal(4, 2)

    grown = layer.with_task("fourth", out, in_)

    assert grown.tasks == ("first", "second", "third", "fourth")
    assert torch.equal(grown.coefficients_out[3], out)
    assert torch.equal(grown.coefficients_in[3], in_)
    assert grown.basis_out is layer.basis_out
    assert grown.basis_in is layer.basis_in
    for task in layer.tasks:
        assert_same_task(grown, task, layer)
    torch.testing.assert_close(grown.records.norms[3], dense_of(grown, "fourth").norm(), rtol=1e-6, atol=0)
    assert grown.records.rank_errors[3] == grown.records.drift_bounds[3] == grown.records.drift_estimates[3] == 0


def test_learning_a_task_again_replaces_it_where_it_stands(layer: LayerSubspace) -> None:
    assert layer.records.drift_bounds[1] > 0

    replaced = layer.with_task("second", normal(4, 2), normal(4, 2))

    assert replaced.tasks == layer.tasks
    assert torch.equal(replaced.coefficients_out[1], normal(4, 2))
    assert replaced.records.drift_bounds[1] == 0
    torch.testing.assert_close(replaced.records.norms[1], dense_of(replaced, "second").norm(), rtol=1e-6, atol=0)
    assert_same_task(replaced, "first", layer)
    assert_same_task(replaced, "third", layer)


def test_a_learned_task_is_stored_in_the_dtype_of_the_layer(layer: LayerSubspace) -> None:
    grown = layer.with_task("fourth", normal(4, 2, dtype=torch.float64), normal(4, 2, dtype=torch.float64))

    assert grown.coefficients_out.dtype == torch.float32
    assert grown.coefficients_in.dtype == torch.float32


def test_removing_a_task_leaves_the_basis_and_the_others_as_they_are(layer: LayerSubspace) -> None:
    smaller = layer.without_task("first")

    assert smaller.tasks == ("second", "third")
    assert smaller.basis_out is layer.basis_out
    assert smaller.basis_in is layer.basis_in
    assert_same_task(smaller, "second", layer)
    assert_same_task(smaller, "third", layer)


def test_removing_a_task_that_is_not_there_is_refused(layer: LayerSubspace) -> None:
    with pytest.raises(ValueError, match="no task 'fourth' in this layer"):
        layer.without_task("fourth")


def test_a_selection_has_the_chosen_tasks_in_the_chosen_order(layer: LayerSubspace) -> None:
    selected = layer.select([2, 0])

    assert selected.tasks == ("third", "first")
    assert_same_task(selected, "third", layer)
    assert_same_task(selected, "first", layer)


def test_selecting_nothing_leaves_a_layer_without_tasks(layer: LayerSubspace) -> None:
    selected = layer.select([])

    assert selected.tasks == ()
    assert selected.coefficients_out.shape == (0, 4, 2)
    assert len(selected.records.norms) == 0
    assert selected.num_components == layer.num_components


def test_balanced_coefficients_are_the_same_update_evenly_split(layer: LayerSubspace) -> None:
    skewed = layer.with_task("first", 1e3 * normal(4, 2), 1e-3 * normal(4, 2) @ torch.tensor([[1.0, 2.0], [0.0, 1.0]]))

    out, in_ = skewed.balanced("first")

    assert out.shape == in_.shape == (4, 2)
    assert out.dtype == in_.dtype == torch.float32
    product = skewed.coefficients_out[0].double() @ skewed.coefficients_in[0].double().T
    torch.testing.assert_close(out.double() @ in_.double().T, product, rtol=0, atol=1e-6 * float(product.norm()))
    torch.testing.assert_close(out.T @ out, in_.T @ in_, rtol=0, atol=1e-5)


def test_balanced_coefficients_of_a_smaller_rank_can_be_trained_from_where_no_rounding_matters(
    layer: LayerSubspace,
) -> None:
    out, in_ = normal(4, 1) @ normal(1, 2), normal(4, 1) @ normal(1, 2)

    for noise in (0.0, 1e-7):
        rank_one = layer.with_task("first", out + noise * normal(4, 2), in_ + noise * normal(4, 2))
        balanced_out, balanced_in = rank_one.balanced("first")

        assert not balanced_out[:, 1].any()
        torch.testing.assert_close(balanced_in[:, 1], torch.tensor([0.2, 0.0, 0.0, 0.0]))
        torch.testing.assert_close(balanced_out @ balanced_in.T, out @ in_.T, rtol=0, atol=1e-5)


def test_explained_variance_is_the_mean_over_tasks_of_what_their_updates_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    updates = {f"task_{i}": random_update(generator, SHAPE, 2, scale=10.0**i) for i in range(4)}
    layer, _ = merge_into_layer(LayerSubspace.empty(*SHAPE, 2, dtype=torch.float64), updates, SETTINGS)

    kept = [dense_of(layer, task).norm() ** 2 / dense_learned(update).norm() ** 2 for task, update in updates.items()]

    assert 0.3 < layer.explained_variance() < 0.99
    assert layer.explained_variance() == pytest.approx(float(sum(kept) / len(kept)), rel=1e-12)


def test_rounding_makes_no_task_explain_more_than_itself(layer: LayerSubspace) -> None:
    kept = layer.with_task("fourth", normal(4, 2), normal(4, 2)).select([3])
    rounded = replace(kept, records=replace(kept.records, norms=kept.records.norms * (1 - 1e-6)))

    assert rounded.explained_variance() == 1.0


def test_tasks_without_weight_do_not_count_in_the_explained_variance(layer: LayerSubspace) -> None:
    zero = layer.with_task("fourth", torch.zeros(4, 2), torch.zeros(4, 2))

    assert zero.explained_variance() == layer.explained_variance()
    assert zero.select([3]).explained_variance() == 1.0


@pytest.mark.parametrize("tasks", [0, 1, TASKS_PER_CHUNK, TASKS_PER_CHUNK + 1])
def test_update_norms_are_the_frobenius_norms_of_the_products(tasks: int) -> None:
    out, in_ = normal(tasks, 4, 2, dtype=torch.float64), normal(tasks, 5, 2, dtype=torch.float64)

    norms = update_norms(out, in_)

    torch.testing.assert_close(norms, torch.linalg.matrix_norm(out @ in_.mT), rtol=1e-12, atol=0)


def test_a_layer_on_another_device_has_everything_there(layer: LayerSubspace) -> None:
    moved = layer.to("meta")

    tensors = [value for field in fields(moved) if isinstance(value := getattr(moved, field.name), Tensor)]
    tensors += [getattr(moved.records, field.name) for field in fields(moved.records)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.tasks == layer.tasks


def test_tasks_that_are_learned_at_once_are_those_that_are_learned_one_by_one(layer: LayerSubspace) -> None:
    learned = {name: (normal(4, 2) * size, normal(4, 2)) for size, name in enumerate(("new", "second", "newer"), 1)}
    at_once, one_by_one = layer.with_tasks(learned), layer
    for name, sides in learned.items():
        one_by_one = one_by_one.with_task(name, *sides)
    assert at_once.tasks == one_by_one.tasks == ("first", "second", "third", "new", "newer")
    for name in ("coefficients_out", "coefficients_in"):
        assert torch.equal(getattr(at_once, name), getattr(one_by_one, name))
    for name in ("norms", "rank_errors", "drift_bounds", "drift_estimates"):
        assert torch.equal(getattr(at_once.records, name), getattr(one_by_one.records, name))


def test_one_of_several_learned_tasks_that_is_not_finite_is_named(layer: LayerSubspace) -> None:
    learned = {"fine": (normal(4, 2), normal(4, 2)), "broken": (normal(4, 2) * torch.nan, normal(4, 2))}
    with pytest.raises(ValueError, match="'broken'"):
        layer.with_tasks(learned)
