"""Learn a stream of text tasks with an encoder, one after the other, in one shared subspace.

    accelerate launch recipes/text_stream.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \
        --tasks agnews=data/agnews sst2=data/sst2 amazon=data/amazon
    accelerate launch recipes/text_stream.py ... --method coefficients
    accelerate launch recipes/text_stream.py ... --method per_task_lora
    accelerate launch recipes/text_stream.py ... --tasks cola=data/cola mrpc=nyu-mll/glue:mrpc stsb=data/stsb \
        --text_columns stsb=left,right --metrics mrpc=f1 --problem_types stsb=regression
    accelerate launch recipes/text_stream.py --config stream.yaml

A task has texts or pairs of texts and a `label`: a class, a number to predict, or a list of labels. Tasks of different
kinds can follow one another, because each has its own head, loss and metric. The script prints what it found in the
data, a line for each task and the matrix of scores, and saves the subspace with a model card in
`<output_dir>/subspace`. `--method` also runs the baselines: a separate LoRA for each task, or one LoRA trained on all
tasks in their order.
"""

from __future__ import annotations

import quiet  # noqa: F401


# isort: split
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from lora_baselines import classifier_loras
from peft import LoraConfig
from task_data import by_task, check_score_metric, dataset_ids, flags_with_config, parse_tasks, quantization
from text_tasks import TextTask, load_text_task
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    set_seed,
)

from share_hf import ShareConfig, ShareTrainer, ShareTrainingArguments
from share_hf.continual.problems import CLASSES, loss_of


