"""The survey of a collection, compared with dense references, and with what is known to be in it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from share_hf.subspace import LayerSubspace, LowRankUpdate, SubspaceSettings, merge_into_layer, merge_into_layers
from share_hf.subspace import collection as collections
from share_hf.subspace import curve as curves
from share_hf.subspace.audit import explained_variance
from share_hf.subspace.collection import (
    SAMPLE_MODULES_FROM,
    CollectionReport,
    _modules_of_curve,
    survey_layers,
    survey_updates,
)
from share_hf.subspace.curve import SAMPLE_FROM, curve_sizes, served_by
from share_hf.subspace.likeness import UpdateSketches, alike, groups_of, sketches_of
from share_hf.subspace.survey_text import survey_sentences


Adapters = dict[str, dict[str, LowRankUpdate]]


def collection(
    tasks: int,
    *,
    modules: int = 2,
    shape: tuple[int, int] = (40, 32),
    shared: int = 4,
    rank: int = 3,
    own: float = 0.05,
) -> Adapters:
    """Return adapters whose updates share a number of directions, except for a small part of each."""
    generator = torch.Generator().manual_seed(tasks + rank)

    def side(length: int, common: Tensor) -> Tensor:
        mixed = common @ torch.randn(shared, rank, generator=generator)
        return mixed + own * torch.randn(length, rank, generator=generator)

    common = [tuple(torch.randn(length, shared, generator=generator) for length in shape) for _ in range(modules)]
    return {
        f"task{i}": {
            f"layers.{m}.q": LowRankUpdate(*(side(length, of) for length, of in zip(shape, common[m], strict=True)))
            for m in range(modules)
        }
        for i in range(tasks)
    }


def alone(seed: int, like: dict[str, LowRankUpdate]) -> dict[str, LowRankUpdate]:
    """Return an adapter that shares nothing with another adapter of the same shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        module: LowRankUpdate(*(torch.randn(side, 3, generator=generator) for side in update.shape))
        for module, update in like.items()
    }


def rows_of(updates: list[LowRankUpdate]) -> tuple[Tensor, Tensor]:
    """Return factors of updates with norm 1 that share it evenly, (tasks, r, n) and (tasks, r, d)."""
    out, in_ = [], []
    for update in updates:
        left, values, right = torch.linalg.svd(
            update.out_factor.double() @ update.in_factor.double().T, full_matrices=False
        )
        rank = update.out_factor.shape[1]
        root = (values[:rank] / values.norm()).sqrt().unsqueeze(1)
        out.append(left[:, :rank].T * root)
        in_.append(right[:rank] * root)
    return torch.stack(out), torch.stack(in_)


