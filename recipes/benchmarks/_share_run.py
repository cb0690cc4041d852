"""Learn a stream with Share by running the recipe as a user would, and measure answers and bytes of the subspace."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from _answers import chosen, encoded
from _grid import Run
from _report import ROOT
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BatchEncoding,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from share_hf import SharedSubspace


if TYPE_CHECKING:
    from text_tasks import TextTask

RECIPE = ROOT / "recipes" / "text_stream.py"
BATCH = 128


def learn(
    run: Run,
    places: Mapping[str, str],
    model: Path,
    tasks: Mapping[str, TextTask],
    tokenizer: PreTrainedTokenizerBase,
    work: Path,
) -> dict[str, Any]:
    """Learn a stream, or resume one that was stopped, and measure it.

    Args:
        run: Run whose settings are flags of the recipe. With `chunk`, all tasks are scored after every
            `chunk` tasks.
        places: Folder of the data by task.
        model: Folder of the base model.
        tasks: Tokenized tasks by name.
        tokenizer: Tokenizer of the model.
        work: Folder for this run only.
    """
    settings = {name: value for name, value in run.settings.items() if name not in ("chunk", "validation")}
    chunk = run.settings.get("chunk")
    ends = [*range(chunk, len(run.tasks), chunk), len(run.tasks)] if chunk else [len(run.tasks)]
    stages = {}
    for end in ends:
        learned = run.tasks[:end]
        folder = work / f"after-{len(learned)}"
        if not folder.exists():
            _run_recipe(learned, settings | {"evaluate_seen_tasks": chunk is None}, run.seed, places, model, work)
            draft = Path(shutil.copytree(work / "out" / "subspace", work / "copied", dirs_exist_ok=True))
            draft.rename(folder)
        subspace = SharedSubspace.from_pretrained(folder)
        stages[end] = {
            "answers": answers(
                subspace, model, {task: tasks[task] for task in learned}, tokenizer, bf16=run.settings["bf16"]
            ),
            "drift": {task.name: [task.drift, task.drift_bound] for task in subspace.report().tasks},
        }
    metrics = subspace.state.metrics
    return {
        **stages.pop(ends[-1]),
        "stages": {str(end): stage for end, stage in stages.items()},
        "matrix": metrics["matrix"],
        "trained": trained_numbers(subspace, run),
        "bytes": stored_bytes(folder),
    }


def _run_recipe(
    tasks: Sequence[str], settings: Mapping[str, Any], seed: int, places: Mapping[str, str], model: Path, work: Path
) -> None:
    flags = {
        "model_name_or_path": model,
        "output_dir": work / "out",
        "seed": seed,
        "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
        **settings,
    }
    if (work / "out").exists():
        flags["resume_from_checkpoint"] = True
    command = [sys.executable, str(RECIPE), "--tasks", *(f"{task}={places[task]}" for task in tasks)]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    subprocess.run(command, check=True)


def answers(
    subspace: SharedSubspace,
    base: Path,
    tasks: Mapping[str, TextTask],
    tokenizer: PreTrainedTokenizerBase,
    *,
    bf16: bool,
) -> dict[str, str | list[float]]:
    """Return the answers of the subspace to the test examples of each task."""
    outputs = max(task.num_labels for task in tasks.values())
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=outputs)
    model = subspace.apply(model, list(tasks)).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    found = {}
    for name, task in tasks.items():
        model.set_adapter(name)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):  # as in the evaluations of the Trainer
            found[name] = task_answers(lambda inputs: model(**inputs.to(device)).logits, task, tokenizer)
    return found


@torch.no_grad()
def task_answers(
    logits_of: Callable[[BatchEncoding], Tensor], task: TextTask, tokenizer: PreTrainedTokenizerBase
) -> str | list[float]:
    """Return the answers to the test examples of a task, in the order of the examples.

    Args:
        logits_of: Function from a batch to its logits (samples, outputs).
        task: Tokenized task.
        tokenizer: Tokenizer of the model.
    """
    collate, inputs = DataCollatorWithPadding(tokenizer), task.scored.remove_columns("label")
    order = np.argsort([len(ids) for ids in inputs["input_ids"]], kind="stable")  # for little padding
    logits = [
        logits_of(collate([inputs[int(i)] for i in order[start : start + BATCH]])).float().cpu()
        for start in range(0, len(order), BATCH)
    ]
    sorted_answers = chosen(torch.cat(logits).numpy(), task.problem_type, task.num_labels)
    in_order = np.empty_like(sorted_answers)
    in_order[order] = sorted_answers
    return encoded(in_order)


def trained_numbers(subspace: SharedSubspace, run: Run) -> int:
    """Return how many numbers the last task trained, without its head."""
    count = 0
    for layer in subspace.state.layers.values():
        outputs, inputs = len(layer.basis_out), len(layer.basis_in)
        rank = run.settings["pseudo_rank"]
        if run.settings["method"] == "coefficients":
            count += rank * (layer.basis_out.shape[1] + layer.basis_in.shape[1])
        elif run.settings["temporary_init"] != "basis":
            count += rank * (outputs + inputs)
        else:
            count += run.settings["num_temporary"] * (outputs + inputs + 2 * rank)
    return count


def stored_bytes(tree: Path) -> dict[str, int]:
    """Return the bytes of a tree on disk: basis, coefficients, heads and other saved modules, JSON, all else."""
    sizes = {"basis": 0, "coefficients": 0, "heads": 0, "json": 0, "other": 0}
    for path in tree.rglob("*"):
        if path.name == "adapter_model.safetensors":
            with safe_open(path, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    kind = "coefficients" if ".share_" in name else "heads"
                    sizes[kind] += tensors.get_tensor(name).nbytes
            continue
        if path.is_file():
            kind = {"subspace.safetensors": "basis"}.get(path.name, "json" if path.suffix == ".json" else "other")
            sizes[kind] += path.stat().st_size
    return sizes
