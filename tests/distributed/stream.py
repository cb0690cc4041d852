"""A small stream. The tests run it under one launcher or another.

python stream.py '{"folder": "out", "model": "bert", …}'; the other keys are arguments of the trainer.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import DatasetDict
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from share_hf import ShareConfig, ShareTrainer, ShareTrainingArguments
from tests.conftest import _tiny_bert, _tiny_llama
from tests.continual.cases import (
    BERT_TARGETS,
    LLAMA_TARGETS,
    At,
    Interruption,
    arguments,
    classification_tasks,
    config,
    language_tasks,
)
from tests.distributed import fsdp_on_cpu


QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.float32),
    "nf4-uint8": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fp4-nested-bfloat16": dict(
        load_in_4bit=True,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    ),
    "int8": dict(load_in_8bit=True),
}


def main() -> None:
    options = json.loads(next(argument for argument in sys.argv[1:] if argument.startswith("{")))
    folder, kind, tasks = Path(options.pop("folder")), options.pop("model"), options.pop("tasks", 3)
    resume, quantized = options.pop("resume", False), options.pop("quantized", None)
    broken_off, together = options.pop("broken_off", None), options.pop("together", None)
    fsdp_on_cpu.allow()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    values = dict(
        max_steps=4, per_device_train_batch_size=8 // world, seed=3, weight_decay=0.0, optim="adamw_torch",
        lr_scheduler_type="constant", save_strategy="steps", save_steps=2,
    )  # fmt: skip
    args = arguments(folder, **{**values, **options})  # before the model, because ZeRO-3 partitions it at once
    torch.manual_seed(0)
    if kind == "bert":
        model, share, data = (
            _tiny_bert(),
            config(BERT_TARGETS),
            classification_tasks(*["colors", "shapes", "sizes"][:tasks]),
        )
    else:
        model, share, data = _llama(folder, quantized), config(LLAMA_TARGETS), language_tasks(*"abc"[:tasks])
    _train(model, args, share, data, resume, broken_off, together)


def _llama(folder: Path, quantized: str | None) -> torch.nn.Module:
    if quantized is None:
        return _tiny_llama()
    base = folder.with_name("base")
    with PartialState().main_process_first():
        if not base.exists():
            _tiny_llama().save_pretrained(base)
    options = QUANTIZATIONS[quantized]
    dtype = options.get("bnb_4bit_compute_dtype", torch.float32)
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(**options), dtype=dtype)


def _train(
    model: torch.nn.Module,
    args: ShareTrainingArguments,
    share: ShareConfig,
    data: dict[str, DatasetDict],
    resume: bool,
    broken_off: bool | None,
    together: list[str] | None,
) -> None:
    """Train the stream, or its last task by itself after a save, and on request after an attempt that fails."""
    last = list(data)[-1] if broken_off is not None else None
    tasks = {name: splits for name, splits in data.items() if name != last}
    trainer = ShareTrainer(model, args, share, tasks, together=together)
    trainer.train(resume_from_checkpoint=resume or None)
    if last is not None:
        splits = list(data[last].values())
        trainer.save_model(str(Path(args.output_dir, "adapters")))
        if broken_off:
            breaks = At("on_step_end", _break_off)
            trainer.add_callback(breaks)
            with suppress(Interruption):
                trainer.learn_task(last, *splits)
            trainer.remove_callback(breaks)
            trainer.evaluate_tasks()
        trainer.learn_task(last, *splits)
    if trainer.is_world_process_zero():
        print(trainer.metrics_table)
    trainer.accelerator.end_training()


def _break_off(args: Any, state: Any, **kwargs: Any) -> None:
    raise Interruption


if __name__ == "__main__":
    main()
