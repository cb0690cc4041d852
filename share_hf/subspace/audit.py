"""Test whether adapters share a subspace, or look alike for reasons unrelated to their tasks.

There are two such reasons: adapters that started from the same random A keep nearly the same A, and any k directions
explain some part of anything. The audit therefore groups adapters by a small sketch of their A, and compares the
explained variance with a null distribution: updates with the same singular values and uniformly random directions,
put through the same computation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .basis import JOINT_ITERATIONS
from .factors import CompactUpdate, LowRankUpdate, inverse_norms
from .layer import LayerSubspace
from .null import NEGLIGIBLE, flattest_singular_values, normalized_updates, padded, random_orthonormal
from .sketch import Numbers, group_by_initialization, initialization_sketches


CHANCE_MARGIN = 0.02  # an explained variance that exceeds the null by less than this is no evidence

# Up to this size a full eigendecomposition is cheap. Beyond it a block Krylov space finds the same leading directions,
# in fewer steps if it starts from the directions of an earlier half-step. The fraction that they explain is off by
# less than 0.001.
_DENSE_COORDINATES = 256
_KRYLOV_STEPS, _STEPS_FROM_EARLIER = 6, 2

_NAMES_SHOWN = 8

Progress = Callable[[Iterable[str]], Iterable[str]]


@dataclass(frozen=True)
class Explained:
    """Fractions of the energy of normalized updates: mean over tasks of ``‖part of ΔW_i‖² / ‖ΔW_i‖²``.

    Args:
        joint: Fraction inside a joint basis, ``C_i = β^T ΔW_i α``.
        outputs: Fraction inside the best k output directions, whatever the inputs. None means unknown.
        inputs: Fraction inside the best k input directions, or None. It is high, whatever the tasks, where adapters
            share their A.
    """

    joint: float
    outputs: float | None = None
    inputs: float | None = None


@dataclass(frozen=True)
class ModuleAudit:
    """Explained variance of the updates of one module, next to the null.

    Args:
        module: Name of the module.
        tasks: Number of updates that count, which are all but the zero ones.
        num_components: (k_out, k_in) of the basis.
        observed: Explained fractions of the updates.
        null: Explained fractions of updates with the same singular values and random directions.
        trivial: Whether this many directions hold any updates of these ranks, which makes `observed` meaningless.
    """

    module: str
    tasks: int
    num_components: tuple[int, int]
    observed: Explained
    null: Explained
    trivial: bool


@dataclass(frozen=True)
class AuditReport:
    """Evidence for and against a shared subspace.

    Args:
        groups: Tuples of tasks that started from the same random A. A task that shares its A with no other is a group
            of its own.
        ungrouped: Tasks whose A is unknown.
        rows: Results of the audited modules.
    """

    groups: tuple[tuple[str, ...], ...]
    ungrouped: tuple[str, ...]
    rows: tuple[ModuleAudit, ...]

    @property
    def observed(self) -> Explained:
        """Mean of the observed fractions over modules."""
        return _mean_explained([row.observed for row in self.rows])

    @property
    def null(self) -> Explained:
        """Mean of the null fractions over modules."""
        return _mean_explained([row.null for row in self.rows])

    @property
    def excess(self) -> float:
        """Fraction that the joint basis explains beyond the null."""
        return self.observed.joint - self.null.joint

    @property
    def trivial(self) -> bool:
        """Whether the numbers of all modules are trivial."""
        return all(row.trivial for row in self.rows)

    def to_dict(self) -> dict[str, object]:
        """Return the whole report, including the means, as values that JSON can represent."""
        means = {"observed": asdict(self.observed), "null": asdict(self.null), "excess": self.excess}
        return {**asdict(self), **means, "trivial": self.trivial}

    def sentences(self) -> tuple[str, str]:
        """Return the model card's sentences about the initialization of the adapters and the explained variance."""
        return _initialization_sentence(self.groups, self.ungrouped), _variance_sentence(self)


def explained_variance(updates: Sequence[LowRankUpdate], k_out: int, k_in: int) -> Explained:
    """Return the fractions that a joint basis of `k_out` and `k_in` directions explains of the updates of one layer.

    The basis is found as in a merge, by alternation from the one-sided directions. Zero updates do not count; if there
    are no others, all fractions are 1.
    """
    return _explained_of(normalized_updates(updates), k_out, k_in)


