"""Learn a stream of text classification tasks with an encoder, one after the other, in one shared subspace.

    accelerate launch recipes/text_stream.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \
        --tasks agnews=data/agnews sst2=data/sst2 amazon=data/amazon
    accelerate launch recipes/text_stream.py ... --method coefficients
    accelerate launch recipes/text_stream.py ... --method per_task_lora
    accelerate launch recipes/text_stream.py --config stream.yaml

A task has a `text` and a `label` column, and may have any number of labels: each brings its own head. It prints a line
a task and the accuracy matrix, and leaves the subspace with a model card in `<output_dir>/subspace`. `--method` runs
the baselines the same way: a LoRA of its own for each task, or one LoRA trained on all tasks in their order.
"""

from __future__ import annotations

import quiet  # noqa: F401


# isort: split
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from datasets import ClassLabel, DatasetDict
from peft import LoraConfig, PeftModel
from task_data import dataset_ids, flags_with_config, load_task, parse_tasks, quantization, train_loras
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

from share_hf import ShareConfig, ShareTrainer, ShareTrainingArguments
from share_hf.continual.labels import LabelMask


@dataclass
class ScriptArguments:
    """What to learn, and on what."""

    model_name_or_path: str = field(metadata={"help": "Folder or hub id of an encoder."})
    tasks: list[str] = field(metadata={"help": "name=place for each task: a file, a folder, or a datasets id."})
    train_examples: int | None = field(default=None, metadata={"help": "Use only the first examples of each task."})
    max_length: int = field(default=64, metadata={"help": "Tokens of a text at most."})
    target_modules: str = field(default="query,value,intermediate.dense", metadata={"help": "Modules to adapt."})
    num_components: int = field(default=32, metadata={"help": "Cap on the directions of a layer's basis (k)."})
    pseudo_rank: int = field(default=8, metadata={"help": "Rank of a task (p), and of the baselines' LoRAs."})
    num_temporary: int | None = field(default=None, metadata={"help": "Temporary factors (φ); k // 4 if not given."})
    init_std: float = field(default=0.05, metadata={"help": "Spread of a new task's coefficients (σ)."})
    drift_tolerance: float | None = field(default=None, metadata={"help": "Largest drift merges may add up to."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the model to NF4 with bitsandbytes."})


@dataclass
class StreamArguments(ShareTrainingArguments):
    """Arguments of ShareTrainer, with the defaults of this recipe."""

    output_dir: str | None = field(default="text-stream", metadata={"help": "Where to leave the subspace."})
    method: Literal["share", "coefficients", "per_task_lora", "sequential_lora"] = field(
        default="share", metadata={"help": "How to learn a task; the last two are baselines."}
    )
    learning_rate: float = field(default=5e-3, metadata={"help": "Learning rate of the adapt phase."})
    init_learning_rate: float | None = field(default=4e-3, metadata={"help": "Learning rate of LoRA factors."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Epochs of each task."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Examples a step and device."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Examples to score at once."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of warm-up; under 1, a share of all."})
    train_sampling_strategy: str = field(default="group_by_length", metadata={"help": "Batch texts of like length."})
    save_strategy: str = field(default="no", metadata={"help": "When a phase writes checkpoints to resume from."})
    report_to: str = field(default="none", metadata={"help": "Where to log: tensorboard, wandb, trackio …"})
    dataloader_pin_memory: bool = field(default=torch.cuda.is_available(), metadata={"help": "Pin host memory."})


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, StreamArguments))
    script, args = parser.parse_args_into_dataclasses(flags_with_config())
    set_seed(args.seed)

    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    places = parse_tasks(script.tasks)
    tasks = {
        name: tokenize(name, load_task(place, script.train_examples), tokenizer, script.max_length)
        for name, place in places.items()
    }
    num_labels = {name: data["train"].features["label"].num_classes for name, data in tasks.items()}
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = AutoModelForSequenceClassification.from_pretrained(
        script.model_name_or_path,
        num_labels=max(num_labels.values()),
        dtype=dtype,
        quantization_config=quantization(script.load_in_4bit, dtype),
    )
    target_modules = script.target_modules.split(",")

    if args.method in ("per_task_lora", "sequential_lora"):
        print(lora_baseline(model, script, args, tasks, num_labels, tokenizer, target_modules))
        return

    config = ShareConfig(
        num_components=script.num_components,
        pseudo_rank=script.pseudo_rank,
        num_temporary=script.num_temporary,
        init_std=script.init_std,
        drift_tolerance=script.drift_tolerance,
        target_modules=target_modules,
    )
    trainer = ShareTrainer(model, args, config, tasks, dataset_ids=dataset_ids(places), processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.is_world_process_zero():
        print(trainer.metrics_table)
        print(f"Subspace of {len(trainer.subspace.tasks)} tasks in {args.output_dir}/subspace")
    trainer.accelerator.end_training()


def tokenize(name: str, data: DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> DatasetDict:
    """Token ids, and labels as numbers; the labels are those of the training data."""
    labels = sorted({str(label) for label in data["train"]["label"]})

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        texts = tokenizer(batch["text"], truncation=True, max_length=max_length)
        return {**texts, "label": [label_number(name, str(label), labels) for label in batch["label"]]}

    encoded = data.map(encode, batched=True, remove_columns=data["train"].column_names, desc=f"Tokenizing {name}")
    return encoded.cast_column("label", ClassLabel(names=labels))


def label_number(task: str, label: str, labels: list[str]) -> int:
    if label not in labels:
        raise ValueError(f"task {task!r} has label {label!r}, expected one of those it is trained on: {labels}")
    return labels.index(label)


def lora_baseline(
    model: torch.nn.Module,
    script: ScriptArguments,
    args: StreamArguments,
    tasks: Mapping[str, DatasetDict],
    num_labels: Mapping[str, int],
    tokenizer: PreTrainedTokenizerBase,
    target_modules: list[str],
) -> str:
    """The accuracy matrix of LoRAs at the learning rate of free factors, each task's labels masked as ours are."""
    args.learning_rate = args.init_learning_rate or args.learning_rate
    rank = script.pseudo_rank
    labels_of_adapter: dict[str, int] = {}

    def prepare(peft_model: PeftModel, task: str) -> None:
        if not labels_of_adapter:
            LabelMask(peft_model, labels_of_adapter.get)
        labels_of_adapter[peft_model.active_adapter] = num_labels[task]

    def score(trainer: Trainer, task: str, data: Any) -> float:
        prediction = trainer.predict(data)
        return float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())

    metrics = train_loras(
        model,
        args,
        LoraConfig(r=rank, lora_alpha=rank, target_modules=target_modules, task_type="SEQ_CLS"),
        tasks,
        score,
        sequential=args.method == "sequential_lora",
        prepare=prepare,
        processing_class=tokenizer,
    )
    return metrics.table()


if __name__ == "__main__":
    sys.exit(main())
