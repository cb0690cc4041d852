"""Does the cost of a merge depend on the number of tasks?

    python recipes/benchmarks/merge.py
    python recipes/benchmarks/merge.py --quick --json merge.json
    python recipes/benchmarks/merge.py --size 1b --device cuda

The benchmark merges a rank-16 adapter into a float32 layer of n = d = 2048, k = 64, p = 16 that has T tasks. The merge
includes the joint basis, the new coefficients of all tasks and the drift certificate. There are three questions:

1. Is the work on n- and d-sized matrices the same at any T? Every operation of a whole merge that reads or writes a
   tensor with a side of n is timed as it is dispatched. The rest of the merge also runs, but is not counted.
2. How much longer does the whole merge take with more tasks?
3. How much faster is it than the plain way? The plain way reconstructs the factors of all T updates, stacks them
   beside the new adapter's, alternates between both sides with an SVD of the n-sized stack each time, and projects all
   updates on the result. It runs in float64, without a certificate, and on an R factor instead of the stack where that
   is smaller (the singular values and left vectors are the same). Both must give the same updates.

The tasks of a layer share directions of decaying weight. Half of the new adapter lies inside the basis, half is new.

`--size 1b` adds a fourth question: how long does it take to merge a task into a whole Llama of 1B parameters? Its
blocks are alike, so the benchmark merges into the layers of one block as often as there are blocks (with `--quick`,
once).

By default, everything runs on a GPU if there is one. (`ShareTrainer` merges on the CPU.)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from _report import Row, argument_parser, finish_pending_work, interleaved, medians, report, seconds_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from share_hf.subspace import (
    LayerSubspace,
    LowRankUpdate,
    SubspaceSettings,
    TaskRecords,
    merge_into_layer,
    thin_svd_of_update,
)
from share_hf.subspace.layer import update_norms


SETTINGS = SubspaceSettings(num_components=64, pseudo_rank=16)
NEW_RANK = 16
FEATURES = 2048
QUICK_FEATURES = 1024  # size of the compared layers with --quick
TASKS = (10, 100, 1_000, 10_000)
COMPARED_TASKS = {100: 50, 1_000: 100}  # T -> how many times faster the merge should be
JOINT_ITERATIONS = 3
CHECKED_TASKS = 25
# The linear modules in a block of Llama-3.2-1B: (outputs, inputs).
BLOCK_1B = {
    "q_proj": (2048, 2048),
    "k_proj": (512, 2048),
    "v_proj": (512, 2048),
    "o_proj": (2048, 2048),
    "gate_proj": (8192, 2048),
    "up_proj": (8192, 2048),
    "down_proj": (2048, 8192),
}
BLOCKS = 16


def main() -> None:
    parser = argument_parser(__doc__, repeats=9)
    parser.add_argument(
        "--size", choices=("layer", "1b"), default="layer", help="what to merge; 1b adds a whole Llama"
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device to compute on (default: a GPU if there is one)",
    )
    options = parser.parse_args()
    title = f"Merging task T + 1 into one layer (k = 64, p = 16, joint basis, with certificate), on {options.device}"
    report(title, all_rows(options), options.json)


def all_rows(options: argparse.Namespace) -> Iterator[Row]:
    repeats, device = 3 if options.quick else options.repeats, torch.device(options.device)
    yield from growth_rows(FEATURES, repeats, device)
    if options.size == "1b":
        yield from model_rows(1 if options.quick else BLOCKS, device)
    yield from comparison_rows(QUICK_FEATURES if options.quick else FEATURES, repeats, device)


def growth_rows(features: int, repeats: int, device: torch.device) -> list[Row]:
    """Measure how the time of a merge and its parts grows with the number of tasks."""
    layers = {tasks: layer_with_tasks((features, features), tasks, device) for tasks in TASKS}
    adapter = new_adapter(layers[TASKS[0]])

    def merge(tasks: int) -> Callable[[], object]:
        return lambda: merge_into_layer(layers[tasks], {"new": adapter}, SETTINGS)

    whole = medians(interleaved({f"{tasks}": merge(tasks) for tasks in TASKS}, repeats=repeats))
    sized: dict[int, list[TimedOperations]] = {tasks: [] for tasks in (TASKS[0], TASKS[-1])}
    for _ in range(repeats):
        for tasks, runs in sized.items():
            with TimedOperations(side=features) as timed:
                merge(tasks)()
            runs.append(timed)
    few, many = (median(run.seconds for run in runs) for runs in sized.values())
    operations_few, operations_many = (runs[0].count for runs in sized.values())

    size = f"n = d = {features}"
    rows = [Row(f"whole merge, T = {tasks:,}, {size}", 1e3 * whole[f"{tasks}"], "ms") for tasks in TASKS]
    rows += [
        Row(f"its n- and d-sized part, T = 10, {size}", 1e3 * few, "ms"),
        Row(f"its n- and d-sized part, T = 10,000, {size}", 1e3 * many, "ms"),
        Row.at_most("operations of that part, T = 10,000 over T = 10", operations_many / operations_few, "x", 1),
        Row.at_most("n- and d-sized part, T = 10,000 over T = 10", many / few, "x", 1.25),
        Row.at_most("whole merge, T = 1,000 over T = 10", whole["1000"] / whole["10"], "x", 4),
        Row.at_most("whole merge, T = 10,000 over T = 10", whole["10000"] / whole["10"], "x", 25),
    ]
    return rows


def model_rows(blocks: int, device: torch.device) -> Iterator[Row]:
    """Measure merging a task into every layer of a model."""
    for tasks in (10, 100):
        layers = [layer_with_tasks(shape, tasks, device) for shape in BLOCK_1B.values()]
        adapters = [new_adapter(layer) for layer in layers]

        def merge_into_block() -> None:
            for layer, adapter in zip(layers, adapters, strict=True):  # noqa: B023
                merge_into_layer(layer, {"new": adapter}, SETTINGS)

        merge_into_block()  # to warm up
        seconds = seconds_of(lambda: [merge_into_block() for _ in range(blocks)])
        size = f"{blocks * len(layers)} layers of a Llama of hidden size 2048"
        yield Row(f"whole merges into {size}, T = {tasks}", seconds, "s")


def comparison_rows(features: int, repeats: int, device: torch.device) -> Iterator[Row]:
    """Compare the merge with reconstruct-and-SVD in time and result."""
    for tasks, times_faster in COMPARED_TASKS.items():
        layer = layer_with_tasks((features, features), tasks, device)
        adapter = new_adapter(layer)
        merge = {"merge": lambda: merge_into_layer(layer, {"new": adapter}, SETTINGS)}  # noqa: B023
        ours = interleaved(merge, repeats=repeats)["merge"]
        results: list[DenseResult] = []
        plain = seconds_of(lambda: results.append(reconstruct_and_decompose(layer, adapter)))  # noqa: B023
        ours += interleaved(merge, repeats=repeats)["merge"]
        merged, _ = merge["merge"]()

        where = f"T = {tasks:,}, n = d = {features}"
        yield Row(f"reconstruct-and-SVD, {where}", plain, "s")
        yield Row(f"merge, {where}", median(ours), "s")
        yield Row.at_least(f"times faster, {where}", plain / median(ours), "x", times_faster)
        largest = difference(merged, results[0])
        yield Row.at_most(f"largest relative difference of an update, {where}", largest, "", 1e-6)


def layer_with_tasks(shape: tuple[int, int], tasks: int, device: torch.device) -> LayerSubspace:
    """Make a float32 layer (n, d) whose `tasks` tasks use the directions of its basis with decaying weight."""
    generator = torch.Generator().manual_seed(tasks)
    k, p = SETTINGS.num_components, SETTINGS.pseudo_rank
    decay = torch.arange(1, k + 1).rsqrt()[:, None]
    basis_out, basis_in = (torch.linalg.qr(normal(generator, side, k).double()).Q.float() for side in shape)
    coefficients_out, coefficients_in = (decay * normal(generator, tasks, k, p) for _ in range(2))
    # The learned updates were a little larger, because compression has reduced their norm.
    norms = update_norms(coefficients_out, coefficients_in) * (1 + 0.1 * torch.rand(tasks, generator=generator))
    nothing = torch.zeros(tasks, dtype=torch.float64)
    drifted = nothing + 0.4
    layer = LayerSubspace(
        tasks=tuple(f"task_{i}" for i in range(tasks)),
        basis_out=basis_out,
        basis_in=basis_in,
        coefficients_out=coefficients_out,
        coefficients_in=coefficients_in,
        records=TaskRecords(norms, nothing, drifted, drifted),
        spectrum_out=decay[:, 0].double(),
        spectrum_in=decay[:, 0].double(),
    )
    return layer.to(device)


def new_adapter(layer: LayerSubspace) -> LowRankUpdate:
    """Make a rank-16 adapter, half of which lies in the directions of the layer's tasks."""
    generator = torch.Generator().manual_seed(0)
    decay = torch.arange(1, SETTINGS.num_components + 1).rsqrt()[:, None]
    factors = []
    for basis in (layer.basis_out, layer.basis_in):
        inside = basis @ (decay * normal(generator, len(decay), NEW_RANK)).to(basis)
        outside = normal(generator, len(basis), NEW_RANK).to(basis)
        factors.append(inside + outside * inside.norm() / outside.norm())
    return LowRankUpdate(*factors)


