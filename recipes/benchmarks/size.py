"""How small is a task on disk?

    python recipes/benchmarks/size.py
    python recipes/benchmarks/size.py --quick --json size.json

The benchmark saves rank-16 LoRAs of a Llama with PEFT, builds and saves a subspace from them, and compares the folder
of a LoRA with the folder of a task, including configuration, weights and metrics. Layers have the sizes of
Llama-3.2-1B (hidden size 2048). All layers are alike, so a few of them suffice for the ratio.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from _report import Row, argument_parser, report
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from share_hf import SharedSubspace


GOAL = 50


def main() -> None:
    parser = argument_parser(__doc__, repeats=1)
    parser.add_argument("--layers", type=int, default=4, help="number of layers of the model (default: %(default)s)")
    arguments = parser.parse_args()
    layers = 1 if arguments.quick else arguments.layers

    with tempfile.TemporaryDirectory() as folder:
        adapters = {f"task{i}": save_lora(Path(folder) / f"task{i}", layers, seed=i) for i in range(3)}
        subspace = SharedSubspace.from_adapters(adapters, num_components=32, pseudo_rank=8, progress=False)
        subspace.save_pretrained(Path(folder) / "subspace")
        lora = size_of(adapters["task0"])
        task = size_of(Path(folder) / "subspace" / "tasks" / "task0")
    rows = [
        Row(f"rank-16 LoRA, {layers} layers of hidden size 2048", lora, "bytes"),
        Row("a task at k = 32, p = 8", task, "bytes"),
        Row.at_least("LoRA / task", lora / task, "x", GOAL),
    ]
    report("A task on disk", rows, arguments.json)


def save_lora(folder: Path, layers: int, seed: int) -> Path:
    """Save a LoRA with random float32 weights on all linear modules with PEFT, and return its folder."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=64,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = get_peft_model(
        model.to_empty(device="cpu"),
        LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False),
    )
    model.save_pretrained(folder)
    return folder


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))


if __name__ == "__main__":
    main()
