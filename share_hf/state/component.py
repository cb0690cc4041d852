"""A component of a pipeline, such as the `unet` of a diffusion model, as a model of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from .layout import of_experts
from .state import SubspaceState, TaskInfo


Value = TypeVar("Value")


def component_of(state: SubspaceState, prefix: str, expected: Iterable[str] = ()) -> SubspaceState:
    """Return the part of a subspace that belongs to one component, with the module names used inside the component.

    Args:
        state: State whose modules are named from the pipeline down, such as `unet.down_blocks.0.…`; not changed.
        prefix: Name of the component, such as "unet".
        expected: Tasks that must adapt something in the component.

    Returns:
        A state with the tasks that adapt something in the component. Their targets list the modules by name.

    Raises:
        ValueError: If no module is in such a component, or an expected task adapts nothing there. The error names the
            components or tasks that exist.
    """
    layers = _below(state.layers, prefix)
    if not layers:
        there = sorted({module.split(".")[0] for module in state.layers})
        raise ValueError(f"prefix is {prefix!r}, expected the component of a module, one of {there[:20]}")
    tasks, layouts = {}, _below(state.layouts, prefix)
    experts = of_experts(layouts)
    for task, info in state.tasks.items():
        adapted = sorted(module for module, layer in layers.items() if layer.has(task))
        if adapted:
            head = _below(info.head, prefix)
            tasks[task] = replace(
                info, head=head, target=_target(info, adapted, experts.intersection(adapted), prefix)
            )
    if missing := [task for task in expected if task not in tasks]:
        raise ValueError(f"task {missing[0]!r} adapts nothing in {prefix!r}, expected one of {list(tasks)[:20]}")
    return replace(
        state,
        layers=layers,
        tasks=tasks,
        layouts=layouts,
        default_task=state.default_task if state.default_task in tasks else None,
    )


def _below(named: Mapping[str, Value], prefix: str) -> dict[str, Value]:
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in named.items() if name.startswith(start)}


def _target(info: TaskInfo, adapted: list[str], experts: set[str], prefix: str) -> dict[str, Any]:
    kept = {name: info.target[name] for name in ("fan_in_fan_out", "task_type") if name in info.target}
    saved = [name.removeprefix(f"{prefix}.") for name in info.target.get("modules_to_save") or ()]
    target = {**kept, "target_modules": [module for module in adapted if module not in experts]}
    if experts:
        target["target_parameters"] = sorted({module.rpartition(".")[0] for module in experts})
    return {**target, "modules_to_save": saved} if saved else target
