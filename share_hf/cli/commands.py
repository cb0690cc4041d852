"""The commands: each calls the library and reports the outcome as text and as JSON."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from peft.utils import CONFIG_NAME
from transformers.utils import logging as transformers_logging

from share_hf import SharedSubspace
from share_hf.format.index import FORMAT_VERSION, INDEX_FILE, read_index
from share_hf.format.replacing import holds, reading_whole, standing_at
from share_hf.format.tree import expect_tree
from share_hf.hub.branches import branch_choice
from share_hf.hub.fetch import RemoteTree, is_local
from share_hf.state import SubspaceState
from share_hf.subspace import SubspaceSettings, smaller_layers

from . import is_first
from .adapters import adapters_of, of_reading, with_reading
from .auditing import audit
from .building import building, save
from .editing import added, export, refit, remove, rename, replace_task, undo
from .opening import expect_no_adapter, load, naming_what_is_missing
from .outcome import Outcome
from .routing import route
from .tables import count, drift, names, percent, score, size, table


def run(args: Namespace, *, debug: bool = False) -> Outcome | None:
    """Run the command that was parsed. Returns None on processes of a launcher that have nothing to report."""
    if not debug:
        transformers_logging.set_verbosity_error()
        hub_logging.set_verbosity_error()
    args.progress = not args.quiet and sys.stderr.isatty() and is_first()
    if not args.progress:
        disable_progress_bars()
    with _unless_printed():
        return _COMMANDS[args.command](args)


def init(args: Namespace) -> Outcome | None:
    names_of_settings = ["target_error", "target_bytes", *(field.name for field in fields(SubspaceSettings))]
    settings = {name: getattr(args, name) for name in names_of_settings}
    adapters = adapters_of(args)
    with building(args, adapters.places) as build:
        expect_no_adapter(args.folder, "add to it with `share-hf add`")
        with naming_what_is_missing(adapters.places.values(), CONFIG_NAME):
            subspace = SharedSubspace.from_adapters(adapters.places, **settings, **of_reading(args))
        outcome = build.end(partial(save, subspace, args), lambda: _made(subspace, args.folder))
    return outcome and with_reading(outcome, replace(subspace.reading, mended=adapters.mended))


def add(args: Namespace) -> Outcome | None:
    adapters = adapters_of(args)
    with building(args, adapters.places) as build:  # a concurrent command starts from what this one saves
        subspace = SharedSubspace.from_pretrained(args.folder)
        with naming_what_is_missing(adapters.places.values(), CONFIG_NAME):
            merge = subspace.add_adapters(adapters.places, tolerance=args.tolerance, **of_reading(args))
        outcome = build.end(partial(save, subspace, args), lambda: added(subspace, merge, args.folder))
    return outcome and with_reading(outcome, replace(subspace.reading, mended=adapters.mended))


def info(args: Namespace) -> Outcome:
    return _described(load(args.place, args, revision=args.revision), args.place)


def push(args: Namespace) -> Outcome:
    subspace = SharedSubspace.from_pretrained(args.folder)
    ours, theirs = subspace.state, _tasks_of(args.repo_id, args.token)
    commit = subspace.push_to_hub(
        args.repo_id,
        commit_message=args.commit_message,
        commit_description=args.commit_description,
        private=args.private,
        token=args.token,
        create_pr=args.create_pr,
        default_task=args.default_task,
        base_model=args.base_model,
        branches=branch_choice(args.branches),
        branch_tolerance=args.branch_tolerance,
        card_template=args.card_template,
        max_attempts=args.max_attempts,
    )
    if subspace.state.lineage != ours.lineage:
        subspace.save_pretrained(args.folder)
    url = commit.pr_url or commit.commit_url
    changes = {
        "new_on_the_hub": _without(ours.tasks, theirs),
        "new_in_the_folder": _without(subspace.tasks, ours.tasks),
        "removed_from_the_folder": _without(ours.tasks, subspace.tasks),
    }
    facts = {"url": url, "commit": commit.oid, "tasks": list(subspace.tasks), **changes}
    return Outcome("\n".join([url, *_changed(changes)]), facts)


def pull(args: Namespace) -> Outcome:
    exists = holds(args.folder, INDEX_FILE)
    if exists:
        subspace = SharedSubspace.from_pretrained(args.folder)
    else:
        expect_no_adapter(args.folder)
        subspace = SharedSubspace(SubspaceState(SubspaceSettings()))
    ours, remote = subspace.state, load(args.repo_id, args, revision=args.revision)
    subspace.update_from(remote, base_model=args.base_model)
    up_to_date = exists and subspace.state.lineage == ours.lineage
    if not up_to_date:
        subspace.save_pretrained(args.folder)
    changes = {
        "new_in_the_folder": _without(subspace.tasks, ours.tasks),
        "removed_from_the_folder": _without(ours.tasks, subspace.tasks),
        "not_on_the_hub": _without(subspace.tasks, remote.tasks),
    }
    title = f"{args.folder}: {count(len(subspace.tasks), 'task')}{', up to date' if up_to_date else ''}"
    facts = {"folder": str(args.folder), "changed": not up_to_date, "tasks": list(subspace.tasks), **changes}
    return Outcome("\n".join([title, *_changed(changes)]), facts)


def upgrade(args: Namespace) -> Outcome:
    on_hub = not is_local(args.place)
    before = _format_versions(args.place, args.token) if on_hub else {args.place: _format_version(Path(args.place))}
    outdated = [revision for revision, version in before.items() if version < FORMAT_VERSION]
    facts = {"from": min(before.values()), "to": FORMAT_VERSION, "upgraded": outdated}
    if not outdated:
        return Outcome(f"{args.place}: already has format version {facts['from']}", facts)
    subspace = load(args.place, args)
    if on_hub:
        # Below any drift, so that every task's branch is written.
        subspace.push_to_hub(
            args.place,
            commit_message=f"Upgrade to format version {FORMAT_VERSION}",
            token=args.token,
            branch_tolerance=-1.0,
        )
    else:
        subspace.save_pretrained(args.place)
    return Outcome(f"{args.place}: upgraded from format version {facts['from']} to {FORMAT_VERSION}", facts)


_COMMANDS = {
    "init": init,
    "add": add,
    "info": info,
    "audit": audit,
    "export": export,
    "remove": remove,
    "rename": rename,
    "replace": replace_task,
    "refit": refit,
    "undo": undo,
    "route": route,
    "push": push,
    "pull": pull,
    "upgrade": upgrade,
}
_PRINTED = ("share_hf.facade.adding", "share_hf.format.collection", "share_hf.shared_subspace")  # loggers
_MEANS = ("average", "forgetting", "backward_transfer", "forward_transfer")


@contextmanager
def _unless_printed() -> Iterator[None]:
    """Silence the library's warnings about what the command prints: results of reading, and the chosen dimensions."""
    loggers = [logging.getLogger(name) for name in _PRINTED]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def _made(subspace: SharedSubspace, folder: Path) -> Outcome:
    outcome = _described(subspace, str(folder))
    if (chosen := subspace.chosen) is None:
        return outcome
    return Outcome(f"{chosen.sentence()}\n\n{outcome.text}", {**outcome.facts, "chosen": asdict(chosen)})


