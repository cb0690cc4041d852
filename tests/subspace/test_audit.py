from __future__ import annotations

import hashlib
import json
import math
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from share_hf.subspace import (
    LayerSubspace,
    LowRankUpdate,
    SubspaceSettings,
    audit,
    initialization_sketch,
    merge_into_layer,
)
from share_hf.subspace.audit import (
    AuditReport,
    Explained,
    ModuleAudit,
    audit_layers,
    audit_updates,
    explained_variance,
    group_by_initialization,
    null_explained_variance,
)
from share_hf.subspace.null import random_orthonormal

from .reference import explained_fraction, joint_basis, reference_weights
from .streams import Stream, dense_learned, examples, random_update, streams


MODULES = {"layers.0.q_proj": (48, 64), "layers.0.v_proj": (24, 64), "layers.1.q_proj": (48, 64)}


def adapter_of(seed: int, rank: int = 8, moved: float = 0.0) -> dict[str, LowRankUpdate]:
    """Return the factors of an adapter: A from a seed, moved by training, and a B of its own."""
    start = torch.Generator().manual_seed(seed)
    training = torch.Generator().manual_seed(1000 + int(1000 * moved) + seed)
    updates = {}
    for module, (n, d) in MODULES.items():
        a = torch.randn(rank, d, generator=start)
        updates[module] = LowRankUpdate(
            torch.randn(n, rank, generator=training), (a + moved * torch.randn(rank, d, generator=training)).T
        )
    return updates


def cosine(first: Tensor, second: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=0))


def all_entries(adapter: dict[str, LowRankUpdate]) -> Tensor:
    return torch.cat([update.in_factor.T.flatten() for update in adapter.values()])


def random_directions(count: int, shape: tuple[int, int], values: Tensor, seed: int) -> list[LowRankUpdate]:
    """Return updates with given singular values, whose directions are the singular vectors of a Gaussian matrix."""
    generator = torch.Generator().manual_seed(seed)
    updates = []
    for _ in range(count):
        left, right = (
            torch.linalg.svd(
                torch.randn(side, len(values), generator=generator, dtype=torch.float64), full_matrices=False
            )
            for side in shape
        )
        updates.append(LowRankUpdate(left.U @ left.Vh * values, right.U @ right.Vh))
    return updates


