"""What does a training step with Share cost in time and memory, compared with a LoRA?

    python recipes/benchmarks/training.py
    python recipes/benchmarks/training.py --quick --json training.json
    python recipes/benchmarks/training.py --dtype bfloat16
    python recipes/benchmarks/training.py --size 1b

Copies of a Llama of hidden size 1024 with random weights take the same steps (forward, backward, fused AdamW) in one
process and take turns: one is frozen, one has a LoRA of PEFT, and two have Share, in its `coefficients` and its
`adapt` phase. Adapters are on all linear modules, at rank 16, k = 64, φ = 16. The dtype is bfloat16 on CUDA, and
float32 elsewhere. `--size 1b` is for a GPU: hidden size 2048, 16 layers, otherwise the same. There are five questions:

1. How much longer is a step than with LoRA, and than a backward pass through the frozen model down to its embeddings?
2. How many bytes do trained parameters, their gradients and the optimizer hold? All tensors are added up.
3. What does an adapter keep of the tokens for the backward pass, besides the input of its module?
4. Which share of a task of 500 steps goes into checkpoints, the merge and saves of the subspace? The parts are timed
   on the same model with the calls that `ShareTrainer` makes, and added up: every checkpoint holds the adapter, the
   bases and the optimizer; the task is started and merged once; the tree is written after the merge and at the end.
5. What do ZeRO-2 and ZeRO-3 add to a step under DDP, for LoRA and for Share? Two processes hold a smaller model for
   each combination and take a step of each in turn. Ratios and differences compare steps of the same round; their
   medians are reported. The ratio also depends on how fast Share is under DDP, and rises as Share gets faster there.
   ZeRO adds a cost for each module and each trained tensor that hardly depends on the length of the step, so it is
   also reported in milliseconds. The goal for that allows for the noise of the comparison, which has its own row. This
   question needs DeepSpeed, and either no GPU or two.

The layers have the sizes of Llama-3.2-1B, but the vocabulary is smaller than its 128,256 tokens. No adapter is on the
output layer, which would add the same to every step, including several GB of logits, and only bring all ratios nearer
to one.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import torch
from _engines import ENGINES, Seconds, reason_against, seconds_in_two_processes
from _report import Row, argument_parser, interleaved, medians, report, seconds_of
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from share_hf import ShareConfig
from share_hf.card import write_tree
from share_hf.continual.phases import begin_phase, describe_task, take_merged
from share_hf.state import SubspaceState


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"half": (1024, 4), "1b": (2048, 16)}  # hidden size and layers
VOCABULARY = 1024  # small, so that the output layer does not dominate
RANK = 16
COMPONENTS, TEMPORARY = 64, 16
SMALL_COMPONENTS, SMALL_RANK = 32, 4
PHASES = ("coefficients", "adapt")
NAMES = {"LoRA": "LoRA", **{phase: f"Share, {phase} phase" for phase in PHASES}}

STEPS, STEPS_A_CHECKPOINT = 500, 100
STREAM_TASKS = 8  # tasks in the subspace before the timed merges

ODD_TOKENS = 37  # divides no other size, so that tensors with a row for each token can be told from others


def main() -> None:
    parser = argument_parser(__doc__, repeats=15)
    parser.add_argument(
        "--size", choices=SIZES, default="half", help="width of the model: that of Llama-3.2-1B, or half of it"
    )
    parser.add_argument(
        "--layers", type=int, help="number of layers of the model (default: 4, or the 16 of Llama-3.2-1B)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16" if DEVICE == "cuda" else "float32",
        help="data type of the base model (default: bfloat16 on CUDA, otherwise float32)",
    )
    options = parser.parse_args()
    hidden_size, layers = SIZES[options.size]
    layers = 1 if options.quick else options.layers or layers
    batch = (2, 256) if options.quick else (4, 512)
    title = (
        f"Training steps of a Llama, {layers} layers of hidden size {hidden_size}, batch {batch[0]} x {batch[1]} "
        f"tokens, {options.dtype}, LoRA r = {RANK}, Share k = {COMPONENTS}, p = {RANK}, φ = {TEMPORARY}"
    )
    report(title, all_rows(options, hidden_size, layers, batch), options.json)


def all_rows(options: argparse.Namespace, hidden_size: int, layers: int, batch: tuple[int, int]) -> Iterator[Row]:
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    base = llama(layers, dtype, hidden_size)
    input_ids = torch.randint(VOCABULARY, batch, device=DEVICE)
    seconds = step_seconds(base, input_ids, 3 if options.quick else options.repeats)
    yield from time_rows(seconds)
    yield from byte_rows(base)
    yield from activation_rows()
    yield from engine_rows(dtype, quick=options.quick)
    # A merge into 112 layers takes seconds, so one is enough.
    yield from stream_rows(base, seconds["adapt"], 1 if options.quick or options.size == "1b" else 3)


# ---- Time -----------------------------------------------------------------------------------------------------------


def step_seconds(base: LlamaForCausalLM, input_ids: Tensor, repeats: int) -> dict[str, float]:
    """Return the median seconds of a step of each variant."""
    variants = {"frozen": frozen_step(base, input_ids), "LoRA": Training(base, lora()).step_on(input_ids)}
    variants |= {phase: Training(base, share(phase)).step_on(input_ids) for phase in PHASES}
    return medians(interleaved(variants, repeats=repeats))


def time_rows(seconds: dict[str, float]) -> list[Row]:
    names = {"frozen": "frozen model, backward through its activations", **NAMES}
    rows = [Row(f"a step: {names[variant]}", 1e3 * value, "ms") for variant, value in seconds.items()]
    for phase in PHASES:
        rows += [
            Row.at_most(f"step of the {phase} phase over LoRA", seconds[phase] / seconds["LoRA"], "x", 1.02),
            Row.at_most(f"step of the {phase} phase over frozen", seconds[phase] / seconds["frozen"], "x", 1.2),
        ]
    return [*rows, Row("step of LoRA over frozen", seconds["LoRA"] / seconds["frozen"], "x")]


class Training:
    """A copy of the model with an adapter, and the optimizer of the adapter's trainable parameters."""

    def __init__(self, base: LlamaForCausalLM, config: PeftConfig) -> None:
        self.model = get_peft_model(copy_of(base), config, adapter_name="task").train()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)

    def step_on(self, input_ids: Tensor) -> Callable[[], None]:
        def step() -> None:
            self.optimizer.zero_grad()
            self.model(input_ids=input_ids, labels=input_ids).loss.backward()
            self.optimizer.step()

        return step

    def bytes_held(self) -> int:
        """Return the bytes of trained parameters, their gradients, and the optimizer's state."""
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        gradients = [parameter.grad for parameter in self.trained]
        return sum(tensor.nbytes for tensor in (*self.trained, *gradients, *state) if isinstance(tensor, Tensor))


