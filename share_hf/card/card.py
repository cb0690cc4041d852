"""Model card of a tree, made from the template in `model_cards/`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Template, TemplateError
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from yaml import YAMLError

from ..format.base_model import published_name
from ..format.basis_file import SUBSPACE_FILE
from ..format.model_classes import class_name_of, pipeline_of
from ..format.saved_modules import num_labels_of
from ..format.task_files import task_folder
from ..format.tree import CARD_FILE, FIGURES_FOLDER
from ..state import MIXED_SCORE, Phase, SubspaceState, TaskScore, decimals, row_names, sketch_of, step_tags
from ..subspace import AuditReport, audit_layers
from ..version import __version__
from .figures import CAPTIONS


_AUTO_CLASSES = {
    "CAUSAL_LM": ("AutoPeftModelForCausalLM", "AutoModelForCausalLM"),
    "SEQ_CLS": ("AutoPeftModelForSequenceClassification", "AutoModelForSequenceClassification"),
    "SEQ_2_SEQ_LM": ("AutoPeftModelForSeq2SeqLM", "AutoModelForSeq2SeqLM"),
    "TOKEN_CLS": ("AutoPeftModelForTokenClassification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("AutoPeftModelForQuestionAnswering", "AutoModelForQuestionAnswering"),
    "FEATURE_EXTRACTION": ("AutoPeftModelForFeatureExtraction", "AutoModel"),
}


GENERATED_BEGIN = "<!-- share_hf: generated from here; what stands outside is kept when the card is written again -->"
GENERATED_END = "<!-- share_hf: generated to here -->"

MAX_CARD_BYTES = 4 * 2**20

# Limits of a card's audit: enough for two sentences, within a second or two. `share-hf audit` has no limits.
AUDITED_LAYERS = 8
MAX_AUDITED_TASKS = 100

# A table with more columns is unreadable. The figure and `metrics.json` have the whole matrix.
MAX_MATRIX_TASKS = 30


@dataclass(frozen=True)
class CardOptions:
    """Options for writing a model card.

    Args:
        repo_id: Repository named in the snippets.
        template: Jinja template to use instead of the package's own. It receives the same variables.
        existing: Existing card. Its text outside the generated part and its other metadata are kept.
        audit: Sentences about the audit. None means to run the audit.
        branches: Tasks that are available at a revision of their name. None means all.
    """

    repo_id: str = "org/share-subspace"
    template: Path | None = None
    existing: str | None = None
    audit: tuple[str, ...] | None = None
    branches: Collection[str] | None = None


def write_card(state: SubspaceState, folder: Path, options: CardOptions) -> None:
    """Write `README.md` for the tree in `folder`.

    Raises:
        ValueError: If the template is missing or cannot make a card, or the existing metadata cannot be read.
    """
    template = options.template or _template()
    if not template.is_file():
        raise ValueError(f"{template}: no such model card template")
    data, facts = _card_data(state), _facts(state, folder, options)
    try:
        compiled = _compiled(template.read_text(encoding="utf-8"))
        generated = ModelCard(compiled.render(card_data=data.to_yaml(), **{**data.to_dict(), **facts})).text
    except (TemplateError, TypeError) as error:
        raise ValueError(f"{template}: not a usable model card template ({error})") from error
    before, owned, after = _outside(options.existing)
    text = f"{before}{GENERATED_BEGIN}\n\n{_without_markers(generated).strip()}\n\n{GENERATED_END}{after}"
    card = ModelCard(f"---\n{_joined(owned, data).to_yaml()}\n---\n\n{text.strip()}\n")
    (folder / CARD_FILE).write_text(str(card), encoding="utf-8")


@lru_cache(maxsize=2)  # because a push writes a card for each branch
def _compiled(template: str) -> Template:
    return Template(template)


def read_card(path: Path) -> str:
    """Read the existing model card, so that its owner's text is kept.

    Raises:
        ValueError: If it is too large for a card, or not UTF-8.
    """
    if (size := path.stat().st_size) > MAX_CARD_BYTES:
        raise ValueError(
            f"{path}: {size} bytes, expected a model card of at most {MAX_CARD_BYTES} bytes: move it elsewhere"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 ({error}), expected a model card: save it as UTF-8, or delete it"
        ) from error


def audit_sentences(state: SubspaceState) -> tuple[str, ...]:
    """Return sentences on whether the tasks share a subspace, if 2 to `MAX_AUDITED_TASKS` were learned freely."""
    if not 2 <= len(freely_learned(state)) <= MAX_AUDITED_TASKS:
        return ()
    return audit_of(state, max_layers=AUDITED_LAYERS).sentences()


def audit_of(state: SubspaceState, **options: Any) -> AuditReport:
    """Return the audit of the tasks that were learned freely. Options are passed to `audit_layers`."""
    free = freely_learned(state)
    sketches = {task: sketch_of(state.tasks[task]) for task in free}
    return audit_layers(state.layers, sketches, tasks=free, **options)


def freely_learned(state: SubspaceState) -> list[str]:
    """Return the tasks whose explained variance is evidence about the basis.

    The basis explains a task that was trained from it, or inside it, for that reason alone.
    """
    return [task for task, info in state.tasks.items() if info.learned_by in (Phase.ADAPTER, Phase.INIT)]


def _without_markers(generated: str) -> str:
    """Return the generated part with its markers escaped, so that no name or field passes for its beginning or end."""
    for marker in (GENERATED_BEGIN, GENERATED_END):
        generated = generated.replace(marker, marker.replace("<", "&lt;"))
    return generated


def _outside(existing: str | None) -> tuple[str, ModelCardData | None, str]:
    """Return the text of a card before the generated part, its metadata, and the text after the generated part."""
    if existing is None:
        return "", None, ""
    try:
        card = ModelCard(existing)
    except (ValueError, TypeError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{CARD_FILE}: the metadata of the model card cannot be read ({reason}), expected YAML: correct it or "
            "delete it"
        ) from error
    before, begin, rest = card.text.partition(GENERATED_BEGIN)
    if not begin:
        return f"{card.text.strip()}\n\n", card.data, ""
    _, _, after = rest.partition(GENERATED_END)
    return before, card.data, after


def _joined(owned: ModelCardData | None, data: ModelCardData) -> ModelCardData:
    """Merge the owner's metadata with the tree's: the tree's value wins, but tags and datasets are joined."""
    if owned is None:
        return data
    fields = {name: value for name, value in owned.to_dict().items() if name != "model-index"}
    for name, value in data.to_dict().items():
        if name in ("tags", "datasets") and isinstance(fields.get(name), list):
            value = list(dict.fromkeys([*fields[name], *value]))
        fields[name] = value
    return ModelCardData(**fields)