def sharing_outputs(count: int, shape: tuple[int, int], rank: int, seed: int) -> list[LowRankUpdate]:
    """Return updates whose outputs lie in the same few directions, with separate inputs."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
    return [
        LowRankUpdate(
            common @ torch.randn(rank, rank, generator=generator, dtype=torch.float64),
            torch.randn(shape[1], rank, generator=generator, dtype=torch.float64),
        )
        for _ in range(count)
    ]


def named(updates: list[LowRankUpdate]) -> dict[str, LowRankUpdate]:
    return {f"task_{i}": update for i, update in enumerate(updates)}


def test_the_cosine_of_two_sketches_estimates_that_of_the_adapters_initializations() -> None:
    errors = []
    for seed in range(20):
        for moved in (0.0, 0.5, 1.0, 3.0):
            first, second = adapter_of(seed), adapter_of(seed, moved=moved)
            exact = cosine(all_entries(first), all_entries(second))
            errors.append(cosine(initialization_sketch(first), initialization_sketch(second)) - exact)
    deviations = torch.tensor(errors)
    assert float(deviations.std()) < 512**-0.5
    assert float(deviations.abs().max()) < 5 * 512**-0.5


def test_a_sketch_does_not_depend_on_the_session_the_dtype_or_b() -> None:
    updates = {"model.layers.0.q_proj": LowRankUpdate(torch.zeros(4, 2), torch.arange(1.0, 7.0).reshape(3, 2))}
    sketch = initialization_sketch(updates)
    (module, update), *_ = updates.items()
    # Entries 1 … 6 of A^T, in the order of A's rows: where this module's hashes have always put them.
    expected = torch.zeros(512, dtype=torch.float64)
    hashes = [_splitmix64(module, j) for j in range(6)]
    for value, hashed in zip((1, 3, 5, 2, 4, 6), hashes, strict=True):
        expected[hashed % 512] += value if hashed >> 32 & 1 else -value
    torch.testing.assert_close(sketch, (expected / expected.norm()).float())
    rounded = {module: LowRankUpdate(torch.ones(4, 2), update.in_factor.bfloat16())}
    assert torch.equal(initialization_sketch(rounded), sketch)
    assert sketch.dtype == torch.float32
    assert float(sketch.norm()) == pytest.approx(1)


def _splitmix64(module: str, place: int) -> int:
    mask = 2**64 - 1
    x = int.from_bytes(hashlib.sha256(module.encode()).digest()[:8], "little") + place * 0x9E3779B97F4A7C15 & mask
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31


def test_adapters_of_different_rank_that_share_leading_rows_have_similar_sketches() -> None:
    wide = adapter_of(0, rank=8)
    narrow = {module: LowRankUpdate(u.out_factor[:, :4], u.in_factor[:, :4]) for module, u in wide.items()}
    assert cosine(initialization_sketch(wide), initialization_sketch(narrow)) == pytest.approx(0.5**0.5, abs=0.1)


def test_rounding_a_sketch_to_three_decimals_keeps_its_cosines() -> None:
    sketches = [initialization_sketch(adapter_of(seed, moved=moved)) for seed in range(5) for moved in (0.0, 0.7)]
    for first in sketches:
        for second in sketches:
            exact = cosine(first, second)
            rounded = cosine(first.mul(1000).round() / 1000, second.mul(1000).round() / 1000)
            assert rounded == pytest.approx(exact, abs=0.01)


def test_an_adapter_of_zero_a_has_a_zero_sketch_and_a_group_of_its_own() -> None:
    zero = {"q_proj": LowRankUpdate(torch.ones(4, 2), torch.zeros(3, 2))}
    sketch = initialization_sketch(zero)
    assert not sketch.any()
    assert group_by_initialization({"a": sketch, "b": sketch}) == (("a",), ("b",))


def test_adapters_of_one_seed_are_grouped_and_others_are_not() -> None:
    adapters = {
        "first": adapter_of(1),
        "other": adapter_of(2),
        "second": adapter_of(1, moved=0.5),
        "third": adapter_of(1, moved=0.8),
        "other_too": adapter_of(2, moved=0.3),
        "alone": adapter_of(3),
    }
    sketches = {task: initialization_sketch(adapter) for task, adapter in adapters.items()}
    groups = (("first", "second", "third"), ("other", "other_too"), ("alone",))
    assert group_by_initialization({**sketches, "unknown": None}) == groups
    as_in_a_file = {task: [round(entry, 3) for entry in sketch.tolist()] for task, sketch in sketches.items()}
    assert group_by_initialization(as_in_a_file) == groups
    assert group_by_initialization({"unknown": None}) == ()


def test_groups_are_linked_through_others() -> None:
    angles = {"left": 0.0, "right": 2.0, "middle": 1.0}
    sketches = {task: [math.cos(angle), math.sin(angle)] for task, angle in angles.items()}
    assert group_by_initialization(sketches, threshold=0.5) == (("left", "right", "middle"),)
    del sketches["middle"]
    assert group_by_initialization(sketches, threshold=0.5) == (("left",), ("right",))


def test_a_thousand_tasks_are_grouped_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    starts = torch.randn(10, 512, generator=generator)
    noise = 0.5 * torch.randn(1000, 512, generator=generator)
    shared = {f"task_{i}": starts[i % 10] + noise[i] for i in range(1000)}
    own = {f"task_{i}": torch.randn(512, generator=generator) for i in range(1000)}
    chain = {f"task_{i}": torch.nn.functional.one_hot(torch.tensor([i, i + 1]), 1001).sum(0) for i in range(1000)}
    started = time.perf_counter()
    groups = group_by_initialization(shared)
    assert [len(group) for group in groups] == [100] * 10
    assert groups[3][:2] == ("task_3", "task_13")
    assert len(group_by_initialization(own)) == 1000
    assert [len(group) for group in group_by_initialization(chain)] == [1000]
    assert time.perf_counter() - started < 5


@examples(40)
@given(streams(most_merges=3, largest_exponent=1.0), st.integers(1, 8))
def test_the_explained_variance_is_that_of_dense_updates(stream: Stream, k: int) -> None:
    updates = {task: update for merge in stream.merges() for task, update in merge.items()}
    dense = {task: dense_learned(update) for task, update in updates.items()}
    weights = reference_weights(dense)
    stack = [weights[task] * update for task, update in dense.items() if weights[task] > 0]

    explained = explained_variance(list(updates.values()), k, k)

    if not stack:
        assert explained == Explained(1.0, 1.0, 1.0)
        return
    for side, matrix in ((explained.outputs, torch.cat(stack, dim=1)), (explained.inputs, torch.cat(stack, dim=0))):
        energies = torch.linalg.svdvals(matrix).square()
        assert side == pytest.approx(float(energies[:k].sum() / energies.sum()), abs=1e-9)
    basis_out, basis_in, gap = joint_basis(stack, k)
    if gap > 1e-3:
        assert explained.joint == pytest.approx(explained_fraction(stack, basis_out, basis_in), abs=1e-6)
    assert explained.joint <= min(explained.outputs, explained.inputs) + 1e-9


def test_what_is_observed_is_what_a_merge_explains() -> None:
    generator = torch.Generator().manual_seed(0)
    updates = [random_update(generator, (40, 56), 4, 10.0**i) for i in range(6)]
    layer = LayerSubspace.empty(40, 56, 4, dtype=torch.float64)
    layer, _ = merge_into_layer(layer, named(updates), SubspaceSettings(num_components=10, pseudo_rank=4))
    assert explained_variance(updates, 10, 10).joint == pytest.approx(layer.explained_variance(), abs=1e-9)


def test_zero_updates_do_not_count() -> None:
    generator = torch.Generator().manual_seed(0)
    updates = [random_update(generator, (12, 10), 2) for _ in range(4)]
    zero = LowRankUpdate(torch.zeros(12, 2), torch.ones(10, 2))
    with_zero = explained_variance([zero, *updates], 3, 3)
    for name, value in vars(explained_variance(updates, 3, 3)).items():
        assert vars(with_zero)[name] == pytest.approx(value, abs=1e-12)
    assert explained_variance([zero], 3, 3) == explained_variance([], 3, 3) == Explained(1.0, 1.0, 1.0)
    values = torch.tensor([2.0, 1.0])
    null = null_explained_variance([values, torch.zeros(1)], (12, 10), 1, 1)
    assert null.joint == pytest.approx(0.8)


@pytest.mark.parametrize(("shape", "count", "k"), [((40, 24), 3, (6, 4)), ((16, 20), 12, (5, 5))])
def test_the_null_is_the_mean_over_dense_updates_of_random_directions(
    shape: tuple[int, int], count: int, k: tuple[int, int]
) -> None:
    values = torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    simulated = []
    for seed in range(60):
        stack = [dense_learned(update) / values.norm() for update in random_directions(count, shape, values, seed)]
        outputs, inputs = (torch.linalg.svd(torch.cat(stack, dim=side)) for side in (1, 0))
        right = inputs.Vh[: k[1]].T
        for _ in range(3):
            left = torch.linalg.svd(torch.cat([update @ right for update in stack], dim=1)).U[:, : k[0]]
            right = torch.linalg.svd(torch.cat([update.T @ left for update in stack], dim=1)).U[:, : k[1]]
        sides = (float(svd.S[:j].square().sum()) / count for svd, j in zip((outputs, inputs), k, strict=True))
        simulated.append([explained_fraction(stack, left, right), *sides])
    sample = torch.tensor(simulated)
    null = null_explained_variance([values] * count, shape, *k, draws=60, seed=7)
    error = 4 * sample.std(0) * (2 / 60) ** 0.5
    assert (abs(torch.tensor([null.joint, null.outputs, null.inputs]) - sample.mean(0)) < error + 1e-9).all()


@examples(30)
@given(
    shape=st.tuples(st.integers(4, 30), st.integers(4, 30)),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    k=st.integers(1, 24),
    seed=st.integers(0, 1000),
)
def test_the_null_is_a_fraction_that_grows_with_k_and_is_all_where_there_is_room(
    shape: tuple[int, int], ranks: list[int], k: int, seed: int
) -> None:
    values = [torch.linspace(1, 0.2, rank) * 10.0**i for i, rank in enumerate(ranks)]
    null = null_explained_variance(values, shape, k, k, seed=seed)
    more = null_explained_variance(values, shape, k + 2, k + 2, seed=seed)
    assert 0 < null.joint <= min(null.outputs, null.inputs) + 1e-9 <= 1 + 2e-9
    assert more.outputs >= null.outputs - 1e-9
    assert more.inputs >= null.inputs - 1e-9
    if all(k >= min(side, sum(ranks)) for side in shape):
        assert null.joint == pytest.approx(1, abs=1e-9)


def test_random_directions_are_uniform_in_sign() -> None:
    columns = random_orthonormal(2000, 6, 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(columns.mT @ columns, torch.eye(3).double().expand(2000, 3, 3), atol=1e-12, rtol=0)
    assert float(columns.mean(0).abs().max()) < 5 * (1 / 6 / 2000) ** 0.5


def test_the_null_depends_on_its_seed_alone() -> None:
    values = [torch.tensor([1.0, 0.5])] * 8
    first = null_explained_variance(values, (12, 14), 3, 3, seed=5)
    torch.manual_seed(99)
    assert null_explained_variance(values, (12, 14), 3, 3, seed=5) == first
    assert null_explained_variance(values, (12, 14), 3, 3, seed=6) != first


def test_many_coordinates_give_what_the_full_decomposition_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [0.8 ** torch.arange(4).double()] * 80
    exact = null_explained_variance(values, (300, 320), 6, 5)
    monkeypatch.setattr(audit, "_DENSE_COORDINATES", 100)
    approximate = null_explained_variance(values, (300, 320), 6, 5)
    for name, value in vars(exact).items():
        assert vars(approximate)[name] == pytest.approx(value, rel=0.01)


@pytest.mark.parametrize("alike", [0.0, 0.5])
def test_directions_that_are_found_in_a_few_steps_explain_what_the_best_do(
    alike: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are as many updates as a layer has features or more, similar or not, and a k where no step is exact."""
    generator = torch.Generator().manual_seed(3)
    shared = [alike * torch.randn(side, 16, generator=generator) for side in (400, 360)]
    updates = [
        LowRankUpdate(*(part + torch.randn(part.shape, generator=generator) for part in shared)) for _ in range(30)
    ]
    found = explained_variance(updates, 16, 14)
    monkeypatch.setattr(audit, "_DENSE_COORDINATES", 1000)
    for name, value in vars(explained_variance(updates, 16, 14)).items():
        assert vars(found)[name] == pytest.approx(value, abs=1e-3)


