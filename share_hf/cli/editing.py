"""The commands that export and edit tasks."""

from __future__ import annotations

from argparse import Namespace

from tqdm.auto import tqdm

from .opening import Outcome, expect_no_adapter, load
from .tables import drift, table


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


def _sum(weights: dict[str, float]) -> str:
    return " + ".join(task if weight == 1 else f"{weight:g} {task}" for task, weight in weights.items())
