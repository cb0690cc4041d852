"""Settings of a subspace: the number and kind of its directions, and how far a task may drift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from .rounding import COEFFICIENT_DTYPES, CoefficientDtype


BasisKind = Literal["joint", "factor"]

_SHOWN = 4  # largest number of layers named in one line

# Settings that came with format version 3, and the values they have if a file does not state them.
LATER_SETTINGS: dict[str, Any] = {"coefficient_dtype": "float32", "tolerance": None}


@dataclass(frozen=True)
class SubspaceSettings:
    """Settings of every layer of a shared subspace.

    Args:
        num_components: Largest number k of directions in the basis of a layer, on each side. A layer has fewer until
            enough directions have been seen, and never more than it has outputs or inputs.
        pseudo_rank: Largest number p of columns of a task's coefficients, which is the rank of its update. It is at
            most `num_components`; a layer (n, d) takes min(p, n, d).
        basis: Kind of basis. `"joint"` (default) gives the updates of all tasks equal weight and does not depend on
            how they were factored; `"factor"` is the paper's basis, from the stacked LoRA factors as they are
            (Sec. 3.2.1).
        center: Whether to subtract the mean column before the decomposition, as the paper does. Only for `"factor"`.
            The mean is not kept, and depends on arbitrary signs.
        explained_variance: Fraction in (0, 1] of the variance of its tasks that a layer explains with the smallest
            possible number of directions, at most `num_components`. None means that there is no such target.
        drift_tolerance: Largest relative drift ``‖ΔW' - ΔW‖ / ‖ΔW‖`` that merges may add up to in any task and layer,
            as certified by the drift bound. A layer grows past `num_components` to stay within it. None means that
            there is no limit.
        max_components: Largest number of directions that a layer may grow to for `drift_tolerance`. None means up to
            its numerical rank.
        coefficient_dtype: Type that coefficients are stored in: `"float32"`, `"bfloat16"` or `"4bit"`. Every merge
            rounds them, and includes the change in the drift that it certifies.
        tolerance: Relative error ``‖ΔW' - ΔW‖ / ‖ΔW‖``, before rounding, up to which a merged task takes a smaller
            rank than `pseudo_rank`. In each layer it takes, and keeps, the smallest rank that stays within it. None
            means that no rank is cut.

    Raises:
        ValueError: If a value is out of range, or two values contradict each other.
    """

    num_components: int = 32
    pseudo_rank: int = 8
    basis: BasisKind = "joint"
    center: bool = False
    explained_variance: float | None = None
    drift_tolerance: float | None = None
    max_components: int | None = None
    coefficient_dtype: CoefficientDtype = "float32"
    tolerance: float | None = None

    def __post_init__(self) -> None:
        check_dimensions(self.num_components, self.pseudo_rank)
        if self.basis not in ("joint", "factor"):
            raise ValueError(f"basis is {self.basis!r}, expected 'joint' or 'factor'")
        if self.center and self.basis != "factor":
            raise ValueError("center=True needs basis='factor': the joint basis has no columns to take a mean of")
        if self.explained_variance is not None and not 0 < self.explained_variance <= 1:
            raise ValueError(f"explained_variance is {self.explained_variance}, expected a fraction in (0, 1]")
        if self.drift_tolerance is not None and not self.drift_tolerance > 0:
            raise ValueError(f"drift_tolerance is {self.drift_tolerance}, expected a positive number")
        if self.coefficient_dtype not in COEFFICIENT_DTYPES:
            raise ValueError(
                f"coefficient_dtype is {self.coefficient_dtype!r}, expected one of {', '.join(COEFFICIENT_DTYPES)}"
            )
        check_tolerance(self.tolerance)
        if self.max_components is not None and self.max_components < self.num_components:
            raise ValueError(
                f"max_components is {self.max_components}, expected at least num_components = {self.num_components}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as they are written to a file; settings of later formats only if they are used."""
        values = asdict(self)
        return {
            name: value
            for name, value in values.items()
            if name not in LATER_SETTINGS or value != LATER_SETTINGS[name]
        }

    @property
    def has_ranks(self) -> bool:
        """Whether each task has its own rank in each layer."""
        return self.tolerance is not None

    @property
    def is_plain(self) -> bool:
        """Whether a file of format version 2 can hold these settings."""
        return all(getattr(self, name) == value for name, value in LATER_SETTINGS.items())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SubspaceSettings:
        """Create settings from a dictionary; keys that are not fields of this class are ignored."""
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


def check_tolerance(tolerance: float | None) -> None:
    """Check that a tolerance, be it of a rank or of a projection, is a relative part of an update.

    Raises:
        ValueError: If it is neither None nor a number of at least 0 and below 1.
    """
    if tolerance is None:
        return
    number = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool)
    if not number or not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is {tolerance!r}, expected None or a number of at least 0 and below 1")


def check_dimensions(num_components: int, pseudo_rank: int) -> None:
    """Check that a layer can have these k and p.

    Raises:
        ValueError: If k or p is not a positive integer, or p > k.
    """
    for name, value in (("num_components", num_components), ("pseudo_rank", pseudo_rank)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}, expected a positive integer")
    if pseudo_rank > num_components:
        raise ValueError(f"pseudo_rank is {pseudo_rank}, expected at most num_components = {num_components}")


def rank_in_layer(pseudo_rank: int, shape: tuple[int, int]) -> int:
    """Return the number of columns of coefficients in a layer (n, d), min(p, n, d): no update has a larger rank."""
    return min(pseudo_rank, *shape)


def smaller_layers(shapes: Mapping[str, tuple[int, int]], num_components: int) -> str | None:
    """Describe in one line the layers that have no room for k directions on both sides; None if all have room.

    Args:
        shapes: Shapes (n, d) by module.
        num_components: Number of directions k.
    """
    small = [f"{module!r} {shape}" for module, shape in sorted(shapes.items()) if min(shape) < num_components]
    if not small:
        return None
    more = f" and {len(small) - _SHOWN} more" if len(small) > _SHOWN else ""
    return (
        f"{len(small)} of {len(shapes)} layers have fewer outputs or inputs than num_components = {num_components} "
        f"and take fewer directions there: {', '.join(small[:_SHOWN])}{more}"
    )