@dataclass(frozen=True)
class DenseResult:
    """The factors (tasks, n, p) and (tasks, d, p) of the checked tasks' updates after the plain merge."""

    out_factors: Tensor
    in_factors: Tensor


def reconstruct_and_decompose(layer: LayerSubspace, adapter: LowRankUpdate) -> DenseResult:
    """Merge in the plain way: with all factors at n x p, and an SVD of the n-sized stack for each half-step."""
    basis_out, basis_in = layer.basis_out.double(), layer.basis_in.double()
    out_factors = torch.cat([basis_out @ layer.coefficients_out.double(), balanced(adapter).out_factor[None]])
    in_factors = torch.cat([basis_in @ layer.coefficients_in.double(), balanced(adapter).in_factor[None]])
    norms = torch.cat([layer.records.norms, balanced(adapter).dense().norm()[None]])

    new_in = leading_directions(stack(in_factors, out_factors, norms))
    for _ in range(JOINT_ITERATIONS):
        new_out = leading_directions(stack(out_factors, new_in.T @ in_factors, norms))
        new_in = leading_directions(stack(in_factors, new_out.T @ out_factors, norms))

    # Compute the coefficients of all tasks, including the checked ones.
    coefficients_out, coefficients_in = new_out.T @ out_factors, new_in.T @ in_factors
    checked = checked_tasks(len(out_factors))
    return DenseResult(new_out @ coefficients_out[checked], new_in @ coefficients_in[checked])


