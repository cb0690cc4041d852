"""Plan of the benchmark of continual learning: every method and run, with all settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from _grid import Run
from _streams import STREAMS


Settings = Mapping[str, Any]

SEEDS = (0, 1, 2)
ALL_SEEDS = range(6)  # of Share and of one LoRA per task on GLUE, to narrow the interval of their difference

# Settings of data and training that all methods share. The names are flags of recipes/text_stream.py.
COMMON: dict[str, Any] = {
    "max_length": 64,
    "bf16": True,  # with AMX, training is 1.8 times faster and evaluation 3.5 times
    "num_train_epochs": 5.0,
    "per_device_train_batch_size": 8,
    "warmup_steps": 0.1,
    "pseudo_rank": 8,
}

SHARE: dict[str, Any] = {
    "method": "share",
    "num_components": 32,
    "temporary_init": "span",
    "basis": "joint",
    "num_init_tasks": 2,
    "learning_rate": 1e-3,
    "init_learning_rate": 1e-3,
}

# Temporary factors that start as basis vectors, combined by random coefficients (Sec. 3.2.2).
OF_THE_PAPER: dict[str, Any] = {"temporary_init": "basis", "num_temporary": 8, "init_std": 0.05}

METHODS: dict[str, dict[str, Any]] = {
    "share": SHARE,
    "share-basis": SHARE | OF_THE_PAPER,
    "share-random": SHARE | {"temporary_init": "random"},
    "share-paper": SHARE | OF_THE_PAPER | {"basis": "factor", "center": True, "num_temporary": 2, "num_init_tasks": 1},
    "coefficients": SHARE | {"method": "coefficients", "num_init_tasks": 4, "learning_rate": 1e-2},
    "lora": {"learning_rate": 1e-3},
    # At this rate, which is the best one with 500 training examples, some seeds do not learn a task at all.
    "lora-fast": {"learning_rate": 2e-3},
    "sequential": {"learning_rate": 1e-3},
    "replay-2": {"learning_rate": 1e-3},
    "replay-5": {"learning_rate": 1e-3},
    "olora": {"learning_rate": 1e-3},
    # Weights need a smaller rate than a head that starts at random, which would learn little in so few steps.
    "osf": {"learning_rate": 5e-4, "head_learning_rate": 2e-3},
    "joint": {"learning_rate": 1e-3},
}
SHARE_METHODS = ("share", "share-basis", "share-random", "share-paper", "coefficients")
WITHOUT_ORDER = ("lora", "lora-fast", "joint")  # the order only changes their seeds
EVERYWHERE = ("share", "lora", "coefficients", "sequential")  # the other methods run with one order and one seed

FIFTY: dict[str, dict[str, Any]] = {
    "k=32": SHARE | {"num_components": 32},
    "k=64": SHARE | {"num_components": 64},
    "drift 0.2": SHARE | {"num_components": 32, "drift_tolerance": 0.2},
    "k=16": SHARE | {"num_components": 16},
    "k=8": SHARE | {"num_components": 8},
    "basis temporaries": SHARE | OF_THE_PAPER,
}

MERGED_SEEDS = (0, 1)  # fifty LoRAs each

# Flags of recipes/llama_stream.py for SmolLM2-135M-Instruct; the rates are those of recipes/configs/smollm2.yaml.
LANGUAGE: dict[str, Any] = {
    "max_length": 128,
    "eval_examples": 400,
    "text_columns": ["text", "sentence", "sentence1", "question", "sentence2"],
    "bf16": True,
    "attn_implementation": "eager",
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "evaluate_before": False,
    "num_components": 32,
    "pseudo_rank": 8,
    "num_init_tasks": 2,
    "init_learning_rate": 3e-3,
}
LANGUAGE_METHODS: dict[str, dict[str, Any]] = {
    "share": {"temporary_init": "span", "learning_rate": 3e-3},
    "lora": {"lora_rank": 16, "lora_learning_rate": 3e-3},
    "coefficients": {"coefficients_learning_rate": 2e-2},
    "sequential": {"lora_rank": 16, "lora_learning_rate": 3e-3},
}

VALIDATION = {"validation": True}  # scored on training examples that are held out

# Changes of one setting at a time.
ABLATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    **{f"k={k}": {"num_components": k, "pseudo_rank": min(8, k)} for k in (4, 8, 16, 64)},
    **{f"p={p}": {"pseudo_rank": p} for p in (2, 4, 16)},
    "basis temporaries": OF_THE_PAPER,
    **{f"phi={phi}": {**OF_THE_PAPER, "num_temporary": phi} for phi in (2, 4, 16)},
    **{f"sigma={sigma:g}": {**OF_THE_PAPER, "init_std": sigma} for sigma in (0.01, 0.2)},
    "factor": {"basis": "factor"},
    **{f"init tasks={count}": {"num_init_tasks": count} for count in (1, 4)},
    "random temporaries": {"temporary_init": "random"},
    "finetune": {"finetune_num_train_epochs": 1.0, "finetune_learning_rate": 5e-3},
}
OF_LORAS = (5e-4, 1e-3, 2e-3)
RATES = dict.fromkeys(("lora", "share", "sequential", "replay-2", "replay-5", "olora", "joint"), OF_LORAS) | {
    "osf": (1e-4, 5e-4, 2e-3),
    "share-basis": (1e-3, 2e-3, 4e-3),
    "share-paper": (1e-3, 2e-3, 4e-3),
    "coefficients": (5e-3, 1e-2, 2e-2),
}


def planned() -> Iterator[Run]:
    """Yield all runs, each once: first those that choose the learning rates, then the most informative ones."""
    yield from {run.name: run for run in _planned()}.values()


def _planned() -> Iterator[Run]:
    yield from tuning()
    yield from _compared("glue", [0], ALL_SEEDS, ("share", "lora", "share-basis", "lora-fast"))
    yield from _compared("glue", [0], SEEDS, EVERYWHERE)
    yield from _compared("glue", [0], SEEDS[:1], [method for method in METHODS if method not in EVERYWHERE])
    yield from _compared("nine", [0], SEEDS[:1], [method for method in METHODS if not method.endswith("-fast")])
    yield from ablations()
    yield from _compared("nine", range(len(STREAMS["nine"].orders)), SEEDS, EVERYWHERE)
    yield from fifty()
    yield from merged()
    yield from language()


def language() -> Iterator[Run]:
    """Yield the runs of SmolLM2-135M-Instruct, with one order and one seed."""
    stream = STREAMS["smollm2"]
    of_data = {"train_examples": stream.train_examples, "target_modules": stream.target_modules}
    for method, settings in LANGUAGE_METHODS.items():
        order = None if method in WITHOUT_ORDER else 0
        yield Run("smollm2", method, 0, order, stream.orders[0], {**LANGUAGE, **of_data, **settings})


def fifty() -> Iterator[Run]:
    """Yield the runs with fifty tasks: Share at several k, and one LoRA per task."""
    for label, settings in FIFTY.items():
        yield run("fifty", "share", 0, 0, {**settings, "chunk": 10}, label)
    for seed in MERGED_SEEDS:
        yield run("fifty", "lora", seed, None, METHODS["lora"])


def merged() -> Iterator[Run]:
    """Yield the runs that merge the LoRAs of fifty tasks, of one seed and of two, ten at a time, at several k."""
    for seeds, components in ((MERGED_SEEDS[:1], (4, 8, 16, 32, 64, 128)), (MERGED_SEEDS, (32, 64, 128))):
        for k in components:
            stages = {"seeds": seeds, "together": 10, "scored": (10, 20, 50)}
            settings = {**METHODS["lora"], "num_components": k, "basis": "joint", **stages}
            label = f"k={k}" if len(seeds) == 1 else f"k={k}, {len(seeds)} seeds"
            yield run("fifty", "merged", 0, 0, settings, label)


def ablations() -> Iterator[Run]:
    """Yield the runs that change one setting of Share, on one order of nine tasks and validation data."""
    for label, changed in ABLATIONS.items():
        yield run("nine", "share", 0, 0, {**SHARE, **changed, **VALIDATION, "train_examples": 500}, label)


def tuning() -> Iterator[Run]:
    """Yield runs that choose a learning rate for each method, on GLUE and validation data; `METHODS` has the best."""
    for method, rates in RATES.items():
        for rate in rates:
            settings = {**METHODS[method], "learning_rate": rate, **VALIDATION}
            yield run("glue", method, 0, 0, settings, f"rate={rate:g}")


def run(stream: str, method: str, seed: int, order: int | None, settings: Settings, label: str = "") -> Run:
    """Return a run with the settings of its stream and those that all methods share."""
    declared = STREAMS[stream]
    of_data = {"train_examples": declared.train_examples, "target_modules": declared.target_modules}
    if method in WITHOUT_ORDER:
        order = None
    tasks = declared.orders[order or 0]
    return Run(stream, method, seed, order, tasks, {**COMMON, **of_data, **settings}, label)


def _compared(stream: str, orders: object, seeds: object, methods: object) -> Iterator[Run]:
    for order in orders:
        for seed in seeds:
            for method in methods:
                yield run(stream, method, seed, order, METHODS[method])
