"""The model card of a tree, from the template in `model_cards/`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..version import __version__
from .figures import CAPTIONS
from .state import SubspaceState


_AUTO_CLASSES = {
    "CAUSAL_LM": ("AutoPeftModelForCausalLM", "AutoModelForCausalLM"),
    "SEQ_CLS": ("AutoPeftModelForSequenceClassification", "AutoModelForSequenceClassification"),
    "SEQ_2_SEQ_LM": ("AutoPeftModelForSeq2SeqLM", "AutoModelForSeq2SeqLM"),
    "TOKEN_CLS": ("AutoPeftModelForTokenClassification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("AutoPeftModelForQuestionAnswering", "AutoModelForQuestionAnswering"),
    "FEATURE_EXTRACTION": ("AutoPeftModelForFeatureExtraction", "AutoModel"),
}


def write_card(state: SubspaceState, folder: Path, repo_id: str = "org/share-subspace") -> None:
    """Write `README.md` for the tree that is in `folder`."""
    facts = _facts(state, folder, repo_id)
    card = ModelCard.from_template(_card_data(state), template_path=str(_template()), **facts)
    card.save(folder / "README.md")


def _template() -> Path:
    """The template: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parents[1]
    return next(
        path
        for folder in (package, package.parent)
        if (path := folder / "model_cards" / "subspace.md.jinja").is_file()
    )


def _card_data(state: SubspaceState) -> ModelCardData:
    score = state.metrics.get("score", "score")
    results = [
        EvalResult(
            task_type="text-classification" if state.tasks[task].labels else "text-generation",
            dataset_type=task,
            dataset_name=task,
            metric_type=score,
            metric_value=value,
        )
        for task in state.tasks
        if (value := _scores(state, task)[1]) is not None
    ]
    base = state.base_model_name_or_path
    return ModelCardData(
        base_model=base if base and not Path(base).is_absolute() else None,
        library_name="peft",
        tags=["share", "lora", "continual-learning", "base_model:adapter"],
        model_name="share-subspace",
        eval_results=results or None,
    )


def _facts(state: SubspaceState, folder: Path, repo_id: str) -> dict[str, Any]:
    """What the template says beside the metadata."""
    default_task = state.root_task or ""
    target = state.tasks[default_task].target if default_task else {}
    auto_class, base_class = _AUTO_CLASSES.get(target.get("task_type"), ("AutoPeftModel", "AutoModel"))
    heads = [
        f", num_labels={n}" if (n := _num_labels(state, tasks)) else "" for tasks in ([default_task], state.tasks)
    ]
    bytes_of = {task: (folder / f"tasks/{task}/adapter_model.safetensors").stat().st_size for task in state.tasks}
    figures = [{"path": f"figures/{name}", "caption": text} for name, text in CAPTIONS.items()]
    return {
        "title": f"Shared subspace of {len(state.tasks)} tasks",
        "repo_id": repo_id,
        "base_model": state.base_model_name_or_path or "the base model",
        "default_task": default_task,
        "auto_class": auto_class,
        "base_class": base_class,
        "head_argument": heads[0],
        "head_argument_of_all": heads[1],
        "kilobytes_per_task": _kilobytes(max(bytes_of.values(), default=0)),
        "basis_kilobytes": _kilobytes((folder / "subspace.safetensors").stat().st_size),
        "tasks": [_task_row(state, task, bytes_of[task]) for task in state.tasks],
        "score_name": state.metrics.get("score", "score"),
        "matrix": _matrix(state),
        "metrics": {
            name: _number(state.metrics.get(name))
            for name in ("average", "forgetting", "backward_transfer", "forward_transfer")
        },
        "figures": [figure for figure in figures if (folder / figure["path"]).is_file()],
        "num_layers": len(state.layers),
        "num_components": state.settings.num_components,
        "pseudo_rank": state.settings.pseudo_rank,
        "basis": state.settings.basis,
        "version": __version__,
    }


def _task_row(state: SubspaceState, task: str, size: int) -> dict[str, Any]:
    learned, now = _scores(state, task)
    return {
        "name": task,
        "learned_by": state.tasks[task].learned_by,
        "learned": _number(learned),
        "now": _number(now),
        "drift": f"{state.drift_of(task):.2g}",
        "kilobytes": _kilobytes(size),
    }


def _scores(state: SubspaceState, task: str) -> tuple[float | None, float | None]:
    """A task's score when learned and now, from the accuracy matrix."""
    names, matrix = state.metrics.get("tasks", []), state.metrics.get("matrix", [])
    if task not in names:
        return None, None
    j = names.index(task)
    column = [row[j] for row in matrix[j:] if row[j] is not None]
    return (column[0], column[-1]) if column else (None, None)


def _matrix(state: SubspaceState) -> dict[str, Any] | None:
    names, matrix = state.metrics.get("tasks", []), state.metrics.get("matrix")
    if not matrix:
        return None
    rows = [{"task": names[i], "scores": [_number(value) for value in row]} for i, row in enumerate(matrix)]
    return {"tasks": names, "rows": rows}


def _num_labels(state: SubspaceState, tasks: Iterable[str]) -> int | None:
    """Labels of the largest classification head of these tasks; a head's last layer is the smallest of its layers."""
    sizes = []
    for task in tasks:
        info = state.tasks.get(task)
        if info is not None and info.target.get("task_type") in ("SEQ_CLS", "TOKEN_CLS"):
            weights = [tensor for name, tensor in info.head.items() if name.endswith("weight") and tensor.ndim == 2]
            sizes += [min(weight.shape[0] for weight in weights)] if weights else []
    return max(sizes, default=None)


def _kilobytes(size: int) -> str:
    return f"{size / 1000:.1f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
