"""The command that finds the tasks that texts belong to."""

from __future__ import annotations

import sys
from argparse import Namespace

from transformers import AutoModel, AutoTokenizer

from .opening import load
from .outcome import Outcome
from .tables import score, table


_SHOWN = 60  # characters shown of a text
_NEAREST = 3


def route(args: Namespace) -> Outcome:
    """Run `share-hf route`: names and scores of the tasks that the given texts belong to."""
    texts = _texts(args)
    subspace = load(args.place, args, revision=args.revision)
    base = args.base_model or subspace.base_model_name_or_path
    if base is None:
        raise ValueError(f"{args.place}: names no base model, expected --base-model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, token=args.token)
        model = AutoModel.from_pretrained(base, token=args.token).eval()
    except OSError as error:
        raise ValueError(
            f"{base}: no model and tokenizer that can be read, expected --base-model ({error})"
        ) from error
    routes = subspace.route(
        texts,
        model,
        tokenizer,
        max_length=args.max_length,
        false_rejects=args.false_rejects or None,
    )
    facts, rows = [], []
    for text, name, likely in zip(texts, routes.names, routes.probabilities, strict=True):
        scores, places = likely.sort(descending=True)
        nearest = [(routes.tasks[place], value) for place, value in zip(places.tolist(), scores.tolist(), strict=True)]
        facts.append({"text": text, "task": name, "scores": dict(nearest)})
        shown = [f"{task} {score(value)}" for task, value in nearest[:_NEAREST]]
        rows.append([_short(text), name or "none", ", ".join(shown)])
    return Outcome(table(["text", "task", "most likely"], rows), {"routes": facts})


def _texts(args: Namespace) -> list[str | tuple[str, str]]:
    lines = list(args.text or ())
    if args.file is not None:
        lines += args.file.read_text(encoding="utf-8").split("\n")
    elif not lines:
        lines = sys.stdin.read().split("\n")
    if not (lines := [line for line in lines if line.strip()]):
        raise ValueError("no text, expected --text, --file, or lines on stdin")
    pairs = [tuple(line.split("\t")) for line in lines]
    if odd := [line for line, parts in zip(lines, pairs, strict=True) if len(parts) > 2]:
        raise ValueError(f"{odd[0]!r} has more than one tab, expected one, between the texts of a pair")
    return [parts[0] if len(parts) == 1 else parts for parts in pairs]


def _short(text: str | tuple[str, str]) -> str:
    line = text if isinstance(text, str) else " | ".join(text)
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1]}…"
