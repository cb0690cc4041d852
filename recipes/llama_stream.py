"""Learn a stream of text tasks with a causal LM, one after the other, in one shared subspace.

    accelerate launch recipes/llama_stream.py
    accelerate launch recipes/llama_stream.py --method sequential_lora
    accelerate launch recipes/llama_stream.py --model_name_or_path meta-llama/Llama-3.2-1B \
        --tasks sst2=data/sst2.jsonl news=data/agnews/ mrpc=org/mrpc --learning_rate 1e-3 --output_dir share-llama
    accelerate launch recipes/llama_stream.py --config stream.yaml
    python recipes/benchmarks/_smollm2.py smollm2 && accelerate launch recipes/llama_stream.py \
        --config recipes/configs/smollm2.yaml --model_name_or_path smollm2 --tasks news=data/agnews/ mrpc=data/mrpc/

Without arguments, the script needs no network: the small backbone and the tasks are in `recipes/assets/`. A task has a
`label` column and a `text` column, or the columns named by `--text_columns`. It is trained as prompt and completion
and scored by the likelihood of its labels. If the tokenizer has a chat template, the prompt is the user's message and
the label is the assistant's answer. The script prints a line for each task and the accuracy matrix, and saves the
subspace with a model card in `<output_dir>/subspace`.

`--method` also runs the baselines: a separate LoRA for each task, or one LoRA trained on all tasks in their order.
`--results_json` writes a file with the answer to each example, sizes and times. With `--own_text`, it also has the
loss on texts that belong to no task, with and without each task's adapter. To choose settings, score on training
examples with `--held_out` instead of on test data.
"""

from __future__ import annotations

import quiet  # noqa: F401


# isort: split
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from likelihood import CompletionCollator, LabelLikelihoodScorer, PromptFormat, prompt_completion_task, with_text
from lora_baselines import train_loras
from peft import LoraConfig, PeftModel
from stream_results import (
    Stopwatch,
    answers,
    own_losses,
    sizes_of_loras,
    sizes_of_subspace,
    texts_of,
    write_results,
)
from task_data import check_score_metric, dataset_ids, flags_with_config, load_task, parse_tasks, quantization
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed

from share_hf import ShareConfig, ShareTrainer, ShareTrainingArguments


ASSETS = Path(__file__).parent / "assets"


@dataclass
class ScriptArguments:
    """What to learn, and on what."""

    model_name_or_path: str = field(
        default=str(ASSETS / "backbone"), metadata={"help": "Folder or Hub id of a causal LM."}
    )
    tasks: list[str] = field(
        default_factory=list,
        metadata={"help": "name=place for each task: a jsonl or csv file, a folder, or a datasets id."},
    )
    train_examples: int | None = field(default=None, metadata={"help": "Training examples per task, from the first."})
    eval_examples: int | None = field(default=None, metadata={"help": "Test examples per task, from the first."})
    held_out: int = field(
        default=0, metadata={"help": "Number of training examples, from the last, to score on instead of test data."}
    )
    text_columns: list[str] = field(
        default_factory=lambda: ["text"],
        metadata={"help": "Columns to join into the text, one per line; a task uses those that it has."},
    )
    chat_template: Literal["auto", "never"] = field(
        default="auto", metadata={"help": "Whether prompts follow the tokenizer's chat template, if it has one."}
    )
    after_text: str | None = field(
        default=None,
        metadata={"help": "Suffix of each text; {labels} stands for the labels. 'Answer:' without a chat template."},
    )
    max_length: int = field(default=256, metadata={"help": "Largest number of tokens of a prompt."})
    target_modules: str = field(default="all-linear", metadata={"help": "Modules to adapt, comma-separated."})
    num_components: int = field(default=32, metadata={"help": "Cap on the number of directions per layer (k)."})
    pseudo_rank: int = field(default=8, metadata={"help": "Rank of a task (p)."})
    lora_rank: int | None = field(default=None, metadata={"help": "Rank of the baselines' LoRAs; p by default."})
    num_temporary: int | None = field(default=None, metadata={"help": "Temporary factors (φ); k // 4 by default."})
    temporary_init: Literal["basis", "span", "random"] = field(
        default="span",
        metadata={"help": "How temporary factors start: as in the paper, or as a LoRA, in the basis' span or not."},
    )
    init_std: float = field(default=0.05, metadata={"help": "Standard deviation of a new task's coefficients (σ)."})
    drift_tolerance: float | None = field(default=None, metadata={"help": "Largest drift that merges may add up to."})
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Implementation of attention, such as eager or sdpa; the model's own by default."},
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the model to NF4 with bitsandbytes."})
    results_json: Path | None = field(
        default=None, metadata={"help": "File to write the measurements to, including the answer to each example."}
    )
    own_text: Path | None = field(
        default=None,
        metadata={"help": "jsonl, csv or text file of no task, on which each adapter's loss is measured."},
    )
    own_texts: int = field(default=100, metadata={"help": "Largest number of texts to read from that file."})


