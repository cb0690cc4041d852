"""Learn a stream of text tasks with a causal LM, one after the other, in one shared subspace.

    accelerate launch recipes/llama_stream.py
    accelerate launch recipes/llama_stream.py --method sequential_lora
    accelerate launch recipes/llama_stream.py --model_name_or_path meta-llama/Llama-3.2-1B \
        --tasks sst2=data/sst2.jsonl news=data/agnews/ mrpc=org/mrpc --learning_rate 1e-3 --output_dir share-llama
    accelerate launch recipes/llama_stream.py --config stream.yaml

Without arguments it needs no network: the small backbone and the tasks are in `recipes/assets/`. A task has a `text`
and a `label` column; it is trained as prompt and completion and scored by the likelihood of its labels. It prints a
line a task and the accuracy matrix, and leaves the subspace with a model card in `<output_dir>/subspace`. `--method`
runs the baselines the same way: a LoRA of its own for each task, or one LoRA trained on all tasks in their order.
"""

from __future__ import annotations

import quiet  # noqa: F401


# isort: split
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from likelihood import LabelLikelihoodScorer, PromptFormat, prompt_completion_task
from peft import LoraConfig
from task_data import dataset_ids, flags_with_config, load_task, parse_tasks, quantization, train_loras
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    set_seed,
)

from share_hf import ShareConfig, ShareTrainer, ShareTrainingArguments


ASSETS = Path(__file__).parent / "assets"


@dataclass
class ScriptArguments:
    """What to learn, and on what."""

    model_name_or_path: str = field(
        default=str(ASSETS / "backbone"), metadata={"help": "Folder or hub id of a causal LM."}
    )
    tasks: list[str] = field(
        default_factory=list,
        metadata={"help": "name=place for each task: a jsonl or csv file, a folder, or a datasets id."},
    )
    train_examples: int | None = field(default=None, metadata={"help": "Use only the first examples of each task."})
    max_length: int = field(default=256, metadata={"help": "Tokens of a prompt at most."})
    target_modules: str = field(default="all-linear", metadata={"help": "Modules to adapt, comma-separated."})
    num_components: int = field(default=32, metadata={"help": "Cap on the directions of a layer's basis (k)."})
    pseudo_rank: int = field(default=8, metadata={"help": "Rank of a task (p), and of the baselines' LoRAs."})
    num_temporary: int | None = field(default=None, metadata={"help": "Temporary factors (φ); k // 4 if not given."})
    init_std: float = field(default=0.05, metadata={"help": "Spread of a new task's coefficients (σ)."})
    drift_tolerance: float | None = field(default=None, metadata={"help": "Largest drift merges may add up to."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the model to NF4 with bitsandbytes."})


@dataclass
class StreamArguments(ShareTrainingArguments):
    """Arguments of ShareTrainer, with the defaults of this recipe."""

    output_dir: str | None = field(default="llama-stream", metadata={"help": "Where to leave the subspace."})
    method: Literal["share", "coefficients", "per_task_lora", "sequential_lora"] = field(
        default="share", metadata={"help": "How to learn a task; the last two are baselines."}
    )
    learning_rate: float = field(default=5e-3, metadata={"help": "Learning rate of the adapt phase."})
    init_learning_rate: float | None = field(default=4e-3, metadata={"help": "Learning rate of LoRA factors."})
    num_train_epochs: float = field(default=5.0, metadata={"help": "Epochs of each task."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Examples a step and device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Examples to score at once."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of warm-up; under 1, a share of all."})
    evaluate_before: bool = field(default=True, metadata={"help": "Score each task also before it is learned."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "How examples are batched; those of like length by default."}
    )
    save_strategy: str = field(default="no", metadata={"help": "When a phase writes checkpoints to resume from."})
    report_to: str = field(default="none", metadata={"help": "Where to log: tensorboard, wandb, trackio …"})
    dataloader_pin_memory: bool = field(default=torch.cuda.is_available(), metadata={"help": "Pin host memory."})


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, StreamArguments))
    script, args = parser.parse_args_into_dataclasses(flags_with_config())
    set_seed(args.seed)

    places = parse_tasks(script.tasks) or {path.name: str(path) for path in sorted((ASSETS / "tasks").iterdir())}
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    prompt_format = PromptFormat(max_length=script.max_length)
    tasks, labels = {}, {}
    for name, place in places.items():
        data = load_task(place, script.train_examples)
        tasks[name], labels[name] = prompt_completion_task(name, data, tokenizer, prompt_format)

    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        script.model_name_or_path, dtype=dtype, quantization_config=quantization(script.load_in_4bit, dtype)
    )
    scorer = LabelLikelihoodScorer(tokenizer, labels, prompt_format, args.per_device_eval_batch_size)
    collator = DataCollatorForSeq2Seq(tokenizer, model=None, label_pad_token_id=-100)
    target_modules = script.target_modules if "," not in script.target_modules else script.target_modules.split(",")

    if args.method in ("per_task_lora", "sequential_lora"):
        rank = script.pseudo_rank
        metrics = train_loras(
            model,
            baseline_arguments(args),
            LoraConfig(r=rank, lora_alpha=rank, target_modules=target_modules, task_type="CAUSAL_LM"),
            tasks,
            lambda trainer, task, data: scorer(trainer.model, task, data)["accuracy"],
            sequential=args.method == "sequential_lora",
            data_collator=collator,
        )
        print(metrics.table())
        return

    config = ShareConfig(
        num_components=script.num_components,
        pseudo_rank=script.pseudo_rank,
        num_temporary=script.num_temporary,
        init_std=script.init_std,
        drift_tolerance=script.drift_tolerance,
        target_modules=target_modules,
    )
    trainer = ShareTrainer(
        model,
        args,
        config,
        tasks,
        dataset_ids=dataset_ids(places),
        task_scorer=scorer,
        data_collator=collator,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.is_world_process_zero():
        print(trainer.metrics_table)
        print(f"Subspace of {len(trainer.subspace.tasks)} tasks in {args.output_dir}/subspace")
    trainer.accelerator.end_training()


def baseline_arguments(args: StreamArguments) -> StreamArguments:
    """A LoRA trains at the learning rate of free factors."""
    args.learning_rate = args.init_learning_rate or args.learning_rate
    return args


if __name__ == "__main__":
    sys.exit(main())