def _template() -> Path:
    """Return the path of the template, which is inside an installed package and beside it in a checkout."""
    package = Path(__file__).parents[1]
    return next(
        path
        for folder in (package, package.parent)
        if (path := folder / "model_cards" / "subspace.md.jinja").is_file()
    )


def _card_data(state: SubspaceState) -> ModelCardData:
    results, scores = [], state.scores()
    for task, info in state.tasks.items():
        name, learned, now = scores[task]
        score = learned if now is None else now
        if score is not None:
            results.append(
                EvalResult(
                    task_type=pipeline_of(info.target)
                    or ("text-classification" if info.labels or info.problem_type else "text-generation"),
                    dataset_type=info.dataset or task,
                    dataset_name=task,
                    metric_type=name,
                    metric_value=score,
                )
            )
    return ModelCardData(
        base_model=published_name(state.base_model_name_or_path),
        library_name="peft",
        tags=["share", "lora", "continual-learning", "base_model:adapter"],
        datasets=list(dict.fromkeys(info.dataset for info in state.tasks.values() if info.dataset)) or None,
        model_name="share-subspace",
        eval_results=results or None,
    )


def _facts(state: SubspaceState, folder: Path, options: CardOptions) -> dict[str, Any]:
    """Return the template's variables, apart from the metadata."""
    default_task = state.root_task or ""
    target = state.tasks[default_task].target if default_task else {}
    of_no_type = ("AutoPeftModel", class_name_of(target) or "AutoModel")
    auto_class, base_class = _AUTO_CLASSES.get(target.get("task_type"), of_no_type)
    example_task = next(iter(state.tasks), "")
    on_branches = [task for task in state.tasks if options.branches is None or task in options.branches]
    example_branch = next(iter(on_branches), "")
    heads = [
        f", num_labels={n}" if (n := _num_labels(state, tasks)) else ""
        for tasks in ([default_task], [example_branch], state.tasks)
    ]
    bytes_of = {task: (folder / task_folder(task) / SAFETENSORS_WEIGHTS_NAME).stat().st_size for task in state.tasks}
    figures = [{"path": f"{FIGURES_FOLDER}/{name}", "caption": text} for name, text in CAPTIONS.items()]
    drifts, scores = state.drifts(), state.scores()
    score_names = {score.metric for score in scores.values() if score.learned is not None}
    return {
        "title": f"Shared subspace of {len(state.tasks)} tasks",
        "repo_id": options.repo_id,
        "base_model": published_name(state.base_model_name_or_path) or "the base model",
        "default_task": default_task,
        "auto_class": auto_class,
        "base_class": base_class,
        "head_argument": heads[0],
        "example_task": example_task,
        "example_branch": example_branch,
        "all_on_branches": len(on_branches) == len(state.tasks),
        "example_head_argument": heads[1],
        "newest_task": next(reversed(state.tasks), ""),
        "head_argument_of_all": heads[2],
        "kilobytes_per_task": _kilobytes(max(bytes_of.values(), default=0)),
        "basis_kilobytes": _kilobytes((folder / SUBSPACE_FILE).stat().st_size),
        "tasks": [_task_row(state, task, scores[task], drifts[task], bytes_of[task]) for task in state.tasks],
        "score_name": next(iter(score_names)) if len(score_names) == 1 else MIXED_SCORE,
        "has_several_scores": len(score_names) > 1,
        "matrix": _matrix(state),
        "metrics": {
            name: _number(state.metrics.get(name))
            for name in ("average", "forgetting", "backward_transfer", "forward_transfer")
        },
        "figures": [figure for figure in figures if (folder / figure["path"]).is_file()],
        "steps": step_tags(state.lineage, tuple(state.tasks)),
        "audit": audit_sentences(state) if options.audit is None else options.audit,
        "training": state.metrics.get("training") or {},
        "datasets": {task: info.dataset for task, info in state.tasks.items() if info.dataset},
        "num_layers": len(state.layers),
        "num_components": state.settings.num_components,
        "pseudo_rank": state.settings.pseudo_rank,
        "basis": state.settings.basis,
        "coefficient_dtype": state.settings.coefficient_dtype,
        "ranks": _ranks(state),
        "version": __version__,
    }