def null_explained_variance(
    singular_values: Sequence[Tensor],
    shape: tuple[int, int],
    k_out: int,
    k_in: int,
    *,
    norms: Tensor | None = None,
    seed: int = 0,
    draws: int = 1,
) -> Explained:
    """Return `explained_variance` of updates with the same singular values and uniformly random directions.

    It needs memory for O(tasks r (n + d)) float64 numbers.

    Args:
        singular_values: Singular values (r_i,) of each task.
        shape: (n, d) of the layer.
        k_out: Number of output directions of the basis.
        k_in: Number of input directions of the basis.
        norms: (tasks,), ``‖ΔW_i‖``, for singular values that do not make up the whole update. No direction explains
            the missing part.
        seed: Seed of the directions.
        draws: Number of draws to average over.
    """
    values = padded([values.double().cpu() for values in singular_values])[:, : min(shape)]
    weights = inverse_norms(values.norm(dim=1) if norms is None else norms.double().cpu())
    values = values[weights > 0] * weights[weights > 0, None]
    if not len(values):
        return Explained(1.0, 1.0, 1.0)
    generator = torch.Generator().manual_seed(seed)
    results = []
    for _ in range(draws):
        left, right = (random_orthonormal(len(values), side, values.shape[1], generator) for side in shape)
        results.append(_explained(left, values, right, k_out, k_in))
    return _mean_explained(results)


def audit_updates(
    layers: Mapping[str, Mapping[str, LowRankUpdate]],
    num_components: int,
    *,
    sketches: Mapping[str, Numbers | None] | None = None,
    modules: Iterable[str] | None = None,
    draws: int = 1,
    seed: int = 0,
    progress: Progress = iter,
) -> AuditReport:
    """Audit adapters as they were trained.

    Args:
        layers: Updates, as a mapping of module -> task -> update.
        num_components: Number of directions of a basis on each side.
        sketches: Sketch of A by task. They are computed from the updates if not given.
        modules: Modules whose variance is compared; all by default. The sketches always cover all modules.
        draws: Number of draws from the null distribution in each module.
        seed: Seed of the null distribution.
        progress: Function that wraps the iteration over modules, as `tqdm` does.
    """
    if sketches is None:
        by_task: dict[str, dict[str, LowRankUpdate]] = {}
        for module, updates in layers.items():
            for task, update in updates.items():
                by_task.setdefault(task, {})[module] = update
        sketches = initialization_sketches(by_task)
    rows = []
    for i, module in enumerate(progress(list(layers if modules is None else modules))):
        updates = normalized_updates(list(layers[module].values()))
        if not updates:
            continue
        shape = updates[0].left.shape[0], updates[0].right.shape[0]
        k_out, k_in = (min(num_components, side) for side in shape)
        values = [update.singular_values for update in updates]
        observed = _explained_of(updates, k_out, k_in)
        null = null_explained_variance(values, shape, k_out, k_in, seed=seed + i, draws=draws)
        ranks = sum(len(singular) for singular in values)
        rows.append(_row(module, len(values), ranks, shape, (k_out, k_in), observed, null))
    return _report(sketches, rows)


