"""Merge trained LoRAs into one subspace, ten at a time, and compare the answers before and after."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from _answers import encoded
from _baselines import HEAD_FILE
from _baselines_heads import kept_head, without_classifier
from _grid import Run
from _share_run import stored_bytes, task_answers
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from share_hf import SharedSubspace


if TYPE_CHECKING:
    from text_tasks import TextTask


def merge(
    run: Run,
    base: PreTrainedModel,
    tasks: Mapping[str, TextTask],
    tokenizer: PreTrainedTokenizerBase,
    loras: Mapping[int, Path],
    work: Path,
) -> dict[str, Any]:
    """Merge one LoRA per task and seed into a subspace, a few at a time, and answer all test examples.

    Args:
        run: Run whose settings have those of the subspace, the number of LoRAs per merge (`together`), and the numbers
            of merged tasks after which all tasks are scored (`scored`).
        base: Base model. The heads of the LoRAs replace its classifier.
        tasks: Tokenized tasks by name.
        tokenizer: Tokenizer of the model.
        loras: Folder with the LoRA and the head of each task, by seed.
        work: Folder for this run only.

    Returns:
        Result of the run, in which each task appears once per seed, as `task-s0`.
    """
    settings = run.settings
    arrived = {f"{task}-s{seed}": folder / task for seed, folder in loras.items() for task in run.tasks}
    of_task = {name: tasks[name.rpartition("-s")[0]] for name in arrived}
    heads = {name: kept_head(base, of_task[name].num_labels, folder / HEAD_FILE) for name, folder in arrived.items()}
    backbone = without_classifier(base)

    def answers(model: PeftModel, names: Sequence[str], adapter: Callable[[str], str]) -> dict[str, Any]:
        found = {}
        for name in names:
            model.set_adapter(adapter(name))
            with torch.autocast("cpu", torch.bfloat16, enabled=settings["bf16"]):  # as in the other runs
                found[name] = task_answers(
                    lambda inputs, head=heads[name]: head(model(**inputs).logits), of_task[name], tokenizer
                )
        return found

    before: dict[str, Any] = {}
    for name, folder in arrived.items():
        lora = PeftModel.from_pretrained(copy.deepcopy(backbone), str(folder), adapter_name="lora").eval()
        before |= answers(lora, [name], lambda _: "lora")
    names, stages, subspace = list(arrived), {}, None
    for start in range(0, len(names), settings["together"]):
        newcomers = {name: str(arrived[name]) for name in names[start : start + settings["together"]]}
        if subspace is None:
            k = settings["num_components"]
            subspace = SharedSubspace.from_adapters(
                newcomers, num_components=k, pseudo_rank=min(k, settings["pseudo_rank"]), basis=settings["basis"]
            )
        else:
            subspace.add_adapters(newcomers)
        if (end := len(subspace.tasks)) in settings["scored"] or end == len(names):
            model = subspace.apply(copy.deepcopy(backbone)).eval()
            drift = {task.name: [task.drift, task.drift_bound] for task in subspace.report().tasks}
            stages[end] = {"answers": answers(model, subspace.tasks, lambda name: name), "drift": drift}
    subspace.save_pretrained(work / "subspace")
    return {
        "metrics": {name: task.metrics[0] for name, task in of_task.items()},
        "true": {name: encoded(np.asarray(list(task.scored["label"]))) for name, task in of_task.items()},
        "before": before,
        **stages.pop(len(names)),
        "stages": {str(end): stage for end, stage in stages.items()},
        "bytes": stored_bytes(work / "subspace"),
        "trained": 0,
    }
