"""Two tasks that a plain Trainer learns with ShareCallback. The tests run this under one launcher or another.

python foreign.py '{"folder": "out", …}'; the other keys are arguments of the Trainer.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from share_hf import ShareCallback, SharedSubspace
from tests.conftest import _tiny_llama
from tests.continual.cases import LLAMA_TARGETS, config, language_task
from tests.distributed import fsdp_on_cpu


def main() -> None:
    fsdp_on_cpu.allow()
    options: dict[str, Any] = json.loads(next(argument for argument in sys.argv[1:] if argument.startswith("{")))
    folder = Path(options.pop("folder"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    args = TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=8 // world, learning_rate=5e-3, seed=3,
        lr_scheduler_type="constant", save_strategy="no", report_to="none", disable_tqdm=True, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    base = _tiny_llama()
    before = SharedSubspace.from_pretrained(folder) if folder.exists() else None
    if before is None:
        model, task = get_peft_model(base, config(LLAMA_TARGETS)), "a"
    else:
        model, task = before.apply(base), "b"
    callback = ShareCallback(task, before)
    data = language_task("ab".index(task))["train"]
    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[callback])
    trainer.train()
    if args.process_index == 0:
        callback.subspace.save_pretrained(folder)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