def test_independent_adapters_explain_no_more_than_chance() -> None:
    layers = {
        f"layers.{i}": named(random_directions(10, (64, 48), torch.tensor([3.0, 2.0, 1.0, 0.5]).double(), i))
        for i in range(6)
    }
    report = audit_updates(layers, 8, draws=3)
    assert abs(report.excess) < 0.015
    assert len(report.groups) == 10
    assert report.sentences()[0] == "10 tasks started from 10 different random A, no two from the same."
    assert report.sentences()[1].endswith("This is no more than chance.")


def test_adapters_that_share_output_directions_exceed_chance_on_that_side() -> None:
    layers = {f"layers.{i}": named(sharing_outputs(10, (64, 48), 6, i)) for i in range(3)}
    report = audit_updates(layers, 8)
    assert report.observed.outputs == pytest.approx(1)
    assert report.null.outputs < 0.6
    assert abs(report.observed.inputs - report.null.inputs) < 0.1
    assert report.excess > 0.1
    assert "On the output side alone it is 100 % against" in report.sentences()[1]


def test_adapters_of_one_seed_exceed_chance_on_the_input_side_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for module in ("first", "second"):
        a = torch.randn(48, 6, generator=generator).double()
        layers[module] = named([LowRankUpdate(torch.randn(64, 6, generator=generator).double(), a) for _ in range(10)])
    report = audit_updates(layers, 8)
    assert report.observed.inputs == pytest.approx(1)
    assert report.excess > 0.1
    assert abs(report.observed.outputs - report.null.outputs) < 0.02
    initialization, variance = report.sentences()
    assert initialization == (
        "All 10 tasks started from the same random A. This alone makes their input directions alike."
    )
    assert variance.endswith(", no more than chance.")


