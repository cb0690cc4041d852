"""What do a thousand tasks in one model cost, compared with as many LoRAs in PEFT?

    python recipes/benchmarks/inference.py
    python recipes/benchmarks/inference.py --quick --json inference.json

A float32 Llama of hidden size 1024 with random weights has tasks with k = 64 and p = 8 in all linear modules. The same
tasks are exported from the subspace as LoRAs of rank 8. The benchmark answers six questions:

1. In a batch of 64 samples, how much longer do the prefill and a decoding step take if each sample has a different
   task than if all have the same one? How much time does the step add to the base model's, compared with a mixed batch
   of PEFT's LoRAs? The benchmark first checks that both compute the same logits.
2. At batch size 1, how long do the prefill and a decoding step take with one task, relative to one LoRA?
3. How long does `set_adapter` take at 10, 1,000 and 10,000 tasks, and in PEFT at 10, 64 and 200 adapters? The latter
   are extrapolated to 1,000 on a line.
4. How much faster is `SharedSubspace.apply` of 100 tasks than `load_adapter` in a loop, and how does its time grow?
5. How much memory do 1,000 resident tasks take, compared with the factors of 1,000 LoRAs of rank 16? It includes the
   bases and what the model keeps of tasks in use, and is measured in a separate process. Does it grow while all tasks
   are used in turn?
6. How much longer is a training step in which each of 20 samples trains the coefficients of its own task than one in
   which all samples train the same task?

The variants take turns in one process, so that other load on the machine affects all of them alike. A ratio is the
median of the ratios of all rounds, and an overhead is the median of the differences. Loads from disk are timed at most
three times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import torch
from _report import Row, argument_parser, interleaved, report
from _serving import (
    VOCABULARY,
    Sizes,
    bytes_of_loras,
    copy_of,
    export_loras,
    job_of_tasks,
    random_subspace,
    with_loras,
)
from peft import PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM

from share_hf import SharedSubspace


HERE = Path(__file__).resolve().parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SWITCHES = 20  # calls of set_adapter in a timed run
ROUNDS_OF_SHORT_RUNS = 5  # rounds of short runs for each round of other ones, because they are noisier
LOADS = 3  # maximum number of timed loads, which take a minute
LORA_RANK_IN_MEMORY = 16
FLAT = 5  # MiB by which memory may grow while tasks are used in turn, to allow for the allocator
SAME_LOGITS = 1e-3  # largest difference, relative to the largest logit

Seconds = Mapping[str, list[float]]


@dataclass(frozen=True)
class Scale:
    """Sizes of everything that is measured.

    Args:
        sizes: Sizes of the model and the tasks.
        samples: Number of samples in a mixed batch, each with a different task.
        prompt: Number of tokens in a sample.
        switched: Numbers of tasks at which `set_adapter` is timed: few, many, and most.
        switched_loras: Numbers of LoRAs at which `set_adapter` is timed.
        applied: Numbers of tasks with which `apply` is timed. The first is also the number of LoRAs to load.
        resident: Number of tasks whose memory is measured.
        together: Number of tasks that are learned in one step.
    """

    sizes: Sizes = field(default_factory=Sizes)
    samples: int = 64
    prompt: int = 128
    switched: tuple[int, int, int] = (10, 1_000, 10_000)
    switched_loras: tuple[int, int, int] = (10, 64, 200)
    applied: tuple[int, int] = (100, 1_000)
    resident: int = 1_000
    together: int = 20


FULL = Scale()
QUICK = Scale(
    Sizes(hidden=128, intermediate=256, layers=2, k=16, p=4),
    samples=6,
    prompt=16,
    switched=(4, 12, 36),
    switched_loras=(2, 6, 9),
    applied=(6, 24),
    resident=48,
    together=4,
)


def main() -> None:
    parser = argument_parser(__doc__, repeats=7)
    options = parser.parse_args()
    scale = QUICK if options.quick else FULL
    sizes = scale.sizes
    title = (
        f"Many tasks in a Llama, {sizes.layers} layers of hidden size {sizes.hidden}, float32, all linear modules, "
        f"k = {sizes.k}, p = {sizes.p}, beside PEFT's LoRA of rank {sizes.p}"
    )
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    with tempfile.TemporaryDirectory() as folder:
        report(title, all_rows(options, scale, Path(folder)), options.json)


def all_rows(options: argparse.Namespace, scale: Scale, folder: Path) -> Iterator[Row]:
    torch.manual_seed(0)
    repeats = 3 if options.quick else options.repeats
    base = scale.sizes.llama(DEVICE)
    subspace = random_subspace(base, scale.applied[1], scale.sizes)
    count = max(scale.samples, scale.switched_loras[-1], scale.applied[0])
    loras = export_loras(subspace, subspace.tasks[:count], folder / "loras")

    yield from memory_rows(base, scale)
    models = Models(
        base,
        subspace.apply(copy_of(base), subspace.tasks[: scale.samples]),
        with_loras(base, loras[: scale.samples]),
    )
    yield from mixed_rows(models, scale, repeats)
    yield from single_rows(models, scale, repeats * ROUNDS_OF_SHORT_RUNS)
    yield from learning_rows(base, subspace, scale, repeats)
    yield from applying_rows(base, subspace, loras, scale, folder, min(repeats, LOADS))
    yield from switching_rows(base, loras, scale, repeats * ROUNDS_OF_SHORT_RUNS)


# ---- Time of forwards -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Models:
    """The base model, and two copies with the same tasks: from a subspace, and as LoRAs."""

    base: LlamaForCausalLM
    share: PeftModel
    lora: PeftModel

    @property
    def tasks(self) -> list[str]:
        return list(self.share.peft_config)


class Prompts:
    """Prompts of equal length, and the steps that a model takes with them, without gradients."""

    def __init__(self, base: LlamaForCausalLM, samples: int, length: int) -> None:
        self.input_ids = torch.randint(VOCABULARY, (samples, length), device=DEVICE)
        # One cache serves all models, because the time of a step does not depend on the values in it.
        self._cache = self.prefill(base).past_key_values

    def prefill(self, model: Callable[..., Any], **options: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=self.input_ids, use_cache=True, logits_to_keep=1, **options)

    def step(self, model: Callable[..., Any], **options: Any) -> None:
        """Decode one token after each cached prompt, and restore the cache."""
        with torch.no_grad():
            model(input_ids=self.input_ids[:, -1:], past_key_values=self._cache, use_cache=True, **options)
        self._cache.crop(-1)


def mixed_rows(models: Models, scale: Scale, repeats: int) -> Iterator[Row]:
    """Measure a batch with a different task for each sample, compared with one task, the base model, and LoRA."""
    prompts = Prompts(models.base, scale.samples, scale.prompt)
    of = f"{scale.samples} samples"
    share, lora = (prompts.prefill(model, adapter_names=models.tasks).logits for model in (models.share, models.lora))
    difference = float((share - lora).abs().max() / lora.abs().max())
    yield Row.at_most(f"{of}, a task each: logits of Share and LoRA, relative difference", difference, "", SAME_LOGITS)
    goals = {f"prefill of {scale.prompt} tokens": (prompts.prefill, 1.3), "a decoding step": (prompts.step, 1.4)}
    timed = {kind: mixed_seconds(run, models, repeats) for kind, (run, _) in goals.items()}
    for kind, (_, goal) in goals.items():
        yield from time_rows(f"{of}, {kind}", timed[kind])
        over = ratio(timed[kind], "Share, a task each", "Share, one task")
        yield Row.at_most(f"{of}, {kind}: a task each over one task", over, "x", goal)
    each = ("Share, a task each", "LoRA, an adapter each")
    added = {name: added_to(timed["a decoding step"], name, "base model") for name in each}
    for name, value in added.items():
        yield Row(f"{of}, added to a decoding step of the base model: {name}", 1e3 * value, "ms")
    of_lora = added["Share, a task each"] / added["LoRA, an adapter each"]
    yield Row.at_most(f"{of}, added to a decoding step: Share over LoRA", of_lora, "x", 1 / 5)


def mixed_seconds(run: Callable[..., object], models: Models, repeats: int) -> Seconds:
    """Time a run of a batch in each of the models, with one task and with a task for each sample."""
    variants = {
        "base model": lambda: run(models.base),
        "Share, one task": lambda: run(models.share),
        "Share, a task each": lambda: run(models.share, adapter_names=models.tasks),
        "LoRA, one adapter": lambda: run(models.lora),
        "LoRA, an adapter each": lambda: run(models.lora, adapter_names=models.tasks),
    }
    return interleaved(variants, repeats=repeats)


def single_rows(models: Models, scale: Scale, repeats: int) -> Iterator[Row]:
    """Measure batches of one sample, with one task, and with a different task at each step."""
    prompts = Prompts(models.base, 1, scale.prompt)
    for kind, run in ((f"prefill of {scale.prompt} tokens", prompts.prefill), ("a decoding step", prompts.step)):
        seconds = interleaved(
            {
                "base model": lambda run=run: run(models.base),
                "Share": lambda run=run: run(models.share),
                "LoRA": lambda run=run: run(models.lora),
            },
            repeats=repeats,
        )
        yield from time_rows(f"batch 1, {kind}", seconds)
        yield Row.at_most(f"batch 1, {kind}: Share over LoRA", ratio(seconds, "Share", "LoRA"), "x", 1.05)

    def switch_and_step(model: PeftModel) -> Callable[[], None]:
        tasks = in_turn(models.tasks)

        def run() -> None:
            model.set_adapter(next(tasks))
            prompts.step(model)

        return run

    seconds = interleaved(
        {"Share": switch_and_step(models.share), "LoRA": switch_and_step(models.lora)}, repeats=repeats
    )
    yield from time_rows(f"batch 1, {len(models.tasks)} resident, another task and a decoding step", seconds)


# ---- Learning -------------------------------------------------------------------------------------------------------


class Learning:
    """A model in which some tasks are trained, and the optimizer of their trainable parameters."""

    def __init__(self, model: PeftModel, tasks: Sequence[str], input_ids: Tensor) -> None:
        self._model = model.train()
        self._model.base_model.set_adapter(list(tasks))
        self._input_ids = input_ids
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=1e-4, fused=True)

    def step(self, **options: Any) -> None:
        self._optimizer.zero_grad()
        self._model(input_ids=self._input_ids, labels=self._input_ids, **options).loss.backward()
        self._optimizer.step()

    def reason_against(self, **options: Any) -> str | None:
        """Return why the model cannot take such a step, or None if it can."""
        try:
            self.step(**options)
        except (ValueError, NotImplementedError) as error:
            return str(error)
        without = sum(parameter.grad is None for parameter in self._trained)
        return f"{without} of {len(self._trained)} trained parameters have no gradient" if without else None


def learning_rows(base: LlamaForCausalLM, subspace: SharedSubspace, scale: Scale, repeats: int) -> Iterator[Row]:
    """Measure a training step with a different task for each sample, relative to a step with one task."""
    tasks = subspace.tasks[: scale.together]
    input_ids = torch.randint(VOCABULARY, (len(tasks), scale.prompt), device=DEVICE)
    of = f"a training step, {len(tasks)} samples of {scale.prompt} tokens"

    def learning(of: Sequence[str]) -> Learning:
        return Learning(subspace.apply(copy_of(base), tasks, trainable=True), of, input_ids)

    one, each = learning(tasks[:1]), learning(tasks)
    if (reason := each.reason_against(adapter_names=tasks)) is not None:
        yield Row.not_run(f"{of}: a task each over one task", reason)
        return
    seconds = interleaved(
        {"one task": one.step, "a task each": lambda: each.step(adapter_names=tasks)}, repeats=repeats
    )
    yield from time_rows(of, seconds)
    over = ratio(seconds, "a task each", "one task")
    yield Row.at_most(f"{of}: a task each over one task", over, "x", 1.3)


# ---- Loading and switching ------------------------------------------------------------------------------------------


def applying_rows(
    base: LlamaForCausalLM,
    subspace: SharedSubspace,
    loras: Sequence[Path],
    scale: Scale,
    folder: Path,
    repeats: int,
) -> Iterator[Row]:
    """Measure applying the tasks of a subspace to a model at once, and loading LoRAs one by one."""
    few, many = scale.applied
    of_few, of_many = subspace.tasks[:few], subspace.tasks[:many]
    tree = folder / "tree"
    random_subspace(base, few, scale.sizes).save_pretrained(tree)
    variants = {
        f"Share, {few} tasks": lambda: subspace.apply(copy_of(base), of_few),
        f"Share, {few} tasks, read from disk": lambda: SharedSubspace.from_pretrained(tree).apply(copy_of(base)),
        f"Share, {many} tasks": lambda: subspace.apply(copy_of(base), of_many),
        f"LoRA, {few} adapters": lambda: with_loras(base, loras[:few]),
    }
    seconds = interleaved(variants, repeats=repeats)
    yield from time_rows("putting tasks into a model", seconds, unit="s")
    faster = ratio(seconds, f"LoRA, {few} adapters", f"Share, {few} tasks")
    yield Row.at_least(f"apply of {few} tasks, faster than load_adapter in a loop", faster, "x", 50)
    grown = ratio(seconds, f"Share, {many} tasks", f"Share, {few} tasks")
    yield Row.at_most(f"apply of {many} tasks over {few}", grown, "x", 1.2 * many / few)


def switching_rows(base: LlamaForCausalLM, loras: Sequence[Path], scale: Scale, repeats: int) -> Iterator[Row]:
    """Measure calls of `set_adapter` in models with more and more tasks."""
    models = {
        f"Share, {count} tasks": random_subspace(base, count, scale.sizes).apply(copy_of(base))
        for count in scale.switched
    }
    models |= {f"LoRA, {count} adapters": with_loras(base, loras[:count]) for count in scale.switched_loras}
    timed = interleaved({name: switches(model) for name, model in models.items()}, repeats=repeats)
    seconds = {name: [value / SWITCHES for value in values] for name, values in timed.items()}
    yield from time_rows("set_adapter", seconds)
    few, many, most = scale.switched
    flat = ratio(seconds, f"Share, {most} tasks", f"Share, {few} tasks")
    yield Row.at_most(f"set_adapter at {most} tasks over {few}", flat, "x", 1.5)
    of_loras = [median(seconds[f"LoRA, {count} adapters"]) for count in scale.switched_loras]
    extrapolated = on_a_line(scale.switched_loras, of_loras, many)
    yield Row(f"set_adapter: LoRA, {many} adapters, on a line through those", 1e3 * extrapolated, "ms")
    faster = extrapolated / median(seconds[f"Share, {many} tasks"])
    yield Row.at_least(f"set_adapter at {many} tasks, faster than LoRA's", faster, "x", 50)


def switches(model: PeftModel) -> Callable[[], None]:
    tasks = in_turn(list(model.peft_config))

    def run() -> None:
        for _ in range(SWITCHES):
            model.set_adapter(next(tasks))

    return run


def in_turn(tasks: Sequence[str]) -> Iterator[str]:
    """Yield tasks from all over the sequence, never the same one twice in a row, without an end."""
    step = max(1, len(tasks) // SWITCHES)
    position = 0
    while True:
        yield tasks[position % len(tasks)]
        position += step


def on_a_line(at: Sequence[int], values: Sequence[float], wanted: int) -> float:
    """Return the value at another point on the line that fits the values best."""
    slope, intercept = linear_regression(at, values)
    return slope * wanted + intercept


# ---- Memory ---------------------------------------------------------------------------------------------------------


def memory_rows(base: LlamaForCausalLM, scale: Scale) -> Iterator[Row]:
    """Measure the anonymous memory of tasks in a separate process, compared with the bytes of as many LoRAs."""
    count = scale.resident
    measured = measured_alone(job_of_tasks(scale.sizes, count))
    loras = bytes_of_loras(base, count, LORA_RANK_IN_MEMORY)
    yield Row(f"memory of {count} resident tasks, bases and those in use included", measured["held"] / 2**20, "MiB")
    yield Row(f"factors of {count} LoRAs of rank {LORA_RANK_IN_MEMORY}", loras / 2**20, "MiB")
    smaller = loras / measured["held"]
    yield Row.at_least(f"memory of {count} resident tasks, below that of the LoRAs", smaller, "x", 25)
    grown = max(0, measured["grown"]) / 2**20
    yield Row.at_most(f"memory grown by while {count} tasks are used in turn", grown, "MiB", FLAT)


def measured_alone(job: str) -> dict[str, int]:
    paths = os.pathsep.join(filter(None, (str(HERE.parents[1]), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(HERE / "_serving.py"), job]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    if run.returncode:
        raise RuntimeError(f"{job} failed:\n{run.stderr[-3000:]}")
    return json.loads(run.stdout.strip().splitlines()[-1])


# ---- Rows -----------------------------------------------------------------------------------------------------------


def time_rows(what: str, seconds: Seconds, *, unit: str = "ms") -> list[Row]:
    """Return a row for each variant, with its median time."""
    scale = {"ms": 1e3, "s": 1}[unit]
    return [Row(f"{what}: {name}", scale * median(values), unit) for name, values in seconds.items()]


def ratio(seconds: Seconds, name: str, other: str) -> float:
    """Return the median of the ratios of all rounds."""
    return median(one / two for one, two in zip(seconds[name], seconds[other], strict=True))


def added_to(seconds: Seconds, name: str, other: str) -> float:
    """Return the median of the differences of all rounds."""
    return median(one - two for one, two in zip(seconds[name], seconds[other], strict=True))


if __name__ == "__main__":
    main()
