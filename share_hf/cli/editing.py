"""The commands that export and edit tasks."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME
from tqdm.auto import tqdm

from share_hf import SharedSubspace
from share_hf.format.lock import holding
from share_hf.format.originals import read_originals
from share_hf.serving import GgufBase, export_gguf
from share_hf.subspace import MergeReport

from .adapters import with_reading
from .building import building, save
from .opening import expect_no_adapter, load, naming_what_is_missing
from .outcome import Outcome
from .tables import count, drift, names, table


def export(args: Namespace) -> Outcome:
    """Run `share-hf export`: write tasks as LoRAs, their weighted sum, or a model with them merged in."""
    subspace = load(args.place, args)
    if args.merge_into is not None:
        subspace.export_merged(args.weights or args.task, args.merge_into, args.out, token=args.token)
        facts = {"merged": args.weights or {args.task: 1.0}, "base_model": args.merge_into, "model": str(args.out)}
        return Outcome(f"{args.out}: {args.merge_into} with {_sum(facts['merged'])} merged into its weights", facts)
    if args.gguf:
        return _export_gguf(subspace, args)
    style = {"style": args.style, "component": args.component}
    if args.weights is not None:
        expect_no_adapter(args.out)
        error = subspace.export_combined(args.weights, args.out, rank=args.rank, **style)
        facts = {"combined": args.weights, "exported": str(args.out), "error": error}
        return Outcome(
            f"{args.out}: {_sum(args.weights)}; limiting its rank costs a relative error of {drift(error)}", facts
        )
    folders = {task: args.out / task for task in subspace.tasks} if args.all else {args.task: args.out}
    if not folders:
        raise ValueError(f"{args.place}: has no tasks, expected at least one to export")
    for folder in folders.values():
        expect_no_adapter(folder)
    for task in tqdm(folders, desc="Exporting", unit="task", leave=False, disable=not args.progress):
        subspace.export_lora(task, folders[task], **style)
    written = {task: str(folder) for task, folder in folders.items()}
    return Outcome(table(("task", "LoRA"), written.items()), {"exported": written})


def _export_gguf(subspace: SharedSubspace, args: Namespace) -> Outcome:
    base = GgufBase.of(args.base_model or subspace.base_model_name_or_path, token=args.token)
    write = partial(export_gguf, subspace, base_model=base, dtype=args.dtype or "float32")
    if args.weights is not None:
        error = write(args.weights, args.out, rank=args.rank)
        facts = {"combined": args.weights, "exported": str(args.out), "error": error}
        return Outcome(
            f"{args.out}: {_sum(args.weights)}; limiting its rank costs a relative error of {drift(error)}", facts
        )
    files = {task: args.out / f"{task}.gguf" for task in subspace.tasks} if args.all else {args.task: args.out}
    if not files:
        raise ValueError(f"{args.place}: has no tasks, expected at least one to export")
    if there := next((file for file in files.values() if file.exists()), None):
        raise ValueError(f"{there}: already exists, expected the name of a new file")
    for task in tqdm(files, desc="Exporting", unit="task", leave=False, disable=not args.progress):
        write(task, files[task])
    written = {task: str(file) for task, file in files.items()}
    return Outcome(table(("task", "LoRA"), written.items()), {"exported": written})


def remove(args: Namespace) -> Outcome:
    """Run `share-hf remove`: remove some tasks from a subspace."""
    removed = list(dict.fromkeys(args.tasks))
    with holding(args.folder):
        subspace = SharedSubspace.from_pretrained(args.folder)
        for task in removed:
            subspace.remove_task(task)
        subspace.save_pretrained(args.folder)
    number = len(subspace.tasks)
    left = f"{count(number, 'task')} {'is' if number == 1 else 'are'} left"
    facts = {"removed": removed, "tasks": list(subspace.tasks)}
    return Outcome(f"{args.folder}: removed {names(removed)}; {left}", facts)


def rename(args: Namespace) -> Outcome:
    """Run `share-hf rename`: rename a task."""
    with holding(args.folder):
        subspace = SharedSubspace.from_pretrained(args.folder)
        subspace.rename_task(args.task, args.new_name)
        subspace.save_pretrained(args.folder)
    facts = {"renamed": args.task, "to": args.new_name, "tasks": list(subspace.tasks)}
    return Outcome(f"{args.folder}: renamed {args.task} to {args.new_name}", facts)


def replace_task(args: Namespace) -> Outcome:
    """Run `share-hf replace`: replace a task by another adapter."""
    task, place = args.adapter
    with holding(args.folder):
        subspace = SharedSubspace.from_pretrained(args.folder)
        with naming_what_is_missing([place], CONFIG_NAME):
            merge = subspace.replace_task(
                task,
                place,
                tolerance=args.tolerance,
                base_model=args.base_model,
                component=args.component,
                token=args.token,
                progress=args.progress,
            )
        subspace.save_pretrained(args.folder)
    return with_reading(added(subspace, merge, args.folder, verb="replaced"), subspace.reading)


def refit(args: Namespace) -> Outcome | None:
    """Run `share-hf refit`: rebuild the bases from the adapters that tasks came from."""
    originals = dict(args.originals)
    known = {task: of.place for task, of in read_originals(args.folder).items()}
    with building(args, {**known, **originals}) as build:
        subspace = SharedSubspace.from_pretrained(args.folder)
        before = {task.name: task.drift for task in subspace.report().tasks}
        with naming_what_is_missing(originals.values(), CONFIG_NAME):
            subspace.refit(originals, component=args.component, token=args.token, progress=args.progress)
        return build.end(partial(save, subspace, args), lambda: _built_anew(subspace, before, args.folder))


def _built_anew(subspace: SharedSubspace, before: dict[str, float], folder: Path) -> Outcome:
    tasks = subspace.report().tasks
    step = subspace.state.lineage[-1]
    rows = [(task.name, drift(before[task.name]), drift(task.drift), drift(task.drift_bound)) for task in tasks]
    whole = f"{step['from_originals']} of {count(len(tasks), 'task')}"
    text = f"{folder}: rebuilt, {whole} from the original adapters\n\n"
    facts = {
        "from_originals": step["from_originals"],
        "tasks": [{**asdict(task), "drift_before": before[task.name]} for task in tasks],
    }
    return Outcome(text + table(("task", "drift before", "now", "bound"), rows), facts)


def undo(args: Namespace) -> Outcome:
    """Run `share-hf undo`: replace a subspace by its predecessor."""
    before = SharedSubspace.from_pretrained(args.folder)
    step = before.state.lineage[-1] if before.state.lineage else {}
    now = SharedSubspace.undo(args.folder)
    facts = {"undone": {name: value for name, value in step.items() if name != "id"}, "tasks": list(now.tasks)}
    return Outcome(f"{args.folder}: undid {_step(step)}; it now has {count(len(now.tasks), 'task')}", facts)


def added(subspace: SharedSubspace, merge: MergeReport, folder: Path, verb: str = "added") -> Outcome:
    """Report new tasks: which were projected, which were merged, and what that changed for the other tasks."""
    tasks = subspace.report().tasks
    rows = [
        (task.name, drift(merge.drift[task.name]), drift(task.drift), drift(task.drift_bound))
        for task in sorted(tasks, key=lambda task: task.name in merge.new_tasks)
    ]
    projected = merge.projected_tasks
    merged = [task for task in merge.new_tasks if task not in projected]
    ways = [f"{way}: {names(of)}" for way, of in (("merged", merged), ("projected onto the basis", projected)) if of]
    changed = f"{merge.changed_layers} of {count(len(merge.layers), 'layer')} changed"
    text = f"{folder}: {verb} {names(merge.new_tasks)}, {changed}\n{'; '.join(ways)}\n\n"
    facts = {
        "new_tasks": list(merge.new_tasks),
        "merged": merged,
        "projected": list(projected),
        "changed_layers": merge.changed_layers,
        "max_drift": merge.max_drift,
        "tasks": [{**asdict(task), "drift_by_merge": merge.drift[task.name]} for task in tasks],
    }
    return Outcome(text + table(("task", "drift by this merge", "since learned", "bound"), rows), facts)


def _step(step: Mapping[str, Any]) -> str:
    """Describe a step of the lineage, for example `the merge of mnli, wic`."""
    if "renamed" in step:
        old, new = step["renamed"]
        return f"the renaming of {old} to {new}"
    nouns = {"merged": "merge", "learned": "learning", "removed": "removal", "refit": "refit"}
    found = [f"the {noun} of {names(_as_list(step[key]))}" for key, noun in nouns.items() if key in step]
    return " and ".join(found) or "the last step"


def _as_list(tasks: str | list[str]) -> list[str]:
    return [tasks] if isinstance(tasks, str) else tasks


def _sum(weights: dict[str, float]) -> str:
    return " + ".join(task if weight == 1 else f"{weight:g} {task}" for task, weight in weights.items())