def frozen_step(base: LlamaForCausalLM, input_ids: Tensor) -> Callable[[], None]:
    """Make a step without training: a forward pass, and a backward pass to the embeddings of the tokens."""
    model = copy_of(base).requires_grad_(False).train()
    model.enable_input_require_grads()
    return lambda: model(input_ids=input_ids, labels=input_ids).loss.backward()


# ---- Memory ---------------------------------------------------------------------------------------------------------


def byte_rows(base: LlamaForCausalLM) -> list[Row]:
    """Measure the bytes that training adds to the frozen model after a step. They do not depend on the batch."""
    input_ids = torch.randint(VOCABULARY, (1, 16), device=DEVICE)
    held = {}
    for name, config in (
        ("LoRA", lora()),
        ("Share", share("coefficients")),
        ("small", share("coefficients", SMALL_COMPONENTS, SMALL_RANK)),
        ("adapt", share("adapt")),
    ):
        training = Training(base, config)
        training.step_on(input_ids)()
        held[name] = training.bytes_held()
        del training
    trained = "parameters, gradients, optimizer state"
    small = f"coefficients at k = {SMALL_COMPONENTS}, p = {SMALL_RANK}"
    return [
        Row(f"{trained}: LoRA", held["LoRA"], "bytes"),
        Row(f"{trained}: adapt phase", held["adapt"], "bytes"),
        Row(f"{trained}: coefficients phase", held["Share"], "bytes"),
        Row(f"{trained}: {small}", held["small"], "bytes"),
        Row.at_least("bytes of LoRA / of the coefficients phase", held["LoRA"] / held["Share"], "x", 15),
        Row.at_least(f"bytes of LoRA / of {small}", held["LoRA"] / held["small"], "x", 100),
    ]


