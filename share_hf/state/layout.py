"""How the matrix of a module lies in its weight, where it is not simply that of a dense layer.

A subspace knows an update as a matrix ΔW (n, d) only. Of a convolution it is the weight with a row for each output
channel; of an embedding its transpose, so that n is the size of a vector and d the number of them, as in PEFT's
``ΔW = B A``. What is noted here makes a LoRA of the update that PEFT loads into the same kind of layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args


Kind = Literal["convolution", "embedding", "expert"]


@dataclass(frozen=True)
class Layout:
    """The kind of a module that is no dense layer, and what its matrix does not tell.

    Args:
        kind: "convolution" (in one to three dimensions), "embedding", or "expert": one of those that a model keeps in
            one parameter.
        kernel: Sizes of the kernel of a convolution, one to three; of others ().

    Raises:
        ValueError: If there is no such module.
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
        """Refuse a matrix (n, d) that no module of this layout has.

        Raises:
            ValueError: If its columns are no multiple of the kernel's size.
        """
        if shape[1] % math.prod(self.kernel):
            raise ValueError(f"shape is {shape}, expected a multiple of the kernel {self.kernel} of columns")

    def __str__(self) -> str:
        return f"{self.kind} with kernel {self.kernel}" if self.kernel else self.kind


def as_json(layout: Layout) -> dict[str, Any]:
    """What a file holds of a layout."""
    return {"kind": layout.kind, **({"kernel": list(layout.kernel)} if layout.kernel else {})}


def from_json(content: Any) -> Layout:
    """The layout in a file.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(content, dict) or not isinstance(kernel := content.get("kernel", []), list):
        raise ValueError(f"layout is {content!r}, expected its kind and kernel")
    return Layout(content.get("kind"), tuple(kernel))


def of_experts(layouts: Mapping[str, Layout]) -> set[str]:
    """The modules that are experts in a parameter of a model."""
    return {module for module, layout in layouts.items() if layout.kind == "expert"}


def named(layout: Layout | None) -> str:
    """How messages call the modules of a layout."""
    return "dense layer" if layout is None else str(layout)


def joined_layouts(
    known: Mapping[str, Layout],
    modules: Mapping[str, object],
    layouts: Mapping[str, Mapping[str, Layout]],
    updates: Mapping[str, Mapping[str, object]],
) -> dict[str, Layout]:
    """The layouts of all modules, those of new tasks among them.

    Args:
        known: Layouts of the modules there are, where they are no dense layers.
        modules: The modules there are.
        layouts: By new task, of its modules.
        updates: The modules that each new task adapts.

    Raises:
        ValueError: If a module is of one kind for one task and of another for another; naming it and the task.
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
                    f"{module!r} is a {named(layout)} for task {task!r}, expected a {named(joined.get(module))} as "
                    f"for {seen[module]}"
                )
    return joined
