"""Small plain LoRAs with several modules, like those in people's collections."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


WEIGHTS = "adapter_model.safetensors"
RANK = 4


def write_collection(folder: Path, count: int, modules: int, features: int = 24) -> list[str]:
    """Write adapters with one update in each of several modules, and return their folders."""
    generator = torch.Generator().manual_seed(0)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"]}
    config["base_model_name_or_path"] = "org/base"
    places = []
    for i in range(count):
        tensors = {}
        for layer in range(modules):
            name = f"base_model.model.{module_name(layer)}.lora"
            tensors[f"{name}_A.weight"] = torch.randn(RANK, features, generator=generator)
            tensors[f"{name}_B.weight"] = torch.randn(features + layer % 3, RANK, generator=generator)
        place = folder / f"task{i}"
        place.mkdir(parents=True)
        save_file(tensors, place / WEIGHTS, {"format": "pt"})
        (place / "adapter_config.json").write_text(json.dumps(config))
        places.append(str(place))
    return places


def module_name(layer: int) -> str:
    return f"model.layers.{layer:02}.self_attn.q_proj"


def scale(place: str, layer: int, factor: float) -> None:
    """Rewrite an adapter with larger factors in one module."""
    path = Path(place) / WEIGHTS
    tensors = load_file(path)
    for name in tensors:
        if module_name(layer) in name:
            tensors[name] = tensors[name] * factor
    save_file(tensors, path, {"format": "pt"})
