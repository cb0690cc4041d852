"""Learn the coefficients of many tasks together, in one run whose batches mix the tasks.

    accelerate launch recipes/many_tasks.py
    accelerate launch recipes/many_tasks.py --clients 60 --per_device_train_batch_size 128
    accelerate launch recipes/many_tasks.py --one_by_one

The script needs no network: the small backbone and the texts are in `recipes/assets/`. Each task is a client that
files notes by topic, with a colour for each topic. Clients choose their colours independently, so the same note has
different labels with different clients. The script first learns three other tasks, one after the other, which make up
the basis. It then learns the coefficients of all clients together, each as if it were trained alone on its own notes.
For comparison, `--one_by_one` learns the clients one after the other. The script prints the accuracy of each client
and saves the subspace with a model card in `<output_dir>/subspace`.
"""

from __future__ import annotations

import quiet  # noqa: F401


# isort: split
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import DatasetDict
from likelihood import LabelLikelihoodScorer, PromptFormat, prompt_completion_task
from task_data import check_score_metric, flags_with_config, load_task
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, HfArgumentParser, set_seed

from share_hf import ShareConfig, ShareTrainer, ShareTrainingArguments


ASSETS = Path(__file__).parent / "assets"
COLOURS = ["red", "blue", "green", "yellow", "black", "white"]
BASIS_TASKS = ["topic", "folder", "intent"]


@dataclass
class ScriptArguments:
    """What to learn, and on what."""

    clients: int = field(default=20, metadata={"help": "Number of tasks that are learned together."})
    notes: int = field(default=240, metadata={"help": "Number of notes that each client brings to learn from."})
    test_notes: int = field(default=60, metadata={"help": "Number of notes that each client is scored on."})
    basis_examples: int = field(default=480, metadata={"help": "Examples of each task that makes the basis."})
    one_by_one: bool = field(default=False, metadata={"help": "Learn the clients one after the other."})
    num_components: int = field(default=32, metadata={"help": "Cap on the number of directions per layer (k)."})
    pseudo_rank: int = field(default=8, metadata={"help": "Rank of a task (p)."})


@dataclass
class StreamArguments(ShareTrainingArguments):
    """Arguments of ShareTrainer, with the defaults of this recipe."""

    output_dir: str | None = field(default="many-tasks", metadata={"help": "Folder to write the subspace to."})
    method: str = field(default="coefficients", metadata={"help": "How tasks are learned; leave as is."})
    num_init_tasks: int = field(default=len(BASIS_TASKS), metadata={"help": "Tasks that make the basis; leave as is."})
    learning_rate: float = field(default=2e-2, metadata={"help": "Learning rate of coefficients."})
    init_learning_rate: float | None = field(default=4e-3, metadata={"help": "Learning rate of LoRA factors."})
    num_train_epochs: float = field(default=5.0, metadata={"help": "Number of epochs per task."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Examples per step, from several clients."})
    samples_per_task: int = field(default=8, metadata={"help": "Number of examples of each client in a step."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Number of examples to score at once."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Number of warm-up steps; below 1, a fraction."})
    evaluate_seen_tasks: bool = field(default=False, metadata={"help": "Score all tasks again after each task."})
    save_strategy: str = field(default="no", metadata={"help": "When a phase writes checkpoints to resume from."})
    report_to: str = field(default="none", metadata={"help": "Where to log, such as tensorboard, wandb or trackio."})
    dataloader_pin_memory: bool = field(default=torch.cuda.is_available(), metadata={"help": "Pin host memory."})


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, StreamArguments))
    script, args = parser.parse_args_into_dataclasses(flags_with_config())
    set_seed(args.seed)

    texts = {name: load_task(str(ASSETS / "tasks" / name), script.basis_examples) for name in BASIS_TASKS}
    notes = load_task(str(ASSETS / "tasks" / "topic"))
    clients = [f"client{number:03d}" for number in range(1, script.clients + 1)]
    texts |= {name: notes_of_client(name, notes, script, args.seed) for name in clients}

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "backbone")
    prompt_format, tasks, labels = PromptFormat(), {}, {}
    for name, data in texts.items():
        tasks[name], labels[name] = prompt_completion_task(name, data, tokenizer, prompt_format)

    check_score_metric(args.score_metric, dict.fromkeys(tasks, LabelLikelihoodScorer.metrics))
    trainer = ShareTrainer(
        AutoModelForCausalLM.from_pretrained(ASSETS / "backbone", dtype=torch.float32),
        args,
        ShareConfig(num_components=script.num_components, pseudo_rank=script.pseudo_rank, target_modules="all-linear"),
        tasks,
        together=None if script.one_by_one else clients,
        task_scorer=LabelLikelihoodScorer(tokenizer, labels, prompt_format, args.per_device_eval_batch_size),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=None, label_pad_token_id=-100),
        processing_class=tokenizer,
    )
    started = time.monotonic()
    output = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.is_world_process_zero():
        scores = trainer.subspace.state.scores()
        for name in clients:
            print(f"{name}  accuracy {scores[name].learned:.3f}")
        mean = sum(scores[name].learned for name in clients) / len(clients)
        way = "one by one" if script.one_by_one else "together"
        print(f"{len(clients)} clients, learned {way}: accuracy {mean:.3f}, chance {1 / len(COLOURS):.3f}")
        print(f"{output.global_step} steps, {time.monotonic() - started:.0f} s, including evaluation")
        print(f"Subspace of {len(trainer.subspace.tasks)} tasks in {args.output_dir}/subspace")
    trainer.accelerator.end_training()


def notes_of_client(name: str, notes: DatasetDict, script: ScriptArguments, seed: int) -> DatasetDict:
    """Draw the notes of a client, each labelled with the colour that the client uses for its topic."""
    draw = random.Random(f"{name}-{seed}")
    topics = sorted(set(notes["train"]["label"]))
    colour_of = dict(zip(topics, draw.sample(COLOURS, len(topics)), strict=True))
    counts = {"train": script.notes, "test": script.test_notes}
    return DatasetDict(
        {
            split: notes[split]
            .select(draw.sample(range(len(notes[split])), min(count, len(notes[split]))))
            .map(lambda note: {"label": colour_of[note["label"]]}, desc=f"Filing for {name}")
            for split, count in counts.items()
        }
    )


if __name__ == "__main__":
    sys.exit(main())
