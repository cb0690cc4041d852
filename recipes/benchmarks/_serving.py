"""A Llama with any number of tasks, in a subspace and as LoRAs, and the memory that they take in a process.

`python _serving.py JOB`, with the job as JSON, measures the memory of many tasks in one model. It runs as a separate
process and prints the measurements as the last line of its output.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from _measured import anonymous_bytes, highest_of
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from share_hf import SharedSubspace
from share_hf.state import SubspaceState, TaskInfo
from share_hf.subspace import LayerSubspace, SubspaceSettings
from share_hf.subspace.layer import TaskRecords, update_norms


VOCABULARY = 1024  # small, so that the output layer does not dominate
SIZE_OF_COEFFICIENTS = 0.25  # standard deviation of the entries, large enough for updates to show in the logits
HEAD_SIZE = 64
IN_USE = 32  # tasks to use before memory is measured, so that it includes what the model keeps of recently used tasks


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model and the tasks.

    Args:
        hidden: Hidden size of the Llama.
        intermediate: Intermediate size of the Llama.
        layers: Number of layers, with seven adapted modules each.
        k: Number of components of the bases.
        p: Rank of the tasks.
    """

    hidden: int = 1024
    intermediate: int = 2048
    layers: int = 4
    k: int = 64
    p: int = 8

    def llama(self, device: str = "cpu") -> LlamaForCausalLM:
        """Make the model in float32, with random weights and in eval mode."""
        heads = max(1, self.hidden // HEAD_SIZE)
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            vocab_size=VOCABULARY,
        )
        with torch.device(device):
            return LlamaForCausalLM(config).eval()


def adapted_modules(base: LlamaForCausalLM) -> dict[str, nn.Linear]:
    """Return all linear modules except the output layer, by name."""
    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and module is not base.get_output_embeddings()
    }


def random_subspace(base: LlamaForCausalLM, tasks: int, sizes: Sizes) -> SharedSubspace:
    """Make a subspace with random bases and random coefficients of the tasks.

    The tasks are not trained, because their cost does not depend on what they have learned.
    """
    names = tuple(f"task{i:05d}" for i in range(tasks))
    generator = torch.Generator().manual_seed(0)
    modules = adapted_modules(base)
    layers = {name: _random_layer(names, module, sizes, generator) for name, module in sorted(modules.items())}
    info = TaskInfo(target={"target_modules": list(layers), "task_type": "CAUSAL_LM"})
    state = SubspaceState(
        settings=SubspaceSettings(num_components=sizes.k, pseudo_rank=sizes.p),
        layers=layers,
        tasks=dict.fromkeys(names, info),
    )
    return SharedSubspace(state)


def _random_layer(
    tasks: tuple[str, ...], module: nn.Linear, sizes: Sizes, generator: torch.Generator
) -> LayerSubspace:
    def basis(features: int) -> Tensor:
        return torch.linalg.qr(torch.randn(features, sizes.k, generator=generator)).Q

    def coefficients() -> Tensor:
        return torch.randn(len(tasks), sizes.k, sizes.p, generator=generator).mul_(SIZE_OF_COEFFICIENTS)

    out, in_ = coefficients(), coefficients()
    return LayerSubspace(
        tasks=tasks,
        basis_out=basis(module.out_features),
        basis_in=basis(module.in_features),
        coefficients_out=out,
        coefficients_in=in_,
        records=TaskRecords.undrifted(update_norms(out, in_)),
        spectrum_out=torch.ones(sizes.k, dtype=torch.float64),
        spectrum_in=torch.ones(sizes.k, dtype=torch.float64),
    )


def copy_of(base: LlamaForCausalLM) -> LlamaForCausalLM:
    """Copy a model but share its weights, which nothing here changes."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def export_loras(subspace: SharedSubspace, tasks: Sequence[str], folder: Path) -> list[Path]:
    """Export tasks to disk as plain LoRAs, which compute the same."""
    places = [folder / task for task in tasks]
    for task, place in zip(tasks, places, strict=True):
        subspace.export_lora(task, place)
    return places


def with_loras(base: LlamaForCausalLM, places: Sequence[Path]) -> PeftModel:
    """Return a copy of the model into which PEFT loads the LoRAs one after the other; the first one is active."""
    first, *others = places
    model = PeftModel.from_pretrained(copy_of(base), first, adapter_name=first.name)
    for place in others:
        model.load_adapter(place, place.name)
    return model.eval()


def bytes_of_loras(base: LlamaForCausalLM, count: int, rank: int) -> int:
    """Return the bytes of the float32 factors of LoRAs on all modules, without the overhead of any objects."""
    features = sum(module.in_features + module.out_features for module in adapted_modules(base).values())
    return 4 * count * rank * features


def bytes_of_tasks(sizes: Sizes, tasks: int) -> dict[str, int]:
    """Measure the anonymous memory of tasks that are resident in a model, in this process.

    Returns:
        `held`: bytes of the bases, the coefficients and what the model keeps of recently used tasks. `grown`: bytes by
        which the peak while all tasks are used in turn exceeds the peak while few of them are.
    """
    torch.manual_seed(0)
    base = sizes.llama()
    token = torch.randint(VOCABULARY, (1, 1))
    with torch.no_grad():
        base(input_ids=token)
    _give_back_free_memory()
    before = anonymous_bytes()
    model = random_subspace(base, tasks, sizes).apply(copy_of(base))
    names = list(model.peft_config)

    def use(tasks: Sequence[str]) -> int:
        """Return the peak memory while tasks are used in turn."""
        with highest_of(anonymous_bytes) as highest, torch.no_grad():
            for task in tasks:
                model.set_adapter(task)
                model(input_ids=token)
        return highest[0]

    use(names[:IN_USE])
    _give_back_free_memory()
    held = anonymous_bytes()
    of_few = use(names[:IN_USE])
    return {"held": held - before, "grown": use(names) - of_few}


def _give_back_free_memory() -> None:
    """Return freed memory to the system, so that it does not count."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def job_of_tasks(sizes: Sizes, tasks: int) -> str:
    """Return the job that `main` reads, as JSON."""
    return json.dumps({"sizes": asdict(sizes), "tasks": tasks, "threads": torch.get_num_threads()})


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    print(json.dumps(bytes_of_tasks(Sizes(**job["sizes"]), job["tasks"])))


if __name__ == "__main__":
    main()
