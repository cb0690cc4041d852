"""Learn a stream with a causal LM by running the recipe as a user would, with results in the common form."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _answers import encoded
from _grid import Run
from _report import ROOT
from _smollm2 import unpacked


RECIPE = ROOT / "recipes" / "llama_stream.py"
METHODS = {"share": "share", "coefficients": "coefficients", "lora": "per_task_lora", "sequential": "sequential_lora"}


def learn(run: Run, places: Mapping[str, str], own_text: Path, work: Path) -> dict[str, Any]:
    """Learn a stream and return its result, including the loss of its adapters on texts that belong to no task.

    Args:
        run: Run whose settings are flags of the recipe.
        places: Path of each task's data.
        own_text: File of texts that belong to no task.
        work: Folder for this run only. The unpacked model goes beside it, in its parent folder.
    """
    model = unpacked(work.parent / "smollm2")
    found = work / "results.json"
    flags = {
        "model_name_or_path": model,
        "method": METHODS[run.method],
        "output_dir": work / "out",
        "seed": run.seed,
        "use_cpu": not torch.cuda.is_available(),
        "results_json": found,
        "own_text": own_text,
        **{name: value for name, value in run.settings.items() if name != "validation"},
    }
    command = [sys.executable, str(RECIPE), "--tasks", *(f"{task}={places[task]}" for task in run.tasks)]
    for name, value in flags.items():
        command += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    subprocess.run(command, check=True)
    return measured(run, json.loads(found.read_text(encoding="utf-8")))


def measured(run: Run, found: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the results file of the recipe to the form of the other results."""
    own = found["own_text"]
    return {
        "metrics": dict.fromkeys(run.tasks, "accuracy"),
        "true": {task: encoded(np.array(kept["expected"])) for task, kept in found["tasks"].items()},
        "answers": {task: encoded(np.array(kept["chosen"])) for task, kept in found["tasks"].items()},
        "matrix": found["metrics"]["matrix"],
        "trained": found["trained_parameters"][run.tasks[-1]],
        "bytes": {"shared": found["bytes"]["shared"], "tasks": sum(found["bytes"]["tasks"].values())},
        "own_loss": {"without": own["without"], "with": statistics.mean(own["with"].values())},
    }