def stack(factors: Tensor, others: Tensor, norms: Tensor) -> Tensor:
    """Stack left factors (n, tasks p) of the weighted updates ``X_i Y_i^T / ‖ΔW_i‖``, scaled by the size of Y_i."""
    size = torch.linalg.qr(others, mode="r").R
    return ((factors @ size.mT) / norms[:, None, None]).transpose(0, 1).flatten(1)


def leading_directions(stacked: Tensor) -> Tensor:
    """Return the leading k left singular vectors of a matrix (n, columns)."""
    if stacked.shape[1] > stacked.shape[0]:
        triangle = torch.linalg.qr(stacked.T, mode="r").R
        return torch.linalg.svd(triangle, full_matrices=False).Vh[: SETTINGS.num_components].T
    return torch.linalg.svd(stacked, full_matrices=False).U[:, : SETTINGS.num_components]


def balanced(adapter: LowRankUpdate) -> LowRankUpdate:
    return thin_svd_of_update(adapter).balanced_factors()


def difference(merged: LayerSubspace, expected: DenseResult) -> float:
    """Return the largest relative difference of an update over the checked tasks."""
    worst = 0.0
    for position, i in enumerate(checked_tasks(len(merged.tasks)).tolist()):
        out_factor = merged.basis_out.double() @ merged.coefficients_out[i].double()
        in_factor = merged.basis_in.double() @ merged.coefficients_in[i].double()
        dense = expected.out_factors[position] @ expected.in_factors[position].T
        worst = max(worst, float((out_factor @ in_factor.T - dense).norm() / dense.norm()))
    return worst


def checked_tasks(count: int) -> Tensor:
    """Return the positions of some tasks, including the first and the new one."""
    return torch.linspace(0, count - 1, CHECKED_TASKS).round().long()


class TimedOperations(TorchDispatchMode):
    """Counts and times the operations with an operand or a result that has a side of a given length."""

    def __init__(self, *, side: int) -> None:
        super().__init__()
        self.side = side
        self.seconds = 0.0
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        finish_pending_work()
        start = time.perf_counter()
        result = function(*arguments, **(options or {}))
        finish_pending_work()
        elapsed = time.perf_counter() - start
        involved = tree_leaves((arguments, options, result))
        if any(isinstance(value, Tensor) and self.side in value.shape for value in involved):
            self.seconds += elapsed
            self.count += 1
        return result


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


if __name__ == "__main__":
    main()
