"""Check of whether tasks can belong to one model, judging by the names and shapes of their modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import combinations

from ..subspace import LayerSubspace, LowRankUpdate


def check_one_model(layers: Mapping[str, LayerSubspace], updates: Mapping[str, Mapping[str, LowRankUpdate]]) -> None:
    """Check that no tasks adapt the same layers under two names, as they would share nothing after a merge.

    The layers of a model have different names inside another class (`encoder.layer.0` is `bert.encoder.layer.0` with a
    head) and in another version of transformers (`language_model.model.layers.0` became
    `model.language_model.layers.0`). Two names count as the same layer if only the parts before the layer number
    differ, one has all the parts of the other, the shapes are the same, and no task has both.

    Args:
        layers: Existing layers by module, with their tasks.
        updates: Updates by new task and module.

    Raises:
        ValueError: If there are such tasks. The error names two of them and their modules.
    """
    shapes: dict[str, dict[str, tuple[int, int]]] = {}
    for modules in (layers, *updates.values()):
        for module in modules:
            before, rest = _split(module)
            if rest and rest not in shapes.setdefault(before, {}):
                shapes[before][rest] = modules[module].shape
    for first, second in combinations(shapes, 2):
        if not _alike(first, second):
            continue
        common = shapes[first].keys() & shapes[second].keys()
        if not common or any(shapes[first][rest] != shapes[second][rest] for rest in common):
            continue
        of_first, of_second = (_tasks_with(before, layers, updates) for before in (first, second))
        if of_first and of_second and of_first.isdisjoint(of_second):
            rest = min(common)
            raise ValueError(
                f"task {_latest(of_first, updates)!r} adapts '{first}.{rest}' and task "
                f"{_latest(of_second, updates)!r} '{second}.{rest}', which are the same layer in two classes or "
                "versions of transformers: expected adapters of one of them; load one adapter and save it again in "
                "the form of the other"
            )


def prefixes(modules: Iterable[str]) -> frozenset[str]:
    """Return the parts of module names before the layer numbers, which show how a model class names its layers."""
    return frozenset(_split(module)[0] for module in modules)


@lru_cache(maxsize=2**16)
def _split(module: str) -> tuple[str, str]:
    """Split a module name before the number of the layer; two empty strings if there is no number or no prefix."""
    parts = module.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return (".".join(parts[:at]), ".".join(parts[at:])) if at else ("", "")


def _alike(first: str, second: str) -> bool:
    one, other = Counter(first.split(".")), Counter(second.split("."))
    return one <= other or other <= one


def _tasks_with(
    before: str,
    layers: Mapping[str, LayerSubspace],
    updates: Mapping[str, Mapping[str, LowRankUpdate]],
) -> set[str]:
    tasks = {task for module, layer in layers.items() if _split(module)[0] == before for task in layer.tasks}
    return tasks | {task for task, modules in updates.items() if any(_split(name)[0] == before for name in modules)}


def _latest(tasks: set[str], updates: Mapping[str, object]) -> str:
    """Return one of the tasks, preferably a new one."""
    return min(tasks & updates.keys() or tasks)
