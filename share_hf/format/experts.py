"""LoRAs of experts that a model keeps in one parameter (`target_parameters` of PEFT), one expert at a time.

In a subspace, each expert is a module of its own, `<module>.<parameter>.<number>`, with the (n, d) of one expert. An
expert is a dense layer like others: its basis is as large as its updates need, each of its tasks has a certificate,
and a merge takes the memory of one expert. A single block matrix of all experts would have rank E·r, far more than any
p, and mixing the experts into one basis would lose what sets them apart, because they see different tokens. The price
is the number of names: a model of 48 layers with two parameters of 128 experts each has 12,288 modules. The numbers in
them are only those of the LoRAs.

In a PEFT file, A is (E·r, d), expert by expert, and B is (n, r·E), of which each expert has every E-th column. If a
module has several such parameters, the later ones are wrapped around the earlier ones, in the order in which the
module defines them, and no name tells which is which.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..state import Layout
from ..subspace import LowRankUpdate


EXPERT = Layout("expert")

# Orders in which modules of transformers define the parameters of their experts.
ORDERS = (("gate_up_proj", "down_proj"), ("gate_proj", "down_proj"), ("up_proj", "down_proj"))

_WRAPPED = ".base_layer"


def parameter_names(path: Path, modules: Iterable[str], targets: Sequence[str]) -> dict[str, str]:
    """Return the name of the parameter that each module of a file, `…experts` or `…experts.base_layer`, stands for.

    Args:
        path: Path of the file, for messages.
        modules: Names in the file that belong to no layer.
        targets: Field `target_parameters` of the file's configuration.

    Raises:
        ValueError: If it cannot be determined which parameter a module stands for. The message names the module.
    """
    wrapped: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        inner = module
        while inner.endswith(_WRAPPED):
            inner = inner.removesuffix(_WRAPPED)
        wrapped[inner].append(module)
    leaves_in: dict[str, set[str]] = defaultdict(set)
    for place, _, leaf in (target.rpartition(".") for target in targets):
        leaves_in[place].add(leaf)
    names = {}
    for inner, found in wrapped.items():
        leaves = {leaf for place in ["", *_ends_of(inner)] for leaf in leaves_in.get(place, ())}
        order = next((order for order in ORDERS if leaves == set(order)), tuple(leaves) if len(leaves) == 1 else ())
        if len(order) != len(found):
            raise ValueError(
                f"{path}: {inner!r} has LoRAs of {len(found)} parameters, of which target_parameters = "
                f"{sorted(targets)[:20]} names {sorted(leaves)[:20]}, expected one, or a pair among "
                f"{[*map(list, ORDERS)]}"
            )
        for module, leaf in zip(sorted(found, key=len, reverse=True), order, strict=True):
            names[module] = f"{inner}.{leaf}"
    return names


def expert_matrices(
    path: Path, parameter: str, tensors: Mapping[str, Tensor], rank: int
) -> list[tuple[Tensor, Tensor]]:
    """Return A (r, d) and B (n, r) of each expert, as views of the tensors of a file.

    Args:
        path: Path of the file, for messages.
        parameter: Name of the parameter.
        tensors: Tensors "A" (E·r, d) and "B" (n, r·E).
        rank: Rank r of the parameter according to the configuration.

    Raises:
        ValueError: If the shapes are not those of several experts of this rank.
    """
    a, b = tensors.get("A"), tensors.get("B")
    if a is None or b is None:
        raise ValueError(f"{path}: {parameter!r} has no lora_{'B' if b is None else 'A'}, expected both")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] % rank or a.shape[0] // rank < 2:
        raise ValueError(
            f"{path}: lora_A and lora_B of {parameter!r} are {tuple(a.shape)} and {tuple(b.shape)}, expected "
            f"(experts · {rank}, d) and (n, {rank} · experts) of more than one expert"
        )
    of_experts = b.reshape(len(b), rank, -1).unbind(2)
    return list(zip(a.split(rank), of_experts, strict=True))


def parameter_of(module: str) -> str:
    """Return the parameter to which an expert belongs."""
    return module.rpartition(".")[0]


def expert_tensors(updates: Mapping[str, LowRankUpdate], rank: int) -> dict[str, Tensor]:
    """Return the tensors of experts in a LoRA of this rank, padded with zeros, by name.

    Args:
        updates: Updates by module, with all the experts of each parameter.
        rank: Rank of the LoRA, at least that of each update.

    Raises:
        ValueError: If an expert is missing, or the order of a module's parameters is unknown.
    """
    experts: dict[str, dict[int, LowRankUpdate]] = defaultdict(dict)
    for module, update in updates.items():
        experts[parameter_of(module)][int(module.rpartition(".")[2])] = update
    leaves: dict[str, list[str]] = defaultdict(list)
    for parameter in experts:
        module, _, leaf = parameter.rpartition(".")
        leaves[module].append(leaf)
    tensors = {}
    for module, found in leaves.items():
        order = next((order for order in ORDERS if set(found) == set(order)), tuple(found))
        if len(found) > 1 and order not in ORDERS:
            raise ValueError(f"{module!r} has experts in {sorted(found)}, expected one, or a pair among {ORDERS}")
        for depth, leaf in enumerate(reversed(order)):
            numbered = experts[f"{module}.{leaf}"]
            if missing := set(range(len(numbered))) - numbered.keys():
                raise ValueError(
                    f"'{module}.{leaf}.{min(missing)}' is missing, expected all experts before the last one"
                )
            ordered = [numbered[number] for number in range(len(numbered))]
            name = f"{module}{_WRAPPED * depth}"
            padded = _padded(ordered, rank, lambda update: update.in_factor)
            tensors[f"{name}.lora_A.weight"] = padded.mT.flatten(0, 1)
            padded = _padded(ordered, rank, lambda update: update.out_factor)
            tensors[f"{name}.lora_B.weight"] = padded.permute(1, 2, 0).flatten(1)
    return tensors


def targets_of(updates: Collection[str], targets: Sequence[str]) -> list[str]:
    """Return `target_parameters` for PEFT: the given ones if they name all parameters of experts, else full names."""
    parameters = sorted({parameter_of(module) for module in updates})
    known = set(targets)
    return list(targets) if all(not known.isdisjoint(_ends_of(name)) for name in parameters) else parameters


def _ends_of(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _padded(updates: Sequence[LowRankUpdate], rank: int, factor: Callable[[LowRankUpdate], Tensor]) -> Tensor:
    """Return the factors (E, rows, rank), with zeros where an update has a smaller rank."""
    return torch.stack([torch.nn.functional.pad(f, (0, rank - f.shape[1])) for f in map(factor, updates)])
