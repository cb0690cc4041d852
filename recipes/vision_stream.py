"""Learn a stream of image classification tasks with a ViT, one after the other, in one shared subspace.

    python recipes/train_digits_vit.py digits-vit
    accelerate launch recipes/vision_stream.py --model_name_or_path digits-vit
    accelerate launch recipes/vision_stream.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --tasks pets=data/pets beans=AI-Lab-Makerere/beans
    accelerate launch recipes/vision_stream.py ... --method coefficients
    accelerate launch recipes/vision_stream.py ... --method per_task_lora
    accelerate launch recipes/vision_stream.py --config stream.yaml

A task is a folder of images, a `datasets` id, or a task made from scikit-learn's digits, such as those listed in
`digits.py`. Without `--tasks`, the script learns the six tasks in that list. Tasks may differ in their number of
labels, because each has its own head. The script prints a line for each task and the accuracy matrix, and saves the
subspace with a model card in `<output_dir>/subspace`. `--method` also runs the baselines: a separate LoRA for each
task, or one LoRA trained on all tasks in their order.
"""

from __future__ import annotations

import quiet  # noqa: F401


# isort: split
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from datasets import DatasetDict
from digits import PREFIX, TASKS
from image_tasks import load_images, with_pixels
from lora_baselines import classifier_loras
from peft import LoraConfig
from task_data import dataset_ids, flags_with_config, parse_tasks, quantization
from transformers import AutoImageProcessor, AutoModelForImageClassification, HfArgumentParser, set_seed

from share_hf import ShareConfig, ShareTrainer, ShareTrainingArguments
from share_hf.tuner.head import parts_to_keep


@dataclass
class ScriptArguments:
    """What to learn, and on what."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of a model for images."})
    tasks: list[str] = field(
        default_factory=TASKS.copy,
        metadata={"help": "name=place for each task: a folder, a datasets id, or digits:…; digits tasks by default."},
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of images; detected by default."})
    label_column: str | None = field(default=None, metadata={"help": "Column of labels; detected by default."})
    train_examples: int | None = field(default=None, metadata={"help": "Training examples per task, from the first."})
    target_modules: str = field(
        default="q_proj,v_proj,fc1,query,value,intermediate.dense",
        metadata={"help": "Modules to adapt; those that the model does not have are ignored."},
    )
    num_components: int = field(default=32, metadata={"help": "Cap on the number of directions per layer (k)."})
    pseudo_rank: int = field(default=8, metadata={"help": "Rank of a task (p), and of the baselines' LoRAs."})
    num_temporary: int | None = field(default=None, metadata={"help": "Temporary factors (φ); k // 4 by default."})
    temporary_init: Literal["basis", "span", "random"] = field(
        default="span",
        metadata={"help": "How temporary factors start: as in the paper, or as a LoRA, in the basis' span or not."},
    )
    init_std: float = field(default=0.05, metadata={"help": "Standard deviation of a new task's coefficients (σ)."})
    drift_tolerance: float | None = field(default=None, metadata={"help": "Largest drift that merges may add up to."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the model to NF4 with bitsandbytes."})


@dataclass
class StreamArguments(ShareTrainingArguments):
    """Arguments of ShareTrainer, with the defaults of this recipe."""

    output_dir: str | None = field(default="vision-stream", metadata={"help": "Folder to write the subspace to."})
    method: Literal["share", "coefficients", "per_task_lora", "sequential_lora"] = field(
        default="share", metadata={"help": "How to learn a task; the last two are baselines."}
    )
    learning_rate: float = field(default=1e-2, metadata={"help": "Learning rate of the adapt phase."})
    init_learning_rate: float | None = field(default=1e-2, metadata={"help": "Learning rate of LoRA factors."})
    coefficients_learning_rate: float = field(
        default=2e-2, metadata={"help": "Learning rate with --method coefficients."}
    )
    num_train_epochs: float = field(default=8.0, metadata={"help": "Number of epochs per task."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Number of examples per step and device."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Number of examples to score at once."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Number of warm-up steps; below 1, a fraction."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Off, because images are read when they are needed."}
    )
    save_strategy: str = field(default="no", metadata={"help": "When a phase writes checkpoints to resume from."})
    report_to: str = field(default="none", metadata={"help": "Where to log, such as tensorboard, wandb or trackio."})
    dataloader_pin_memory: bool = field(default=torch.cuda.is_available(), metadata={"help": "Pin host memory."})


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, StreamArguments))
    script, args = parser.parse_args_into_dataclasses(flags_with_config())
    if args.method == "coefficients":
        args.learning_rate = args.coefficients_learning_rate
    set_seed(args.seed)

    processor = AutoImageProcessor.from_pretrained(script.model_name_or_path)
    places = parse_tasks(script.tasks)
    columns = {"image_column": script.image_column, "label_column": script.label_column}
    tasks = {
        name: with_pixels(load_images(place, script.train_examples, **columns), processor)
        for name, place in places.items()
    }
    num_labels = {name: data["train"].features["label"].num_classes for name, data in tasks.items()}
    compute_dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = AutoModelForImageClassification.from_pretrained(
        script.model_name_or_path,
        num_labels=max(num_labels.values()),
        # With bf16, weights stay float32 and autocast rounds what is computed: in bfloat16, small steps of a head are
        # lost.
        dtype=compute_dtype if script.load_in_4bit else torch.float32,
        quantization_config=quantization(script.load_in_4bit, compute_dtype, head="classifier"),
        ignore_mismatched_sizes=True,  # replaces a head for other labels, such as ImageNet's
    )
    target_modules = script.target_modules.split(",")

    if args.method in ("per_task_lora", "sequential_lora"):
        table = lora_baseline(model, script, args, tasks, num_labels, target_modules)
        if args.process_index == 0:
            print(table)
        return

    config = ShareConfig(
        num_components=script.num_components,
        pseudo_rank=script.pseudo_rank,
        num_temporary=script.num_temporary,
        temporary_init=script.temporary_init,
        init_std=script.init_std,
        drift_tolerance=script.drift_tolerance,
        target_modules=target_modules,
    )
    of_hub = dataset_ids({name: place for name, place in places.items() if not place.startswith(PREFIX)})
    trainer = ShareTrainer(model, args, config, tasks, dataset_ids=of_hub, processing_class=processor)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.is_world_process_zero():
        print(trainer.metrics_table)
        print(f"Subspace of {len(trainer.subspace.tasks)} tasks in {args.output_dir}/subspace")
    trainer.accelerator.end_training()


def lora_baseline(
    model: torch.nn.Module,
    script: ScriptArguments,
    args: StreamArguments,
    tasks: Mapping[str, DatasetDict],
    num_labels: Mapping[str, int],
    target_modules: list[str],
) -> str:
    """Train a LoRA baseline and return its accuracy matrix.

    It uses the learning rate of LoRA factors, and the same heads as Share.
    """
    args.learning_rate = args.init_learning_rate or args.learning_rate
    rank, head = script.pseudo_rank, parts_to_keep(model, None)
    metrics = classifier_loras(
        model,
        args,
        LoraConfig(r=rank, lora_alpha=rank, target_modules=target_modules, modules_to_save=head),
        tasks,
        num_labels,
        lambda task, outputs, labels: float((outputs.argmax(-1) == labels).mean()),
        sequential=args.method == "sequential_lora",
    )
    return metrics.table()


if __name__ == "__main__":
    sys.exit(main())