def test_a_stored_subspace_is_judged_like_its_adapters() -> None:
    flat, shape = torch.ones(4, dtype=torch.float64), (64, 48)
    for updates, exceeds in ((random_directions(10, shape, flat, 0), False), (sharing_outputs(10, shape, 4, 0), True)):
        settings = SubspaceSettings(num_components=8, pseudo_rank=4)
        layer, _ = merge_into_layer(LayerSubspace.empty(*shape, 4), named(updates), settings)
        stored = audit_layers({"q_proj": layer}, dict.fromkeys(layer.tasks), draws=5)
        raw = audit_updates({"q_proj": named(updates)}, 8, draws=5)
        assert stored.observed == Explained(layer.explained_variance())
        assert stored.null.outputs is not None
        assert stored.observed.joint == pytest.approx(raw.observed.joint, abs=1e-5)
        assert (stored.excess > 0.05) == (raw.excess > 0.05) == exceeds
        assert stored.null.joint < raw.null.joint + 0.02
        assert stored.groups == ()
        assert stored.ungrouped == layer.tasks


def test_what_a_rank_over_p_lost_is_lost_to_the_null_too() -> None:
    flat = torch.ones(4, dtype=torch.float64)
    updates = named(random_directions(3, (64, 48), flat, 0))
    settings = SubspaceSettings(num_components=12, pseudo_rank=2)
    layer, _ = merge_into_layer(LayerSubspace.empty(64, 48, 2), updates, settings)
    report = audit_layers({"q_proj": layer}, {})
    assert report.observed.joint == pytest.approx(0.5, abs=1e-5)
    assert report.null.joint == pytest.approx(0.5, abs=1e-5)
    assert report.trivial