@dataclass
class ScriptArguments:
    """What to learn, and on what."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of an encoder."})
    tasks: list[str] = field(metadata={"help": "name=place for each task: a file, a folder, or a datasets id."})
    text_columns: list[str] = field(
        default_factory=list, metadata={"help": "Columns of texts, first,second for pairs: for all tasks, or name=…"}
    )
    problem_types: list[str] = field(
        default_factory=list, metadata={"help": "name=regression, for example, if a task's labels are ambiguous."}
    )
    metrics: list[str] = field(
        default_factory=list, metadata={"help": "name=metric or name=first,second; the first is the task's score."}
    )
    train_examples: int | None = field(default=None, metadata={"help": "Training examples per task, from the first."})
    max_length: int = field(default=64, metadata={"help": "Largest number of tokens of a text, or of a pair."})
    target_modules: str = field(default="query,value,intermediate.dense", metadata={"help": "Modules to adapt."})
    num_components: int = field(default=32, metadata={"help": "Cap on the number of directions per layer (k)."})
    pseudo_rank: int = field(default=8, metadata={"help": "Rank of a task (p), and of the baselines' LoRAs."})
    num_temporary: int | None = field(default=None, metadata={"help": "Temporary factors (φ); k // 4 by default."})
    temporary_init: Literal["basis", "span", "random"] = field(
        default="span",
        metadata={"help": "How temporary factors start: as in the paper, or as a LoRA, in the basis' span or not."},
    )
    basis: Literal["joint", "factor"] = field(default="joint", metadata={"help": "How merges choose the basis."})
    center: bool = field(
        default=False, metadata={"help": "Center the factors in merges, as the paper does (only with 'factor')."}
    )
    init_std: float = field(default=0.05, metadata={"help": "Standard deviation of a new task's coefficients (σ)."})
    drift_tolerance: float | None = field(default=None, metadata={"help": "Largest drift that merges may add up to."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the model to NF4 with bitsandbytes."})


@dataclass
class StreamArguments(ShareTrainingArguments):
    """Arguments of ShareTrainer, with the defaults of this recipe."""

    output_dir: str | None = field(default="text-stream", metadata={"help": "Folder to write the subspace to."})
    method: Literal["share", "coefficients", "per_task_lora", "sequential_lora"] = field(
        default="share", metadata={"help": "How to learn a task; the last two are baselines."}
    )
    learning_rate: float = field(default=4e-3, metadata={"help": "Learning rate of the adapt phase."})
    init_learning_rate: float | None = field(default=4e-3, metadata={"help": "Learning rate of LoRA factors."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Number of epochs per task."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Number of examples per step and device."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Number of examples to score at once."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Number of warm-up steps; below 1, a fraction."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "Batch texts of similar length."}
    )
    save_strategy: str = field(default="no", metadata={"help": "When a phase writes checkpoints to resume from."})
    report_to: str = field(default="none", metadata={"help": "Where to log, such as tensorboard, wandb or trackio."})
    dataloader_pin_memory: bool = field(default=torch.cuda.is_available(), metadata={"help": "Pin host memory."})


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, StreamArguments))
    script, args = parser.parse_args_into_dataclasses(flags_with_config())
    set_seed(args.seed)

    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    places = parse_tasks(script.tasks)
    tasks = load_tasks(script, places, tokenizer)
    check_score_metric(args.score_metric, {name: task.metrics for name, task in tasks.items()})
    if args.process_index == 0:
        print(*(task.summary for task in tasks.values()), sep="\n")
    compute_dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = AutoModelForSequenceClassification.from_pretrained(
        script.model_name_or_path,
        num_labels=max(task.num_labels for task in tasks.values()),
        # With bf16, weights stay float32 and autocast rounds what is computed: in bfloat16, small steps of a head are
        # lost.
        dtype=compute_dtype if script.load_in_4bit else torch.float32,
        quantization_config=quantization(script.load_in_4bit, compute_dtype),
    )
    target_modules = script.target_modules.split(",")

    if args.method in ("per_task_lora", "sequential_lora"):
        table = lora_baseline(model, script, args, tasks, tokenizer, target_modules)
        if args.process_index == 0:
            print(table)
        return

    config = ShareConfig(
        num_components=script.num_components,
        pseudo_rank=script.pseudo_rank,
        num_temporary=script.num_temporary,
        temporary_init=script.temporary_init,
        basis=script.basis,
        center=script.center,
        init_std=script.init_std,
        drift_tolerance=script.drift_tolerance,
        target_modules=target_modules,
    )
    trainer = ShareTrainer(
        model,
        args,
        config,
        {name: task.data for name, task in tasks.items()},
        dataset_ids=dataset_ids(places),
        labels={name: task.labels for name, task in tasks.items()},
        compute_metrics={name: task.compute_metrics for name, task in tasks.items()},
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.is_world_process_zero():
        print(trainer.metrics_table)
        print(f"Subspace of {len(trainer.subspace.tasks)} tasks in {args.output_dir}/subspace")
    trainer.accelerator.end_training()


def load_tasks(
    script: ScriptArguments, places: Mapping[str, str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, TextTask]:
    """Load the tasks, each with the columns, the problem type and the metrics that the flags set for it."""
    of_all = [columns for columns in script.text_columns if "=" not in columns]
    if len(of_all) > 1:
        raise ValueError(f"--text_columns has {of_all}, expected one entry for all tasks, or name=first,second")
    columns = dict.fromkeys(places, of_all[0].split(",")) if of_all else {}
    columns |= by_task("--text_columns", [each for each in script.text_columns if "=" in each], places)
    kinds = by_task("--problem_types", script.problem_types, places)
    metrics = by_task("--metrics", script.metrics, places)
    return {
        name: load_text_task(
            name,
            place,
            tokenizer,
            text_columns=columns.get(name),
            problem_type=",".join(kinds[name]) if name in kinds else None,
            metrics=metrics.get(name),
            max_length=script.max_length,
            train_examples=script.train_examples,
        )
        for name, place in places.items()
    }


def lora_baseline(
    model: torch.nn.Module,
    script: ScriptArguments,
    args: StreamArguments,
    tasks: Mapping[str, TextTask],
    tokenizer: PreTrainedTokenizerBase,
    target_modules: list[str],
) -> str:
    """Train a LoRA baseline and return its score matrix.

    It uses the learning rate of LoRA factors, and the same heads, losses and metrics as Share.
    """
    args.learning_rate = args.init_learning_rate or args.learning_rate
    rank = script.pseudo_rank

    def measure(task: str, outputs: np.ndarray, labels: np.ndarray) -> float:
        return tasks[task].scores(outputs, labels)[tasks[task].metrics[0]]

    def loss(task: str, logits: Tensor, labels: Tensor, num_items: Tensor | None) -> Tensor:
        return loss_of(tasks[task].problem_type, logits, labels, tasks[task].num_labels, num_items)

    # The model's own loss supports label smoothing, which applies to classes only.
    are_classes = all(task.problem_type == CLASSES for task in tasks.values())
    metrics = classifier_loras(
        model,
        args,
        LoraConfig(r=rank, lora_alpha=rank, target_modules=target_modules, task_type="SEQ_CLS"),
        {name: task.data for name, task in tasks.items()},
        {name: task.num_labels for name, task in tasks.items()},
        measure,
        sequential=args.method == "sequential_lora",
        loss=None if are_classes else loss,
        score_names={name: task.metrics[0] for name, task in tasks.items()},
        processing_class=tokenizer,
    )
    return metrics.table()


if __name__ == "__main__":
    sys.exit(main())