class TestCurve:
    @pytest.mark.parametrize(
        ("largest", "sizes"), [(1, [1]), (2, [1, 2]), (8, [1, 2, 3, 4, 6, 8]), (10, [1, 2, 3, 4, 6, 8, 10])]
    )
    def test_its_sizes_double_in_two_steps(self, largest: int, sizes: list[int]) -> None:
        assert curve_sizes(largest) == sizes

    @settings(max_examples=15, deadline=None)
    @given(seed=st.integers(0, 2**31), tasks=st.integers(1, 6), rank=st.integers(1, 4))
    def test_every_point_is_what_a_basis_of_that_size_explains(self, seed: int, tasks: int, rank: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        updates = [
            LowRankUpdate(*(torch.randn(side, rank, generator=generator) for side in (14, 11))) for _ in range(tasks)
        ]
        sizes = curve_sizes(11)
        for point in served_by(*rows_of(updates), sizes):
            expected = explained_variance(updates, point.num_components, point.num_components)
            assert point.explained == pytest.approx(expected.joint, abs=1e-9)

    def test_errors_by_rank_are_those_of_dense_updates(self) -> None:
        updates = [of["layers.0.q"] for of in collection(5).values()]
        point = served_by(*rows_of(updates), [3])[0]
        layer, _ = merge_into_layer(
            LayerSubspace.empty(40, 32, 3, dtype=torch.float64),
            {str(i): update for i, update in enumerate(updates)},
            SubspaceSettings(num_components=3, pseudo_rank=3),
        )
        for p in (1, 2, 3):
            errors = []
            for i, update in enumerate(updates):
                exact = update.dense().double()
                inside = layer.basis_out @ layer.basis_out.T @ exact @ layer.basis_in @ layer.basis_in.T
                left, values, right = torch.linalg.svd(inside)
                kept = left[:, :p] @ torch.diag(values[:p]) @ right[:p]
                errors.append(float((kept - exact).norm() / exact.norm()))
                assert layer.has(str(i))
            assert point.errors[p - 1] == pytest.approx(sum(errors) / len(errors), rel=1e-3)

    def test_power_steps_come_close_to_exact_ones(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = rows_of([of["layers.0.q"] for of in collection(60, shape=(80, 70), shared=6, own=0.3).values()])
        sizes = curve_sizes(16)
        exact = served_by(*rows, sizes)
        monkeypatch.setattr(curves, "_EXACT_COORDINATES", 8)
        for point, expected in zip(served_by(*rows, sizes), exact, strict=True):
            assert point.explained <= expected.explained * 1.05
            assert point.explained >= expected.explained - 0.02


class TestLikeness:
    @settings(max_examples=20, deadline=None)
    @given(seed=st.integers(0, 2**31), scale=st.sampled_from([1.0, 0.5, 1e-3, 1e4]))
    def test_one_adapter_in_other_factors_is_a_duplicate(self, seed: int, scale: float) -> None:
        adapters = collection(4)
        generator = torch.Generator().manual_seed(seed)
        mix = torch.linalg.qr(torch.randn(3, 3, generator=generator)).Q
        adapters["copy"] = {
            module: LowRankUpdate(scale * update.out_factor @ mix, update.in_factor @ mix / scale)
            for module, update in adapters["task2"].items()
        }
        report = survey_updates(adapters, 4)
        assert report.duplicates == (("task2", "copy"),)
        assert report.near_duplicates == ()

    def test_another_scale_or_sign_is_not_a_duplicate(self) -> None:
        adapters = collection(3)
        for name, factor in (("double", 2.0), ("negative", -1.0)):
            adapters[name] = {
                module: LowRankUpdate(factor * update.out_factor, update.in_factor)
                for module, update in adapters["task1"].items()
            }
        report = survey_updates(adapters, 4)
        assert report.duplicates == ()
        assert report.near_duplicates == (("task1", "double"),)

    def test_a_later_checkpoint_is_nearly_the_same(self) -> None:
        adapters = collection(3)
        generator = torch.Generator().manual_seed(5)
        adapters["later"] = {}
        for module, update in adapters["task0"].items():
            moved = 0.1 * update.out_factor.norm() / update.out_factor.numel() ** 0.5
            noise = torch.randn(update.out_factor.shape, generator=generator)
            adapters["later"][module] = LowRankUpdate(update.out_factor + moved * noise, update.in_factor)
        found = survey_updates(adapters, 4).alike
        assert [(pair.task, pair.other) for pair in found] == [("later", "task0")]
        exact = [torch.cat([u.dense().double().flatten() for u in adapters[t].values()]) for t in ("later", "task0")]
        assert found[0].cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(*exact, dim=0)), abs=1e-6)
        largest = max(of.norm() for of in exact)
        assert found[0].distance == pytest.approx(float((exact[0] - exact[1]).norm() / largest), rel=1e-6)

    def test_many_copies_are_compared_with_the_first_alone(self) -> None:
        adapters = {f"copy{i}": next(iter(collection(1).values())) for i in range(30)}
        sketches = UpdateSketches(adapters)
        for module in ("layers.0.q", "layers.1.q"):
            sketches.add(sketches_of(module, {task: of[module] for task, of in adapters.items()}))
        candidates = sketches.candidates()
        assert candidates == {f"copy{i}": "copy0" for i in range(1, 30)}
        assert groups_of(alike(candidates, adapters.__getitem__)) == (tuple(adapters),)

    def test_adapters_of_different_modules_and_zeros_are_compared(self) -> None:
        adapters = collection(2)
        adapters["part"] = {"layers.0.q": adapters["task0"]["layers.0.q"]}
        adapters["zero"] = {
            module: LowRankUpdate(0 * update.out_factor, update.in_factor)
            for module, update in adapters["task0"].items()
        }
        assert survey_updates(adapters, 4).duplicates == ()


class TestService:
    def test_an_adapter_that_shares_nothing_is_served_badly(self) -> None:
        adapters = collection(20)
        adapters["odd"] = alone(3, adapters["task0"])
        report = survey_updates(adapters, 4)
        assert report.badly_served == ("odd",)
        assert report.errors["odd"] > 0.8 > 0.3 > report.errors["task0"]

    def test_errors_are_those_of_a_subspace_of_all(self) -> None:
        adapters = collection(6)
        report = survey_updates(adapters, 3)
        layers, _ = merge_into_layers({}, adapters, SubspaceSettings(num_components=3, pseudo_rank=3))
        for task, updates in adapters.items():
            lost = energy = 0.0
            for module, update in updates.items():
                exact = update.dense().double()
                lost += float((layers[module].update_of(task).dense().double() - exact).square().sum())
                energy += float(exact.square().sum())
            assert report.errors[task] == pytest.approx((lost / energy) ** 0.5, rel=1e-4)

    def test_advice_holds_for_the_subspace_that_it_advises(self) -> None:
        adapters = collection(12)
        report = survey_updates(adapters, 8, target_errors=(0.2, 1e-6))
        good, impossible = report.advice
        assert impossible.num_components is None
        built = SubspaceSettings(num_components=good.num_components, pseudo_rank=good.pseudo_rank)
        layers, _ = merge_into_layers({}, adapters, built)
        errors = torch.cat([layer.records.drift_estimates for layer in layers.values()])
        assert float(errors.mean()) == pytest.approx(good.error, rel=0.02)
        tensors = [
            tensor
            for layer in layers.values()
            for tensor in (layer.basis_out, layer.basis_in, layer.coefficients_out, layer.coefficients_in)
        ]
        assert sum(tensor.nbytes for tensor in tensors) == good.bytes