def activation_rows() -> list[Row]:
    """Measure how many numbers one adapted layer keeps of each token besides the layer's input."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        of = f"kept a token by an adapter, {str(dtype).removeprefix('torch.')}"
        rows += [
            Row.at_most(f"widest activation {of}: {phase} phase", widest_kept(share(phase), dtype), "", RANK)
            for phase in PHASES
        ]
        rows.append(Row(f"widest activation {of}: LoRA", widest_kept(lora(), dtype), ""))
    # Autocast casts the input for the adapter as it does for the frozen layer, and the cast is kept instead of the
    # input.
    of = "kept a token by an adapter, bfloat16 autocast"
    rows += [
        Row(f"widest activation {of}: {phase} phase", widest_kept(share(phase), torch.float32, autocast=True), "")
        for phase in PHASES
    ]
    return [*rows, Row(f"widest activation {of}: LoRA", widest_kept(lora(), torch.float32, autocast=True), "")]


def widest_kept(config: PeftConfig, dtype: torch.dtype, *, autocast: bool = False) -> int:
    """Return the width of the widest activation that an adapted layer keeps for backward, besides its own input."""
    model = nn.ModuleDict({"q_proj": nn.Linear(256, 192, device=DEVICE, dtype=dtype)})
    config = copy.deepcopy(config)
    config.target_modules = {"q_proj"}
    layer = get_peft_model(model, config, adapter_name="task").train().get_submodule("base_model.model.q_proj")
    x = torch.randn(3, ODD_TOKENS, 256, device=DEVICE, dtype=dtype, requires_grad=True)

    kept: list[Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
        torch.autocast(DEVICE, torch.bfloat16) if autocast else nullcontext(),
    ):
        y = layer(x)
    y.float().square().sum().backward()
    return max(tensor.numel() // (3 * ODD_TOKENS) for tensor in of_tokens(kept) if not shares_memory(tensor, x))


def of_tokens(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor.numel() % ODD_TOKENS == 0]


def shares_memory(tensor: Tensor, other: Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


# ---- A stream -------------------------------------------------------------------------------------------------------


def stream_rows(base: LlamaForCausalLM, step: float, repeats: int) -> list[Row]:
    """Measure everything in a task of a stream except steps, in seconds and as a share of the task's time."""
    config = share("coefficients")
    model = get_peft_model(copy_of(base), config, adapter_name="default")
    config.target_modules = model.peft_config["default"].target_modules
    state = SubspaceState(settings=config.subspace_settings())
    for i in range(STREAM_TASKS):
        begin_phase(model, state, f"task{i}", "init", config)
        pretend_to_train(model)
        state = merged(model, state, f"task{i}")

    tasks = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(repeats):
            state, seconds = seconds_of_a_task(model, state, f"timed{i}", config, Path(folder))
            tasks.append(seconds)
    of = {part: median(seconds[part] for seconds in tasks) for part in tasks[0]}
    checkpoints = STEPS // STEPS_A_CHECKPOINT
    others = checkpoints * of["checkpoint"] + of["begin"] + of["merge"] + of["draft"] + of["save"]
    return [
        Row("a checkpoint: adapter of the adapt phase, bases, optimizer", 1e3 * of["checkpoint"], "ms"),
        Row("beginning an adapt phase", 1e3 * of["begin"], "ms"),
        Row(f"a merge into {STREAM_TASKS} tasks, all layers, and its load", 1e3 * of["merge"], "ms"),
        Row("writing the tree after the merge", 1e3 * of["draft"], "ms"),
        Row("writing the tree at the task's end, with card and figures", 1e3 * of["save"], "ms"),
        Row(f"all of it for {STEPS} steps, a checkpoint every {STEPS_A_CHECKPOINT}", others, "s"),
        Row.at_most(f"its share of the time of {STEPS} steps", 100 * others / (STEPS * step + others), "%", 2),
    ]


def seconds_of_a_task(
    model: PeftModel, state: SubspaceState, task: str, config: ShareConfig, folder: Path
) -> tuple[SubspaceState, dict[str, float]]:
    """Add a task to the subspace, and return the subspace and the seconds of each part of learning except steps."""
    states: list[SubspaceState] = []
    seconds = {"begin": seconds_of(lambda: begin_phase(model, state, task, "adapt", config))}
    optimizer = pretend_to_train(model)
    seconds["checkpoint"] = seconds_of(lambda: save_checkpoint(model, task, optimizer, folder / "checkpoint"))
    seconds["merge"] = seconds_of(lambda: states.append(merged(model, state, task)))
    seconds["draft"] = seconds_of(lambda: write_tree(states[0], folder / "subspace", draft=True))
    seconds["save"] = seconds_of(lambda: write_tree(states[0], folder / "subspace", draft=False))
    return states[0], seconds


