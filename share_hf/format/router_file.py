"""`router.safetensors`: at the root, what all tasks share for routing; in a task's folder, what belongs to the task.

At the root: `settled` and `part.<identity>`, each the lower triangle (m (m + 1) / 2,), row by row, of a sum of
scatter, in float64 for `settled` and in float32, which has all digits, for each part; and `probe` (m,) float32. The
rest is in the index, under `router`: `layers`, `width` (m), `tasks` (those that have a route), `degrees` (of "settled"
and of each part, in the order in which the parts were learned) and `settled` (the identities of what is in that sum).

In a task's folder: `mean` (m,), `variances` (m,) and `distances` (d,) float32, and `measured` (1,) int64, as in
`TaskFeatures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..state import Router
from ..subspace.discriminants import MOST_DISTANCES, FeatureScatter, TaskFeatures
from .files import check_tensors, expect_tensor, read_tensors, tensor_bytes


ROUTER_FILE = "router.safetensors"

_SETTLED, _PART, _PROBE = "settled", "part.", "probe"
_MOST_WIDTH = 2**14


@dataclass(frozen=True)
class RouterEntry:
    """Entry of a router in the index.

    Args:
        layers: Same as in `Router`.
        width: Number of features of an input (m).
        tasks: Tasks that have a route.
        degrees: Degrees of freedom of each sum of scatter in the file, by name; "settled" is the sum of older tasks.
        settled: Identities of what is in the sum "settled".
    """

    layers: tuple[int, ...]
    width: int
    tasks: tuple[str, ...]
    degrees: Mapping[str, int] = field(default_factory=dict)
    settled: tuple[str, ...] = ()

    @classmethod
    def of(cls, router: Router, tasks: tuple[str, ...]) -> RouterEntry:
        settled = {} if router.settled is None else {_SETTLED: router.settled.degrees}
        parts = {name: part.degrees for name, part in router.parts.items()}
        return cls(router.layers, router.width, tasks, {**settled, **parts}, router.settled_identities)

    def as_json(self) -> dict[str, Any]:
        """Return the entry as JSON for the index. Degrees are a list, which keeps their order."""
        return {
            "layers": list(self.layers),
            "width": self.width,
            "tasks": list(self.tasks),
            "degrees": [[name, count] for name, count in self.degrees.items()],
            "settled": list(self.settled),
        }

    @classmethod
    def from_json(cls, content: Any, known: tuple[str, ...]) -> RouterEntry:
        """Check the content of an index and return it as an entry. `known` are the tasks of the index.

        Raises:
            ValueError: If a field is invalid. The message gives the field, what was found and what was expected.
        """
        if not isinstance(content, dict):
            raise ValueError(f"router is {content!r}, expected an object")
        layers, width, degrees = content["layers"], content["width"], content["degrees"]
        if not isinstance(layers, list) or not layers or not all(type(i) is int and i >= 0 for i in layers):
            raise ValueError(f"router has layers {layers!r}, expected indices of layers")
        if type(width) is not int or not 0 < width <= _MOST_WIDTH:
            raise ValueError(f"router has width {width!r}, expected a number of features up to {_MOST_WIDTH}")
        for name in ("tasks", "settled"):
            if not isinstance(content[name], list) or not all(isinstance(entry, str) for entry in content[name]):
                raise ValueError(f"router has {name} {content[name]!r}, expected a list of names")
        if unknown := sorted({*content["tasks"]} - {*known}):
            raise ValueError(f"router has {unknown[0]!r} among its tasks, expected tasks of the tree")
        pairs = isinstance(degrees, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in degrees)
        if not pairs or not all(isinstance(name, str) and type(count) is int and count > 0 for name, count in degrees):
            raise ValueError(f"router has degrees {degrees!r}, expected pairs of a name and a positive number")
        if not degrees:
            raise ValueError("router has no degrees, expected those of at least one sum of scatter")
        return cls(tuple(layers), width, tuple(content["tasks"]), dict(map(tuple, degrees)), tuple(content["settled"]))

    def most_bytes(self) -> int:
        """Return the largest possible size in bytes of the `router.safetensors` at the root."""
        return 8 * (len(self.degrees) * _triangle(self.width) + self.width) + 2**20


def router_bytes(router: Router) -> bytes:
    """Return the `router.safetensors` at the root."""
    lower = tuple(torch.tril_indices(router.width, router.width))
    tensors = {f"{_PART}{name}": part.products[lower].float() for name, part in router.parts.items()}
    if router.settled is not None:
        tensors[_SETTLED] = router.settled.products[lower]
    if router.probe is not None:
        tensors[_PROBE] = router.probe
    return tensor_bytes(tensors)


def read_router(path: Path, entry: RouterEntry) -> Router:
    """Read the router in a file, as announced by the index.

    Raises:
        ValueError: If the file is damaged or does not match the index. The message names the file and the tensor.
    """
    tensors = read_tensors(path)
    expected = {_SETTLED if name == _SETTLED else f"{_PART}{name}" for name in entry.degrees}
    if odd := sorted((tensors.keys() - {_PROBE}) ^ expected):
        raise ValueError(f"{path}: {odd[0]!r} is missing here or in the index, expected the same names in both")
    found = {}
    for name, degrees in entry.degrees.items():
        settled = name == _SETTLED
        triangle = _expect(
            path,
            tensors,
            name if settled else f"{_PART}{name}",
            (_triangle(entry.width),),
            torch.float64 if settled else torch.float32,
        )
        found[name] = FeatureScatter(_symmetric(triangle.double(), entry.width), degrees)
        if float(found[name].products.diagonal().min()) < 0:
            raise ValueError(f"{path}: {name!r} has a negative diagonal, expected a sum of squares there")
    probe = expect_tensor(path, tensors, _PROBE, (entry.width,)).clone() if _PROBE in tensors else None
    return Router(
        layers=entry.layers,
        probe=probe,
        settled=found.pop(_SETTLED, None),
        parts=found,
        settled_identities=entry.settled,
    )


def route_bytes(features: TaskFeatures, path: Path) -> bytes:
    """Return the `router.safetensors` of a task.

    Raises:
        ValueError: If it could not be read back. The message names the file and the tensor.
    """
    tensors = {
        "mean": features.mean,
        "variances": features.variances,
        "distances": features.distances,
        "measured": torch.tensor([features.measured]),
    }
    check_tensors(path, tensors)
    return tensor_bytes(tensors)


def read_route(path: Path | str, width: int) -> TaskFeatures:
    """Read the features of a task's inputs.

    Raises:
        ValueError: If the file is damaged, or does not fit a router with `width` features. The message names the file
            and the tensor.
    """
    tensors = read_tensors(Path(path))
    names = ("mean", "variances", "distances", "measured")
    if odd := sorted(tensors.keys() ^ {*names}):
        raise ValueError(f"{path}: {odd[0]!r} is missing or unexpected, expected {', '.join(names)}")
    mean, variances = (expect_tensor(path, tensors, name, (width,)) for name in ("mean", "variances"))
    measured = int(_expect(path, tensors, "measured", (1,), torch.int64))
    if measured < 1:
        raise ValueError(f"{path}: 'measured' is {measured}, expected at least 1")
    distances = expect_tensor(path, tensors, "distances", (min(measured, MOST_DISTANCES),))
    for name, values in (("variances", variances), ("distances", distances)):
        if float(values.min()) < 0:
            raise ValueError(f"{path}: {name!r} has {float(values.min()):.3g}, expected no negative number")
    if bool((distances.diff() < 0).any()):
        raise ValueError(f"{path}: 'distances' are not in ascending order")
    # Copy out of the mapped file, which may be replaced.
    return TaskFeatures(mean.clone(), variances.clone(), distances.clone(), measured)


def _triangle(width: int) -> int:
    return width * (width + 1) // 2


def _symmetric(triangle: Tensor, width: int) -> Tensor:
    products = torch.zeros(width, width, dtype=triangle.dtype)
    rows, columns = torch.tril_indices(width, width)
    products[rows, columns] = triangle
    products[columns, rows] = triangle
    return products


def _expect(
    path: Path | str, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    tensor = tensors[name]
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(f"{path}: {name!r} is {tuple(tensor.shape)} {tensor.dtype}, expected {shape} {dtype}")
    return tensor
