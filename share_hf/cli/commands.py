"""What the commands do: call the library, and say what came of it as text and as JSON."""

from __future__ import annotations

import difflib
import re
import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from peft.utils import CONFIG_NAME
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from share_hf import SharedSubspace
from share_hf.hub.adapters import read_lora
from share_hf.hub.index import INDEX_FILE
from share_hf.hub.remote import RemoteTree
from share_hf.hub.state import scores_of
from share_hf.subspace import AuditReport, LowRankUpdate, MergeReport, SubspaceSettings, audit_layers, audit_updates
from share_hf.subspace.audit import ModuleAudit

from .tables import drift, names, percent, score, size, table


_MEANS = ("average", "forgetting", "backward_transfer", "forward_transfer")
_SIDES = {"joint": "explained", "outputs": "outputs", "inputs": "inputs"}


@dataclass(frozen=True)
class Outcome:
    """What a command found or did, for a person and as JSON."""

    text: str
    facts: dict[str, Any]


def run(args: Namespace, *, debug: bool = False) -> Outcome:
    """Run the command that the arguments are of."""
    if not debug:
        transformers_logging.set_verbosity_error()
        hub_logging.set_verbosity_error()
    if not _bars(args):
        disable_progress_bars()
    return _COMMANDS[args.command](args)


def init(args: Namespace) -> Outcome:
    _expect_no_tree(args.folder, "add to it with `share-hf add`")
    settings = {field.name: getattr(args, field.name) for field in fields(SubspaceSettings)}
    subspace = SharedSubspace.from_adapters(
        _by_name(args.adapters), **settings, token=args.token, progress=_bars(args)
    )
    subspace.save_pretrained(args.folder)
    return _described(subspace, str(args.folder))


def add(args: Namespace) -> Outcome:
    subspace = SharedSubspace.from_pretrained(args.folder)
    merge = subspace.add_adapters(_by_name(args.adapters), token=args.token, progress=_bars(args))
    subspace.save_pretrained(args.folder)
    return _merged(subspace, merge, args.folder)


def info(args: Namespace) -> Outcome:
    return _described(_load(args.place, args, revision=args.revision), args.place)


def audit(args: Namespace) -> Outcome:
    if len(args.places) == 1:
        state = _load(args.places[0][1], args).state
        report = audit_layers(
            state.layers,
            {task: task_info.initialization for task, task_info in state.tasks.items()},
            progress=lambda modules: _tracked(modules, args, "Auditing", "layer"),
        )
        return _audited(report, args.per_module)
    layers: dict[str, dict[str, LowRankUpdate]] = {}
    for task, place in _tracked(_by_name(args.places).items(), args, "Reading adapters", "adapter"):
        for module, update in read_lora(place, token=args.token).updates.items():
            layers.setdefault(module, {})[task] = update
    report = audit_updates(
        layers, args.num_components, progress=lambda modules: _tracked(modules, args, "Auditing", "layer")
    )
    return _audited(report, args.per_module)


def export(args: Namespace) -> Outcome:
    subspace = _load(args.place, args)
    folders = {task: args.out / task for task in subspace.tasks} if args.all else {args.task: args.out}
    for folder in folders.values():
        _expect_no_tree(folder)
    for task, folder in _tracked(folders.items(), args, "Exporting", "task"):
        subspace.export_lora(task, folder)
    written = {task: str(folder) for task, folder in folders.items()}
    return Outcome(table(("task", "LoRA"), written.items()), {"exported": written})