class TestSampling:
    def test_of_many_adapters_the_curve_is_a_sample_and_the_rest_is_not(self) -> None:
        adapters = collection(SAMPLE_FROM, modules=5, shape=(12, 10), rank=2)
        adapters[f"task{SAMPLE_FROM - 1}"] = adapters["task3"]
        adapters["task150"] = alone(1, adapters["task0"])
        report = survey_updates(adapters, 4)
        assert report.sampled and report.curve_tasks < report.tasks == SAMPLE_FROM
        assert len(report.curve_modules) < report.modules == 5
        assert report.duplicates == (("task3", f"task{SAMPLE_FROM - 1}"),)
        assert report.badly_served == ("task150",)
        assert len(report.errors) == SAMPLE_FROM
        text = " ".join(survey_sentences(report))
        assert f"are from a sample: {report.curve_tasks} of {SAMPLE_FROM} adapters in 2 of 5 modules" in text
        assert not survey_updates(dict(list(adapters.items())[:-1]), 4).sampled

    def test_of_fewer_adapters_all_are_taken_in_some_modules_of_each_kind(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        adapters = {
            task: {f"layers.{i // 2}.{'qv'[i % 2]}": update for i, update in enumerate(of.values())}
            for task, of in collection(SAMPLE_MODULES_FROM, modules=24, shape=(24, 20)).items()
        }
        report = survey_updates(adapters, 4)
        assert report.curve_tasks == report.tasks == SAMPLE_MODULES_FROM and len(report.errors) == report.tasks
        assert [module[-1] for module in report.curve_modules].count("q") == 6 == len(report.curve_modules) - 6
        layers = sorted(int(module.split(".")[1]) for module in report.curve_modules)
        assert layers[0] < 3 and layers[-1] > 8
        assert f"all {report.tasks} adapters in 12 of 24 modules" in " ".join(survey_sentences(report))
        assert not survey_updates(dict(list(adapters.items())[1:]), 4).sampled
        monkeypatch.setattr(collections, "SAMPLE_MODULES_FROM", SAMPLE_FROM)
        whole = survey_updates(adapters, 4)
        assert not whole.sampled and whole.errors == pytest.approx(report.errors)
        for point, expected in zip(report.curve, whole.curve, strict=True):
            assert point.explained == pytest.approx(expected.explained, abs=0.01)
            assert point.null_explained == pytest.approx(expected.null_explained, abs=0.01)

    def test_kinds_of_different_numbers_are_taken_in_proportion(self) -> None:
        names = [f"layers.{i}.{kind}" for i in range(32) for kind in "qkvogud"]
        chosen = _modules_of_curve([*names, "lm_head"], 20)
        kinds = [name[-1] for name in chosen if name != "lm_head"]
        assert 14 <= len(chosen) <= 17 and all(kinds.count(kind) >= 2 for kind in "qkvogud")
        assert _modules_of_curve(names[:11], 20) == names[:11]

    def test_a_kind_of_one_module_is_taken(self) -> None:
        names = [f"layers.{i}.q" for i in range(32)]
        for alone in ("a.lm_head", "z.lm_head"):
            assert alone in _modules_of_curve([*names, alone], 20)

    def test_updates_are_taken_a_few_modules_at_a_time(self) -> None:
        adapters, held = collection(2, modules=20), []

        class Reading(dict):
            def __getitem__(self, module: str) -> LowRankUpdate:
                held.append(module)
                return super().__getitem__(module)

        survey_updates({task: Reading(of) for task, of in adapters.items()}, 4, progress=iter)
        assert len(held) == 40


class TestStored:
    def test_the_curve_ends_at_what_the_subspace_explains(self) -> None:
        layers, _ = merge_into_layers({}, collection(6), SubspaceSettings(num_components=4, pseudo_rank=3))
        report = survey_layers(layers, [f"task{i}" for i in range(6)])
        explained = sum(layer.explained_variance() for layer in layers.values()) / len(layers)
        assert report.curve[-1].num_components == 4
        assert report.curve[-1].explained == pytest.approx(explained, rel=1e-5)
        assert report.curve[0].explained < report.curve[-1].explained

    def test_without_tasks_there_is_nothing_to_say(self) -> None:
        report = survey_layers({}, [])
        assert report == CollectionReport(tasks=0, modules=0, num_components=1, advice=report.advice)
        assert survey_sentences(report) == ()
