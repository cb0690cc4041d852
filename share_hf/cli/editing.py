"""The commands that export and edit tasks."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from peft.utils import CONFIG_NAME
from tqdm.auto import tqdm

from share_hf import SharedSubspace
from share_hf.format.lock import holding
from share_hf.subspace import MergeReport

from .opening import expect_no_adapter, load, naming_what_is_missing
from .outcome import Outcome
from .tables import drift, names, table


def export(args: Namespace) -> Outcome:
    """`share-hf export`: tasks as LoRAs, their weighted sum, or a model that has them in its weights."""
    subspace = load(args.place, args)
    if args.merge_into is not None:
        subspace.export_merged(args.weights or args.task, args.merge_into, args.out, token=args.token)
        facts = {"merged": args.weights or {args.task: 1.0}, "base_model": args.merge_into, "model": str(args.out)}
        return Outcome(f"{args.out}: {args.merge_into} with {_sum(facts['merged'])} in its weights", facts)
    style = {"style": args.style, "component": args.component}
    if args.weights is not None:
        expect_no_adapter(args.out)
        error = subspace.export_combined(args.weights, args.out, rank=args.rank, **style)
        facts = {"combined": args.weights, "exported": str(args.out), "error": error}
        return Outcome(f"{args.out}: {_sum(args.weights)}; its rank costs {drift(error)} of the sum", facts)
    folders = {task: args.out / task for task in subspace.tasks} if args.all else {args.task: args.out}
    for folder in folders.values():
        expect_no_adapter(folder)
    for task in tqdm(folders, desc="Exporting", unit="task", leave=False, disable=not args.progress):
        subspace.export_lora(task, folders[task], **style)
    written = {task: str(folder) for task, folder in folders.items()}
    return Outcome(table(("task", "LoRA"), written.items()), {"exported": written})


def remove(args: Namespace) -> Outcome:
    """`share-hf remove`: a subspace without some of its tasks."""
    with holding(args.folder):
        subspace = SharedSubspace.from_pretrained(args.folder)
        for task in args.tasks:
            subspace.remove_task(task)
        subspace.save_pretrained(args.folder)
    left = f"{len(subspace.tasks)} tasks are left"
    return Outcome(
        f"{args.folder}: removed {names(args.tasks)}, {left}", {"removed": args.tasks, "tasks": list(subspace.tasks)}
    )


def rename(args: Namespace) -> Outcome:
    """`share-hf rename`: a task under another name."""
    with holding(args.folder):
        subspace = SharedSubspace.from_pretrained(args.folder)
        subspace.rename_task(args.task, args.new_name)
        subspace.save_pretrained(args.folder)
    facts = {"renamed": args.task, "to": args.new_name, "tasks": list(subspace.tasks)}
    return Outcome(f"{args.folder}: {args.task} is called {args.new_name} now", facts)


def replace_task(args: Namespace) -> Outcome:
    """`share-hf replace`: another adapter in the place of a task."""
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
    return added(subspace, merge, args.folder, verb="replaced")


def refit(args: Namespace) -> Outcome:
    """`share-hf refit`: bases built anew from the adapters that tasks came from."""
    originals = dict(args.originals)
    with holding(args.folder):
        subspace = SharedSubspace.from_pretrained(args.folder)
        before = {task.name: task.drift for task in subspace.report().tasks}
        with naming_what_is_missing(originals.values(), CONFIG_NAME):
            subspace.refit(originals, component=args.component, token=args.token, progress=args.progress)
        subspace.save_pretrained(args.folder, history=args.history, keep_originals=args.keep_originals)
    tasks = subspace.report().tasks
    step = subspace.state.lineage[-1]
    rows = [(task.name, drift(before[task.name]), drift(task.drift), drift(task.drift_bound)) for task in tasks]
    text = f"{args.folder}: built anew, {step['from_originals']} of {len(tasks)} tasks from their adapters\n\n"
    facts = {
        "from_originals": step["from_originals"],
        "tasks": [{**asdict(task), "drift_before": before[task.name]} for task in tasks],
    }
    return Outcome(text + table(("task", "drift before", "now", "bound"), rows), facts)


def undo(args: Namespace) -> Outcome:
    """`share-hf undo`: the predecessor of a subspace in its place."""
    before = SharedSubspace.from_pretrained(args.folder)
    step = before.state.lineage[-1] if before.state.lineage else {}
    now = SharedSubspace.undo(args.folder)
    what = ", ".join(f"{name} {step[name]}" for name in ("merged", "learned", "removed", "refit") if name in step)
    facts = {"undone": {name: value for name, value in step.items() if name != "id"}, "tasks": list(now.tasks)}
    return Outcome(f"{args.folder}: took back {what or 'the last step'}; {len(now.tasks)} tasks", facts)


def added(subspace: SharedSubspace, merge: MergeReport, folder: Path, verb: str = "added") -> Outcome:
    """What came of new tasks: which were projected, which were merged, and what that changed of the others."""
    tasks = subspace.report().tasks
    rows = [
        (task.name, drift(merge.drift[task.name]), drift(task.drift), drift(task.drift_bound))
        for task in sorted(tasks, key=lambda task: task.name in merge.new_tasks)
    ]
    projected = merge.projected_tasks
    merged = [task for task in merge.new_tasks if task not in projected]
    ways = [f"{way}: {names(of)}" for way, of in (("merged", merged), ("projected on the basis", projected)) if of]
    changed = f"{merge.changed_layers} of {len(merge.layers)} layers changed"
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


def _sum(weights: dict[str, float]) -> str:
    return " + ".join(task if weight == 1 else f"{weight:g} {task}" for task, weight in weights.items())
