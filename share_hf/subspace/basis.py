"""The two ways to choose the directions of a layer: the paper's, and one that does not depend on the factorization.

Both take an `UpdateStack` and return orthonormal directions in its coordinates, completed to a basis of the whole
coordinate space: a merge discards the directions after the first k, and computes the drift certificate from them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .factors import orienting_signs
from .settings import SubspaceSettings
from .stack import UpdateStack


# The alternating half-steps of the joint basis converge fast; after three on each side the objective is stationary to
# 1e-4.
JOINT_ITERATIONS = 3

# Energy, relative to the energy of a task, above which a direction counts however many tasks there are. Its square
# root is the relative part of a new update that may lie outside the basis without a merge.
_NOTABLE_ENERGY = 1e-12


@dataclass(frozen=True)
class Directions:
    """Orthonormal directions of one side of a layer, in the coordinates of a stack, best first.

    Args:
        vectors: (q, q), all directions; the first `kept` form the basis.
        spectrum: (q,), singular values of the stack along the directions, descending.
        kept: Number of directions in the basis.
    """

    vectors: Tensor
    spectrum: Tensor
    kept: int

    @property
    def basis(self) -> Tensor:
        """Directions (q, kept) of the basis."""
        return self.vectors[:, : self.kept]

    @property
    def discarded(self) -> Tensor:
        """Directions (q, q - kept) that are not part of the basis."""
        return self.vectors[:, self.kept :]

    def keep(self, kept: int) -> Directions:
        """Return the same directions with `kept` of them in the basis."""
        return Directions(self.vectors, self.spectrum, kept)

    def oriented(self, coordinates: Tensor) -> Directions:
        """Return the same directions with signs that the basis itself, ``coordinates (n, q) @ basis``, determines."""
        signs = torch.ones_like(self.spectrum)
        signs[: self.kept] = orienting_signs(coordinates @ self.basis).squeeze(0)
        return Directions(self.vectors * signs, self.spectrum, self.kept)


def choose_directions(stack: UpdateStack, settings: SubspaceSettings, cap: int) -> tuple[Directions, Directions]:
    """Choose output and input directions of a layer, at most `cap` of them on each side.

    With `settings.explained_variance`, these are the fewest directions that reach it, but no fewer than the layer
    already has. They are always cut to numerical rank.
    """
    if settings.basis == "factor":
        sides = _factor_directions(stack, settings, cap), _factor_directions(stack.mirrored, settings, cap)
        return sides
    return _joint_directions(stack, settings, cap)


def _factor_directions(stack: UpdateStack, settings: SubspaceSettings, cap: int) -> Directions:
    columns = stack.factor_columns()
    if settings.center:
        columns = columns - columns.mean(dim=1, keepdim=True)
    # The triangular factor has the same singular values as the stack and at most q rows, however many tasks there are.
    triangle = torch.linalg.qr(columns.T, mode="r").R
    _, spectrum, right_t = torch.linalg.svd(triangle, full_matrices=True)
    coordinates = columns.shape[0]
    spectrum = torch.nn.functional.pad(spectrum, (0, coordinates - len(spectrum)))
    noise = max(columns.shape) * torch.finfo(torch.float64).eps * spectrum[0] if coordinates else 0.0
    kept = min(int((spectrum > noise).sum()), cap)
    if settings.explained_variance is not None and kept:
        share = spectrum.square().cumsum(0) / spectrum.square().sum()
        reached = int((share < settings.explained_variance).sum()) + 1
        kept = min(kept, max(reached, min(stack.rotation_out.shape[1], cap)))
    return Directions(right_t.T, spectrum, kept)


def _joint_directions(stack: UpdateStack, settings: SubspaceSettings, cap: int) -> tuple[Directions, Directions]:
    problem = _JointProblem(stack)
    rank_out, rank_in = min(problem.start_out.kept, cap), min(problem.start_in.kept, cap)
    if settings.explained_variance is None:
        return problem.solve(rank_out, rank_in)
    least_out, least_in = (min(rotation.shape[1], cap) for rotation in (stack.rotation_out, stack.rotation_in))

    def solve(k: int) -> tuple[Directions, Directions]:
        return problem.solve(min(rank_out, max(k, least_out)), min(rank_in, max(k, least_in)))

    fewest = problem.fewest_nested(settings.explained_variance)
    best = solve(fewest)
    # The one-sided start needs more directions than the optimum to reach the threshold, so try fewer.
    for k in range(fewest - 1, max(0, min(least_out, least_in) - 1), -1):
        fewer = solve(k)
        if problem.explained(*fewer) < settings.explained_variance:
            break
        best = fewer
    return best


class _JointProblem:
    """Maximization of ``Σ w_i² ‖P_out^T ΔW_i P_in‖²`` over orthonormal P_out and P_in of given sizes."""

    def __init__(self, stack: UpdateStack) -> None:
        self.stack, self.mirrored = stack, stack.mirrored
        self.moment_out, self.moment_in = self.stack.second_moment(), self.mirrored.second_moment()
        self.start_out = _with_faint_directions(self.stack, _eigen_directions(self.moment_out))
        self.start_in = _with_faint_directions(self.mirrored, _eigen_directions(self.moment_in))

    def solve(self, kept_out: int, kept_in: int) -> tuple[Directions, Directions]:
        """Solve by alternating half-steps, each exact, from the one-sided directions of the input side."""
        out, in_ = self.start_out.keep(kept_out), self.start_in.keep(kept_in)
        if kept_out >= self.start_out.kept and kept_in >= self.start_in.kept:
            return out, in_
        for _ in range(JOINT_ITERATIONS):
            out = self._half_step(self.stack, self.moment_out, in_, kept_out)
            in_ = self._half_step(self.mirrored, self.moment_in, out, kept_in)
        return out, in_

    @staticmethod
    def _half_step(stack: UpdateStack, moment: Tensor, other: Directions, kept: int) -> Directions:
        return _eigen_directions(stack.second_moment_within(moment, other.basis, other.discarded)).keep(kept)

    def explained(self, out: Directions, in_: Directions) -> float:
        """Return the fraction of ``Σ w_i² ‖ΔW_i‖²`` inside both bases."""
        total = torch.trace(self.moment_out) + self.stack.energy_outside
        within = self.stack.second_moment_within(self.moment_out, in_.basis, in_.discarded)
        return float(torch.trace(out.basis.T @ within @ out.basis) / total) if total > 0 else 1.0

    def fewest_nested(self, threshold: float) -> int:
        """Return the smallest k for which the first k one-sided directions of both sides explain `threshold`."""
        limit = max(self.start_out.kept, self.start_in.kept)
        for k in range(1, limit):
            out, in_ = (side.keep(min(k, side.kept)) for side in (self.start_out, self.start_in))
            if self.explained(out, in_) >= threshold:
                return k
        return limit


def _eigen_directions(moment: Tensor) -> Directions:
    """Return the eigenvectors of a second moment, best first, with a basis of its numerical rank.

    An eigenvalue is the square of a singular value, so singular values below about 1e-7 of the largest are rounding
    error.
    """
    values, vectors = torch.linalg.eigh(moment)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    return Directions(vectors, values.sqrt(), int((values > _noise(values)).sum()))


def _with_faint_directions(stack: UpdateStack, found: Directions) -> Directions:
    """Add to the directions of a second moment those that its rounding error hides.

    The rounding error grows with the number of tasks, and a hidden direction may hold all that sets a task apart from
    the others, so these directions are found from the factors.
    """
    if not found.kept or found.kept == len(found.spectrum) or _noise(found.spectrum.square()) < _NOTABLE_ENERGY:
        return found
    hidden = _eigen_directions(stack.second_moment_along(found.discarded))
    notable = int((hidden.spectrum.square() > _NOTABLE_ENERGY).sum())
    return Directions(
        torch.cat([found.basis, found.discarded @ hidden.vectors], dim=1),
        torch.cat([found.spectrum[: found.kept], hidden.spectrum]),
        found.kept + notable,
    )


def _noise(eigenvalues: Tensor) -> Tensor:
    """Return the rounding error of the eigenvalues (q,), descending, of a second moment."""
    return 8 * len(eigenvalues) * torch.finfo(torch.float64).eps * eigenvalues[:1].sum()