def push(args: Namespace) -> Outcome:
    subspace = SharedSubspace.from_pretrained(args.folder)
    before, published = subspace.state, _published_tasks(args.repo_id, args.token)
    commit = subspace.push_to_hub(
        args.repo_id,
        commit_message=args.commit_message,
        commit_description=args.commit_description,
        private=args.private,
        token=args.token,
        create_pr=args.create_pr,
        default_task=args.default_task,
        branch_tolerance=args.branch_tolerance,
        card_template=args.card_template,
        max_attempts=args.max_attempts,
    )
    now = subspace.state
    updated = (now.lineage, now.default_task) != (before.lineage, before.default_task)
    if updated:
        subspace.save_pretrained(args.folder)
    facts = {
        "url": commit.pr_url or commit.commit_url,
        "commit": commit.oid,
        "new_tasks": [task for task in before.tasks if task not in published],
        "tasks_of_others": [task for task in now.tasks if task not in before.tasks],
        "removed_tasks": [task for task in before.tasks if task not in now.tasks],
        "tasks": list(now.tasks),
        "folder_updated": updated,
    }
    lines = [facts["url"], f"new there: {names(facts['new_tasks'])}"]
    if updated:
        lines.append(f"new in {args.folder}: {names(facts['tasks_of_others'])}")
    if facts["removed_tasks"]:
        lines.append(f"removed by others: {names(facts['removed_tasks'])}")
    return Outcome("\n".join(lines), facts)


def pull(args: Namespace) -> Outcome:
    exists = (args.folder / INDEX_FILE).exists()
    if not exists:
        _expect_no_tree(args.folder)
    local = SharedSubspace.from_pretrained(args.folder) if exists else None
    remote = _load(args.repo_id, args, revision=args.revision)
    before = local.state if local is not None else None
    if local is None:
        local = remote
    else:
        local.update_from(remote)
    now, had = local.state, before.tasks if before is not None else ()
    changed = before is None or now.lineage != before.lineage
    if changed:
        local.save_pretrained(args.folder)
    facts = {
        "folder": str(args.folder),
        "changed": changed,
        "new_tasks": [task for task in now.tasks if task not in had],
        "removed_tasks": [task for task in had if task not in now.tasks],
        "unpushed_tasks": [task for task in now.tasks if task not in remote.tasks],
        "tasks": list(now.tasks),
    }
    lines = [f"{args.folder}: {len(now.tasks)} tasks" + ("" if changed else ", up to date")]
    for title in ("new", "removed", "unpushed"):
        if tasks := facts[f"{title}_tasks"]:
            lines.append(f"{title}: {names(tasks)}")
    return Outcome("\n".join(lines), facts)


_COMMANDS = {"init": init, "add": add, "info": info, "audit": audit, "export": export, "push": push, "pull": pull}


def _bars(args: Namespace) -> bool:
    return not args.quiet and sys.stderr.isatty()


def _tracked(items: Iterable[Any], args: Namespace, title: str, unit: str) -> Iterable[Any]:
    return tqdm(items, desc=title, unit=unit, leave=False, disable=not _bars(args))


def _by_name(located: Sequence[tuple[str, str]]) -> dict[str, str]:
    named: dict[str, str] = {}
    for name, place in located:
        if name in named:
            raise ValueError(
                f"{named[name]} and {place} are both called {name!r}, expected name=place for one of them"
            )
        named[name] = place
    return named


def _load(place: str, args: Namespace, *, revision: str | None = None) -> SharedSubspace:
    try:
        return SharedSubspace.from_pretrained(place, revision=revision, token=args.token)
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HFValidationError) as error:
        subspaces = [str(path.parent) for path in Path(place).parent.glob(f"*/{INDEX_FILE}")]
        near = difflib.get_close_matches(place, subspaces, n=1)
        advice = f", did you mean {near[0]}?" if near else "; a private one needs --token or `hf auth login`"
        raise ValueError(f"{place}: no such folder, and no repository that could be read{advice}") from error


def _published_tasks(repo_id: str, token: str | None) -> tuple[str, ...]:
    """The tasks of a repository; none where there is no subspace yet."""
    try:
        return RemoteTree.open(repo_id, token=token).index.tasks
    except (RepositoryNotFoundError, ValueError):
        return ()


def _expect_no_tree(folder: Path, advice: str = "choose another folder") -> None:
    """Refuse to write over a subspace, or to turn the folder of an adapter into one."""
    if (folder / INDEX_FILE).exists():
        raise ValueError(f"{folder} is a shared subspace already, {advice}")
    if (folder / CONFIG_NAME).exists():
        raise ValueError(f"{folder} holds an adapter, expected a folder without one")


