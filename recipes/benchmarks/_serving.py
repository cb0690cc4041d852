"""A Llama and any number of tasks of it, in a subspace and as LoRAs; and the memory that they take in a process.

`python _serving.py JOB`, with a job as JSON, measures what many tasks in one model take in a process of its own. It
writes what it measured as the last line of its output.
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


VOCABULARY = 1024  # small, so that the head is not everything
SIZE_OF_COEFFICIENTS = 0.25  # of each entry: updates that show in the logits
HEAD_SIZE = 64
IN_USE = 32  # tasks that are used before memory is measured, so that what is kept of the last ones is in it


@dataclass(frozen=True)
class Sizes:
    """What the model and the tasks are like.

    Args:
        hidden: Hidden size of the Llama.
        intermediate: Intermediate size.
        layers: Its layers, with seven adapted modules each.
        k: Components of the bases.
        p: Rank of the tasks.
    """

    hidden: int = 1024
    intermediate: int = 2048
    layers: int = 4
    k: int = 64
    p: int = 8

    def llama(self, device: str = "cpu") -> LlamaForCausalLM:
        """The model in float32, of random weights and in eval mode."""
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
    """All linear modules but the head, by name."""
    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and module is not base.get_output_embeddings()
    }


def random_subspace(base: LlamaForCausalLM, tasks: int, sizes: Sizes) -> SharedSubspace:
    """A subspace of random bases in which tasks have random coefficients.

    No task is trained: what tasks cost does not depend on what they have learned.
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
    """A model of its own that shares the weights, which nothing here changes."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def export_loras(subspace: SharedSubspace, tasks: Sequence[str], folder: Path) -> list[Path]:
    """The tasks as plain LoRAs on disk, which compute the same."""
    places = [folder / task for task in tasks]
    for task, place in zip(tasks, places, strict=True):
        subspace.export_lora(task, place)
    return places


def with_loras(base: LlamaForCausalLM, places: Sequence[Path]) -> PeftModel:
    """A copy of the model with LoRAs, loaded one after the other by PEFT; the first is active."""
    first, *others = places
    model = PeftModel.from_pretrained(copy_of(base), first, adapter_name=first.name)
    for place in others:
        model.load_adapter(place, place.name)
    return model.eval()


def bytes_of_loras(base: LlamaForCausalLM, count: int, rank: int) -> int:
    """What the factors of LoRAs of all modules take in float32, without any object around them."""
    features = sum(module.in_features + module.out_features for module in adapted_modules(base).values())
    return 4 * count * rank * features


def bytes_of_tasks(sizes: Sizes, tasks: int) -> dict[str, int]:
    """Anonymous memory of tasks that are resident in a model, measured in this process.

    Returns:
        `held`: bases, coefficients and what is kept of the tasks that were used last. `grown`: by how much the most
        that was taken while all tasks were used in turn is more than while few of them were.
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
        """The highest use of memory while tasks are used in turn."""
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
    """To the system, so that what a process has freed is not counted."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def job_of_tasks(sizes: Sizes, tasks: int) -> str:
    """The job that `main` reads."""
    return json.dumps({"sizes": asdict(sizes), "tasks": tasks, "threads": torch.get_num_threads()})


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    print(json.dumps(bytes_of_tasks(Sizes(**job["sizes"]), job["tasks"])))


if __name__ == "__main__":
    main()