def _ranks(state: SubspaceState) -> dict[str, str] | None:
    """Return the tolerance that gives tasks their own ranks, and the mean of these ranks; None if all ranks are p."""
    if not state.settings.has_ranks:
        return None
    ranks = [rank for layer in state.layers.values() for rank in layer.ranks.tolist()]
    return {"tolerance": f"{state.settings.tolerance:g}", "mean": f"{sum(ranks) / max(1, len(ranks)):.2g}"}


def _task_row(state: SubspaceState, task: str, score: TaskScore, drift: float, size: int) -> dict[str, Any]:
    return {
        "name": task,
        "learned_by": state.tasks[task].learned_by,
        "metric": score.metric,
        "learned": _number(score.learned),
        "now": _number(score.now),
        "drift": f"{drift:.2g}",
        "kilobytes": _kilobytes(size),
    }


def _matrix(state: SubspaceState) -> dict[str, Any] | None:
    names, matrix = state.metrics.get("tasks", []), state.metrics.get("matrix")
    if not matrix:
        return None
    if len(names) > MAX_MATRIX_TASKS:
        return {"tasks": names, "rows": []}
    rows = [
        {"task": name, "scores": [_number(value) for value in row]}
        for name, row in zip(row_names(state.metrics), matrix, strict=False)
    ]
    return {"tasks": names, "rows": rows}


def _num_labels(state: SubspaceState, tasks: Iterable[str]) -> int | None:
    """Return the number of labels of the largest classification head of these tasks."""
    sizes = []
    for task in tasks:
        info = state.tasks.get(task)
        if info is not None and (info.target.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") or pipeline_of(info.target)):
            sizes.append(num_labels_of(info.head) or 0)
    return max(sizes, default=None) or None


def _kilobytes(size: int) -> str:
    return f"{size / 1000:.1f}"


def _number(value: float | None) -> str:
    return "" if value is None else decimals(value)
