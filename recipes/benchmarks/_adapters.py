"""Make adapters on disk that have a shared part and a decaying spectrum, and measure how exactly they are stored."""

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
OWN_PART = 0.005  # standard deviation of the entries that an adapter adds to the shared part


@dataclass(frozen=True)
class Sizes:
    """Sizes of the adapters.

    Args:
        modules: Number of adapted modules.
        features: Number of outputs and of inputs of each module.
        rank: Rank of each LoRA.
    """

    modules: int = 24
    features: int = 1024
    rank: int = 16

    def names(self) -> list[str]:
        """Return the names of the modules."""
        return [f"model.layers.{i // 4}.self_attn.{'qkvo'[i % 4]}_proj" for i in range(self.modules)]


def make_adapters(folder: Path, count: int, sizes: Sizes) -> list[Path]:
    """Return the folders of `count` adapters in the order of their names; adapters that already exist are reused."""
    places = [folder / f"task{i:05d}" for i in range(count)]
    missing = [i for i, place in enumerate(places) if not (place / "adapter_config.json").is_file()]
    shared = _shared_directions(sizes) if missing else []
    for i in missing:
        _write_adapter(places[i], i, shared, sizes)
    return places


def _shared_directions(sizes: Sizes) -> list[tuple[Tensor, Tensor]]:
    """Draw the directions (n, 96) and (d, 96) that all adapters share in each module, scaled by their strengths."""
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
    # The configuration is written last and atomically: an adapter that has one is complete.
    draft = place / "config.tmp"
    draft.write_text(json.dumps(config))
    os.replace(draft, place / "adapter_config.json")


def factors_of(place: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return B (n, r) and A (r, d) of each module in float64, with the scale in B."""
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
    """Return ``‖B' A' - B A‖ / ‖B A‖`` from the learned B, A and the stored B', A', each (n, r) and (r, d)."""
    norms = []
    for outs, ins in (
        ([learned[0], -stored[0].double()], [learned[1], stored[1].double()]),
        ([learned[0]], [learned[1]]),
    ):
        out = torch.linalg.qr(torch.cat(outs, dim=1), mode="r").R
        in_ = torch.linalg.qr(torch.cat(ins).T, mode="r").R
        norms.append(float((out @ in_.T).norm()))
    return norms[0] / norms[1]