@dataclass
class StreamArguments(ShareTrainingArguments):
    """Arguments of ShareTrainer, with the defaults of this recipe."""

    output_dir: str | None = field(default="llama-stream", metadata={"help": "Folder to write the subspace to."})
    method: Literal["share", "coefficients", "per_task_lora", "sequential_lora"] = field(
        default="share", metadata={"help": "How to learn a task; the last two are baselines."}
    )
    learning_rate: float = field(default=4e-3, metadata={"help": "Learning rate of the adapt phase."})
    init_learning_rate: float | None = field(default=4e-3, metadata={"help": "Learning rate of LoRA factors."})
    coefficients_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate with --method coefficients; learning_rate by default."}
    )
    lora_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the baselines; init_learning_rate by default."}
    )
    num_train_epochs: float = field(default=5.0, metadata={"help": "Number of epochs per task."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Number of examples per step and device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Number of examples to score at once."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Number of warm-up steps; below 1, a fraction."})
    evaluate_before: bool = field(default=True, metadata={"help": "Score each task also before it is learned."})
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={"help": "How examples are batched; by default, with others of similar length."},
    )
    save_strategy: str = field(default="no", metadata={"help": "When a phase writes checkpoints to resume from."})
    report_to: str = field(default="none", metadata={"help": "Where to log, such as tensorboard, wandb or trackio."})
    dataloader_pin_memory: bool = field(default=torch.cuda.is_available(), metadata={"help": "Pin host memory."})


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, StreamArguments))
    script, args = parser.parse_args_into_dataclasses(flags_with_config())
    check_results(script, args)
    args.learning_rate = own_learning_rate(args)
    started = time.monotonic()
    set_seed(args.seed)

    places = parse_tasks(script.tasks) or {path.name: str(path) for path in sorted((ASSETS / "tasks").iterdir())}
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    prompt_format = PromptFormat.of_tokenizer(
        tokenizer, script.after_text, script.max_length, chats=script.chat_template == "auto"
    )
    check_score_metric(args.score_metric, dict.fromkeys(places, LabelLikelihoodScorer.metrics))
    own_texts = texts_of(script.own_text, script.own_texts) if script.own_text else []
    tasks, labels = {}, {}
    for name, place in places.items():
        data = load_task(place, script.train_examples, script.eval_examples, script.held_out)
        data = with_text(name, data, script.text_columns)
        tasks[name], labels[name] = prompt_completion_task(name, data, tokenizer, prompt_format)

    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        script.model_name_or_path,
        dtype=dtype,
        quantization_config=quantization(script.load_in_4bit, dtype),
        attn_implementation=script.attn_implementation,
    )
    scorer = LabelLikelihoodScorer(tokenizer, labels, prompt_format, args.per_device_eval_batch_size)
    collator = CompletionCollator(tokenizer, model)
    stopwatch = Stopwatch()
    target_modules = script.target_modules if "," not in script.target_modules else script.target_modules.split(",")

    def keep_results(model: PeftModel, adapters: Mapping[str, str], metrics: Mapping[str, Any], sizes: Any) -> None:
        results = {
            "settings": settings_of(script, args),
            "metrics": metrics,
            "tasks": answers(scorer, model, tasks, labels, adapters, scored=args.evaluate_seen_tasks),
            **sizes,
            "seconds": {
                "total": time.monotonic() - started,
                "training": stopwatch.seconds,
                "scoring": scorer.seconds,
            },
            "own_text": own_losses(model, tokenizer, own_texts, adapters, script.max_length) if own_texts else None,
        }
        write_results(script.results_json, results)

    if args.method in ("per_task_lora", "sequential_lora"):
        rank = script.lora_rank or script.pseudo_rank
        learned: dict[str, Any] = {}
        metrics = train_loras(
            model,
            args,
            LoraConfig(r=rank, lora_alpha=rank, target_modules=target_modules, task_type="CAUSAL_LM"),
            tasks,
            lambda trainer, task, data: scorer(trainer.model, task, data)["accuracy"],
            sequential=args.method == "sequential_lora",
            finish=lambda model, adapters: learned.update(model=model, adapters=adapters),
            data_collator=collator,
            callbacks=[stopwatch],
        )
        print(metrics.table())
        if script.results_json is not None:
            keep_results(**learned, metrics=metrics.as_dict(), sizes=sizes_of_loras(**learned))
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
    trainer = ShareTrainer(
        model,
        args,
        config,
        tasks,
        dataset_ids=dataset_ids(places),
        task_scorer=scorer,
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=[stopwatch],
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.is_world_process_zero():
        print(trainer.metrics_table)
        print(f"Subspace of {len(trainer.subspace.tasks)} tasks in {args.output_dir}/subspace")
    if script.results_json is not None:
        sizes = sizes_of_subspace(trainer.subspace.report(), trainer.metrics["parameters"])
        keep_results(trainer.model, {task: task for task in tasks}, trainer.metrics, sizes)
    trainer.accelerator.end_training()


def check_results(script: ScriptArguments, args: StreamArguments) -> None:
    """Reject settings that could not write their results, before hours of training."""
    if script.own_text is not None and script.results_json is None:
        raise ValueError(
            f"--own_text is {script.own_text} and --results_json is not given, expected both: the losses are kept "
            "there"
        )
    if script.results_json is not None and args.world_size > 1:
        raise ValueError(f"--results_json is given in {args.world_size} processes, expected one process")


def own_learning_rate(args: StreamArguments) -> float:
    """Return the learning rate of the method; the baselines default to the learning rate of LoRA factors."""
    if args.method == "share":
        return args.learning_rate
    if args.method == "coefficients":
        return args.coefficients_learning_rate or args.learning_rate
    return args.lora_learning_rate or args.init_learning_rate or args.learning_rate


def settings_of(script: ScriptArguments, args: StreamArguments) -> dict[str, Any]:
    """Return the settings to store with the results."""
    names = [*StreamArguments.__annotations__, "num_init_tasks", "finetune_num_train_epochs", "bf16", "seed"]
    return {**asdict(script), **{name: getattr(args, name) for name in names}}


if __name__ == "__main__":
    sys.exit(main())
