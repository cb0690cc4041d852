"""Adapters on disk with a shared part and a decaying spectrum, and how far what is stored of them is from them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


SHARED_DIRECTIONS = 96
DECAY = 0.7  # the i-th shared direction has strength i^-0.7
OWN_PART = 0.005  # of each entry, beside the shared part


@dataclass(frozen=True)
class Sizes:
    """What adapters are like.

    Args:
        modules: How many modules they adapt.
        features: Outputs and inputs of each.
        rank: Rank of each LoRA.
    """

    modules: int = 24
    features: int = 1024
    rank: int = 16

    def names(self) -> list[str]:
        """Names of the modules."""
        return [f"model.layers.{i // 4}.self_attn.{'qkvo'[i % 4]}_proj" for i in range(self.modules)]


def make_adapters(folder: Path, count: int, sizes: Sizes) -> list[Path]:
    """Folders of `count` adapters in the order of their names; those that are there already are taken as they are."""
    places = [folder / f"task{i:05d}" for i in range(count)]
    missing = [i for i, place in enumerate(places) if not (place / "adapter_config.json").is_file()]
    shared = _shared_directions(sizes) if missing else []
    for i in missing:
        _write_adapter(places[i], i, shared, sizes)
    return places


def _shared_directions(sizes: Sizes) -> list[tuple[Tensor, Tensor]]:
    """By module, the directions (n, 96) and (d, 96) that all adapters share, each with its strength."""
    generator = torch.Generator().manual_seed(0)
    count = min(SHARED_DIRECTIONS, sizes.features)
    strengths = torch.arange(1, count + 1) ** -DECAY

    def directions() -> Tensor:
        return torch.linalg.qr(torch.randn(sizes.features, count, generator=generator)).Q * strengths

    return [(directions(), directions()) for _ in range(sizes.modules)]


def _write_adapter(place: Path, seed: int, shared: list[tuple[Tensor, Tensor]], sizes: Sizes) -> None:
    generator = torch.Generator().manual_seed(seed + 1)

    def factor(directions: Tensor) -> Tensor:
        mixing = torch.randn(directions.shape[1], sizes.rank, generator=generator)
        own = torch.randn(sizes.features, sizes.rank, generator=generator)
        return directions @ mixing + OWN_PART * own

    tensors = {}
    for name, (out, in_) in zip(sizes.names(), shared, strict=True):
        tensors[f"base_model.model.{name}.lora_B.weight"] = factor(out)
        tensors[f"base_model.model.{name}.lora_A.weight"] = factor(in_).T.contiguous()
    config = {
        "peft_type": "LORA",
        "r": sizes.rank,
        "lora_alpha": sizes.rank,
        "target_modules": [f"{kind}_proj" for kind in "qkvo"],
        "base_model_name_or_path": "base",
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
    }
    place.mkdir(parents=True, exist_ok=True)
    save_file(tensors, place / "adapter_model.safetensors", {"format": "pt"})
    # Last, and at once: an adapter that has its configuration is whole.
    draft = place / "config.tmp"
    draft.write_text(json.dumps(config))
    os.replace(draft, place / "adapter_config.json")


def factors_of(place: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """B (n, r) and A (r, d) by module, with the scale in B."""
    config = json.loads((place / "adapter_config.json").read_text())
    tensors = load_file(place / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    found = {}
    for name in sorted(tensors):
        if name.endswith(".lora_B.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            found[module] = scale * tensors[name].double(), tensors[name.replace("lora_B", "lora_A")].double()
    return found


def relative_error(learned: tuple[Tensor, Tensor], stored: tuple[Tensor, Tensor]) -> float:
    """``‖B' A' - B A‖ / ‖B A‖`` from the factors (n, r), (r, d) of both."""
    norms = []
    for outs, ins in (
        ([learned[0], -stored[0].double()], [learned[1], stored[1].double()]),
        ([learned[0]], [learned[1]]),
    ):
        out = torch.linalg.qr(torch.cat(outs, dim=1), mode="r").R
        in_ = torch.linalg.qr(torch.cat(ins).T, mode="r").R
        norms.append(float((out @ in_.T).norm()))
    return norms[0] / norms[1]