def test_tasks_that_were_trained_inside_the_basis_can_be_left_out() -> None:
    settings = SubspaceSettings(num_components=8, pseudo_rank=4)
    updates = named(random_directions(10, (64, 48), torch.ones(4).double(), 0))
    layer, _ = merge_into_layer(LayerSubspace.empty(64, 48, 4), updates, settings)
    grown = layer
    for i in range(10):
        grown = grown.with_task(f"inside_{i}", torch.randn(8, 4), torch.randn(8, 4))
    everything, adapters = (audit_layers({"q": grown}, {}, tasks=tasks) for tasks in (None, layer.tasks))
    assert adapters == audit_layers({"q": layer}, {})
    assert everything.excess > adapters.excess + 0.2


def test_the_audit_of_a_subspace_can_be_of_a_few_layers() -> None:
    generator = torch.Generator().manual_seed(0)
    settings = SubspaceSettings(num_components=3, pseudo_rank=2)
    layers = {}
    for i in range(8):
        updates = {f"task_{j}": random_update(generator, (12, 10), 2) for j in range(3)}
        layers[f"layers.{i}"], _ = merge_into_layer(LayerSubspace.empty(12, 10, 2), updates, settings)
    layers["unused"] = LayerSubspace.empty(12, 10, 2)
    seen: list[str] = []
    report = audit_layers(layers, {}, max_layers=3, progress=lambda modules: (seen.append(m) or m for m in modules))
    assert [row.module for row in report.rows] == seen == ["layers.0", "layers.3", "layers.6"]
    assert [row.module for row in audit_layers(layers, {}).rows] == list(layers)[:-1]
    assert audit_layers({}, {}).sentences()[1] == "There are no updates to explain."


