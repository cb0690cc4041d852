"""Fingerprints of the basis that the coefficients of a layer's tasks belong to; state dicts carry both together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, KeysView
from typing import Any

import torch
from torch import Tensor, nn


class Fingerprints(nn.Module):
    """
    The fingerprint (8,) uint8 of the basis, by task with coefficients in that basis.

    A layer has one basis, so the fingerprint is one tensor in memory. State dicts have a copy for each task, because
    safetensors refuses tensors that share memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tasks: dict[str, None] = {}
        self.of_basis = torch.zeros(8, dtype=torch.uint8)

    def mark(self, tasks: Iterable[str]) -> None:
        """Record that the coefficients of these tasks belong to the basis."""
        self._tasks.update(dict.fromkeys(tasks))

    def keys(self) -> KeysView[str]:
        return self._tasks.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, task: object) -> bool:
        return task in self._tasks

    def __getitem__(self, task: str) -> Tensor:
        if task not in self._tasks:
            raise KeyError(task)
        return self.of_basis.clone()

    def __delitem__(self, task: str) -> None:
        del self._tasks[task]

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_tasks", ()):
            return self[name]
        return super().__getattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Ignore what a loader of transformers sets as an attribute: it has been compared already."""
        if name not in self._tasks:
            super().register_parameter(name, param)

    def check(self, found: Tensor | None, name: str) -> None:
        """Refuse coefficients whose fingerprint, stored under this name, differs from that of the layer's basis.

        Raises:
            ValueError: If the fingerprint is missing or differs. Names it, with the value found and the one expected.
        """
        # Rounded because an average of equal fingerprints, such as an EMA of all tensors, equals them up to rounding.
        if found is not None and torch.equal(found.cpu().float().round(), self.of_basis.float()):
            return
        value = "missing" if found is None else found.tolist()
        raise ValueError(
            f"{name!r} is {value}, expected {self.of_basis.tolist()}: the coefficients belong to another basis than "
            "the model's, or do not say to which one. Load them with their basis, from their folder or repository, "
            "with PeftModel.from_pretrained, load_adapter or SharedSubspace.from_pretrained; add a task of another "
            "subspace as a LoRA, with SharedSubspace.export_lora there and add_adapters here"
        )

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        for task in self._tasks:
            destination[f"{prefix}{task}"] = self.of_basis.clone()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load nothing: the layer has compared the fingerprints already."""
        missing_keys.extend(name for task in self._tasks if (name := f"{prefix}{task}") not in state_dict)
        unexpected_keys.extend(
            name for name in state_dict if name.startswith(prefix) and name.removeprefix(prefix) not in self._tasks
        )
