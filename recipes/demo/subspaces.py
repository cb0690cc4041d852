"""What the demo shows of a subspace, as plain values: its tasks, sizes, drift, scores and audit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from share_hf import SharedSubspace
from share_hf.card import audit_of
from share_hf.state import row_names
from share_hf.subspace import AuditReport


INDEX_FILE = "share_config.json"
TASKS_ON_A_PAGE, MATRIX_ON_A_PAGE = 20, 15

# The audit draws random updates for each task in each layer: this bounds its time to some seconds.
AUDITED_UPDATES, AUDITED_LAYERS = 4000, 8

Item = TypeVar("Item")


class DemoError(ValueError):
    """A problem that the page shows to its visitor."""


@dataclass(frozen=True)
class TaskFacts:
    """What the table of tasks shows of a task.

    Args:
        name: Name of the task.
        learned_by: Phase that trained the task, or `"adapter"`.
        size: Size of its coefficients and head in bytes.
        drift: Estimated drift since the task was learned.
        bound: Certified bound on the drift in any one layer.
        labels: Names of its labels; empty if it has none.
        has_head: Whether it has a head of its own.
        has_route: Whether the router knows its inputs.
        metric: Name of its score.
        learned: Score when it was learned, None if not measured.
        now: Score now, None if not measured.
    """

    name: str
    learned_by: str
    size: int
    drift: float
    bound: float
    labels: tuple[str, ...]
    has_head: bool
    has_route: bool
    metric: str
    learned: float | None
    now: float | None


@dataclass(frozen=True)
class Summary:
    """Sizes and means of a subspace.

    Args:
        base_model: Name of its base model, None if it names none.
        tasks: Number of its tasks.
        modules: Number of adapted modules.
        directions: Smallest and largest number of directions of a layer.
        pseudo_rank: Rank p of a task.
        explained_variance: Mean explained variance.
        basis_bytes: Size of all bases in bytes.
        task_bytes: Size of all tasks in bytes.
        lora_bytes: Size of the tasks as plain LoRAs in bytes.
        means: Means over the stream, such as `"average"`, that were measured.
        missing: Sentences about the parts of the page that this subspace has nothing for.
    """

    base_model: str | None
    tasks: int
    modules: int
    directions: tuple[int, int]
    pseudo_rank: int
    explained_variance: float
    basis_bytes: int
    task_bytes: int
    lora_bytes: int
    means: dict[str, float]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Matrix:
    """Scores on some tasks (columns) after some steps (rows).

    Args:
        score: Name of the scores.
        columns: Names of tasks.
        rows: Name and scores of each step, None where a score was not measured.
    """

    score: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]


@dataclass(frozen=True)
class Audit:
    """Evidence on whether the tasks share a subspace.

    Args:
        report: Report of the library; None if there is nothing to audit.
        layers: Number of layers of the subspace, of which the report may have fewer.
        reason: Why there is nothing to audit.
    """

    report: AuditReport | None
    layers: int
    reason: str = ""


def nearby(folder: Path) -> list[str]:
    """Return the subspaces up to two levels below a folder, by their paths, those written last first."""
    found = [path for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{INDEX_FILE}")]
    return [path.parent.as_posix() for path in sorted(found, key=lambda path: -path.stat().st_mtime)]


def open_subspace(place: str) -> SharedSubspace:
    """Load a subspace from a folder or from the Hub.

    Raises:
        DemoError: If there is none. The message says what was found and expected.
    """
    place = place.strip()
    if not place:
        raise DemoError("No subspace is named. Give the folder of a subspace, or an id on the Hub such as org/name.")
    try:
        return SharedSubspace.from_pretrained(place)
    except HFValidationError as error:
        raise DemoError(f"{place}: no such folder, and no id of a repository on the Hub.") from error
    except (OSError, HfHubHTTPError) as error:
        raise DemoError(
            f"{place}: no such folder, and no repository that could be read. A private one needs HF_TOKEN, and the "
            f"hub needs a network. ({first_line(error)})"
        ) from error
    except ValueError as error:
        raise DemoError(str(error)) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message: those of other libraries have many."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def facts_of_tasks(subspace: SharedSubspace) -> list[TaskFacts]:
    """Return the facts about each task, in the order in which the tasks were learned."""
    infos, scores, routed = subspace.state.tasks, subspace.state.scores(), set(subspace.routed_tasks)
    return [
        TaskFacts(
            name=task.name,
            learned_by=str(task.learned_by),
            size=task.bytes,
            drift=task.drift,
            bound=task.drift_bound,
            labels=infos[task.name].labels or (),
            has_head=bool(infos[task.name].head),
            has_route=task.name in routed,
            metric=scores[task.name].metric,
            learned=scores[task.name].learned,
            now=scores[task.name].now,
        )
        for task in subspace.report().tasks
    ]


def summary_of(subspace: SharedSubspace, tasks: Sequence[TaskFacts]) -> Summary:
    """Return sizes, means, and what is missing.

    Args:
        subspace: A subspace.
        tasks: Facts about all of its tasks.
    """
    report, metrics = subspace.report(), subspace.state.metrics
    names = ("average", "forgetting", "backward_transfer", "forward_transfer")
    return Summary(
        base_model=subspace.base_model_name_or_path,
        tasks=len(tasks),
        modules=report.modules,
        directions=report.num_components,
        pseudo_rank=report.pseudo_rank,
        explained_variance=report.explained_variance,
        basis_bytes=report.basis_bytes,
        task_bytes=sum(task.size for task in tasks),
        lora_bytes=report.lora_bytes,
        means={name: metrics[name] for name in names if metrics.get(name) is not None},
        missing=tuple(_missing(subspace, tasks)),
    )


def _missing(subspace: SharedSubspace, tasks: Sequence[TaskFacts]) -> list[str]:
    sentences = []
    if subspace.base_model_name_or_path is None:
        sentences.append("It names no base model: enter one under “Model and prompt” to ask its tasks.")
    if not any(task.learned is not None for task in tasks):
        sentences.append("It has no scores: ShareTrainer measures them where tasks have evaluation data.")
    if not subspace.routed_tasks:
        sentences.append("It has no router, so every text needs a task: SharedSubspace.learn_route teaches one.")
    elif len(subspace.routed_tasks) < len(tasks):
        sentences.append(f"The router knows {len(subspace.routed_tasks)} of its {len(tasks)} tasks.")
    return sentences


def matching(tasks: Sequence[TaskFacts], search: str) -> list[TaskFacts]:
    """Return the tasks whose name contains each word of a search, ignoring case."""
    words = search.lower().split()
    return [task for task in tasks if all(word in task.name.lower() for word in words)]


def page_of(items: Sequence[Item], page: int, size: int) -> tuple[Sequence[Item], int, int]:
    """Return the items on a page, the number of the page, and the number of pages; a page out of range is moved in."""
    pages = max(1, -(-len(items) // size))
    page = min(max(1, page), pages)
    return items[(page - 1) * size : page * size], page, pages


def matrix_of(subspace: SharedSubspace, page: int) -> tuple[Matrix | None, int, int]:
    """Return the scores on the tasks of a page after the steps that learned them and after the last step.

    Args:
        subspace: A subspace.
        page: Number of the page, from 1.

    Returns:
        The scores, None if none were measured; the number of the page, and the number of pages.
    """
    metrics = subspace.state.metrics
    rows = list(zip(row_names(metrics), metrics.get("matrix", []), strict=False))
    if not rows:
        return None, 1, 1
    steps, page, pages = page_of(rows, page, MATRIX_ON_A_PAGE)
    columns, _, _ = page_of(metrics["tasks"], page, MATRIX_ON_A_PAGE)
    start = (page - 1) * MATRIX_ON_A_PAGE
    shown = [*steps, *([rows[-1]] if page < pages else [])]
    values = [
        (name, tuple(row[j] if j < len(row) else None for j in range(start, start + len(columns))))
        for name, row in shown
    ]
    return Matrix(metrics.get("score", "score"), tuple(columns), tuple(values)), page, pages


def audit(subspace: SharedSubspace) -> Audit:
    """Compare what the bases explain with what chance would explain, on some layers.

    Only tasks that were learned freely count: a basis explains a task that was trained inside it for that alone.
    """
    state, layers = subspace.state, len(subspace.state.layers)
    free = sum(info.learned_by in ("adapter", "init") for info in state.tasks.values())
    if free < 2:
        return Audit(None, layers, f"{free} of its tasks was learned outside the subspace, and the audit needs two.")
    return Audit(audit_of(state, max_layers=min(AUDITED_LAYERS, max(1, AUDITED_UPDATES // free))), layers)
