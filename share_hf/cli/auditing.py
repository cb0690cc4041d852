"""The command that audits a subspace or a collection of adapters."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

from peft.utils import CONFIG_NAME
from tqdm.auto import tqdm

from share_hf.card import audit_of
from share_hf.card.audit_figure import check_figure, write_audit_figure
from share_hf.card.card import freely_learned
from share_hf.format.collection import Reading, read_collection
from share_hf.subspace import AuditReport, LowRankUpdate, audit_updates, initialization_sketches
from share_hf.subspace.audit import ModuleAudit
from share_hf.subspace.collection import CollectionReport, kind_of, survey_layers, survey_updates
from share_hf.subspace.curve import SAMPLE_FROM
from share_hf.subspace.sketch import group_by_initialization
from share_hf.subspace.survey_text import survey_sentences

from .adapters import adapters_of, of_reading, with_reading
from .opening import load, naming_what_is_missing
from .outcome import Outcome
from .tables import percent, some, table


def audit(args: Namespace) -> Outcome:
    """Run `share-hf audit`: whether adapters share a subspace, how many directions it needs, and which fit badly."""
    if args.figure is not None:
        check_figure(args.figure)
    progress = partial(tqdm, desc="Auditing", unit="layer", leave=False, disable=not args.progress)
    targets = tuple(args.target_error or (0.1, 0.25))
    reading = Reading()
    if len(args.adapters) == 1 and args.from_file is None:
        state = load(args.adapters[0][1], args).state
        report = audit_of(state, progress=progress)
        survey = survey_layers(state.layers, freely_learned(state), target_errors=targets)
    else:
        adapters = adapters_of(args)
        with naming_what_is_missing(adapters.places.values(), CONFIG_NAME):
            collection = read_collection(adapters, **of_reading(args))
        updates, reading = collection.updates, collection.reading
        survey = survey_updates(updates, args.num_components, target_errors=targets, progress=progress)
        if len(updates) < SAMPLE_FROM:
            report = audit_updates(
                _ByModule(updates), args.num_components, modules=survey.curve_modules, progress=progress
            )
        else:
            groups = group_by_initialization(initialization_sketches(updates))
            report = AuditReport(groups, (), survey.rows)
    if args.figure is not None:
        write_audit_figure(survey, args.figure)
    return with_reading(_audited(report, survey, args.per_module), reading)


class _ByModule(Mapping[str, Mapping[str, LowRankUpdate]]):
    """Map module -> task -> update of adapters. The updates of a module are read on access."""

    def __init__(self, updates: Mapping[str, Mapping[str, LowRankUpdate]]) -> None:
        self._updates = updates
        self._tasks: dict[str, list[str]] = {}
        for task, modules in updates.items():
            for module in modules:
                self._tasks.setdefault(module, []).append(task)

    def __getitem__(self, module: str) -> dict[str, LowRankUpdate]:
        return {task: self._updates[task][module] for task in self._tasks[module]}

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)


def _audited(report: AuditReport, survey: CollectionReport, per_module: bool) -> Outcome:
    kinds: dict[str, list[ModuleAudit]] = {}
    for row in report.rows:
        kinds.setdefault(row.module if per_module else kind_of(row.module), []).append(row)
    sides = [side for side, value in vars(report.observed).items() if value is not None]
    rows = []
    for kind, members in kinds.items():
        part = replace(report, rows=tuple(members))
        fractions = [percent(getattr(means, side)) for side in sides for means in (part.observed, part.null)]
        k = max(k for member in members for k in member.num_components)
        rows.append([kind, str(len(members)), str(k), *fractions])
    header = ["module", "layers", "k", *(title for side in sides for title in (side, "chance"))]
    groups = [*map(some, report.groups), *([f"unknown: {some(report.ungrouped)}"] if report.ungrouped else [])]
    by_seed = f"\nTasks by the random A they started from: {some(groups, '; ') or 'none'}"
    curve = table(
        ("k", "explained", "chance", "error of ΔW", "chance"),
        [
            (
                str(point.num_components),
                percent(point.explained),
                percent(point.null_explained),
                f"{point.error:.3f}",
                f"{point.null_error:.3f}",
            )
            for point in survey.curve
        ],
    )
    found = survey_sentences(survey)
    text = "\n".join([table(header, rows), by_seed, *report.sentences(), "", curve, "", *found])
    facts = {**report.to_dict(), "sentences": list(report.sentences())}
    facts["collection"] = {**survey.to_dict(), "sentences": list(found)}
    return Outcome(text, facts)
