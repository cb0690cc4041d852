"""What the tests of the tuner share: three architectures, and small operations on models with tasks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from share_hf import ShareConfig
from share_hf.tuner import ShareLayer, share_layers


K, P, PHI = 8, 4, 3


@dataclass(frozen=True)
class Case:
    """An architecture, and what is adapted in it."""

    architecture: str
    target_modules: tuple[str, ...]
    task_type: str | None

    def config(self, **overrides: Any) -> ShareConfig:
        values = dict(
            num_components=K,
            pseudo_rank=P,
            num_temporary=PHI,
            target_modules=list(self.target_modules),
            task_type=self.task_type,
        )
        return ShareConfig(**{**values, **overrides})

    def batch(self, size: int = 4, length: int = 7, seed: int = 1) -> dict[str, Tensor]:
        """Return token ids together with labels to learn."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 64, (size, length), generator=generator)
        return {"input_ids": ids, "labels": ids if self.task_type == "CAUSAL_LM" else ids[:, 0] % 3}


LLAMA = Case("llama", ("q_proj", "v_proj", "down_proj"), "CAUSAL_LM")
BERT = Case("bert", ("query", "value"), None)
GPT2 = Case("gpt2", ("c_attn", "c_fc"), "CAUSAL_LM")

each_architecture = pytest.mark.parametrize("case", [LLAMA, BERT, GPT2], ids=lambda case: case.architecture)


def with_tasks(base: PreTrainedModel, case: Case, *tasks: str, **config: Any) -> PeftModel:
    """Return the model in eval mode with tasks that each have an effect. The first one is active."""
    first, *others = tasks
    model = get_peft_model(base, case.config(**config), adapter_name=first)
    for task in others:
        model.add_adapter(task, case.config(**config))
    for i, task in enumerate(tasks):
        randomize(model, task, seed=i)
    return model.eval()


def with_random_bases(model: PeftModel) -> PeftModel:
    """Return the model with bases that no new model has, so that a basis that was not loaded shows."""
    for layer in share_layers(model).values():
        layer.set_basis(
            torch.linalg.qr(torch.randn(layer.out_features, K)).Q, torch.linalg.qr(torch.randn(layer.in_features, K)).Q
        )
    return model


def randomize(model: nn.Module, task: str, seed: int = 0) -> None:
    """Give a task a random update that is large enough to show in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in task_parameters(model, task).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return what adding an adapter could change: modules, parameters and what is trained."""
    return {
        "modules": {name: type(module).__name__ for name, module in model.named_modules()},
        "parameters": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "tasks": {name: layer.tasks for name, layer in share_layers(model).items()},
        "configs": list(getattr(model, "peft_config", {})),
        "active": [layer.active_adapters for layer in share_layers(model).values()],
    }


def task_parameters(model: nn.Module, task: str) -> dict[str, nn.Parameter]:
    """Return a task's parameters in Share layers by name; those of a frozen task are rows of the layer's stack."""
    return {
        f"{module_name}.{name}.{task}": getattr(module, name)[task]
        for module_name, module in model.named_modules()
        if isinstance(module, ShareLayer)
        for name in module.adapter_layer_names
        if task in getattr(module, name)
    }


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def an_adapted_layer(model: nn.Module) -> ShareLayer:
    return next(iter(share_layers(model).values()))


def on_device_of(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch on the model's device."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def logits(model: nn.Module, batch: Mapping[str, Tensor], **kwargs: Any) -> Tensor:
    """Return the logits, computed without gradients so that eval mode may cache folded factors."""
    with torch.no_grad():
        return model(input_ids=on_device_of(model, batch)["input_ids"], **kwargs).logits


def update_by_hand(layer: ShareLayer, task: str) -> Tensor:
    """Return (n, d) in float64 by the paper's formulas: ``(β ε_β)(α ε_α)^T``, ``(β_φ ε_β)(α_φ ε_α)^T`` or ``B A``."""
    sides = []
    for side in ("out", "in"):
        temporary = getattr(layer, f"share_temporary_{side}")
        coefficients = getattr(layer, f"share_coefficients_{side}")
        columns = temporary[task] if task in temporary else getattr(layer, f"share_basis_{side}")
        columns = columns.detach().double()
        sides.append(columns @ coefficients[task].detach().double() if task in coefficients else columns)
    return sides[0] @ sides[1].T


def with_updates_in_weights(base: PreTrainedModel, updates: Mapping[str, Tensor]) -> PreTrainedModel:
    """Return a copy of the base model with updates (n, d) added to its weights by module."""
    changed = copy.deepcopy(base)
    for name, update in updates.items():
        module = changed.get_submodule(name)
        transposed = isinstance(module, (Conv1D, nn.Embedding))
        update = update.T if transposed else update.reshape(module.weight.shape)
        module.weight.data = (module.weight.data.double() + update).to(module.weight.dtype)
    return changed


def learn(model: nn.Module, batch: Mapping[str, Tensor], steps: int = 5, learning_rate: float = 0.02) -> list[float]:
    """Train what is trainable, and return the loss before each step and after the last one."""
    model.train()
    batch = on_device_of(model, batch)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=learning_rate, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    losses.append(model(**batch).loss.item())
    model.eval()
    return losses


def gradients(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of the loss with respect to what is trainable, in train mode."""
    model.train()
    model.zero_grad()
    model(**on_device_of(model, batch)).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in trainable(model).items()}


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Assert equality up to rounding; `tolerance` is relative to the largest entry."""
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=0, atol=tolerance * max(1e-12, expected.abs().max().item())
    )


def assert_differ(found: Tensor, other: Tensor) -> None:
    """Assert a difference much larger than rounding, so that equality in other tests means something."""
    assert (found - other).abs().max() > 0.01 * other.abs().max()
