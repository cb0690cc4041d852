"""Run one entry of the benchmark of continual learning in this process: `python _continual_run.py JOB`, with JSON."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import _language_run
import _merged_run
import _share_run
import numpy as np
import torch
from _answers import chosen, encoded
from _baselines import BaselineSettings, Outcome, train
from _grid import Results, Run
from _plan import SHARE_METHODS
from _report import ROOT, machine, versions
from _streams import STREAMS, write_data
from routing import packaged_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)


sys.path.insert(0, str(ROOT / "recipes"))
from text_tasks import TextTask, load_text_task


OWN_TEXT = "imdb"  # not a task of the causal LM: the loss on it shows how much of the model's own ability is left
OF_DATA = ("max_length", "train_examples", "target_modules", "validation")  # settings that only describe the data
OF_MERGES = ("num_components", "basis", "seeds", "together", "scored")  # settings for merging LoRAs


def main() -> None:
    job = json.loads(sys.argv[1])
    run, work = Run.from_dict(job["run"]), Path(job["work"])
    model = quick_to_train(Path(job["model"]) if job["model"] else packaged_model(), work.parent / "base")
    stream = STREAMS[run.stream]
    validation = run.settings.get("validation", False)
    places = write_data(run.stream, Path(job["data"]), work / "data", validation=validation)
    started = time.monotonic()
    if run.stream == "smollm2":
        own_text = Path(job["data"]) / "cl_bench" / OWN_TEXT / "test.jsonl"
        keep(job, run, _language_run.learn(run, places, own_text, work), started)
        return
    tokenizer = AutoTokenizer.from_pretrained(model)
    tasks = {
        name: load_text_task(
            name,
            places[name],
            tokenizer,
            metrics=[stream.metric(name)],
            max_length=run.settings["max_length"],
            train_examples=run.settings["train_examples"],
        )
        for name in run.tasks
    }
    if run.method in SHARE_METHODS:
        result = _share_run.learn(run, places, model, tasks, tokenizer, work)
    elif run.method == "merged":
        result = merged(run, model, tasks, tokenizer, work)
    else:
        result = baseline(run, model, tasks, tokenizer, work)
    true = {name: encoded(np.asarray(list(task.scored["label"]))) for name, task in tasks.items()}
    described = {"metrics": {name: task.metrics[0] for name, task in tasks.items()}, "true": true}
    keep(job, run, {**described, **result}, started)


def quick_to_train(model: Path, folder: Path) -> Path:
    """Make a copy of a base model that has no dropout, and whose attention is made of plain matrix products.

    With a thousand examples, dropout mostly slows learning, and it makes every step a quarter longer. The fused kernel
    of attention makes a step in bfloat16 on a CPU twice as long as plain products, from which it differs by rounding.
    """
    if not folder.exists():
        draft = Path(shutil.copytree(model, folder.with_name(f"{folder.name}.{os.getpid()}")))
        config = json.loads((draft / "config.json").read_text(encoding="utf-8"))
        config |= {name: 0.0 for name in config if name.endswith(("dropout_prob", "dropout"))}
        config["attn_implementation"] = "eager"
        (draft / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        with contextlib.suppress(OSError):  # another run made the folder in the meantime
            draft.rename(folder)
    return folder


def keep(job: Mapping[str, Any], run: Run, result: Mapping[str, Any], started: float) -> None:
    """Write the result of a run, with versions and machine."""
    facts = {"seconds": time.monotonic() - started, "versions": versions(), "machine": machine()}
    Results(Path(job["results"])).add(run, {**result, **facts})


def baseline(
    run: Run, model: Path, tasks: Mapping[str, TextTask], tokenizer: PreTrainedTokenizerBase, work: Path
) -> dict[str, Any]:
    """Learn a stream with one of the other methods."""
    settings = {name: value for name, value in run.settings.items() if name not in OF_DATA}
    rank, of_heads = settings.pop("pseudo_rank"), settings.pop("head_learning_rate", None)
    args = TrainingArguments(
        str(work / "out"),
        seed=run.seed,
        per_device_eval_batch_size=128,
        train_sampling_strategy="group_by_length",
        report_to="none",
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        **settings,
    )
    set_seed(run.seed)
    outputs = max(task.num_labels for task in tasks.values())
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=outputs)
    modules = run.settings["target_modules"].split(",")
    baseline_settings = BaselineSettings(args, modules, rank, head_learning_rate=of_heads, processing_class=tokenizer)
    keep_in = loras_of(run, work) if (run.stream, run.method) == ("fifty", "lora") else None
    method = "lora" if run.method == "lora-fast" else run.method
    return measured(train(method, base, tasks, baseline_settings, keep_in=keep_in), tasks)


def loras_of(run: Run, work: Path) -> Path:
    """Return the folder that keeps the LoRAs of a run for the runs that merge them."""
    (folder := work.parent / "loras").mkdir(exist_ok=True)
    return folder / run.name


def merged(
    run: Run, model: Path, tasks: Mapping[str, TextTask], tokenizer: PreTrainedTokenizerBase, work: Path
) -> dict[str, Any]:
    """Merge LoRAs of several seeds, after training the missing ones."""
    loras = {}
    for seed in run.settings["seeds"]:
        settings = {name: value for name, value in run.settings.items() if name not in OF_MERGES}
        lora = replace(run, method="lora", seed=seed, order=None, settings=settings)
        loras[seed] = loras_of(lora, work)
        if not loras[seed].is_dir():
            baseline(lora, model, tasks, tokenizer, work)
    outputs = max(task.num_labels for task in tasks.values())
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=outputs)
    return _merged_run.merge(run, base, tasks, tokenizer, loras, work)


def measured(outcome: Outcome, tasks: Mapping[str, TextTask]) -> dict[str, Any]:
    """Convert an outcome to the form of the results."""
    return {
        "answers": {
            name: encoded(chosen(outcome.predictions[name], task.problem_type, task.num_labels))
            for name, task in tasks.items()
        },
        "matrix": outcome.metrics.matrix,
        "trained": outcome.steps[-1].adapter_parameters,
        "bytes": {
            "shared": outcome.bytes_shared,
            "tasks": sum(outcome.bytes_of_tasks.values()),
        },
    }


if __name__ == "__main__":
    main()