def test_an_audit_of_chosen_modules_still_sketches_all_of_the_adapter() -> None:
    adapters = {"a": adapter_of(0), "b": adapter_of(0, moved=0.5), "c": adapter_of(1)}
    layers = {module: {task: adapter[module] for task, adapter in adapters.items()} for module in MODULES}
    report = audit_updates(layers, 4, modules=["layers.1.q_proj"])
    assert [row.module for row in report.rows] == ["layers.1.q_proj"]
    assert report.groups == (("a", "b"), ("c",))
    given_sketches = audit_updates(layers, 4, sketches={"a": None, "b": None, "c": None})
    assert given_sketches.ungrouped == ("a", "b", "c")
    assert [row.tasks for row in given_sketches.rows] == [3, 3, 3]


def test_the_report_is_json_with_its_means() -> None:
    layers = {f"layers.{i}": named(sharing_outputs(4, (12, 10), 2, i)) for i in range(2)}
    report = audit_updates(layers, 3)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["excess"] == report.excess
    assert values["groups"] == [[f"task_{i}"] for i in range(4)]
    mean = sum(row["null"]["joint"] for row in values["rows"]) / 2
    assert values["null"]["joint"] == pytest.approx(mean)
    assert values["rows"][0]["num_components"] == [3, 3]
    assert audit_updates(layers, 3) == report


def report_of(
    observed: Explained,
    null: Explained,
    groups: tuple[tuple[str, ...], ...] = (),
    ungrouped: tuple[str, ...] = (),
    trivial: bool = False,
) -> AuditReport:
    return AuditReport(groups, ungrouped, (ModuleAudit("q_proj", 3, (32, 32), observed, null, trivial),))