def audit_layers(
    layers: Mapping[str, LayerSubspace],
    sketches: Mapping[str, Numbers | None],
    *,
    tasks: Collection[str] | None = None,
    max_layers: int | None = None,
    draws: int = 1,
    seed: int = 0,
    progress: Progress = iter,
) -> AuditReport:
    """Audit a stored subspace by what it keeps of its tasks as they were learned.

    A subspace does not store how much of an update one side alone explains, so these fractions are None in the
    observed part. It does not store the singular values as learned either: the null takes the flattest ones that the
    coefficients allow, so it is a lower bound on what chance explains. What the updates lost to a rank above p, the
    null loses as well.

    Args:
        layers: Layers by module.
        sketches: Sketch of A by task, for the groups.
        tasks: Tasks whose variance counts; all by default. Leave out tasks that were trained inside the basis: it
            explains them through no merit of its own.
        max_layers: Number of layers to audit, evenly spaced; all by default.
        draws: Number of draws from the null distribution in each layer.
        seed: Seed of the null distribution.
        progress: Function that wraps the iteration over modules, as `tqdm` does.
    """
    modules = list(layers)
    if max_layers is not None and max_layers < len(modules):
        modules = [modules[i * len(modules) // max_layers] for i in range(max_layers)]
    rows = []
    for i, module in enumerate(progress(modules)):
        layer = layers[module]
        if not all(layer.num_components):
            continue
        weights = inverse_norms(layer.records.norms)
        kept = [j for j, task in enumerate(layer.tasks) if weights[j] > 0 and (tasks is None or task in tasks)]
        if not kept:
            continue
        layer = layer.select(kept)
        values, rank_errors = flattest_singular_values(layer), layer.records.rank_errors.cpu()
        norms = layer.records.norms.cpu() / (1 - rank_errors.square()).clamp_min(NEGLIGIBLE).sqrt()
        k_out, k_in = layer.num_components
        observed = Explained(layer.explained_variance())
        null = null_explained_variance(values, layer.shape, k_out, k_in, norms=norms, seed=seed + i, draws=draws)
        ranks = int((values > NEGLIGIBLE * values[:, :1]).sum())
        rows.append(_row(module, len(kept), ranks, layer.shape, (k_out, k_in), observed, null))
    return _report(sketches, rows)


def _explained_of(updates: Sequence[CompactUpdate], k_out: int, k_in: int) -> Explained:
    """Return `explained_variance` of updates of norm 1."""
    if not updates:
        return Explained(1.0, 1.0, 1.0)
    values = padded([update.singular_values for update in updates])
    left, right = (
        torch.stack([torch.nn.functional.pad(side, (0, values.shape[1] - side.shape[1])) for side in sides])
        for sides in ([update.left for update in updates], [update.right for update in updates])
    )
    return _explained(left, values, right, k_out, k_in)


def _explained(left: Tensor, values: Tensor, right: Tensor, k_out: int, k_in: int) -> Explained:
    """Return the explained variance of ``ΔW_i = left_i diag(values_i) right_i^T``.

    Args:
        left: (tasks, n, r), orthonormal columns where the singular value is not 0.
        values: (tasks, r), singular values.
        right: (tasks, d, r), orthonormal columns, as in `left`.
        k_out: Number of output directions of the basis.
        k_in: Number of input directions of the basis.
    """
    root = values.sqrt().unsqueeze(1)
    out, in_ = _coordinates(left * root), _coordinates(right * root)
    everything = torch.diag_embed(values)
    basis_out, basis_in = _leading_directions(out, everything, k_out), _leading_directions(in_, everything, k_in)
    outputs, inputs = _energy(out, everything, basis_out), _energy(in_, everything, basis_in)
    for _ in range(JOINT_ITERATIONS):
        basis_out = _leading_directions(out, _gram(in_, basis_in), k_out, basis_out)
        seen_out = _gram(out, basis_out)
        basis_in = _leading_directions(in_, seen_out, k_in, basis_in)
    return Explained(*(energy / len(values) for energy in (_energy(in_, seen_out, basis_in), outputs, inputs)))


def _coordinates(columns: Tensor) -> Tensor:
    """Return factors (tasks, n, r), transposed, in coordinates of their span: (tasks, r, q), q = min(n, tasks r)."""
    tasks, features, rank = columns.shape
    rows = columns.mT.reshape(tasks * rank, features)
    if len(rows) < features:
        rows = torch.linalg.qr(rows.T, mode="r").R.T.contiguous()
    return rows.view(tasks, rank, -1)


def _gram(rows: Tensor, directions: Tensor) -> Tensor:
    """Return ``X_i^T P P^T X_i`` (tasks, r, r) for factors (tasks, r, q)."""
    seen = rows @ directions
    return seen @ seen.mT


def _moment_times(rows: Tensor, weights: Tensor, block: Tensor) -> Tensor:
    """Return ``(Σ X_i G_i X_i^T) block`` (q, b) for factors (tasks, r, q) and G (tasks, r, r)."""
    return rows.flatten(0, 1).T @ (weights @ (rows @ block)).flatten(0, 1)


def _energy(rows: Tensor, weights: Tensor, directions: Tensor) -> float:
    return float((directions * _moment_times(rows, weights, directions)).sum())


def _leading_directions(rows: Tensor, weights: Tensor, k: int, earlier: Tensor | None = None) -> Tensor:
    """Return the k leading eigenvectors (q, k) of ``Σ X_i G_i X_i^T``.

    Args:
        rows: (tasks, r, q), X transposed.
        weights: (tasks, r, r), G.
        k: Number of eigenvectors.
        earlier: (q, k), leading eigenvectors for similar weights.
    """
    q = rows.shape[2]
    k = min(k, q)
    if q <= _DENSE_COORDINATES or 2 * _KRYLOV_STEPS * 2 * k >= q:
        moment = (weights @ rows).flatten(0, 1).T @ rows.flatten(0, 1)
        return torch.linalg.eigh(moment).eigenvectors[:, q - k :]
    # Single precision is enough to find the directions; the fraction that they explain is computed in double.
    rows, weights = rows.float(), weights.float()
    if earlier is None:
        generator = torch.Generator().manual_seed(0)
        block, steps = torch.randn(q, 2 * k, generator=generator).to(rows.device), _KRYLOV_STEPS
    else:
        block, steps = _moment_times(rows, weights, earlier.float()), _STEPS_FROM_EARLIER
    blocks = [torch.linalg.qr(block).Q]
    for _ in range(steps - 1):
        blocks.append(torch.linalg.qr(_moment_times(rows, weights, blocks[-1])).Q)
    space = torch.linalg.qr(torch.cat(blocks, dim=1)).Q
    inside = space.T @ _moment_times(rows, weights, space)
    found = space @ torch.linalg.eigh(inside).eigenvectors[:, -k:]
    return torch.linalg.qr(found.double()).Q


def _mean_explained(parts: Sequence[Explained]) -> Explained:
    """Return the mean of each fraction, None where one is unknown, and 1 for all of them if there are no parts."""
    columns = list(zip(*((part.joint, part.outputs, part.inputs) for part in parts), strict=True)) or [(1.0,)] * 3
    return Explained(*(None if None in column else sum(column) / len(column) for column in columns))


def _row(
    module: str,
    tasks: int,
    ranks: int,
    shape: tuple[int, int],
    num_components: tuple[int, int],
    observed: Explained,
    null: Explained,
) -> ModuleAudit:
    trivial = all(k >= min(side, ranks) for k, side in zip(num_components, shape, strict=True))
    return ModuleAudit(module, tasks, num_components, observed, null, trivial)


def _report(sketches: Mapping[str, Numbers | None], rows: Sequence[ModuleAudit]) -> AuditReport:
    ungrouped = tuple(task for task, sketch in sketches.items() if sketch is None)
    return AuditReport(group_by_initialization(sketches), ungrouped, tuple(rows))


def _initialization_sentence(groups: Sequence[Sequence[str]], ungrouped: Sequence[str]) -> str:
    known, shared = sum(map(len, groups)), [group for group in groups if len(group) > 1]
    if not known:
        return (
            "It is not known from which random A the tasks started; sharing one is enough to make input directions "
            "alike."
        )
    unknown = f" That of {_names(ungrouped)} is not known." if ungrouped else ""
    alike = " This alone makes their input directions alike." if shared else ""
    if known == 1:
        return f"One random A is known, that of {groups[0][0]}.{unknown}"
    if len(groups) == 1:
        who = f"{known} tasks ({_names(groups[0])})" if ungrouped else f"All {known} tasks"
        return f"{who} started from the same random A.{alike}{unknown}"
    same = f"; these from the same one: {'; '.join(map(_names, shared))}" if shared else ", no two from the same"
    return f"{known} tasks started from {len(groups)} different random A{same}.{alike}{unknown}"


def _variance_sentence(report: AuditReport) -> str:
    if not report.rows:
        return "There are no updates to explain."
    observed, null = report.observed, report.null
    sizes = {k for row in report.rows for k in row.num_components}
    basis = f"The basis of {'' if len(sizes) == 1 else 'up to '}{max(sizes)} directions per layer"
    explains = f"{basis} explains {_percent(observed.joint)} of the updates' energy"
    if report.trivial:
        return f"{explains}. It has room for all directions of so few updates, so this number proves nothing."
    # For a stored subspace, the null takes the flattest singular values possible.
    alike, least = ("similar", "at least ") if observed.outputs is None else ("the same", "")
    explains += f"; random directions with {alike} singular values would have {least}{_percent(null.joint)}."
    by_chance = report.excess < CHANCE_MARGIN
    if by_chance:
        explains += " This is no more than chance."
    if observed.outputs is not None:
        outputs_by_chance = observed.outputs - null.outputs < CHANCE_MARGIN
        if by_chance and outputs_by_chance:
            return explains
        sides = f"{_percent(observed.outputs)} against {_percent(null.outputs)}"
        return f"{explains} On the output side alone it is {sides}{', no more than chance' * outputs_by_chance}."
    if not by_chance and any(len(group) > 1 for group in report.groups):
        return f"{explains} Part of the difference may come from the shared random A."
    return explains


def _names(tasks: Sequence[str]) -> str:
    """Return ``a, b and c``, or the first few names and how many more there are."""
    shown = list(tasks)
    if len(shown) > _NAMES_SHOWN:
        shown = [*shown[:_NAMES_SHOWN], f"{len(shown) - _NAMES_SHOWN} more"]
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _percent(fraction: float) -> str:
    return "over 99 %" if 0.995 <= fraction < 1 - NEGLIGIBLE else f"{100 * fraction:.0f} %"
