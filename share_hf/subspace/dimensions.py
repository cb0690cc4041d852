"""Choice of the k and p that reach a target, from the error and size of every candidate in one pass over the modules.

A module is decomposed once, for the largest k under consideration. Smaller bases follow from larger ones, each by a
few alternations inside the leading directions of the one before, so no candidate costs a build.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .basis import JOINT_ITERATIONS, Directions, choose_directions
from .batch import Scratch, batch_of_few, batch_of_many
from .coordinates import EXACT_COLUMNS, OVERSAMPLING, exact_coordinates, found_coordinates
from .factors import LowRankUpdate, inverse_norms, truncated_balanced_factors
from .layer import LayerSubspace
from .rounding import BLOCK, CoefficientDtype, store, stored_bytes
from .settings import SubspaceSettings, check_dimensions, rank_in_layer
from .stack import UpdateStack
from .threads import for_each_module, tasks_by_module


Auto = Literal["auto"]

# The largest k that "auto" considers if `max_components` is not given.
LARGEST_AUTO = 128

# Every k is computed up to the first of these, and beyond it only as many k per octave as the second. Between them,
# the loss is interpolated.
_EVERY_SIZE_TO = 16
_SIZES_AN_OCTAVE = 4

# Factors by which the error of a build may exceed the error computed here: its alternation starts elsewhere, and its
# search for the leading directions of many updates has less room (see `coordinates`).
_OTHER_START = 1.002
_LESS_ROOM = 1.01

# An alternation has converged once a step gains less than this part of the energy.
_NOTABLE_GAIN = 1e-3

_TASKS_PER_CHUNK = 64
_K_OF_ROUNDING = BLOCK
_BYTES_OF_BASIS = 4  # a float32 number


@dataclass(frozen=True)
class WantedDimensions:
    """The k and p that a user asks for.

    Args:
        num_components: Number of directions k, or `"auto"`.
        pseudo_rank: Rank p, or `"auto"`.
        target_error: Largest mean relative error ``‖ΔW' - ΔW‖ / ‖ΔW‖`` over all tasks and modules. The values that are
            `"auto"` are chosen to reach it with the fewest bytes.
        target_bytes: Largest size of bases and coefficients. The values that are `"auto"` are chosen to reach the
            smallest error within it.
        max_components: Largest k to consider; `LARGEST_AUTO` if not given.

    Raises:
        ValueError: If a value is out of range, if a value is `"auto"` without exactly one target, or if a target is
            given and no value is `"auto"`.
    """

    num_components: int | Auto = 32
    pseudo_rank: int | Auto = 8
    target_error: float | None = None
    target_bytes: int | None = None
    max_components: int | None = None

    def __post_init__(self) -> None:
        k, p = self.num_components, self.pseudo_rank
        for name, value in (("num_components", k), ("pseudo_rank", p)):
            if isinstance(value, str) and value != "auto":
                raise ValueError(f"{name} is {value!r}, expected a positive integer or 'auto'")
        check_dimensions(*self.limits)
        targets = {"target_error": self.target_error, "target_bytes": self.target_bytes}
        given = {name: value for name, value in targets.items() if value is not None}
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value!r}, expected a positive number")
        if self.is_open and len(given) != 1:
            raise ValueError(
                f"num_components is {k!r} and pseudo_rank {p!r} with {' and '.join(sorted(given)) or 'no target'}, "
                "expected one of target_error and target_bytes, which says what 'auto' should reach"
            )
        if given and not self.is_open:
            raise ValueError(
                f"{next(iter(given))} is given with num_components = {k} and pseudo_rank = {p}, expected 'auto' for "
                "one of them: otherwise nothing is left to choose"
            )

    @property
    def is_open(self) -> bool:
        """Whether k or p has yet to be chosen."""
        return "auto" in (self.num_components, self.pseudo_rank)

    @property
    def limits(self) -> tuple[int, int]:
        """Given k and p, with the largest k and the smallest p in place of a value that has yet to be chosen."""
        return self.limit, 1 if self.pseudo_rank == "auto" else self.pseudo_rank

    def check_beside(self, settings: SubspaceSettings) -> None:
        """Check that no setting which chooses k or p layer by layer is combined with `"auto"`.

        Raises:
            ValueError: If there is such a setting. The error names it.
        """
        given = {name: getattr(settings, name) for name in ("explained_variance", "drift_tolerance", "tolerance")}
        for name, value in given.items():
            chosen = "pseudo_rank" if self.num_components != "auto" else "num_components"
            if value is not None and (self.num_components == "auto" or (self.is_open and name == "tolerance")):
                raise ValueError(
                    f"{chosen} is 'auto' and {name} is {value}, expected one of the two: both choose how much of a "
                    "task is kept"
                )

    @property
    def limit(self) -> int:
        """Largest possible k."""
        if self.num_components != "auto":
            return self.num_components
        return LARGEST_AUTO if self.max_components is None else self.max_components


@dataclass(frozen=True)
class ChosenDimensions:
    """Chosen k and p, with the expected error and size.

    Args:
        num_components: Number of directions k.
        pseudo_rank: Rank p.
        error: Mean relative error of ΔW over tasks and modules that is expected of a build with this k and p.
        bytes: Size of the bases and coefficients of that build, in bytes.
    """

    num_components: int
    pseudo_rank: int
    error: float
    bytes: int

    def sentence(self) -> str:
        """Return a sentence that describes the choice."""
        return (
            f"chose num_components = {self.num_components} and pseudo_rank = {self.pseudo_rank}: a mean relative "
            f"error of {self.error:.3g} and {self.bytes / 1e6:.3g} MB of bases and coefficients"
        )


@dataclass(frozen=True)
class _Curves:
    """Errors and sizes of one or more modules, by k and p from 1 to the largest k.

    Args:
        errors: (K, K) float64, sums of the relative errors of all updates.
        bytes: (K, K) float64, sizes in bytes.
        updates: Number of updates that count, which are all but the zero ones.
    """

    errors: Tensor
    bytes: Tensor
    updates: int

    def plus(self, other: _Curves) -> _Curves:
        return _Curves(self.errors + other.errors, self.bytes + other.bytes, self.updates + other.updates)


def settled(
    settings: SubspaceSettings,
    wanted: WantedDimensions,
    updates: Mapping[str, Mapping[str, LowRankUpdate]],
    *,
    progress: bool = False,
) -> tuple[SubspaceSettings, ChosenDimensions | None]:
    """Return the settings with the wanted k and p, and the choice that was made, or None if both were given.

    Args:
        settings: Source of all other settings.
        wanted: Values of k and p that are asked for.
        updates: Same as in `choose_dimensions`.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: See `choose_dimensions`.
    """
    if not wanted.is_open:
        return settings, None
    chosen = choose_dimensions(updates, wanted, settings, progress=progress)
    return replace(settings, num_components=chosen.num_components, pseudo_rank=chosen.pseudo_rank), chosen


def choose_dimensions(
    updates: Mapping[str, Mapping[str, LowRankUpdate]],
    wanted: WantedDimensions,
    settings: SubspaceSettings,
    *,
    progress: bool = False,
) -> ChosenDimensions:
    """Choose the k and p that reach a target, for the updates that a subspace is about to be built from.

    Updates are read from their mappings one module at a time and not kept afterwards. The errors agree to within a
    percent with the errors of the bases that a build would choose, and to within a few percent for 4-bit coefficients.

    Args:
        updates: Updates, as a mapping of task -> module -> update, as for `merge_into_layers`.
        wanted: Dimensions to choose, and the target that they must reach.
        settings: Settings of the build, such as the kind of basis. Their k and p do not matter.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If no k up to the largest and no p reaches the target, or an update is unusable. The error names
            the target or the update.
    """
    by_module = tasks_by_module(updates)

    def curves(module: str) -> _Curves:
        try:
            return _curves_of({task: updates[task][module] for task in by_module[module]}, settings, wanted)
        except ValueError as error:
            raise ValueError(f"{module!r}: {error}") from error

    nothing = torch.zeros(wanted.limit, wanted.limit, dtype=torch.float64)
    total = _Curves(nothing, nothing, 0)
    with tqdm(total=len(by_module), desc="Choosing k and p", unit="layer", leave=False, disable=not progress) as bar:
        for of_module in for_each_module(curves, by_module):
            total = total.plus(of_module)
            bar.update()
    return _best(total, wanted)


def _best(total: _Curves, wanted: WantedDimensions) -> ChosenDimensions:
    errors = total.errors / max(1, total.updates)
    sizes = torch.arange(1, len(errors) + 1)
    ks, ps = sizes[:, None], sizes[None, :]
    allowed = ps <= ks
    if wanted.num_components != "auto":
        allowed &= ks == wanted.num_components
    if wanted.pseudo_rank != "auto":
        allowed &= ps == wanted.pseudo_rank
    if wanted.target_error is not None:
        reached, cost, then = errors <= wanted.target_error, total.bytes, errors
    else:
        reached, cost, then = total.bytes <= wanted.target_bytes, errors, total.bytes
    if not (allowed & reached).any():
        raise ValueError(_unreachable(errors, total.bytes, allowed, wanted))
    least = cost[allowed & reached].min()
    # Rounding would decide between candidates that lose nothing, so take the one that is better in the other measure.
    among = allowed & reached & (cost <= least * (1 + 1e-9) + 1e-9)
    k, p = divmod(int(torch.where(among, then, torch.inf).argmin()), len(errors))
    return ChosenDimensions(k + 1, p + 1, float(errors[k, p]), int(total.bytes[k, p]))


def _unreachable(errors: Tensor, sizes: Tensor, allowed: Tensor, wanted: WantedDimensions) -> str:
    if wanted.target_bytes is not None:
        least = int(sizes[allowed].min())
        return (
            f"target_bytes is {wanted.target_bytes}, expected at least {least}, the size with the smallest basis and "
            "rank"
        )
    advice = "a larger max_components looks further" if wanted.num_components == "auto" else "'auto' chooses k too"
    return (
        f"target_error is {wanted.target_error:g}, but up to num_components = {wanted.limit} and pseudo_rank = "
        f"{wanted.limit if wanted.pseudo_rank == 'auto' else wanted.pseudo_rank} the error is at least "
        f"{float(errors[allowed].min()):.3g}: expected a larger one ({advice})"
    )


def _curves_of(updates: Mapping[str, LowRankUpdate], settings: SubspaceSettings, wanted: WantedDimensions) -> _Curves:
    first = next(iter(updates.values()))
    shape, limit = first.shape, wanted.limit
    for task, update in updates.items():
        if update.shape != shape:
            raise ValueError(f"the update of task {task!r} is {update.shape}, the layer is {shape}")
    stack, norms, margin = _stack_of(updates, replace(settings, num_components=limit, pseudo_rank=1))
    sizes = _sizes_to(limit) if wanted.num_components == "auto" else [limit]
    directions = choose_directions(stack, settings, limit)
    kept, held = _held_energies(stack, settings, directions, sizes)
    counts = norms > 0
    lost = (1 - held[:, counts] / norms[counts, None].square()).clamp_min(0)
    if settings.coefficient_dtype != "float32":
        noise = _relative_rounding(stack, directions, settings.coefficient_dtype)[counts, None].square()
        lost = lost + noise * (1 - lost)
    errors = torch.zeros(limit, limit, dtype=torch.float64)
    for chunk in lost.split(_TASKS_PER_CHUNK, dim=1) if counts.any() else ():
        summed = _interpolated(chunk, sizes, limit).sqrt().sum(1).cpu() * margin
        columns = torch.arange(limit).clamp_max(summed.shape[1] - 1)  # ranks larger than the updates have
        errors += summed[:, columns]
    ks, ps = torch.arange(1, limit + 1)[:, None], torch.arange(1, limit + 1)[None, :]
    k_out, k_in = (ks.clamp_max(most) for most in kept)
    ranks = ps.clamp_max(rank_in_layer(limit, shape))
    dtype = settings.coefficient_dtype
    coefficients = len(updates) * (stored_bytes(k_out, ranks, dtype) + stored_bytes(k_in, ranks, dtype))
    size = _BYTES_OF_BASIS * (shape[0] * k_out + shape[1] * k_in) + coefficients
    return _Curves(errors, size.double(), int(counts.sum()))


def _stack_of(updates: Mapping[str, LowRankUpdate], settings: SubspaceSettings) -> tuple[UpdateStack, Tensor, float]:
    """Return the updates in coordinates that hold the leading k directions, their norms, and a factor for errors."""
    first = next(iter(updates.values()))
    layer = LayerSubspace.empty(*first.shape, settings.pseudo_rank, device=first.out_factor.device)
    joint, room = settings.basis == "joint", settings.num_components + OVERSAMPLING
    columns = sum(update.out_factor.shape[1] for update in updates.values())
    if columns <= max(EXACT_COLUMNS, 4 * room):
        batch = batch_of_few(layer, updates, as_they_are=not joint)
        _, stack = exact_coordinates(layer, batch, inverse_norms(batch.norms))
        return stack, batch.norms, _OTHER_START if joint else 1.0
    batch = batch_of_many(layer, updates, Scratch(), as_they_are=not joint)
    _, stack, _ = found_coordinates(layer, batch, inverse_norms(batch.norms), room, joint=joint)
    return stack, batch.norms, _LESS_ROOM


def _sizes_to(limit: int) -> list[int]:
    """Return the k to compute: every small one, a few per octave, and the largest."""
    sizes, size = [], 1
    while size < limit:
        sizes.append(size)
        size += max(1, 2 ** (size.bit_length() - 1) // _SIZES_AN_OCTAVE) if size >= _EVERY_SIZE_TO else 1
    return [*sizes, limit]


def _held_energies(
    stack: UpdateStack, settings: SubspaceSettings, directions: tuple[Directions, Directions], sizes: list[int]
) -> tuple[tuple[int, int], Tensor]:
    """Compute the energy of each update that its best p directions hold inside k directions of a layer.

    Args:
        stack: Stack of the updates, as new ones.
        settings: Settings that give the kind of basis.
        directions: Output and input directions of the largest k.
        sizes: Values of k, ascending.

    Returns:
        The largest number of directions on each side, and (sizes, updates, r) float64, for p = 1 ... r the sum of the
        p largest squared singular values of ``P_out^T ΔW_i P_in``.
    """
    out_directions, in_directions = directions
    kept = out_directions.kept, in_directions.kept
    # Both sides are best first, so the first k are usable directions already, and the first 2k hold better ones.
    out, in_ = stack.new_out @ out_directions.vectors, stack.new_in @ in_directions.vectors
    held = []
    for size in reversed(sizes):
        k_out, k_in = min(size, kept[0]), min(size, kept[1])
        if settings.basis == "joint" and size < sizes[-1] and size < max(kept):
            room, weights, before = 2 * size + OVERSAMPLING, stack.new_weights, 0.0
            for _ in range(JOINT_ITERATIONS):
                out = _turned(out[..., :room], in_[..., :k_in], weights)
                in_ = _turned(in_[..., :room], out[..., :k_out], weights)
                energies = _energies(out[..., :k_out], in_[..., :k_in])
                inside = float(energies[:, -1:].sum(1) @ weights.square())
                if inside <= before * (1 + _NOTABLE_GAIN):
                    break
                before = inside
        else:
            energies = _energies(out[..., :k_out], in_[..., :k_in])
        held.append(energies)
    return kept, torch.stack(held[::-1])


def _relative_rounding(
    stack: UpdateStack, directions: tuple[Directions, Directions], dtype: CoefficientDtype
) -> Tensor:
    """Return how much storing coefficients in fewer bits changes each update (updates,), relative to what is stored.

    It is computed for one k only: blocks have the same size for all k, so the change hardly depends on it.
    """
    out, in_ = (
        (factors @ side.keep(min(side.kept, _K_OF_ROUNDING)).basis).mT
        for factors, side in zip((stack.new_out, stack.new_in), directions, strict=True)
    )
    exact_out, exact_in, _ = truncated_balanced_factors(out, in_, min(out.shape[-2], in_.shape[-2], out.shape[-1]))
    stored = torch.empty_like(exact_out, dtype=torch.float32), torch.empty_like(exact_in, dtype=torch.float32)
    changes = store((exact_out, exact_in), stored, dtype, dim=-2).changes
    sizes = torch.linalg.matrix_norm(exact_out @ exact_in.mT)
    return torch.where(sizes > 0, changes / torch.where(sizes > 0, sizes, 1.0), 0.0)


def _turned(factors: Tensor, others: Tensor, weights: Tensor) -> Tensor:
    """Return factors (updates, r, q) along directions that are best first, as seen through the other side (…, k)."""
    gram = (others @ others.mT) * weights.square()[:, None, None]
    moment = factors.flatten(0, 1).T @ (gram @ factors).flatten(0, 1)
    return factors @ torch.linalg.eigh(moment).eigenvectors.flip(1)


def _energies(out: Tensor, in_: Tensor) -> Tensor:
    """Return sums (updates, r) of the largest 1 ... r squared singular values of ``X_i^T Y_i``, from Gram matrices."""
    # With L L^T = Y Y^T from an eigendecomposition, X X^T Y Y^T has the eigenvalues of the symmetric L^T X X^T L.
    values, vectors = torch.linalg.eigh(in_ @ in_.mT)
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
    product = root.mT @ (out @ out.mT) @ root
    return torch.linalg.eigvalsh(product).clamp_min(0).flip(-1).cumsum(-1)


def _interpolated(lost: Tensor, sizes: list[int], limit: int) -> Tensor:
    """Interpolate the loss (limit, updates, r) at every k from the loss (sizes, updates, r) at some k.

    Directions come best first, so each reduces the loss by less than the one before, and a straight line between two
    points overestimates it. If only one k is known, its loss holds for all.
    """
    known = torch.tensor(sizes, device=lost.device, dtype=lost.dtype)
    wanted = torch.arange(1, limit + 1, device=lost.device, dtype=lost.dtype)
    above = torch.searchsorted(known, wanted)
    below = (above - 1).clamp_min(0)
    step = (known[above] - known[below]).clamp_min(1)
    part = ((known[above] - wanted) / step)[:, None, None] * (above > below)[:, None, None]
    return lost[above] * (1 - part) + lost[below] * part