def _described(subspace: SharedSubspace, place: str) -> Outcome:
    state, report = subspace.state, subspace.report()
    scores = {task: scores_of(state, task) for task in subspace.tasks}
    stored = report.basis_bytes + sum(task.bytes for task in report.tasks)
    smallest, largest = report.num_components
    lines = [
        f"{place}: {len(report.tasks)} tasks of {subspace.base_model_name_or_path or 'an unnamed model'}",
        f"{report.modules} modules of {smallest if smallest == largest else f'{smallest} to {largest}'} directions "
        f"(k = {subspace.settings.num_components}), rank p = {report.pseudo_rank}, basis {subspace.settings.basis}, "
        f"explained variance {percent(report.explained_variance)}",
        f"{size(report.basis_bytes)} of bases and {size(stored - report.basis_bytes)} of tasks, as LoRAs of rank p "
        f"{size(report.lora_bytes)}",
        "",
    ]
    header = ["task", "learned by", "size", "drift", "bound"]
    scored = any(learned is not None for _, learned, _ in scores.values())
    if scored:
        header += [" / ".join(dict.fromkeys(name for name, *_ in scores.values())), "now"]
    rows = []
    for task in report.tasks:
        row = [task.name, task.learned_by, size(task.bytes), drift(task.drift), drift(task.drift_bound)]
        rows.append(row + [score(value) for value in scores[task.name][1:]] if scored else row)
    lines.append(table(header, rows))
    if means := {name: state.metrics[name] for name in _MEANS if state.metrics.get(name) is not None}:
        lines += ["", ", ".join(f"{name.replace('_', ' ')} {score(value)}" for name, value in means.items())]
    facts = {
        "base_model": subspace.base_model_name_or_path,
        "settings": asdict(subspace.settings),
        **report.to_dict(),
        "scores": {
            task: {"metric": name, "learned": learned, "now": now}
            for task, (name, learned, now) in scores.items()
            if learned is not None
        },
        **means,
    }
    return Outcome("\n".join(lines), facts)


def _merged(subspace: SharedSubspace, merge: MergeReport, folder: Path) -> Outcome:
    tasks = subspace.report().tasks
    header = ("task", "by this merge", "since learned", "bound")
    rows = [
        (
            f"{task.name} (new)" if task.name in merge.new_tasks else task.name,
            drift(merge.drift[task.name]),
            drift(task.drift),
            drift(task.drift_bound),
        )
        for task in tasks
    ]
    title = f"{folder}: {names(merge.new_tasks)} merged, {merge.changed_layers} of {len(merge.layers)} layers changed."
    facts = {
        "new_tasks": list(merge.new_tasks),
        "changed_layers": merge.changed_layers,
        "layers": len(merge.layers),
        "max_drift": merge.max_drift,
        "tasks": [{**asdict(task), "drift_by_merge": merge.drift[task.name]} for task in tasks],
    }
    return Outcome(f"{title} Drift of the tasks:\n\n{table(header, rows)}", facts)


def _audited(report: AuditReport, per_module: bool) -> Outcome:
    kinds: dict[str, list[ModuleAudit]] = {}
    for row in report.rows:
        kinds.setdefault(row.module if per_module else re.sub(r"\d+", "*", row.module), []).append(row)
    sides = [side for side in ("joint", "outputs", "inputs") if getattr(report.observed, side) is not None]
    header = ["module", "layers", "k", *(name for side in sides for name in (_SIDES[side], "chance"))]
    rows = []
    for kind, members in kinds.items():
        part = replace(report, rows=tuple(members))
        fractions = [getattr(means, side) for side in sides for means in (part.observed, part.null)]
        largest = max(k for member in members for k in member.num_components)
        rows.append([kind, str(len(members)), str(largest), *map(percent, fractions)])
    groups = "; ".join(map(names, report.groups)) or "none known"
    unknown = f"; not known: {names(report.ungrouped)}" if report.ungrouped else ""
    first, second = report.sentences()
    text = f"{table(header, rows)}\n\nGroups of one random A: {groups}{unknown}\n{first}\n{second}"
    return Outcome(text, {**report.to_dict(), "sentences": [first, second]})