@pytest.mark.parametrize(
    ("groups", "ungrouped", "expected"),
    [
        (
            (("a", "b", "c"),),
            (),
            "All 3 tasks started from the same random A. This alone makes their input directions alike.",
        ),
        (
            (("a", "b"),),
            ("c",),
            "2 tasks (a and b) started from the same random A. This alone makes their input directions alike. That of "
            "c is not known.",
        ),
        ((("a",), ("b",)), (), "2 tasks started from 2 different random A, no two from the same."),
        (
            (("a", "d", "e"), ("b",), ("c", "f")),
            ("g", "h"),
            "6 tasks started from 3 different random A; these from the same one: a, d and e; c and f. This alone "
            "makes their input directions alike. That of g and h is not known.",
        ),
        ((("a",),), ("b",), "One random A is known, that of a. That of b is not known."),
        ((("a",),), (), "One random A is known, that of a."),
        (
            (),
            ("a", "b"),
            "It is not known from which random A the tasks started; sharing one is enough to make input directions "
            "alike.",
        ),
        (
            (tuple("abcdefghijk"), ("z",)),
            (),
            "12 tasks started from 2 different random A; these from the same one: a, b, c, d, e, f, g, h and 3 more. "
            "This alone makes their input directions alike.",
        ),
    ],
)
def test_the_first_sentence_says_which_tasks_share_an_initialization(
    groups: tuple[tuple[str, ...], ...], ungrouped: tuple[str, ...], expected: str
) -> None:
    sentence, _ = report_of(Explained(0.8), Explained(0.6), groups, ungrouped).sentences()
    assert sentence == expected
    assert sentence.isascii()


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (
            report_of(Explained(0.83, 0.9, 0.95), Explained(0.61, 0.7, 0.72)),
            "explains 83 % of the updates' energy; random directions with the same singular values would have 61 %. "
            "On the output side alone it is 90 % against 70 %.",
        ),
        (
            report_of(Explained(0.83, 0.71, 0.95), Explained(0.61, 0.7, 0.72)),
            "explains 83 % of the updates' energy; random directions with the same singular values would have 61 %. "
            "On the output side alone it is 71 % against 70 %, no more than chance.",
        ),
        (
            report_of(Explained(0.62, 0.71, 0.72), Explained(0.61, 0.7, 0.72)),
            "explains 62 % of the updates' energy; random directions with the same singular values would have 61 %. "
            "This is no more than chance.",
        ),
        (
            report_of(Explained(0.62, 0.75, 0.72), Explained(0.61, 0.7, 0.72)),
            "explains 62 % of the updates' energy; random directions with the same singular values would have 61 %. "
            "This is no more than chance. On the output side alone it is 75 % against 70 %.",
        ),
        (
            report_of(Explained(0.62), Explained(0.61), (("a", "b"),)),
            "explains 62 % of the updates' energy; random directions with similar singular values would have at least "
            "61 %. This is no more than chance.",
        ),
        (
            report_of(Explained(0.83), Explained(0.61), (("a",), ("b",))),
            "explains 83 % of the updates' energy; random directions with similar singular values would have at least "
            "61 %.",
        ),
        (
            report_of(Explained(0.83), Explained(0.61), (("a", "b"),)),
            "explains 83 % of the updates' energy; random directions with similar singular values would have at least "
            "61 %. Part of the difference may come from the shared random A.",
        ),
        (
            report_of(Explained(0.997), Explained(0.9), (("a",), ("b",))),
            "explains over 99 % of the updates' energy; random directions with similar singular values would have at "
            "least 90 %.",
        ),
        (
            report_of(Explained(1.0), Explained(1.0), trivial=True),
            "explains 100 % of the updates' energy. It has room for all directions of so few updates, so this number "
            "proves nothing.",
        ),
    ],
)
def test_the_second_sentence_puts_the_explained_variance_beside_chance(report: AuditReport, expected: str) -> None:
    _, sentence = report.sentences()
    assert sentence == f"The basis of 32 directions per layer {expected}"
    assert sentence.isascii()


def test_few_adapters_in_a_large_basis_prove_nothing() -> None:
    layers = {"q_proj": named(random_directions(3, (64, 48), torch.ones(4).double(), 0))}
    report = audit_updates(layers, 12)
    assert report.trivial
    assert report.observed.joint == pytest.approx(1)
    assert "proves nothing" in report.sentences()[1]
    assert not audit_updates(layers, 11).trivial


@pytest.mark.parametrize("seeds", ["shared", "own"])
def test_real_adapters_are_grouped_by_the_seed_they_started_from(shared_data: Path, seeds: str) -> None:
    from share_hf.format.lora import read_lora

    folders = sorted((shared_data / "adapters" / f"minilm-{seeds}-seed").iterdir())
    adapters = {folder.name: read_lora(folder).updates for folder in folders}
    layers = {module: {task: adapters[task][module] for task in adapters} for module in next(iter(adapters.values()))}
    modules = list(layers)[::6]
    report = audit_updates(layers, 16, modules=modules)
    tasks = tuple(adapters)
    assert report.groups == ((tasks,) if seeds == "shared" else tuple((task,) for task in tasks))
    assert report.observed.outputs > report.null.outputs
    if seeds == "shared":
        assert report.observed.inputs - report.null.inputs > 0.1
    else:
        assert abs(report.excess) < 0.02
        assert abs(report.observed.inputs - report.null.inputs) < 0.02
