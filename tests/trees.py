"""What the tests of the tree share: models, plain LoRA adapters that PEFT itself wrote, and comparisons."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from share_hf import SharedSubspace
from share_hf.state import SubspaceState
from share_hf.tuner import share_layers


BASE_NAME = "org/tiny"
INPUT_IDS = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(7))


def named(model: PreTrainedModel, name: str = BASE_NAME) -> PreTrainedModel:
    """Return the model as if it had been loaded from this place."""
    model.name_or_path = name
    return model


def bert_with_labels(model: BertForSequenceClassification, num_labels: int) -> BertForSequenceClassification:
    """Return the same encoder with a head of this size, which depends only on the size."""
    config = BertConfig(**{**model.config.to_dict(), "num_labels": num_labels, "id2label": None, "label2id": None})
    torch.manual_seed(num_labels)
    resized = BertForSequenceClassification(config).eval()
    resized.bert.load_state_dict(model.bert.state_dict())
    return resized


def lora_config(**overrides: Any) -> LoraConfig:
    """Return a LoRA of rank 4 and scale 2 on query and value of a Llama, with random A and B."""
    values = dict(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    return LoraConfig(**{**values, **overrides})


BERT_LORA = dict(target_modules=["query", "value"], task_type="SEQ_CLS")


def save_adapter(model: PreTrainedModel, folder: Path, config: Any, seed: int) -> Path:
    """Save an adapter with random weights, including its head, as PEFT saves it."""
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "modules_to_save" in name:
                parameter.copy_(torch.randn_like(parameter))
    peft_model.save_pretrained(folder)
    return folder


def small_lora(folder: Path, seed: int, scale: float) -> tuple[Path, dict[str, Tensor]]:
    """Write a plain LoRA of rank 4 for two small modules, and return its updates (n, d) by module in float64."""
    modules = {"model.layers.0.self_attn.q_proj": (24, 20), "model.layers.0.mlp.gate": (3, 20)}
    alpha, rank = 3, 4  # a scale that is not a power of two
    generator = torch.Generator().manual_seed(seed)
    tensors, updates = {}, {}
    for module, (n, d) in modules.items():
        b, a = (torch.randn(n, rank, generator=generator) * scale, torch.randn(rank, d, generator=generator))
        tensors |= {f"base_model.model.{module}.lora_{side}.weight": of for side, of in (("A", a), ("B", b))}
        updates[module] = alpha / rank * b.double() @ a.double()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q_proj", "gate"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}))
    return folder, updates


def plain_logits(model: PreTrainedModel, folder: Path) -> Tensor:
    """Return what PEFT computes with the plain LoRA in a folder."""
    return logits(PeftModel.from_pretrained(model, folder).eval())


def delta_weights(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """Return PEFT's own updates (n, d) of a LoRA by module of the base model."""
    peft_model = PeftModel.from_pretrained(model, folder)
    return {
        name: module.get_delta_weight("default")
        for name, module in peft_model.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    }


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=INPUT_IDS).logits


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Assert equality up to rounding; `tolerance` is relative to the largest entry."""
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def assert_same_state(found: SubspaceState, expected: SubspaceState) -> None:
    """Assert that everything a tree holds is equal bit by bit; spectra are stored in float32."""
    assert list(found.tasks) == list(expected.tasks)
    assert found.layers.keys() == expected.layers.keys()
    for name in ("settings", "base_model_name_or_path", "default_task", "metrics", "lineage"):
        assert getattr(found, name) == getattr(expected, name), name
    for module, layer in found.layers.items():
        other = expected.layers[module]
        assert layer.tasks == other.tasks
        for name in ("basis_out", "basis_in", "coefficients_out", "coefficients_in"):
            assert_same_tensor(getattr(layer, name), getattr(other, name))
        for name in ("norms", "rank_errors", "drift_bounds", "drift_estimates"):
            assert_same_tensor(getattr(layer.records, name), getattr(other.records, name))
        for name in ("spectrum_out", "spectrum_in"):
            assert_same_tensor(getattr(layer, name).float(), getattr(other, name).float())
    for task, info in found.tasks.items():
        other = expected.tasks[task]
        assert (info.learned_by, info.labels, info.scores) == (other.learned_by, other.labels, other.scores)
        assert known(info.target) == known(other.target)
        assert info.head.keys() == other.head.keys()
        for name in info.head:
            assert_same_tensor(info.head[name], other.head[name])


def known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def assert_same_tensor(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def distance(found: SharedSubspace, expected: SharedSubspace, task: str) -> float:
    """Return the relative change of a task's weights over all layers."""
    change = total = 0.0
    for module, layer in expected.state.layers_of(task).items():
        before, after = layer.update_of(task).dense(), found.state.layers[module].update_of(task).dense()
        change += float((after - before).square().sum())
        total += float(before.square().sum())
    return (change / total) ** 0.5


def untouched(model: PreTrainedModel, pristine: PreTrainedModel) -> bool:
    """Return whether a model is still as it was made: no adapters, the same weights, the same trained parameters."""
    assert not share_layers(model)
    parameters, expected = dict(model.named_parameters()), dict(pristine.named_parameters())
    return parameters.keys() == expected.keys() and all(
        torch.equal(parameter, expected[name]) and parameter.requires_grad == expected[name].requires_grad
        for name, parameter in parameters.items()
    )


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder by relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file, and leave everything else unchanged."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change `share_config.json` like somebody who knows about the digest."""

    def change_and_sign(content: dict[str, Any]) -> None:
        content.pop("digest")
        change(content)
        content["digest"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    edit_json(folder / "share_config.json", change_and_sign)


def sign_anew(tree: Path, name: str) -> None:
    """Give a changed file its new checksum, like somebody who knows about it."""
    path = tree / name
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if path.parent.parent.name == "tasks" and path.name != "metrics.json":
        edit_json(path.parent / "metrics.json", lambda metrics: metrics["sha256"].update({path.name: digest}))
        sign_anew(tree, f"tasks/{path.parent.name}/metrics.json")
    else:
        edit_index(tree, lambda index: index["sha256"].update({name: digest}))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors in a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def leave_aside(folder: Path) -> None:
    """Bring a folder into the state in which a save leaves it that was killed between its two renames."""
    workshop = folder.with_name(f".{folder.name}.share_hf")
    workshop.mkdir()
    (workshop / "share_hf.txt").touch()
    folder.rename(workshop / "old")