def _format_version(folder: Path) -> int:
    if not standing_at(folder).is_dir():
        raise ValueError(f"{folder}: no such folder")
    index = reading_whole(folder, INDEX_FILE, read_index)
    expect_tree(folder, index)
    return index.format_version


def _format_versions(repo_id: str, token: str | None) -> dict[str, int]:
    """Return the format version of `main` and, if it is the newest, of the branches, which an upgrade writes last."""
    with naming_what_is_missing([repo_id], INDEX_FILE):
        index = RemoteTree.open(repo_id, token=token).index
    versions = {"main": index.format_version}
    if index.format_version >= FORMAT_VERSION:
        branches = {ref.name for ref in HfApi(token=token).list_repo_refs(repo_id).branches}
        for task in branches.intersection(index.tasks):
            versions[task] = RemoteTree.open(repo_id, task, token=token).index.format_version
    return versions


def _tasks_of(repo_id: str, token: str | None) -> tuple[str, ...]:
    """Return the tasks of a repository; none if it has no subspace yet."""
    try:
        return RemoteTree.open(repo_id, token=token).index.tasks
    except (RepositoryNotFoundError, ValueError):
        return ()


def _without(tasks: Collection[str], others: Collection[str]) -> list[str]:
    return [task for task in tasks if task not in others]


def _changed(changes: dict[str, list[str]]) -> list[str]:
    return [f"{title.replace('_', ' ')}: {names(tasks)}" for title, tasks in changes.items() if tasks]


def _described(subspace: SharedSubspace, place: str) -> Outcome:
    state, settings, report = subspace.state, subspace.settings, subspace.report()
    scores = state.scores()
    scored = any(score.learned is not None for score in scores.values())
    header = ["task", "learned by", "size", "drift", "bound", *(("score", "learned", "now") if scored else ())]
    rows = []
    for task in report.tasks:
        metric, *values = scores[task.name]
        row = [task.name, task.learned_by, size(task.bytes), drift(task.drift), drift(task.drift_bound)]
        rows.append([*row, metric, *map(score, values)] if scored else row)
    low, high = report.num_components
    facts_of_layers = [
        count(report.modules, "module"),
        f"{high if low == high else f'{low} to {high}'} directions (k = {settings.num_components})",
        f"rank {'up to ' if settings.has_ranks else ''}p = {report.pseudo_rank}",
        *([f"coefficients in {dtype}"] if (dtype := settings.coefficient_dtype) != "float32" else []),
        f"{settings.basis} basis",
        f"explained variance {percent(report.explained_variance)}",
    ]
    stored = f"{size(report.basis_bytes)} of bases, {size(sum(task.bytes for task in report.tasks))} of tasks"
    lines = [
        f"{place}: {count(len(report.tasks), 'task')} of {subspace.base_model_name_or_path or 'an unnamed model'}",
        ", ".join(facts_of_layers),
        f"{stored}; as LoRAs of rank p: {size(report.lora_bytes)}",
        "",
        table(header, rows),
    ]
    shapes = {module: layer.shape for module, layer in state.layers.items()}
    if (line := smaller_layers(shapes, settings.num_components)) is not None:
        lines.insert(3, line)
    means = {name: value for name, value in state.metrics.items() if name in _MEANS and value is not None}
    if means:
        lines.append("\n" + ", ".join(f"{name.replace('_', ' ')} {score(value)}" for name, value in means.items()))
    facts = {
        "base_model": subspace.base_model_name_or_path,
        "settings": settings.to_dict(),
        **report.to_dict(),
        "scores": {task: known._asdict() for task, known in scores.items()},
        "metrics": means,
    }
    return Outcome("\n".join(lines), facts)