def merged(model: PeftModel, state: SubspaceState, task: str) -> SubspaceState:
    phase = model.peft_config[task].phase
    return take_merged(model, state, task, describe_task(model, task, phase))[0]


def pretend_to_train(model: PeftModel) -> torch.optim.Optimizer:
    """Update the trainable parameters with random gradients, and return an optimizer whose state has its real size."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=True)
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def save_checkpoint(model: PeftModel, task: str, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    model.save_pretrained(folder, selected_adapters=[task])
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


# ---- Engines --------------------------------------------------------------------------------------------------------


def engine_rows(dtype: torch.dtype, *, quick: bool) -> list[Row]:
    """Measure steps of two processes under each engine, and what ZeRO adds to them over DDP."""
    hidden_size, batch, repeats = (256, (2, 64), 7) if quick else (512, (2, 128), 61)
    adapters = {"LoRA": lora(), **{phase: share(phase) for phase in PHASES}}
    names = {
        (adapter, engine): f"a step in two processes, hidden size {hidden_size}, {engine}: {NAMES[adapter]}"
        for adapter in adapters
        for engine in ENGINES
    }
    reason = reason_against()
    if reason is not None:
        return [Row.not_run(name, reason) for name in names.values()]
    make_base = partial(llama, 1 if quick else 2, dtype, hidden_size)
    seconds = seconds_in_two_processes(make_base, adapters, batch, repeats)
    rows = [Row(names[variant], 1e3 * median(values), "ms") for variant, values in seconds.items()]
    for engine in ENGINES[1:]:
        rows += over_ddp_rows(engine, seconds)
    return rows


def over_ddp_rows(engine: str, seconds: Seconds) -> list[Row]:
    """Return what the engine adds to a step, as a ratio and in milliseconds, comparing steps of the same round."""
    ratios, added = {}, {}
    for adapter in NAMES:
        pairs = list(zip(seconds[adapter, engine], seconds[adapter, "DDP"], strict=True))
        ratios[adapter] = median(zero / ddp for zero, ddp in pairs)
        added[adapter] = [1e3 * (zero - ddp) for zero, ddp in pairs]
    of_lora = median(added["LoRA"])
    noise = {
        phase: noise_of_median([a - b for a, b in zip(added[phase], added["LoRA"], strict=True)]) for phase in PHASES
    }
    return [
        Row(f"{engine} over DDP: LoRA", ratios["LoRA"], "x"),
        *(Row.at_most(f"{engine} over DDP: {NAMES[phase]}", ratios[phase], "x", ratios["LoRA"]) for phase in PHASES),
        Row(f"{engine} adds to a step: LoRA", of_lora, "ms"),
        *(
            Row.at_most(
                f"{engine} adds to a step: {NAMES[phase]}, at most LoRA's + noise",
                median(added[phase]),
                "ms",
                of_lora + noise[phase],
            )
            for phase in PHASES
        ),
        *(Row(f"{engine} adds to a step: noise of {NAMES[phase]} - LoRA", noise[phase], "ms") for phase in PHASES),
    ]


def noise_of_median(values: list[float]) -> float:
    """Return half of the 95 % interval of the median, like the notch in a box plot (McGill et al. 1978)."""
    lower, _, upper = quantiles(values, n=4)
    return 1.57 * (upper - lower) / len(values) ** 0.5


# ---- The models -----------------------------------------------------------------------------------------------------


def llama(layers: int, dtype: torch.dtype, hidden_size: int) -> LlamaForCausalLM:
    """Make a Llama with the proportions of Llama-3.2-1B, whose hidden size is 2048."""
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 256,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    with torch.device(DEVICE):  # a CPU takes long to draw a billion random numbers
        return LlamaForCausalLM(config).to(dtype)


def copy_of(base: LlamaForCausalLM) -> LlamaForCausalLM:
    """Copy a model but share its weights, which nothing here trains, so that a GPU holds them only once."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def lora() -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")


def share(phase: str, num_components: int = COMPONENTS, pseudo_rank: int = RANK) -> ShareConfig:
    return ShareConfig(
        num_components=num_components,
        pseudo_rank=pseudo_rank,
        num_temporary=min(TEMPORARY, num_components // 2),
        target_modules="all-linear",
        phase=phase,
    )


if __name__ == "__main__":
    main()
