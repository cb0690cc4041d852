"""The layout of a module's matrix in its weight, for modules that are not dense layers.

A subspace knows an update only as a matrix ΔW (n, d). For a convolution it is the weight with one row per output
channel. For an embedding it is the transposed weight, so that n is the size of a vector and d the number of vectors,
as in PEFT's ``ΔW = B A``. A layout holds the information that turns the update into a LoRA that PEFT can load into the
same kind of layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args


Kind = Literal["convolution", "embedding", "expert"]


@dataclass(frozen=True)
class Layout:
    """Kind of a module that is not a dense layer, and what its matrix does not show.

    Args:
        kind: Kind of the module: "convolution" (in one to three dimensions), "embedding", or "expert" (one of several
            experts that a model keeps in a single parameter).
        kernel: One to three sizes of the kernel of a convolution; () for other kinds.

    Raises:
        ValueError: If there are no such modules.
    """

    kind: Kind
    kernel: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind is {self.kind!r}, expected one of {list(get_args(Kind))}")
        dimensions = (1, 2, 3) if self.kind == "convolution" else (0,)
        if len(self.kernel) not in dimensions or not all(type(size) is int and size > 0 for size in self.kernel):
            raise ValueError(f"kernel of a {self.kind} is {self.kernel}, expected {dimensions} positive integers")

    def check_shape(self, shape: tuple[int, int]) -> None:
        """Check that a module of this layout can have a matrix (n, d).

        Raises:
            ValueError: If the number of columns is not a multiple of the kernel's size.
        """
        if shape[1] % math.prod(self.kernel):
            raise ValueError(f"shape is {shape}, expected a multiple of the kernel {self.kernel} of columns")

    def __str__(self) -> str:
        return f"{self.kind} with kernel {self.kernel}" if self.kernel else self.kind


def as_json(layout: Layout) -> dict[str, Any]:
    """Return a layout as it is stored in a file."""
    return {"kind": layout.kind, **({"kernel": list(layout.kernel)} if layout.kernel else {})}


def from_json(content: Any) -> Layout:
    """Return the layout that a file holds.

    Raises:
        ValueError: If the content is not a layout.
    """
    if not isinstance(content, dict) or not isinstance(kernel := content.get("kernel", []), list):
        raise ValueError(f"layout is {content!r}, expected its kind and kernel")
    return Layout(content.get("kind"), tuple(kernel))


def of_experts(layouts: Mapping[str, Layout]) -> set[str]:
    """Return the modules that are experts inside a parameter of the model."""
    return {module for module, layout in layouts.items() if layout.kind == "expert"}


def named(layout: Layout | None) -> str:
    """Return the name of a layout for messages; None means a dense layer."""
    return "dense layer" if layout is None else str(layout)


def joined_layouts(
    known: Mapping[str, Layout],
    modules: Mapping[str, object],
    layouts: Mapping[str, Mapping[str, Layout]],
    updates: Mapping[str, Mapping[str, object]],
) -> dict[str, Layout]:
    """Return the layouts of all modules, including modules of new tasks.

    Args:
        known: Layouts of the existing modules that are not dense layers.
        modules: Existing modules.
        layouts: Layouts by new task and module.
        updates: Modules that each new task adapts.

    Raises:
        ValueError: If a module has different layouts for different tasks. The error names the module and the task.
    """
    joined = dict(known)
    seen = dict.fromkeys(modules, "the subspace")
    for task, adapted in updates.items():
        of_task = layouts.get(task, {})
        for module in adapted:
            layout = of_task.get(module)
            if module not in seen:
                seen[module] = f"task {task!r}"
                if layout is not None:
                    joined[module] = layout
            elif layout != joined.get(module):
                raise ValueError(
                    f"{module!r} is of kind {named(layout)} for task {task!r}, expected {named(joined.get(module))} "
                    f"as for {seen[module]}"
                )
    return joined
