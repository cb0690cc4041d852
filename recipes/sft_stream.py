"""Learn chat-format tasks one after the other with `trl.SFTTrainer`, each merged into one shared subspace.

    accelerate launch recipes/sft_stream.py
    accelerate launch recipes/sft_stream.py --model_name_or_path meta-llama/Llama-3.2-1B-Instruct --load_in_4bit \
        --tasks support=data/support.jsonl sst2=data/sst2/ --learning_rate 1e-3 --output_dir share-llama-chat
    accelerate launch recipes/sft_stream.py --config stream.yaml

The script needs the extra `trl`, and the extra `quantization` for `--load_in_4bit`. Without arguments, it needs no
network: the small backbone and three tasks are in `recipes/assets/`. A task has either a `messages` column, whose last
message is learned, or the columns `text` and `label`. An answer counts as right if the model writes it word for word.
The script prints a line for each task and the accuracy matrix, and saves the subspace with a model card in
`<output_dir>/subspace`. It accepts all arguments of `trl.SFTConfig`.

The script creates a new trainer for each task, which DeepSpeed does not support within one process. With DeepSpeed,
use `recipes/llama_stream.py` instead.
"""

from __future__ import annotations

import quiet  # noqa: F401


# isort: split
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from task_data import flags_with_config, load_task, parse_tasks, quantization
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.trainer_callback import ProgressCallback
from trl import SFTConfig, SFTTrainer

from share_hf import ShareCallback, ShareConfig, SharedSubspace
from share_hf.continual import ContinualMetrics
from share_hf.continual.progress import StreamProgressCallback


ASSETS = Path(__file__).parent / "assets"
BFLOAT16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
DEFAULT_TASKS = {name: str(ASSETS / "tasks" / name) for name in ("giver", "topic", "receiver")}

# For models without a chat template: a question, "Answer:", and the answer.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '\\nAnswer: ' + message['content'] + eos_token if message['role'] == 'assistant' else message['content'] }}"
    "{% endfor %}"
    "{{ '\\nAnswer:' if add_generation_prompt else '' }}"
)


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
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the model to NF4 with bitsandbytes."})
    target_modules: str = field(default="all-linear", metadata={"help": "Modules to adapt, comma-separated."})
    num_components: int = field(default=32, metadata={"help": "Cap on the number of directions per layer (k)."})
    pseudo_rank: int = field(default=8, metadata={"help": "Rank of a task (p)."})
    init_std: float = field(default=0.05, metadata={"help": "Standard deviation of a new task's coefficients (σ)."})
    drift_tolerance: float | None = field(default=None, metadata={"help": "Largest drift that merges may add up to."})


@dataclass
class StreamConfig(SFTConfig):
    """Arguments of SFTTrainer, with the defaults of this recipe."""

    output_dir: str | None = field(default="sft-stream", metadata={"help": "Folder to write the subspace to."})
    learning_rate: float = field(default=5e-3, metadata={"help": "Learning rate of AdamW."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Number of epochs per task."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Number of examples per step and device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Number of prompts to answer at once."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Number of warm-up steps; below 1, a fraction."})
    bf16: bool | None = field(default=BFLOAT16, metadata={"help": "Whether to compute in bfloat16."})
    gradient_checkpointing: bool = field(
        default=torch.cuda.is_available(), metadata={"help": "Save memory by computing activations twice."}
    )
    save_strategy: str = field(default="no", metadata={"help": "When a task writes checkpoints."})
    report_to: str = field(default="none", metadata={"help": "Where to log, such as tensorboard, wandb or trackio."})
    dataloader_pin_memory: bool = field(default=torch.cuda.is_available(), metadata={"help": "Pin host memory."})


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, StreamConfig))
    script, args = parser.parse_args_into_dataclasses(flags_with_config())
    set_seed(args.seed)

    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    tasks = {}
    for name, place in (parse_tasks(script.tasks) or DEFAULT_TASKS).items():
        data = load_task(place, script.train_examples)
        tasks[name] = data.map(prompt_and_completion, remove_columns=data["train"].column_names)

    dtype = torch.bfloat16 if args.bf16 else torch.float32
    base_model = AutoModelForCausalLM.from_pretrained(
        script.model_name_or_path, dtype=dtype, quantization_config=quantization(script.load_in_4bit, dtype)
    )
    targets = script.target_modules
    config = ShareConfig(
        num_components=script.num_components,
        pseudo_rank=script.pseudo_rank,
        init_std=script.init_std,
        drift_tolerance=script.drift_tolerance,
        target_modules=targets.split(",") if "," in targets else targets,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base_model, config)

    metrics = ContinualMetrics(tasks=list(tasks))
    subspace = None
    for task, data in tasks.items():
        started = time.monotonic()
        callback, progress = ShareCallback(task, subspace), StreamProgressCallback()
        progress.title = task
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=data["train"],
            processing_class=tokenizer,
            callbacks=[callback, progress],
        )
        trainer.remove_callback(ProgressCallback)
        with model.disable_adapter():
            metrics.baseline.append(accuracy(model, tokenizer, test_split(data), args))
        trainer.train()

        row: list[float | None] = [None] * len(tasks)
        for j, seen in enumerate(callback.subspace.tasks):
            model.set_adapter(seen)
            row[j] = accuracy(model, tokenizer, test_split(tasks[seen]), args)
        metrics.matrix.append(row)
        metrics.drift = callback.report.drift
        subspace = SharedSubspace(replace(callback.subspace.state, metrics=metrics.as_dict()))
        if trainer.is_world_process_zero():
            progress.task_line(metrics, subspace.state.tasks[task].learned_by, time.monotonic() - started)
            subspace.save_pretrained(Path(args.output_dir) / "subspace")
    if trainer.is_world_process_zero():
        print(metrics.table())
        print(f"Subspace of {len(subspace.tasks)} tasks in {args.output_dir}/subspace")
    trainer.accelerator.end_training()


def prompt_and_completion(example: dict[str, Any]) -> dict[str, Any]:
    """Convert an example to SFTTrainer's format, with the loss on the completion (the last message)."""
    if "messages" in example:
        messages = example["messages"]
    elif {"text", "label"} <= example.keys():
        messages = [
            {"role": "user", "content": example["text"]},
            {"role": "assistant", "content": str(example["label"])},
        ]
    else:
        raise ValueError(f"a task has columns {list(example)}, expected 'messages', or 'text' and 'label'")
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def test_split(data: dict[str, Dataset]) -> Dataset:
    return data["test"] if "test" in data else data["validation"]


@torch.inference_mode()
def accuracy(model: PeftModel, tokenizer: PreTrainedTokenizerBase, data: Dataset, args: SFTConfig) -> float:
    """Return the fraction of the answers that the active adapter writes word for word."""
    model.eval()
    prompts = [
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False) for prompt in data["prompt"]
    ]
    answers = [completion[0]["content"].strip() for completion in data["completion"]]
    longest = max(len(tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]) for answer in answers) + 1
    # Prompts of similar length share a batch, so that there is little padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    correct = 0
    for start in tqdm(range(0, len(order), args.per_device_eval_batch_size), desc="answering", leave=False):
        rows = order[start : start + args.per_device_eval_batch_size]
        inputs = tokenizer(
            [prompts[i] for i in rows],
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        written = model.generate(
            **inputs, max_new_tokens=longest, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        texts = tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        correct += sum(text.strip() == answers[i] for text, i in zip(texts, rows, strict=True))
    return correct / len(order)


if __name__ == "__main__":
    sys.exit(main())
