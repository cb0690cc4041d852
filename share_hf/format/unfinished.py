"""Finished modules of an interrupted build: kept beside the build's folder until its tree is written.

`.<folder>.share_hf.unfinished` has one safetensors file per module, with a layer and the report of its merge. They
belong to exactly the inputs that `inputs.json` there names. Only a build of that folder reads them, and only if they
have the checksum that is in their names: if a machine went down while writing others, these are made again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers.utils import logging

from ..subspace import LayerMergeReport, LayerSubspace, TaskRecords
from .files import check_tensors, json_bytes, read_json, sha256_of


logger = logging.get_logger(__name__)

# Result of merging a module.
Merged = tuple[LayerSubspace, LayerMergeReport]

_INPUTS = "inputs.json"
_DIGITS = 32  # of a hash, because some file systems limit file names to short ones
_OF_LAYER = (
    *("basis_out", "basis_in", "coefficients_out", "coefficients_in"),
    *("spectrum_out", "spectrum_in"),
)
_OF_RECORDS = tuple(field.name for field in fields(TaskRecords))
_DAMAGED = (SafetensorError, OSError, ValueError, KeyError, TypeError)


class UnfinishedBuild:
    """Finished modules of an unfinished build. The caller must hold the folder.

    Args:
        folder: Folder for which the build is made.
        inputs: Everything on which its results depend, as JSON. Modules of a build with other inputs are removed.

    Attributes:
        is_other: Whether there were modules of another build.
    """

    def __init__(self, folder: Path, inputs: Mapping[str, Any]) -> None:
        real = Path(os.path.realpath(folder))
        self.place = real.with_name(f".{real.name}.share_hf.unfinished")
        self._inputs = json.loads(json.dumps(inputs))
        self._writes = True
        self.is_other = self.place.exists() and self._found_inputs() != self._inputs
        if self.is_other:
            self.remove()
        self._earlier = {path.name.partition(".")[0]: path for path in self.place.glob("*.safetensors")}

    def has(self, module: str) -> bool:
        """Return whether an earlier run finished a module."""
        return _hash(module) in self._earlier

    def read(self, module: str) -> Merged | None:
        """Read a module that an earlier run finished; None if its file is damaged."""
        path = self._earlier[_hash(module)]
        try:
            if path.name != _file_name(module, sha256_of(path)):
                return None
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["merge"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- no mapping
            check_tensors(path, tensors)
            return _merged(tensors, facts)
        except _DAMAGED:
            return None

    def write(self, module: str, merged: Merged) -> None:
        """Keep a finished module. If space runs out, no more are kept, because the build does not need them."""
        if not self._writes:
            return
        try:
            if not self.place.is_dir():
                self.place.mkdir(parents=True)
                (self.place / _INPUTS).write_bytes(json_bytes(self._inputs))
            tensors, facts = _taken_apart(*merged)
            content = save(tensors, {"merge": json.dumps(facts)})
            (self.place / _file_name(module, sha256(content).hexdigest())).write_bytes(content)
        except OSError as error:
            logger.warning(f"{self.place}: no more modules are kept for a later run ({error})")
            self._writes = False
            self.remove()

    def remove(self) -> None:
        """Remove all modules, because the tree is written or the inputs are refused."""
        shutil.rmtree(self.place, ignore_errors=True)

    def _found_inputs(self) -> dict[str, Any] | None:
        try:
            return read_json(self.place / _INPUTS)
        except (ValueError, OSError):
            return None


def _hash(module: str) -> str:
    """Return the name of a module's file, because names of modules may have any length."""
    return sha256(module.encode()).hexdigest()[:_DIGITS]


def _file_name(module: str, checksum: str) -> str:
    return f"{_hash(module)}.{checksum[:_DIGITS]}.safetensors"


def _taken_apart(layer: LayerSubspace, report: LayerMergeReport) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {name: getattr(layer, name).cpu() for name in _OF_LAYER}
    tensors |= {name: getattr(layer.records, name).cpu() for name in _OF_RECORDS}
    for name, by_task in (("drift", report.drift), ("drift_bound", report.drift_bound)):
        tensors[name] = torch.tensor([by_task[task] for task in layer.tasks], dtype=torch.float64)
    facts = {
        "tasks": layer.tasks,
        "new_tasks": report.new_tasks,
        "explained_by_basis": layer.explained_by_basis,
        "basis_changed": report.basis_changed,
    }
    # No file can hold tensors that share memory, as the records of undrifted tasks do.
    return {name: tensor.clone() for name, tensor in tensors.items()}, facts


def _merged(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Merged:
    tasks = tuple(facts["tasks"])
    layer = LayerSubspace(
        tasks=tasks,
        records=TaskRecords(**{name: tensors[name] for name in _OF_RECORDS}),
        explained_by_basis=facts["explained_by_basis"],
        **{name: tensors[name] for name in _OF_LAYER},
    )
    report = LayerMergeReport(
        new_tasks=tuple(facts["new_tasks"]),
        drift=dict(zip(tasks, tensors["drift"].tolist(), strict=True)),
        drift_bound=dict(zip(tasks, tensors["drift_bound"].tolist(), strict=True)),
        num_components=layer.num_components,
        basis_changed=facts["basis_changed"],
    )
    return layer, report
